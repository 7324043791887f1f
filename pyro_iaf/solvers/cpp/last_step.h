// The last step of a guide, z = c + R (mu + S sinh(e^t asinh(x) + a)), and the score through it;
// the same as in pyro_iaf/flows/sinh_arcsinh.py, where the formulas are explained.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "algebra.h"

// The rows of `coefficients` are mu, the logarithm of the diagonal of S, a and t, and then what is
// below that diagonal, times sqrt(D). The rows of `frame` are c, and R or its diagonal.
template <typename T>
struct LastStep {
  int64_t K, D;
  bool dense, dense_frame;
  const T *coefficients, *frame;
  std::vector<T> learned;  // the matrix S, or its diagonal
  std::vector<T> tail;     // e^t

  LastStep(int64_t K, int64_t D, bool dense, bool dense_frame, const T* coefficients,
           const T* frame)
      : K(K), D(D), dense(dense), dense_frame(dense_frame), coefficients(coefficients),
        frame(frame), learned(dense ? D * D : D, T(0)), tail(D) {
    const T factor = 1 / std::sqrt(T(D));
    for (int64_t i = 0; i < D; ++i) {
      tail[i] = std::exp(row(3)[i]);
      learned[diagonal(i, dense)] = std::exp(row(1)[i]);
      for (int64_t j = 0; dense && j < i; ++j) learned[i * D + j] = row(4 + i)[j] * factor;
    }
  }

  const T* row(int64_t k) const { return coefficients + k * D; }
  const T* scale() const { return frame + D; }
  int64_t diagonal(int64_t i, bool is_dense) const { return is_dense ? i * D + i : i; }

  // rows S', rows S or, with `solve`, rows S^-1; the same for the frame.
  void times(const T* matrix, bool is_dense, bool transposed, const T* rows, T* to, T beta) const {
    if (is_dense) {
      const Matrix<T> m{matrix, D};
      multiply<T>(K, D, D, {rows, D}, transposed ? m.t() : m, beta, to, D);
      return;
    }
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < D; ++i) {
        const int64_t at = k * D + i;
        to[at] = rows[at] * matrix[i] + (beta == 0 ? T(0) : beta * to[at]);
      }
    }
  }

  void solve(const T* matrix, bool is_dense, T* rows) const {
    if (is_dense) return solve_lower(K, D, matrix, D, rows);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < D; ++i) rows[k * D + i] /= matrix[i];
    }
  }

  void fill(const T* one_row, T* rows) const {
    for (int64_t k = 0; k < K; ++k) std::copy_n(one_row, D, rows + k * D);
  }

  void forward(const T* x, const T* log_q, const T* score, T* y, T* log_q_y, T* score_y,
               T* bent) const {
    std::vector<T> log_slope(D), v(K * D);
    for (int64_t i = 0; i < D; ++i) {
      log_slope[i] = row(1)[i] + row(3)[i] + std::log(scale()[diagonal(i, dense_frame)]);
    }
    for (int64_t k = 0; k < K; ++k) {
      T log_det = 0;
      for (int64_t i = 0; i < D; ++i) {
        const int64_t at = k * D + i;
        const T wide = 1 + x[at] * x[at], root = std::sqrt(wide);
        bent[at] = std::sinh(tail[i] * std::asinh(x[at]) + row(2)[i]);
        const T square = 1 + bent[at] * bent[at], slope = tail[i] * std::sqrt(square) / root;
        log_det += log_slope[i] + (std::log(square) - std::log(wide)) / 2;
        const T of_log_det = bent[at] * tail[i] / (std::sqrt(square) * root) - x[at] / wide;
        score_y[at] = (score[at] - of_log_det) / slope;
      }
      log_q_y[k] = log_q[k] - log_det;
    }
    fill(row(0), v.data());
    times(learned.data(), dense, true, bent, v.data(), 1);
    fill(frame, y);
    times(scale(), dense_frame, true, v.data(), y, 1);
    solve(learned.data(), dense, score_y);
    solve(scale(), dense_frame, score_y);
  }

  void backward(const T* slope, const T* x, const T* bent, T* of_x, T* of_coefficients) const {
    std::vector<T> of_v(K * D), of_bent(K * D), by_row(K * D), sums(D);
    times(scale(), dense_frame, false, slope, of_v.data(), 0);
    times(learned.data(), dense, false, of_v.data(), of_bent.data(), 0);
    sum_rows(K, D, of_v.data(), of_coefficients);
    for (int64_t at = 0; at < K * D; ++at) by_row[at] = of_v[at] * bent[at];
    sum_rows(K, D, by_row.data(), sums.data());
    for (int64_t i = 0; i < D; ++i) of_coefficients[D + i] = sums[i] * learned[diagonal(i, dense)];
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < D; ++i) {
        const int64_t at = k * D + i;
        const T of_sum = of_bent[at] * std::sqrt(1 + bent[at] * bent[at]);
        of_bent[at] = of_sum;
        by_row[at] = of_sum * tail[i] * std::asinh(x[at]);
        of_x[at] = of_sum * tail[i] / std::sqrt(1 + x[at] * x[at]);
      }
    }
    sum_rows(K, D, of_bent.data(), of_coefficients + 2 * D);
    sum_rows(K, D, by_row.data(), of_coefficients + 3 * D);
    if (!dense) return;
    T* below = of_coefficients + 4 * D;
    multiply<T>(D, D, K, Matrix<T>{of_v.data(), D}.t(), {bent, D}, 0, below, D);
    const T factor = 1 / std::sqrt(T(D));
    for (int64_t i = 0; i < D; ++i) {
      for (int64_t j = 0; j < D; ++j) below[i * D + j] = j < i ? below[i * D + j] * factor : T(0);
    }
  }
};
