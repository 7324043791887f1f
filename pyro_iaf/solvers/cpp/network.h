// One pass of a masked network with ELU activations, and its gradient, for rows of inputs.
//
// All matrices of the network lie one after the other in one vector: for each hidden layer units by
// inputs, then the outputs by the last hidden layer and the network's input, then the offsets of
// all units. The weights are masked as a whole.

#pragma once

#include <cstring>
#include <vector>

#include "algebra.h"

// The sizes of a network and the places of its matrices.
struct Layers {
  int64_t D, num_outputs;
  std::vector<int64_t> widths;     // of the hidden layers
  std::vector<int64_t> places;     // of their matrices, of the output's, and of the offsets
  Layers(int64_t D, int64_t num_params, std::vector<int64_t> hidden)
      : D(D), num_outputs(num_params * D), widths(std::move(hidden)) {
    int64_t place = 0;
    for (size_t l = 0; l < widths.size(); ++l) {
      places.push_back(place);
      place += widths[l] * inputs(l);
    }
    places.push_back(place);
    places.push_back(place + num_outputs * (widths.back() + D));
  }
  size_t depth() const { return widths.size(); }
  int64_t inputs(size_t l) const { return l ? widths[l - 1] : D; }
  int64_t output_stride() const { return widths.back() + D; }
};

template <typename T>
static void forward(const Layers& net, int64_t K, const T* x, const T* masked, T* out,
                    const std::vector<T*>& units, const std::vector<T*>& slopes) {
  const T* offsets = masked + net.places.back();
  auto begin = [&](T* to, int64_t width) {
    for (int64_t k = 0; k < K; ++k) std::memcpy(to + k * width, offsets, width * sizeof(T));
    offsets += width;
  };
  const T* h = x;
  for (size_t l = 0; l < net.depth(); ++l) {
    const int64_t width = net.widths[l], num_inputs = net.inputs(l);
    T *u = units[l], *s = slopes[l];
    begin(u, width);
    const Matrix<T> weight{masked + net.places[l], num_inputs};
    multiply<T>(K, width, num_inputs, {h, num_inputs}, weight.t(), 1, u, width);
    for (int64_t j = 0; j < K * width; ++j) {
      const T z = u[j], e = exponential(z > 0 ? T(0) : z);
      u[j] = z > 0 ? z : e - 1;
      s[j] = z > 0 ? T(1) : e;
    }
    h = u;
  }
  const int64_t P = net.num_outputs, H = net.widths.back(), stride = net.output_stride();
  const T* output = masked + net.places[net.depth()];
  begin(out, P);
  multiply<T>(K, P, H, {h, H}, Matrix<T>{output, stride}.t(), 1, out, P);
  multiply<T>(K, P, net.D, {x, net.D}, Matrix<T>{output + H, stride}.t(), 1, out, P);
}

// From the slope in the outputs, that in the weights and, unless it is null, that in x, which is
// added to beta times what is there.
template <typename T>
static void backward(const Layers& net, int64_t K, const T* slope, const T* x, const T* masked,
                     const T* mask, int64_t num_weights, const std::vector<const T*>& units,
                     const std::vector<const T*>& slopes, T* of_x, T beta, T* of_weights) {
  const int64_t P = net.num_outputs, H = net.widths.back(), stride = net.output_stride();
  const T* output = masked + net.places[net.depth()];
  T* of_output = of_weights + net.places[net.depth()];
  const Matrix<T> rows{slope, P};
  multiply<T>(P, H, K, rows.t(), {units.back(), H}, 0, of_output, stride);
  multiply<T>(P, net.D, K, rows.t(), {x, net.D}, 0, of_output + H, stride);
  if (of_x) multiply<T>(K, net.D, P, rows, {output + H, stride}, beta, of_x, net.D);
  T* of_offsets = of_weights + num_weights - P;
  sum_rows(K, P, slope, of_offsets);
  std::vector<T> above(K * H), below;
  multiply<T>(K, H, P, rows, {output, stride}, 0, above.data(), H);
  for (size_t l = net.depth(); l-- > 0;) {
    const int64_t width = net.widths[l], num_inputs = net.inputs(l);
    for (int64_t j = 0; j < K * width; ++j) above[j] *= slopes[l][j];
    const Matrix<T> grad{above.data(), width}, weight{masked + net.places[l], num_inputs};
    const T* h = l ? units[l - 1] : x;
    multiply<T>(width, num_inputs, K, grad.t(), {h, num_inputs}, 0, of_weights + net.places[l],
                num_inputs);
    of_offsets -= width;
    sum_rows(K, width, above.data(), of_offsets);
    if (l) {
      below.assign(K * num_inputs, 0);
      multiply<T>(K, num_inputs, width, grad, weight, 0, below.data(), num_inputs);
      above.swap(below);
    } else if (of_x) {
      multiply<T>(K, num_inputs, width, grad, weight, 1, of_x, num_inputs);
    }
  }
  for (int64_t j = 0; j < num_weights; ++j) of_weights[j] *= mask[j];
}
