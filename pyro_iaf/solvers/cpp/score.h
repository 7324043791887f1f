// Carries the score of a density through an autoregressive map, particle by particle.
//
// J' u = v is solved for the coordinates of u one after the other, the last first. Here v is the
// score of the noise minus the gradient of the map's log-determinant. Each coordinate is propagated
// back through the network at once. The gradient in a unit of degree d depends only on coordinates
// after position d, so it is complete when these are solved. The arithmetic is that of one backward
// pass.

#pragma once

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

// The particles from k0 up to k1. `slopes` are the map's derivatives: of the value with respect to
// the coordinate and the P parameters, then of the log slope with respect to these, null where they
// are zero. `weights` are those of the L hidden layers and of the outputs, which read the last
// hidden layer and then the coordinates. `starts[l * (D + 1) + d]` is the first unit of degree d in
// hidden layer l. The coordinates at the first d positions lie from `lowest[d]` up to `highest[d]`.
template <typename T>
static void carry(int64_t k0, int64_t k1, int64_t D, int64_t L, int64_t P, const int64_t* widths,
                  const T* score, const T* const* slopes, const T* const* activation_slopes,
                  const T* const* weights, const int64_t* order, const int64_t* starts, T* u) {
  const int64_t K = k1 - k0, H = widths[L - 1];
  const T* const* by_params = slopes + 1;
  const T* const* log_slopes = slopes + 1 + P;  // in the coordinate, and in the parameters
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
          const T g = gradients[l + 1][at] * activation_slopes[l][k0 * widths[l] + at];
          add_row(&gradients[l][k * width], weights[l] + h * width, g, first, last);
        }
      }
    }
    const int64_t i = order[p], last = starts[(L - 1) * (D + 1) + p + 1];
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = (k0 + k) * D + i;
      T* in_units = &gradients[L][k * H];
      T* in_x = &gradients[0][k * D];
      const T own = log_slopes[0] ? score[at] - log_slopes[0][at] : score[at];
      const T found = (own - in_x[i]) / slopes[0][at];
      u[at] = found;
      auto in_param = [&](int64_t j) {
        const T by_value = by_params[j][at] * found;
        return log_slopes[1 + j] ? by_value + log_slopes[1 + j][at] : by_value;
      };
      int64_t j = 0;
      for (; j + 1 < P; j += 2) {
        const T* row = output + (j * D + i) * (H + D);
        const T* other = row + D * (H + D);
        const T a = in_param(j), b = in_param(j + 1);
        add_rows(in_units, row, a, other, b, 0, last);
        add_rows(in_x, row + H, a, other + H, b, lowest[p], highest[p]);
      }
      if (j < P) {
        const T* row = output + (j * D + i) * (H + D);
        const T a = in_param(j);
        add_row(in_units, row, a, 0, last);
        add_row(in_x, row + H, a, lowest[p], highest[p]);
      }
    }
  }
}

// All particles through all flows. `tensors` holds slopes, activation slopes, weights, order and
// starts of each flow. Bit k of `given` says whether the k-th derivative of the log slope is there.
template <typename T>
static void carry_all(int64_t K, int64_t num_threads, int64_t num_flows, int64_t D, int64_t L,
                      int64_t P, int64_t given, const int64_t* widths, const void** tensors,
                      const T* score, T* u) {
  const int64_t size = (K + num_threads - 1) / num_threads;
  auto part = [&](int64_t k0) {
    const void** next = tensors;
    for (int64_t f = 0; f < num_flows; ++f) {
      std::vector<const T*> slopes;
      for (int64_t k = 0; k < 2 * P + 2; ++k) {
        const bool is_there = k <= P || (given >> (k - P - 1) & 1);
        slopes.push_back(is_there ? static_cast<const T*>(*next++) : nullptr);
      }
      const T* const* t = reinterpret_cast<const T* const*>(next);
      next += 2 * L + 3;
      carry(k0, std::min(k0 + size, K), D, L, P, widths + f * L, f ? u : score, slopes.data(), t,
            t + L, static_cast<const int64_t*>(next[-2]), static_cast<const int64_t*>(next[-1]), u);
    }
  };
  std::vector<std::thread> others;
  for (int64_t k0 = size; k0 < K; k0 += size) others.emplace_back(part, k0);
  if (K > 0) part(0);
  for (auto& thread : others) thread.join();
}
