// The inverse of an autoregressive map, one coordinate after the other.
//
// A unit of degree d depends on the coordinates at the first d positions alone. So when these are
// known, the units of degree d follow, then the parameters of the next coordinate, then itself. The
// arithmetic is that of one pass. Rows are the innermost loop.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "maps.h"
#include "network.h"

// So many rows at once, whose units stay in the cache.
constexpr int64_t CHUNK = 16;

// to[k] += factor * from[k]
template <typename T>
static inline void add_rows_of(T* to, T factor, const T* from) {
  for (int64_t k = 0; k < CHUNK; ++k) to[k] += factor * from[k];
}

// The rows from k0 up to k1, at most CHUNK of them. `order` and `starts` are as in score.h.
template <typename T>
static void invert_chunk(const Layers& net, Map map, T bias, int64_t k0, int64_t k1, const T* y,
                         const T* masked, const int64_t* order, const int64_t* starts, T* x) {
  const int64_t D = net.D, L = net.depth(), H = net.widths.back(), stride = net.output_stride();
  const T* output = masked + net.places[L];
  std::vector<std::vector<T>> units;
  std::vector<const T*> offsets{masked + net.places.back()};  // of each layer, then of the outputs
  for (int64_t width : net.widths) {
    units.emplace_back(width * CHUNK);
    offsets.push_back(offsets.back() + width);
  }
  std::vector<T> known(D * CHUNK);  // by position
  for (int64_t p = 0; p < D; ++p) {
    for (int64_t l = 0; l < L; ++l) {
      const int64_t* first = starts + l * (D + 1) + p;
      for (int64_t j = first[0]; j < first[1]; ++j) {
        T* unit = units[l].data() + j * CHUNK;
        const T* row = masked + net.places[l] + j * net.inputs(l);
        std::fill_n(unit, CHUNK, offsets[l][j]);
        if (l == 0) {
          for (int64_t q = 0; q < p; ++q) add_rows_of(unit, row[order[q]], &known[q * CHUNK]);
        } else {
          const int64_t count = starts[(l - 1) * (D + 1) + p + 1];
          for (int64_t u = 0; u < count; ++u) add_rows_of(unit, row[u], &units[l - 1][u * CHUNK]);
        }
        for (int64_t k = 0; k < CHUNK; ++k) {
          const T z = unit[k], e = exponential(z > 0 ? T(0) : z);
          unit[k] = z > 0 ? z : e - 1;
        }
      }
    }
    const int64_t i = order[p], count = starts[(L - 1) * (D + 1) + p + 1];
    T params[2][CHUNK];
    for (int64_t which = 0; which < 2; ++which) {
      const int64_t at = which * D + i;
      const T* row = output + at * stride;
      std::fill_n(params[which], CHUNK, offsets[L][at]);
      for (int64_t u = 0; u < count; ++u) add_rows_of(params[which], row[u], &units[L - 1][u * CHUNK]);
      for (int64_t q = 0; q < p; ++q) add_rows_of(params[which], row[H + order[q]], &known[q * CHUNK]);
    }
    for (int64_t k = k0; k < k1; ++k) {
      const Point<T> zero = apply<T>(map, bias, T(0), params[0][k - k0], params[1][k - k0]);
      x[k * D + i] = (y[k * D + i] - zero.y) / zero.by_x;
      known[p * CHUNK + k - k0] = x[k * D + i];
    }
  }
}

// All K rows.
template <typename T>
static void invert_all(const Layers& net, Map map, T bias, int64_t K, const T* y, const T* masked,
                       const int64_t* order, const int64_t* starts, T* x) {
  for (int64_t k0 = 0; k0 < K; k0 += CHUNK) {
    invert_chunk<T>(net, map, bias, k0, std::min(k0 + CHUNK, K), y, masked, order, starts, x);
  }
}
