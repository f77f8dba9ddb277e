// What the ops do with tensors: read their types and values, allocate, lay out, and refuse what does not fit.
#pragma once

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "geometry.h"
#include "half.h"
#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// An array for per-channel values: aligned, padded to whole vectors, all 0.
template <class E> class Array {
 public:
  Array() = default;
  explicit Array(int64_t count) {
    const size_t bytes = (count * sizeof(E) + VECTOR - 1) / VECTOR * VECTOR;
    data_.reset(static_cast<E*>(::operator new(bytes, std::align_val_t(VECTOR))));
    std::memset(static_cast<void*>(data_.get()), 0, bytes);
  }
  E* get() const { return data_.get(); }
  E& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(E* p) const { ::operator delete(p, std::align_val_t(VECTOR)); }
  };
  std::unique_ptr<E, Free> data_;
};

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "batchnorm: expected float32, float64, bfloat16 or float16");
  }
}

int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

double number(float value) { return value; }
double number(double value) { return value; }
double number(BFloat16 value) { return from_bfloat16(value.bits); }
double number(Float16 value) { return from_half(value.bits); }

// Calls body with the data as a pointer to its type.
template <class Body> auto with_type(const void* data, Type type, Body body) {
  switch (type) {
    case Type::float32: return body(static_cast<const float*>(data));
    case Type::float64: return body(static_cast<const double*>(data));
    case Type::bfloat16: return body(static_cast<const BFloat16*>(data));
    case Type::float16: return body(static_cast<const Float16*>(data));
  }
  return body(static_cast<const float*>(data));
}
double number_at(const void* data, Type type, int64_t i) {
  return with_type(data, type, [i](const auto* values) { return number(values[i]); });
}

void set_number(void* data, Type type, int64_t i, double value) {
  switch (type) {
    case Type::float32: static_cast<float*>(data)[i] = float(value); break;
    case Type::float64: static_cast<double*>(data)[i] = value; break;
    case Type::bfloat16: static_cast<uint16_t*>(data)[i] = to_bfloat16(float(value)); break;
    case Type::float16: static_cast<uint16_t*>(data)[i] = to_half(float(value)); break;
  }
}

// What the type holds of a value.
double rounded(double value, Type type) {
  double storage = 0;
  set_number(&storage, type, 0, value);
  return number_at(&storage, type, 0);
}

// (C,), or a row of (groups, C), of any float type -> A; `otherwise` where there is no tensor.
template <class A> void read_channels(const MaybeTensor& t, int64_t C, A otherwise, A* to, int64_t row = 0) {
  if (!t) {
    std::fill_n(to, C, otherwise);
    return;
  }
  const int64_t stride = t->stride(t->dim() - 1), first = t->dim() > 1 ? row * t->stride(0) : 0;
  with_type(t->const_data_ptr(), type_of(*t), [&](const auto* from) {
    for (int64_t c = 0; c < C; ++c) to[c] = A(number(from[first + c * stride]));
  });
}

// Channels innermost, with the places densely packed: (N, C), channels_last, channels_last_3d and the like.
bool is_channels_last(const Tensor& t) {
  int64_t expected = t.size(1);
  if (t.size(1) != 1 && t.stride(1) != 1) return false;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Uninitialized, on the CPU. Through the C interface: the dispatcher would cost more than a small op's arithmetic.
Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}
Tensor empty_as(const Tensor& dense) {
  return empty(dense.dim(), dense.sizes().data(), dense.strides().data(), dense.scalar_type());
}
Tensor empty_channels(int64_t C, ScalarType dtype) {
  const int64_t stride = 1;
  return empty(1, &C, &stride, dtype);
}

Tensor dense(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

// `t` with the strides of `x`.
Tensor laid_out_as(const Tensor& t, const Tensor& x) {
  if (same_strides(t, x)) return t;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, t);
  return copy;
}

Geometry geometry_of(const Tensor& x, int64_t examples, int64_t threads) {
  int64_t S = 1;
  for (int64_t d = 2; d < x.dim(); ++d) S *= x.size(d);
  const bool channels_last = S == 1 || !x.is_contiguous();
  return cut(examples, x.size(1), S, channels_last, size_of(type_of(x)), threads);
}

// ---- what the ops refuse ---------------------------------------------------------------------------------------------

std::string shape_of(const Tensor& t) {
  std::string text;
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return "(" + text + ")";
}
void check_input(const Tensor& x, int64_t activation) {
  STD_TORCH_CHECK(x.dim() >= 2, "batchnorm: x must be (N, C, ...), got ", shape_of(x));
  STD_TORCH_CHECK(0 <= activation && activation < ACTIVATIONS, "batchnorm: unknown activation ", activation);
  type_of(x);
}
// (C,), C the size of x's dimension `channel`.
void check_channels(const char* name, const MaybeTensor& t, const Tensor& x, int64_t channel = 1) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cpu(), "batchnorm: ", name, " must be on the CPU, as x is");
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(channel), "batchnorm: ", name, " must be (", x.size(channel),
                  ",), one value for each channel, got ", shape_of(*t));
  type_of(*t);
}
// (groups, C)
void check_rows(const char* name, const Tensor& t, const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == groups && t.size(1) == x.size(1), "batchnorm: ", name,
                  " must be (", groups, ", ", x.size(1), "), one row for each group, got ", shape_of(t));
  type_of(t);
}
void check_groups(const Tensor& x, int64_t size, int64_t groups) {
  const int64_t N = x.size(0);
  STD_TORCH_CHECK(size > 0 && groups > 0 && (N == 0 ? groups == 1 : (groups - 1) * size < N), "batchnorm: ", groups,
                  " groups of ", size, " examples do not fit into ", N);
}
void check_like(const char* name, const MaybeTensor& t, const Tensor& x) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cpu(), "batchnorm: ", name, " must be on the CPU, as x is");
  bool same = t->dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t->size(d) == x.size(d);
  STD_TORCH_CHECK(same, "batchnorm: ", name, " must have x's shape, ", shape_of(x), ", got ", shape_of(*t));
  STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), "batchnorm: ", name, " must have x's dtype");
}
void check_running(
    const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& batches, const MaybeTensor& skipped,
    std::optional<double> momentum, const Tensor& x, int64_t channel) {
  check_channels("running_mean", mean, x, channel), check_channels("running_var", var, x, channel);
  STD_TORCH_CHECK(!mean == !var, "batchnorm: running_mean and running_var must be given together");
  STD_TORCH_CHECK(momentum || batches || !mean, "batchnorm: momentum=None needs the number of batches");
  STD_TORCH_CHECK(!batches || (batches->is_cpu() && batches->numel() == 1 && batches->scalar_type() == ScalarType::Long),
                  "batchnorm: batches must be one int64 on the CPU");
  STD_TORCH_CHECK(!skipped || (skipped->is_cpu() && skipped->dim() == 1 && skipped->size(0) == x.size(channel) &&
                               skipped->scalar_type() == ScalarType::Long),
                  "batchnorm: skipped must be (", x.size(channel), ",) of int64 on the CPU");
}

}  // namespace
