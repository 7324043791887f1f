// Tensors by the part of PyTorch's stable interface that the kernels use
// (torch/csrc/inductor/aoti_torch/c/shim.h), without PyTorch's own headers, which take seconds.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

using Handle = void*;  // of a tensor, owned
extern "C" {
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_get_dtype(Handle, int32_t*);
int32_t aoti_torch_get_dim(Handle, int64_t*);
int32_t aoti_torch_get_numel(Handle, int64_t*);
int32_t aoti_torch_is_contiguous(Handle, bool*);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 Handle*);
int32_t aoti_torch_copy_(Handle, Handle, int32_t);
int32_t aoti_torch_delete_tensor_object(Handle);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, void**);
int32_t aoti_torch_library_impl(void*, const char*, void (*)(uint64_t*, uint64_t, uint64_t));
}

inline void check(int32_t error) {
  if (error) throw std::runtime_error("PyTorch refused a call of an operation of pyro_iaf");
}

inline const int64_t* sizes_of(Handle tensor) {
  int64_t* sizes;
  check(aoti_torch_get_sizes(tensor, &sizes));
  return sizes;
}

inline int64_t numel_of(Handle tensor) {
  int64_t numel;
  check(aoti_torch_get_numel(tensor, &numel));
  return numel;
}

inline int32_t dtype_of(Handle tensor) {
  int32_t dtype;
  check(aoti_torch_get_dtype(tensor, &dtype));
  return dtype;
}

inline void* data_of(Handle tensor) {
  void* data;
  check(aoti_torch_get_data_ptr(tensor, &data));
  return data;
}

// A tensor that is deleted with this object.
struct Owned {
  Handle tensor = nullptr;
  explicit Owned(Handle owned) : tensor(owned) {}
  explicit Owned(uint64_t argument) : tensor(reinterpret_cast<Handle>(argument)) {}
  Owned(Owned&& other) : tensor(other.give()) {}
  ~Owned() {
    if (tensor) aoti_torch_delete_tensor_object(tensor);
  }
  // The tensor for another owner.
  struct Given {
    Handle tensor;
    operator Handle() const { return tensor; }
    operator uint64_t() const { return reinterpret_cast<uint64_t>(tensor); }  // on the stack
  };
  Given give() {
    const Given given{tensor};
    tensor = nullptr;
    return given;
  }
  template <typename T>
  T* data() const {
    return static_cast<T*>(data_of(tensor));
  }
};

inline Owned new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype) {
  const int64_t* s = sizes.begin();
  const int64_t strides[] = {sizes.size() == 2 ? s[1] : 1, 1};
  Handle made;
  check(aoti_torch_empty_strided(sizes.size(), s, strides, dtype, aoti_torch_device_type_cpu(), 0,
                                 &made));
  return Owned(made);
}

// The matrix or vector with its numbers row by row.
inline Owned in_rows(Owned given) {
  bool is_contiguous;
  check(aoti_torch_is_contiguous(given.tensor, &is_contiguous));
  if (is_contiguous) return given;
  int64_t dim;
  check(aoti_torch_get_dim(given.tensor, &dim));
  const int64_t* sizes = sizes_of(given.tensor);
  const int32_t dtype = dtype_of(given.tensor);
  Owned copy = dim == 1 ? new_tensor({sizes[0]}, dtype) : new_tensor({sizes[0], sizes[1]}, dtype);
  check(aoti_torch_copy_(copy.tensor, given.tensor, 0));
  return copy;
}

// Calls `run` with a zero of the tensors' type.
template <typename Run>
void by_dtype(int32_t dtype, Run run) {
  if (dtype == aoti_torch_dtype_float32()) {
    run(0.0f);
  } else {
    run(0.0);
  }
}

// Registers the kernel of an operation that is defined already; returns nonzero if that failed.
inline int32_t register_kernel(const char* name, void (*run)(uint64_t*, uint64_t, uint64_t)) {
  void* library;
  return aoti_torch_library_init_impl("pyro_iaf", "CPU", __FILE__, __LINE__, &library) ||
         aoti_torch_library_impl(library, name, run);
}
