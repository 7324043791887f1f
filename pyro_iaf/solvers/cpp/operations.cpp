// The operations of pyro_iaf, as PyTorch calls them: arguments and results lie on a stack. The
// operation owns the tensors among its arguments.

#include <algorithm>
#include <vector>

#include "last_step.h"
#include "maps.h"
#include "network.h"
#include "score.h"
#include "tensors.h"

using Tensors = std::vector<Owned>;

static Tensors take(const uint64_t* stack, int64_t count) {
  Tensors taken;
  for (int64_t k = 0; k < count; ++k) taken.push_back(in_rows(Owned(stack[k])));
  return taken;
}

static void give(Tensors& results, uint64_t* stack) {
  for (Owned& result : results) *stack++ = result.give();
}

// The data of every `step`-th tensor.
template <typename T>
static std::vector<T*> data_of_each(const Tensors& tensors, size_t first, size_t step) {
  std::vector<T*> found;
  for (size_t k = first; k < tensors.size(); k += step) found.push_back(tensors[k].data<T>());
  return found;
}

template <typename T>
static std::vector<const T*> constant(const std::vector<T*>& pointers) {
  return {pointers.begin(), pointers.end()};
}

// Adds tensors for units and slopes of each hidden layer.
static void add_layers(Tensors& results, const Layers& net, int64_t K, int32_t dtype) {
  for (int64_t width : net.widths) {
    results.push_back(new_tensor({K, width}, dtype));
    results.push_back(new_tensor({K, width}, dtype));
  }
}

template <typename T>
static T* mask_weights(const Owned& weights, const Owned& mask, const Owned& masked) {
  const T *w = weights.data<T>(), *m = mask.data<T>();
  T* product = masked.data<T>();
  for (int64_t j = 0, count = numel_of(mask.tensor); j < count; ++j) product[j] = w[j] * m[j];
  return product;
}

// From x, weights, mask, the number of parameters, and the widths of the hidden layers: outputs,
// masked weights, and units and slopes of each hidden layer.
static void network(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, 3);
  const int64_t K = sizes_of(given[0].tensor)[0], D = sizes_of(given[0].tensor)[1];
  const Layers net(D, stack[3], {stack + 4, stack + num_arguments});
  const int32_t dtype = dtype_of(given[0].tensor);
  Tensors results;
  results.push_back(new_tensor({K, net.num_outputs}, dtype));
  results.push_back(new_tensor({numel_of(given[2].tensor)}, dtype));
  add_layers(results, net, K, dtype);
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* masked = mask_weights<T>(given[1], given[2], results[1]);
    forward<T>(net, K, given[0].data<T>(), masked, results[0].data<T>(),
               data_of_each<T>(results, 2, 2), data_of_each<T>(results, 3, 2));
  });
  give(results, stack);
}

// From the slope in the outputs, x, masked weights, mask, units and slopes of each layer, the number
// of parameters, and whether x has a slope: those of x, empty if it has none, and of the weights.
static void network_backward(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, num_arguments - 2);
  const Handle x = given[1].tensor;
  const int64_t K = sizes_of(x)[0], D = sizes_of(x)[1], W = numel_of(given[3].tensor);
  const bool has_slope = stack[num_arguments - 1];
  std::vector<int64_t> widths;
  for (size_t k = 4; k < given.size(); k += 2) widths.push_back(sizes_of(given[k].tensor)[1]);
  const Layers net(D, stack[num_arguments - 2], widths);
  const int32_t dtype = dtype_of(x);
  Tensors results;
  results.push_back(new_tensor({has_slope ? K : 0, D}, dtype));
  results.push_back(new_tensor({W}, dtype));
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(net, K, given[0].data<T>(), given[1].data<T>(), given[2].data<T>(),
                given[3].data<T>(), W, constant(data_of_each<T>(given, 4, 2)),
                constant(data_of_each<T>(given, 5, 2)),
                has_slope ? results[0].data<T>() : nullptr, T(0), results[1].data<T>());
  });
  give(results, stack);
}

