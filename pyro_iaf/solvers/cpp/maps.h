// The univariate maps that flows apply to each coordinate, with their derivatives; the same as in
// pyro_iaf/nn/univariate.py, where the formulas are explained.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

// A map at one coordinate, and its derivatives in the coordinate and the two parameters.
template <typename T>
struct Point {
  T y, log_slope, by_x, by_shift, by_scale, log_slope_by_scale;
};

enum class Map : int64_t { affine, gated };

template <typename T>
static Point<T> apply(Map map, T bias, T x, T shift, T log_scale) {
  const T tanh = std::tanh(log_scale / 10), bounded = 10 * tanh, slope = 1 - tanh * tanh;
  if (map == Map::affine) {
    const T scale = std::exp(bounded);
    return {shift + scale * x, bounded, scale, 1, scale * x * slope, slope};
  }
  const T gate = bounded + bias, power = std::exp(-std::abs(gate));
  const T larger = 1 / (1 + power), smaller = power / (1 + power);
  const T open = gate > 0 ? larger : smaller, shut = gate > 0 ? smaller : larger;
  const T log_open = std::min(gate, T(0)) - std::log1p(power);
  return {shut * shift + open * x, log_open, open, shut, open * shut * slope * (x - shift),
          shut * slope};
}
