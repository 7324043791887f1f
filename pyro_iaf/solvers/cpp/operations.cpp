// The operations of pyro_iaf, as PyTorch calls them: arguments and results lie on a stack. The
// operation owns the tensors among its arguments.

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "inverse.h"
#include "last_step.h"
#include "maps.h"
#include "network.h"
#include "score.h"
#include "tensors.h"

using Tensors = std::vector<Owned>;

// The sizes and the type of K rows of D coordinates.
struct Rows {
  int64_t K, D;
  int32_t dtype;
  explicit Rows(const Owned& x)
      : K(sizes_of(x.tensor)[0]), D(sizes_of(x.tensor)[1]), dtype(dtype_of(x.tensor)) {}
};

static Tensors take(const uint64_t* stack, int64_t count) {
  Tensors taken;
  for (int64_t k = 0; k < count; ++k) taken.push_back(in_rows(Owned(stack[k])));
  return taken;
}

static void give(Tensors& results, uint64_t* stack) {
  for (Owned& result : results) *stack++ = result.give();
}

using Sizes = std::initializer_list<int64_t>;

static Tensors new_tensors(int32_t dtype, std::initializer_list<Sizes> sizes) {
  Tensors made;
  for (const auto& each : sizes) made.push_back(new_tensor(each, dtype));
  return made;
}

// Adds tensors for units and slopes of each hidden layer.
static void add_layers(Tensors& results, const Layers& net, const Rows& rows) {
  for (int64_t width : net.widths) {
    for (int k = 0; k < 2; ++k) results.push_back(new_tensor({rows.K, width}, rows.dtype));
  }
}

// The data of every second tensor: of the units or the slopes of each hidden layer.
template <typename T>
static std::vector<T*> every_second(const Tensors& tensors, size_t first) {
  std::vector<T*> found;
  for (size_t k = first; k < tensors.size(); k += 2) {
    found.push_back(tensors[k].data<std::remove_const_t<T>>());
  }
  return found;
}

// The widths of hidden layers, whose units and slopes begin with tensor `first`.
static std::vector<int64_t> widths_of(const Tensors& tensors, size_t first) {
  std::vector<int64_t> widths;
  for (size_t k = first; k < tensors.size(); k += 2) {
    widths.push_back(sizes_of(tensors[k].tensor)[1]);
  }
  return widths;
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
  const Rows rows(given[0]);
  const Layers net(rows.D, stack[3], {stack + 4, stack + num_arguments});
  Tensors results =
      new_tensors(rows.dtype, {{rows.K, net.num_outputs}, {numel_of(given[2].tensor)}});
  add_layers(results, net, rows);
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* masked = mask_weights<T>(given[1], given[2], results[1]);
    forward<T>(net, rows.K, given[0].data<T>(), masked, results[0].data<T>(),
               every_second<T>(results, 2), every_second<T>(results, 3));
  });
  give(results, stack);
}

// From the slope in the outputs, x, masked weights, mask, units and slopes of each layer, the
// number of parameters, and whether x has a slope: those of x, empty if it has none, and of the
// weights.
static void network_backward(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, num_arguments - 2);
  const Rows rows(given[1]);
  const int64_t W = numel_of(given[3].tensor);
  const bool has_slope = stack[num_arguments - 1];
  const Layers net(rows.D, stack[num_arguments - 2], widths_of(given, 4));
  Tensors results = new_tensors(rows.dtype, {{has_slope ? rows.K : 0, rows.D}, {W}});
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(net, rows.K, given[0].data<T>(), given[1].data<T>(), given[2].data<T>(),
                given[3].data<T>(), W, every_second<const T>(given, 4),
                every_second<const T>(given, 5), has_slope ? results[0].data<T>() : nullptr, T(0),
                results[1].data<T>());
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
  const Rows rows(given[0]);
  const int64_t K = rows.K, D = rows.D, W = numel_of(given[4].tensor);
  const Layers net(D, 2, {stack + 10, stack + num_arguments});
  Tensors results = new_tensors(rows.dtype, {{K, D}, {K}, {K, D}, {W}, {3 * K, D}});
  add_layers(results, net, rows);
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = given[0].data<T>(), *log_q = given[1].data<T>();
    const T* masked = mask_weights<T>(given[3], given[4], results[3]);
    const auto units = every_second<T>(results, 5), slopes = every_second<T>(results, 6);
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

// From the slope in y, x, mask, masked weights, the derivatives, and units and slopes of each
// hidden layer: the slopes in x and in the weights.
static void flow_backward(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, num_arguments);
  const Rows rows(given[1]);
  const int64_t K = rows.K, D = rows.D, W = numel_of(given[3].tensor);
  const Layers net(D, 2, widths_of(given, 5));
  Tensors results = new_tensors(rows.dtype, {{K, D}, {W}});
  by_dtype(rows.dtype, [&](auto zero) {
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
                given[2].data<T>(), W, every_second<const T>(given, 5),
                every_second<const T>(given, 6), of_x, T(1), results[1].data<T>());
  });
  give(results, stack);
}