// From x, its log density and score, weights, mask, order and starts (see score.h), the map, the
// bits of its bias as a double, the number of threads, and the widths of the hidden layers: y, its
// log density and score, masked weights, derivatives of y in x and the parameters, and units and
// slopes of each hidden layer.
static void flow(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, 7);
  const Map map = static_cast<Map>(stack[7]);
  double bias;
  std::memcpy(&bias, &stack[8], sizeof bias);
  const int64_t num_threads = stack[9];
  const int64_t K = sizes_of(given[0].tensor)[0], D = sizes_of(given[0].tensor)[1];
  const Layers net(D, 2, {stack + 10, stack + num_arguments});
  const int32_t dtype = dtype_of(given[0].tensor);
  Tensors results;
  results.push_back(new_tensor({K, D}, dtype));
  results.push_back(new_tensor({K}, dtype));
  results.push_back(new_tensor({K, D}, dtype));
  results.push_back(new_tensor({numel_of(given[4].tensor)}, dtype));
  results.push_back(new_tensor({3 * K, D}, dtype));
  add_layers(results, net, K, dtype);
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = given[0].data<T>(), *log_q = given[1].data<T>();
    const T* masked = mask_weights<T>(given[3], given[4], results[3]);
    const auto units = data_of_each<T>(results, 5, 2), slopes = data_of_each<T>(results, 6, 2);
    std::vector<T> params(2 * K * D), log_slope_by_scale(K * D);
    forward<T>(net, K, x, masked, params.data(), units, slopes);
    T *y = results[0].data<T>(), *log_q_y = results[1].data<T>();
    T *by_x = results[4].data<T>(), *by_shift = by_x + K * D, *by_scale = by_shift + K * D;
    for (int64_t k = 0; k < K; ++k) {
      T log_det = 0;
      for (int64_t i = 0; i < D; ++i) {
        const int64_t at = k * D + i;
        const T* own = params.data() + 2 * k * D + i;
        const Point<T> point = apply<T>(map, bias, x[at], own[0], own[D]);
        y[at] = point.y;
        log_det += point.log_slope;
        by_x[at] = point.by_x;
        by_shift[at] = point.by_shift;
        by_scale[at] = point.by_scale;
        log_slope_by_scale[at] = point.log_slope_by_scale;
      }
      log_q_y[k] = log_q[k] - log_det;
    }
    std::vector<const void*> tensors{by_x, by_shift, by_scale, log_slope_by_scale.data()};
    for (const T* slope : slopes) tensors.push_back(slope);
    for (size_t l = 0; l <= net.depth(); ++l) tensors.push_back(masked + net.places[l]);
    tensors.push_back(given[5].data<int64_t>());
    tensors.push_back(given[6].data<int64_t>());
    const int64_t only_by_scale = 1 << 2;
    carry_all(K, num_threads, 1, D, net.depth(), 2, only_by_scale, net.widths.data(),
              tensors.data(), given[2].data<T>(), results[2].data<T>());
  });
  give(results, stack);
}

// From the slope in y, x, mask, masked weights, the derivatives, and units and slopes of each hidden
// layer: the slopes in x and in the weights.
static void flow_backward(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, num_arguments);
  const Handle x = given[1].tensor;
  const int64_t K = sizes_of(x)[0], D = sizes_of(x)[1], W = numel_of(given[3].tensor);
  std::vector<int64_t> widths;
  for (size_t k = 5; k < given.size(); k += 2) widths.push_back(sizes_of(given[k].tensor)[1]);
  const Layers net(D, 2, widths);
  const int32_t dtype = dtype_of(x);
  Tensors results;
  results.push_back(new_tensor({K, D}, dtype));
  results.push_back(new_tensor({W}, dtype));
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *slope = given[0].data<T>(), *by = given[4].data<T>();
    T* of_x = results[0].data<T>();
    std::vector<T> of_params(2 * K * D);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < D; ++i) {
        const int64_t at = k * D + i;
        of_x[at] = slope[at] * by[at];
        of_params[2 * k * D + i] = slope[at] * by[K * D + at];
        of_params[(2 * k + 1) * D + i] = slope[at] * by[2 * K * D + at];
      }
    }
    backward<T>(net, K, of_params.data(), given[1].data<T>(), given[3].data<T>(),
                given[2].data<T>(), W, constant(data_of_each<T>(given, 5, 2)),
                constant(data_of_each<T>(given, 6, 2)), of_x, T(1), results[1].data<T>());
  });
  give(results, stack);
}

