// Products and triangular systems of small matrices, and an exponential for loops.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// PyTorch's own BLAS, where its library shows it; column by column.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const float*, const float*, const int*, const float*, const int*,
                                  const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const double*, const double*, const int*, const double*,
                                  const int*, const double*, double*, const int*);
__attribute__((weak)) void strsm_(const char*, const char*, const char*, const char*, const int*,
                                  const int*, const float*, const float*, const int*, float*,
                                  const int*);
__attribute__((weak)) void dtrsm_(const char*, const char*, const char*, const char*, const int*,
                                  const int*, const double*, const double*, const int*, double*,
                                  const int*);
}

static bool blas(char ta, char tb, int m, int n, int k, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
  const float one = 1;
  if (sgemm_) sgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
  return sgemm_;
}

static bool blas(char ta, char tb, int m, int n, int k, const double* a, int lda, const double* b,
                 int ldb, double beta, double* c, int ldc) {
  const double one = 1;
  if (dgemm_) dgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
  return dgemm_;
}

// A matrix with its numbers row by row, of which one row begins `stride` after the one before, or
// its transpose.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
  bool transposed = false;
  Matrix t() const { return {data, stride, !transposed}; }
  T at(int64_t r, int64_t c) const {
    return transposed ? data[c * stride + r] : data[r * stride + c];
  }
};

// c = a b + beta c, where c has m rows and n columns, and a has k columns.
template <typename T>
static void multiply(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, T beta, T* c,
                     int64_t stride) {
  // Column by column these are the transposes.
  const char ta = a.transposed ? 'T' : 'N', tb = b.transposed ? 'T' : 'N';
  if (blas(tb, ta, n, m, k, b.data, b.stride, a.data, a.stride, beta, c, stride)) return;
  for (int64_t r = 0; r < m; ++r) {
    T* row = c + r * stride;
    for (int64_t j = 0; j < n; ++j) row[j] = beta == 0 ? T(0) : row[j] * beta;
    for (int64_t i = 0; i < k; ++i) {
      const T factor = a.at(r, i);
      for (int64_t j = 0; j < n; ++j) row[j] += factor * b.at(i, j);
    }
  }
}

template <typename T>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  static constexpr int shift = 23, terms = 7;
  static constexpr float lowest = -87, round = 12582912, high = 0.693359375f,
                         low = -2.12194440e-4f;
};
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr int shift = 52, terms = 13;
  static constexpr double lowest = -708, round = 6755399441055744,
                          high = 0.693145751953125, low = 1.42860682030941723212e-6;
};

// e^x for x <= 0, without branches, so that a loop over it takes several numbers at once. It is
// 2^n e^r with an integer n and |r| <= log(2) / 2, where the power series is short.
template <typename T>
static inline T exponential(T x) {
  using E = Exponent<T>;
  x = x < E::lowest ? E::lowest : x;
  const T shifted = x * T(1.44269504088896340736) + E::round;  // its last bits hold n
  const T n = shifted - E::round;
  const T r = (x - n * E::high) - n * E::low;
  T sum = 1;
  for (int k = E::terms; k > 0; --k) sum = 1 + sum * r * (T(1) / T(k));
  typename E::Bits bits, power;
  std::memcpy(&bits, &sum, sizeof(T));
  std::memcpy(&power, &shifted, sizeof(T));
  bits += power << E::shift;
  std::memcpy(&sum, &bits, sizeof(T));
  return sum;
}

static bool blas_solve(char trans, int n, int k, const float* a, int lda, float* rows, int ldb) {
  const float one = 1;
  if (strsm_) strsm_("L", "U", &trans, "N", &n, &k, &one, a, &lda, rows, &ldb);
  return strsm_;
}

static bool blas_solve(char trans, int n, int k, const double* a, int lda, double* rows, int ldb) {
  const double one = 1;
  if (dtrsm_) dtrsm_("L", "U", &trans, "N", &n, &k, &one, a, &lda, rows, &ldb);
  return dtrsm_;
}

// Replaces each of K rows r of length n by the x with x a = r, for a lower-triangular matrix a.
template <typename T>
static void solve_lower(int64_t K, int64_t n, const T* a, int64_t stride, T* rows) {
  // Column by column, a is an upper triangle, and the rows are columns.
  if (blas_solve('N', n, K, a, stride, rows, n)) return;
  for (int64_t k = 0; k < K; ++k) {
    T* row = rows + k * n;
    for (int64_t j = n; j-- > 0;) {
      row[j] /= a[j * stride + j];
      for (int64_t i = 0; i < j; ++i) row[i] -= row[j] * a[j * stride + i];
    }
  }
}

// to[j] = the sum over K rows of their j-th number.
template <typename T>
static void sum_rows(int64_t K, int64_t width, const T* rows, T* to) {
  for (int64_t j = 0; j < width; ++j) to[j] = 0;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t j = 0; j < width; ++j) to[j] += rows[k * width + j];
  }
}