// From y, weights, mask, order and starts, the map, the bits of its bias as a double, and the widths
// of the hidden layers: x.
static void inverse(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const Tensors given = take(stack, 5);
  const Map map = static_cast<Map>(stack[5]);
  double bias;
  std::memcpy(&bias, &stack[6], sizeof bias);
  const Rows rows(given[0]);
  const Layers net(rows.D, 2, {stack + 7, stack + num_arguments});
  Tensors results = new_tensors(rows.dtype, {{rows.K, rows.D}});
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Owned masked = new_tensor({numel_of(given[2].tensor)}, rows.dtype);
    mask_weights<T>(given[1], given[2], masked);
    invert_all<T>(net, map, bias, rows.K, given[0].data<T>(), masked.data<T>(),
                  given[3].data<int64_t>(), given[4].data<int64_t>(), results[0].data<T>());
  });
  give(results, stack);
}

template <typename T>
static LastStep<T> last_step_of(const Rows& rows, const Owned& coefficients, const Owned& frame) {
  return {rows.K, rows.D, sizes_of(coefficients.tensor)[0] > 4, sizes_of(frame.tensor)[0] > 2,
          coefficients.data<T>(), frame.data<T>()};
}

// From x, its log density and score, coefficients and frame: y, its log density and score, and the
// bent x.
static void last_step(uint64_t* stack, uint64_t, uint64_t) {
  const Tensors given = take(stack, 5);
  const Rows rows(given[0]);
  const int64_t K = rows.K, D = rows.D;
  Tensors results = new_tensors(rows.dtype, {{K, D}, {K}, {K, D}, {K, D}});
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    last_step_of<T>(rows, given[3], given[4])
        .forward(given[0].data<T>(), given[1].data<T>(), given[2].data<T>(), results[0].data<T>(),
                 results[1].data<T>(), results[2].data<T>(), results[3].data<T>());
  });
  give(results, stack);
}

// From the slope in y, x, the bent x, coefficients and frame: the slopes in x and coefficients.
static void last_step_backward(uint64_t* stack, uint64_t, uint64_t) {
  const Tensors given = take(stack, 5);
  const Rows rows(given[1]);
  Tensors results =
      new_tensors(rows.dtype, {{rows.K, rows.D}, {sizes_of(given[3].tensor)[0], rows.D}});
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    last_step_of<T>(rows, given[3], given[4])
        .backward(given[0].data<T>(), given[1].data<T>(), given[2].data<T>(), results[0].data<T>(),
                  results[1].data<T>());
  });
  give(results, stack);
}

// From the score, the tensors of the flows, the numbers of flows, threads and parameters, and
// `given` (see score.h): the score at the output.
static void carry_scores(uint64_t* stack, uint64_t num_arguments, uint64_t) {
  const int64_t count = num_arguments - 5;
  const int64_t num_flows = stack[count + 1], num_threads = stack[count + 2];
  const int64_t P = stack[count + 3], given = stack[count + 4];
  int64_t num_slopes = 1 + P;
  for (int64_t k = 0; k <= P; ++k) num_slopes += given >> k & 1;
  const int64_t each = count / num_flows, L = (each - num_slopes - 3) / 2;
  const Tensors tensors = take(stack, count + 1);
  const Rows rows(tensors[0]);
  std::vector<const void*> data;  // of all but the score
  std::vector<int64_t> widths;
  for (int64_t k = 1; k <= count; ++k) {
    data.push_back(data_of(tensors[k].tensor));
    const int64_t place = (k - 1) % each;
    const bool is_activation = place >= num_slopes && place < num_slopes + L;
    if (is_activation) widths.push_back(sizes_of(tensors[k].tensor)[1]);
  }
  Tensors results = new_tensors(rows.dtype, {{rows.K, rows.D}});
  by_dtype(rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    carry_all<T>(rows.K, num_threads, num_flows, rows.D, L, P, given, widths.data(), data.data(),
                 tensors[0].data<T>(), results[0].data<T>());
  });
  give(results, stack);
}

extern "C" int32_t register_operation(const char* kind, const char* name) {
  const struct {
    const char* kind;
    void (*run)(uint64_t*, uint64_t, uint64_t);
  } operations[] = {
      {"carry", carry_scores},           {"flow", flow},
      {"flow_backward", flow_backward},  {"inverse", inverse},
      {"last_step", last_step},
      {"last_step_backward", last_step_backward},
      {"network", network},              {"network_backward", network_backward},
  };
  for (const auto& operation : operations) {
    if (!std::strcmp(kind, operation.kind)) return register_kernel(name, operation.run);
  }
  return 1;
}