template <typename T>
static LastStep<T> last_step_of(const Owned& x, const Owned& coefficients, const Owned& frame) {
  const int64_t K = sizes_of(x.tensor)[0], D = sizes_of(x.tensor)[1];
  return {K, D, sizes_of(coefficients.tensor)[0] > 4, sizes_of(frame.tensor)[0] > 2,
          coefficients.data<T>(), frame.data<T>()};
}

// From x, its log density and score, coefficients and frame: y, its log density and score, and the
// bent x.
static void last_step(uint64_t* stack, uint64_t, uint64_t) {
  const Tensors given = take(stack, 5);
  const int64_t K = sizes_of(given[0].tensor)[0], D = sizes_of(given[0].tensor)[1];
  const int32_t dtype = dtype_of(given[0].tensor);
  Tensors results;
  results.push_back(new_tensor({K, D}, dtype));
  results.push_back(new_tensor({K}, dtype));
  results.push_back(new_tensor({K, D}, dtype));
  results.push_back(new_tensor({K, D}, dtype));
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    last_step_of<T>(given[0], given[3], given[4])
        .forward(given[0].data<T>(), given[1].data<T>(), given[2].data<T>(), results[0].data<T>(),
                 results[1].data<T>(), results[2].data<T>(), results[3].data<T>());
  });
  give(results, stack);
}

// From the slope in y, x, the bent x, coefficients and frame: the slopes in x and coefficients.
static void last_step_backward(uint64_t* stack, uint64_t, uint64_t) {
  const Tensors given = take(stack, 5);
  const int64_t K = sizes_of(given[1].tensor)[0], D = sizes_of(given[1].tensor)[1];
  const int32_t dtype = dtype_of(given[1].tensor);
  Tensors results;
  results.push_back(new_tensor({K, D}, dtype));
  results.push_back(new_tensor({sizes_of(given[3].tensor)[0], D}, dtype));
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    last_step_of<T>(given[1], given[3], given[4])
        .backward(given[0].data<T>(), given[1].data<T>(), given[2].data<T>(), results[0].data<T>(),
                  results[1].data<T>());
  });
  give(results, stack);
}

// From the score, the tensors of the flows, the numbers of flows,
// threads and parameters, and `given` (see score.h): the score at the output.
static void carry_scores(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const int64_t count = num_arguments - 5;
  const int64_t num_flows = stack[count + 1], num_threads = stack[count + 2];
  const int64_t P = stack[count + 3], given = stack[count + 4];
  int64_t num_slopes = 1 + P;
  for (int64_t k = 0; k <= P; ++k) num_slopes += given >> k & 1;
  const int64_t each = count / num_flows, L = (each - num_slopes - 3) / 2;
  std::vector<Owned> tensors;
  for (int64_t k = 0; k <= count; ++k) tensors.emplace_back(stack[k]);
  std::vector<const void*> data;
  std::vector<int64_t> widths;
  for (int64_t k = 0; k <= count; ++k) {
    const int64_t place = (k + each - 1) % each;
    if (!k || place <= num_slopes + 2 * L) {  // orders and starts are contiguous already
      tensors[k].tensor = in_rows(std::move(tensors[k])).give();
    }
    data.push_back(data_of(tensors[k].tensor));
    const bool is_activation = place >= num_slopes && place < num_slopes + L;
    if (k && is_activation) widths.push_back(sizes_of(tensors[k].tensor)[1]);
  }
  const int64_t K = sizes_of(tensors[0].tensor)[0], D = sizes_of(tensors[0].tensor)[1];
  const int32_t dtype = dtype_of(tensors[0].tensor);
  Owned found = new_tensor({K, D}, dtype);
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    carry_all(K, num_threads, num_flows, D, L, P, given, widths.data(), data.data() + 1,
              static_cast<const T*>(data[0]), static_cast<T*>(data_of(found.tensor)));
  });
  stack[0] = found.give();
}

extern "C" int32_t register_operation(const char* kind, const char* name) {
  const struct {
    const char* kind;
    void (*run)(uint64_t*, uint64_t, uint64_t);
  } operations[] = {
      {"carry", carry_scores},           {"flow", flow},
      {"flow_backward", flow_backward},  {"last_step", last_step},
      {"last_step_backward", last_step_backward},
      {"network", network},              {"network_backward", network_backward},
  };
  for (const auto& operation : operations) {
    if (!std::strcmp(kind, operation.kind)) return register_kernel(name, operation.run);
  }
  return 1;
}
