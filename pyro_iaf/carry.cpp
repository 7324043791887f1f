// Carries the score of a density through an autoregressive map, particle by particle.
//
// From J' u = v, where v is the score of the noise less the slope of the map's log-determinant, the
// coordinates of u are found one after the other, the last first. What has been found is pushed
// back through the network at once: a unit of degree d hears from coordinates after position d
// alone, so it is complete when those are known. All in all one backward pass.

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

template <typename T>
static void add_row(T* to, const T* row, T factor, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) to[c] += row[c] * factor;
}

template <typename T>
static void add_rows(T* to, const T* row, T factor, const T* other, T factor_of_other,
                     int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) to[c] += row[c] * factor + other[c] * factor_of_other;
}

// The particles from k0 to k1. `weights` are those of the L hidden layers and of the outputs, which
// read the last hidden layer and then the coordinates; `starts[l * (D + 1) + d]` is the first unit
// of degree d in hidden layer l; the coordinates at the first d positions lie from `lowest[d]` to
// before `highest[d]`.
template <typename T>
static void carry(int64_t k0, int64_t k1, int64_t D, int64_t L, const int64_t* widths,
                  const T* score, const T* scale, const T* by_m, const T* by_s, const T* slope,
                  const T* const* bends, const T* const* weights, const int64_t* order,
                  const int64_t* starts, T* u) {
  const int64_t K = k1 - k0, H = widths[L - 1];
  std::vector<int64_t> lowest(D + 1, D), highest(D + 1, 0);
  for (int64_t p = 0; p < D; ++p) {
    lowest[p + 1] = std::min(lowest[p], order[p]);
    highest[p + 1] = std::max(highest[p], order[p] + 1);
  }
  std::vector<std::vector<T>> gradients;  // in the coordinates, and in each hidden layer
  gradients.emplace_back(K * D, T(0));
  for (int64_t l = 0; l < L; ++l) gradients.emplace_back(K * widths[l], T(0));
  const T* output = weights[L];
  for (int64_t p = D - 1; p >= 0; --p) {
    const int64_t d = p + 1;
    for (int64_t l = L - 1; d < D && l >= 0; --l) {
      const int64_t width = l ? widths[l - 1] : D;
      const int64_t first = l ? 0 : lowest[d];
      const int64_t last = l ? starts[(l - 1) * (D + 1) + d + 1] : highest[d];
      for (int64_t h = starts[l * (D + 1) + d]; h < starts[l * (D + 1) + d + 1]; ++h) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = k * widths[l] + h;
          const T g = gradients[l + 1][at] * bends[l][k0 * widths[l] + at];
          add_row(&gradients[l][k * width], weights[l] + h * width, g, first, last);
        }
      }
    }
    const int64_t i = order[p], last = starts[(L - 1) * (D + 1) + p + 1];
    const T* of_m = output + i * (H + D);
    const T* of_s = output + (D + i) * (H + D);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = (k0 + k) * D + i;
      T* in_x = &gradients[0][k * D];
      const T found = (score[at] - in_x[i]) / scale[at];
      u[at] = found;
      const T m = by_m[at] * found, s = by_s[at] * found + slope[at];
      add_rows(&gradients[L][k * H], of_m, m, of_s, s, 0, last);
      add_rows(in_x, of_m + H, m, of_s + H, s, lowest[p], highest[p]);
    }
  }
}

// All particles through all flows. Of each flow there are 2 L + 7 tensors: scale, by_m, by_s, slope,
// the bends, the weights, the order, and the starts.
template <typename T>
static void carry_all(int64_t K, int64_t num_threads, int64_t num_flows, int64_t D, int64_t L,
                      const int64_t* widths, const void** tensors, const T* score, T* u) {
  const int64_t size = (K + num_threads - 1) / num_threads;
  auto part = [&](int64_t k0) {
    for (int64_t f = 0; f < num_flows; ++f) {
      const void** own = tensors + f * (2 * L + 7);
      const T* const* t = reinterpret_cast<const T* const*>(own);
      carry(k0, std::min(k0 + size, K), D, L, widths + f * L, f ? u : score, t[0], t[1], t[2],
            t[3], t + 4, t + 4 + L, static_cast<const int64_t*>(own[2 * L + 5]),
            static_cast<const int64_t*>(own[2 * L + 6]), u);
    }
  };
  std::vector<std::thread> others;
  for (int64_t k0 = size; k0 < K; k0 += size) others.emplace_back(part, k0);
  if (K > 0) part(0);
  for (auto& thread : others) thread.join();
}

extern "C" void carry_float(int64_t K, int64_t num_threads, int64_t num_flows, int64_t D, int64_t L,
                            const int64_t* widths, const void** tensors, const float* score,
                            float* u) {
  carry_all(K, num_threads, num_flows, D, L, widths, tensors, score, u);
}

extern "C" void carry_double(int64_t K, int64_t num_threads, int64_t num_flows, int64_t D,
                             int64_t L, const int64_t* widths, const void** tensors,
                             const double* score, double* u) {
  carry_all(K, num_threads, num_flows, D, L, widths, tensors, score, u);
}
