// The CPU kernels of the ops in schema.py: cut the tensors into blocks, run the leaf loops over them on torch's threads.
//
// Comes from: torch's dispatcher. Goes to: leaves.h, in the widest instruction set of this processor.
// Two passes over memory in its order: sums, then what the sums are needed for.
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
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

// ---- memory -------------------------------------------------------------------------------------------------------

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

// (C,) of any float type -> A; `otherwise` where there is no tensor.
template <class A> void read_channels(const MaybeTensor& t, int64_t C, A otherwise, A* to) {
  if (!t) {
    std::fill_n(to, C, otherwise);
    return;
  }
  const int64_t stride = t->stride(0);
  with_type(t->const_data_ptr(), type_of(*t), [&](const auto* from) {
    for (int64_t c = 0; c < C; ++c) to[c] = A(number(from[c * stride]));
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

const char* read(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
char* write(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

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

Geometry geometry_of(const Tensor& x) {
  int64_t S = 1;
  for (int64_t d = 2; d < x.dim(); ++d) S *= x.size(d);
  const bool channels_last = S == 1 || !x.is_contiguous();
  return cut(x.size(0), x.size(1), S, channels_last, size_of(type_of(x)), torch::stable::get_num_threads());
}

// ---- passes ---------------------------------------------------------------------------------------------------------

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("BATCHNORM_INSTRUCTIONS");  // for tests: a narrower set than the processor's
  const std::string_view limit = wanted ? wanted : "avx512_bf16";
  if (limit == "generic") return InstructionSet::generic;
  const auto has = [](auto... names) { return (names && ...); };
  if (limit.starts_with("avx512") && has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                                         __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl")))
    return limit == "avx512_bf16" && __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
  if (has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c")))
    return InstructionSet::avx2;
#endif
  return InstructionSet::generic;
}

Leaf leaf_for(Choice choice) {
  static const InstructionSet best = best_instruction_set();
#if defined(__x86_64__)
  if (best == InstructionSet::avx512_bf16) return avx512_bf16::choose(choice);
  if (best == InstructionSet::avx512) return avx512::choose(choice);
  if (best == InstructionSet::avx2) return avx2::choose(choice);
#endif
  return generic::choose(choice);
}

int64_t padded(int64_t count) { return (count + LANES_OF_FLOAT - 1) / LANES_OF_FLOAT * LANES_OF_FLOAT; }

// What the passes of one op have in common: where the data lies, and the values of each channel.
template <class A> struct Job {
  Geometry g;
  Type type;
  int64_t item;  // bytes of a value in memory
  const char *x = nullptr, *dy = nullptr, *kept = nullptr;
  char *y = nullptr, *dx = nullptr, *dresidual = nullptr;
  double slope = 0;
  Array<A> values;
  Array<double> wide;
  A *mean, *scale, *shift, *mean_term, *centered_term, *gamma, *beta;
  double *sum, *product, *mu, *rstd;

  Job(const Tensor& tensor, double slope)
      : g(geometry_of(tensor)), type(type_of(tensor)), item(size_of(type)), x(read(tensor)), slope(slope),
        values(7 * padded(g.C)), wide(4 * padded(g.C)) {
    A* next = values.get();
    for (A** p : {&mean, &scale, &shift, &mean_term, &centered_term, &gamma, &beta}) *p = next, next += padded(g.C);
    double* next_wide = wide.get();
    for (double** p : {&sum, &product, &mu, &rstd}) *p = next_wide, next_wide += padded(g.C);
  }
};

// The first of a job's per-channel arrays as rows want them: as they are for planes, else spread over the places of a row.
template <class A> struct Lanes {
  Array<A> spread;
  std::array<const A*, 5> values{};

  Lanes(const Job<A>& job, int used) {
    const std::array all{job.mean, job.scale, job.shift, job.mean_term, job.centered_term};
    std::copy_n(all.begin(), used, values.begin());
    const Geometry& g = job.g;
    if (g.planes || g.places() == g.C) return;
    const int64_t width = padded(g.places());
    spread = Array<A>(used * width);
    for (int i = 0; i < used; ++i) {
      A* to = &spread[i * width];
      for (int64_t o = 0; o < g.outer; ++o)
        for (int64_t c = 0; c < g.C; ++c, to += g.inner) std::fill_n(to, g.inner, all[i][c]);
      values[i] = &spread[i * width];
    }
  }
  const void* at(int i, int64_t channel) const { return values[i] ? values[i] + channel : nullptr; }
};

// Channels [begin, end), whose rows are numbered in the order of memory, on so many threads. Others follow up to `last`.
struct Group {
  int64_t begin, end, last, threads;
  int64_t channels() const { return end - begin; }
  int64_t rows(const Geometry& g) const {
    return g.planes ? g.N * channels() : (g.N * g.C * g.S + g.places() - 1) / g.places();
  }
};

constexpr int64_t AHEAD = 2048;  // bytes

// Runs the leaf over rows [begin, end) of a group. Sums are those of the group.
template <class A>
void run(
    Leaf leaf, const Job<A>& job, const Lanes<A>& lanes, Group group, int64_t begin, int64_t end, double* sum, double* product,
    int64_t ahead = AHEAD, bool streaming = false) {
  const Geometry& g = job.g;
  const auto call = [&](int64_t rows, int64_t length, int64_t offset, int64_t channel) {
    const auto at = [&](auto* p) { return p ? p + offset * job.item : nullptr; };
    const auto sums = [&](double* p) { return p ? p + (channel - group.begin) * LANES : nullptr; };
    leaf({rows, length, at(job.x), at(job.dy), at(job.kept), at(job.y), at(job.dx), at(job.dresidual),
          lanes.at(0, channel), lanes.at(1, channel), lanes.at(2, channel), lanes.at(3, channel), lanes.at(4, channel),
          sums(sum), sums(product), job.slope, ahead, streaming});
  };
  if (g.planes) {
    for (int64_t row = begin; row < end;) {  // the rows of one example lie together
      const int64_t example = row / group.channels(), channel = group.begin + row % group.channels();
      const int64_t rows = std::min(group.end - channel, end - row);
      call(rows, g.S, (example * g.C + channel) * g.S, channel);
      row += rows;
    }
    return;
  }
  const int64_t total = g.N * g.C * g.S, whole = std::min(end, total / g.places());
  if (whole > begin) call(whole - begin, g.places(), begin * g.places(), group.begin);
  if (whole < end) call(1, total - whole * g.places(), whole * g.places(), group.begin);
}

template <class F> void parallel(int64_t tasks, const F& task) {
  if (tasks == 1) return task(0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// First pass: job.sum and job.product of the group's channels. One part of the rows per thread, added up in order.
template <class A> void sum_group(Leaf leaf, const Job<A>& job, Group group, int used) {
  const Geometry& g = job.g;
  const Lanes<A> lanes(job, used);
  const int64_t rows = group.rows(g), parts = std::min(group.threads, rows);
  const int64_t per_channel = g.planes ? LANES : g.inner;
  const int64_t width = padded(g.planes ? group.channels() * LANES : g.places());
  const Array<double> sums(2 * parts * width);
  parallel(parts, [&](int64_t part) {
    double* sum = &sums[2 * part * width];
    run(leaf, job, lanes, group, rows * part / parts, rows * (part + 1) / parts, sum, sum + width,
        g.planes ? AHEAD : together(job.item) * g.length * job.item);
  });
  std::fill(job.sum + group.begin, job.sum + group.end, 0), std::fill(job.product + group.begin, job.product + group.end, 0);
  for (int64_t part = 0; part < parts; ++part) {
    const double *sum = &sums[2 * part * width], *product = sum + width;
    for (int64_t o = 0; o < g.outer; ++o)
      for (int64_t c = group.begin; c < group.end; ++c)
        for (int64_t i = 0; i < per_channel; ++i) job.sum[c] += *sum++, job.product[c] += *product++;
  }
}

// K, near the mean of each channel: of a few values of it, far apart.
template <class A> void set_near_mean(const Job<A>& job) {
  const Geometry& g = job.g;
  const bool channels_last = !g.planes && g.inner == 1;
  const int64_t samples = std::min<int64_t>(g.values(), channels_last ? 16 : 4);  // of all channels in one piece: cheap
  with_type(job.x, job.type, [&](const auto* x) {
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t place = g.values() / samples * i, n = place / g.S, s = place % g.S;
      const auto* from = x + n * g.C * g.S + (channels_last ? s * g.C : s);
      for (int64_t c = 0; c < g.C; ++c) job.mean[c] += A(number(from[channels_last ? c : c * g.S]) / samples);
    }
  });
}
constexpr double FAR = 4;  // of the variance: how large the square of mean - K may be for quick sums, which then cancel


constexpr int64_t PIECE = 1 << 16;  // bytes visited at a time on the way back
constexpr int64_t STREAMED = 30 << 20;  // bytes read and written: what a common last-level cache holds
constexpr int64_t STREAMED_ROW = 512;  // bytes of a row of planes that are worth the vectors cut at its ends

// Whether results are written past the caches: that saves reading what is overwritten, and keeps x and dy in them.
template <class A> bool streams(const Job<A>& job) {
  const Geometry& g = job.g;
  const int64_t tensors = !!job.x + !!job.dy + !!job.kept + !!job.y + !!job.dx + !!job.dresidual;
  if (tensors * g.N * g.C * g.S * job.item < STREAMED) return false;
  if (g.planes) return g.length * job.item >= STREAMED_ROW;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % VECTOR == 0; };
  return g.length * job.item % VECTOR == 0 && aligned(job.y) && aligned(job.dx) && aligned(job.dresidual);
}

// Second pass, from the end to the beginning: what the first one read last is still in cache. Alone it goes forward.
template <class A> void write_group(Leaf leaf, const Job<A>& job, Group group, int used, bool after_sums = true) {
  const Lanes<A> lanes(job, used);
  const int64_t rows = group.rows(job.g), parts = std::min(group.threads, rows);
  const int64_t step = after_sums ? std::max<int64_t>(1, PIECE / (job.g.length * job.item)) : rows;
  const bool streaming = streams(job);
  // While this group is written, the next one is read: the same row of it lies so far ahead.
  const int64_t next = group.channels() * job.g.S * job.item;
  const bool near = job.g.planes && group.end < group.last && job.g.N * next <= 2 * CACHE * group.threads;
  const int64_t ahead = near ? next : AHEAD;
  parallel(parts, [&](int64_t part) {
    const int64_t first = rows * part / parts;
    for (int64_t end = rows * (part + 1) / parts; end > first; end -= step)
      run(leaf, job, lanes, group, std::max(first, end - step), end, nullptr, nullptr, ahead, streaming);
  });
}

// sums -> finish(channel, quick) -> writes, group by group. `finish` refuses quick sums that are not exact enough: then
// the group is summed again, in double.
template <class A, class Finish> void run_passes(Choice sums, Choice writes, const Job<A>& job, const Finish& finish) {
  const Geometry& g = job.g;
  const auto sum = [&](Choice choice, Group group, bool quick) {
    choice.quick = quick;
    sum_group(leaf_for(choice), job, group, choice.pass == Pass::statistics ? 1 : 3);
    bool accepted = true;
    for (int64_t c = group.begin; c < group.end; ++c) accepted &= finish(c, quick);
    return accepted;
  };
  const bool can_be_quick = sizeof(A) == sizeof(float);
  const int64_t workers = g.apart ? g.threads : 1;
  parallel(workers, [&](int64_t worker) {
    const int64_t last = g.C * (worker + 1) / workers;
    for (int64_t begin = g.C * worker / workers; begin < last; begin += g.group) {
      const Group group{begin, std::min(begin + g.group, last), last, g.apart ? 1 : g.threads};
      if (!sum(sums, group, can_be_quick)) sum(sums, group, false);
      write_group(leaf_for(writes), job, group, writes.pass == Pass::normalize ? 3 : 5);
    }
  });
}

// ---- what the ops refuse ---------------------------------------------------------------------------------------------

std::string shape_of(const Tensor& t) {
  std::string text;
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return "(" + text + ")";
}
void check_input(const Tensor& x, int64_t activation) {
  STD_TORCH_CHECK(x.dim() >= 2, "batchnorm: x must be (N, C, ...), got ", shape_of(x));
  STD_TORCH_CHECK(0 <= activation && activation <= int64_t(Activation::tanh), "batchnorm: unknown activation ", activation);
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
void check_like(const char* name, const MaybeTensor& t, const Tensor& x) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cpu(), "batchnorm: ", name, " must be on the CPU, as x is");
  bool same = t->dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t->size(d) == x.size(d);
  STD_TORCH_CHECK(same, "batchnorm: ", name, " must have x's shape, ", shape_of(x), ", got ", shape_of(*t));
  STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), "batchnorm: ", name, " must have x's dtype");
}
void check_running(
    const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& batches, std::optional<double> momentum,
    const Tensor& x, int64_t channel) {
  check_channels("running_mean", mean, x, channel), check_channels("running_var", var, x, channel);
  STD_TORCH_CHECK(!mean == !var, "batchnorm: running_mean and running_var must be given together");
  STD_TORCH_CHECK(momentum || batches || !mean, "batchnorm: momentum=None needs the number of batches");
  STD_TORCH_CHECK(!batches || (batches->is_cpu() && batches->numel() == 1 && batches->scalar_type() == ScalarType::Long),
                  "batchnorm: batches must be one int64 on the CPU");
}

// ---- ops ------------------------------------------------------------------------------------------------------------

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor statistics_like(const Tensor& x) { return empty_channels(x.size(1), ScalarType::Double); }
Tensor channels_like(const Tensor& x) { return empty_channels(x.size(1), statistics_type(x)); }

template <class A> A* data_of(const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); }

// Where y tells dg/dz, y is kept of a layer with a residual, else the residual. As in schema.py.
Kept kept_for(Activation activation, double slope) {
  const bool result = activation == Activation::relu || activation == Activation::relu6 || activation == Activation::sigmoid ||
                      activation == Activation::tanh || (activation == Activation::leaky_relu && slope >= 0);
  return result ? Kept::result : Kept::residual;
}

// Calls body<A>() with the type that x is computed in.
template <class Body> auto in_compute_type(const Tensor& x, Body body) {
  return x.scalar_type() == ScalarType::Double ? body.template operator()<double>() : body.template operator()<float>();
}

// z = (x - mu) * rstd * gamma + beta, as the leaf loops compute it: (x - mean) * scale + shift with mean the part of mu that
// A holds. The rest of mu goes into the shift: where |mu| is large, rounding it would be an error of many ulp in x - mu.
template <class A> void set_affine(const Job<A>& job, int64_t c, double mu, double rstd) {
  job.mean[c] = A(mu);
  job.scale[c] = A(job.gamma[c] * rstd);
  job.shift[c] = A(job.beta[c] - (mu - job.mean[c]) * job.scale[c]);
}

// Algorithm 1: y = g((x - mu) / sqrt(var + eps) * gamma + beta + residual), with mu and var of each channel of x.
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, double eps,
    int64_t activation, double slope) {
  check_input(input, activation), check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_like("residual", residual, input);
  const Tensor x = dense(input), y = empty_as(x), mu = statistics_like(x), var = statistics_like(x);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  const auto g = Activation(activation);
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, slope);
    const int64_t C = job.g.C, m = job.g.values();
    if (C * m == 0) {
      std::fill_n(data_of<double>(mu), C, NAN), std::fill_n(data_of<double>(var), C, NAN);
      return;
    }
    job.y = write(y), job.kept = r ? read(*r) : nullptr;
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    set_near_mean(job);  // sums of x - K: E[x^2] - E[x]^2 alone would cancel
    run_passes<A>(
        {Pass::statistics, job.type, Activation::none, Kept::nothing, job.g.planes},
        {Pass::normalize, job.type, g, r ? Kept::residual : Kept::nothing, job.g.planes}, job, [&](int64_t c, bool quick) {
          const double shifted = job.sum[c] / m, spread = job.product[c] / m - shifted * shifted;
          if (quick && !(shifted * shifted <= FAR * spread && std::isfinite(spread))) return false;
          const double mean = job.mean[c] + shifted, biased = spread < 0 ? 0 : spread;
          data_of<double>(mu)[c] = mean, data_of<double>(var)[c] = biased;
          set_affine(job, c, mean, 1 / std::sqrt(biased + eps));
          return true;
        });
  });
  return {y, mu, var};
}

// y = g((x - mu) / sqrt(var + eps) * gamma + beta + residual) with the given mu and var.
Tensor normalize(
    const Tensor& input, const Tensor& mu, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& residual, double eps, int64_t activation, double slope) {
  check_input(input, activation), check_channels("mean", mu, input), check_channels("var", var, input);
  check_channels("weight", weight, input), check_channels("bias", bias, input), check_like("residual", residual, input);
  const Tensor x = dense(input), y = empty_as(x);
  const MaybeTensor r = residual ? MaybeTensor(laid_out_as(*residual, x)) : std::nullopt;
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, slope);
    const int64_t C = job.g.C;
    if (C * job.g.values() == 0) return;
    job.y = write(y), job.kept = r ? read(*r) : nullptr;
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    read_channels<double>(mu, C, 0, job.mu), read_channels<double>(var, C, 0, job.rstd);
    for (int64_t c = 0; c < C; ++c) set_affine(job, c, job.mu[c], 1 / std::sqrt(job.rstd[c] + eps));
    const Choice choice{Pass::normalize, job.type, Activation(activation), r ? Kept::residual : Kept::nothing, job.g.planes};
    write_group(leaf_for(choice), job, {0, C, C, job.g.threads}, 3, false);
  });
  return y;
}

// Section 3, for z = xhat * gamma + beta + residual, y = g(z): dx, dgamma, dbeta, dresidual.
// `kept` is y or the residual (kept_for); with training = false mu and var are constants.
// dresidual has no elements where there was no residual, or no activation: it is dy then.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& gradient, const Tensor& input, const Tensor& mu, const Tensor& var, const MaybeTensor& weight,
    const MaybeTensor& bias, const MaybeTensor& kept, double eps, int64_t activation, double slope, bool training) {
  check_input(input, activation), check_channels("mean", mu, input), check_channels("var", var, input);
  check_channels("weight", weight, input), check_channels("bias", bias, input);
  check_like("dy", gradient, input), check_like("kept", kept, input);
  const Tensor x = dense(input), dy = laid_out_as(gradient, x), dx = empty_as(x);
  const Tensor dgamma = channels_like(x), dbeta = channels_like(x);
  const auto g = Activation(activation);
  const Kept kind = kept && g != Activation::none ? kept_for(g, slope) : Kept::nothing;
  const MaybeTensor k = kind == Kept::nothing ? std::nullopt : MaybeTensor(laid_out_as(*kept, x));
  const Tensor dresidual = k ? empty_as(x) : empty_channels(0, x.scalar_type());
  in_compute_type(x, [&]<class A>() {
    Job<A> job(x, slope);
    const int64_t C = job.g.C, m = job.g.values();
    if (C * m == 0) {
      std::fill_n(data_of<A>(dgamma), C, A(0)), std::fill_n(data_of<A>(dbeta), C, A(0));
      return;
    }
    job.dy = read(dy), job.dx = write(dx);
    if (k) job.kept = read(*k), job.dresidual = write(dresidual);
    read_channels<A>(weight, C, 1, job.gamma), read_channels<A>(bias, C, 0, job.beta);
    read_channels<double>(mu, C, 0, job.mu), read_channels<double>(var, C, 0, job.rstd);
    for (int64_t c = 0; c < C; ++c) {
      job.rstd[c] = 1 / std::sqrt(job.rstd[c] + eps);
      set_affine(job, c, job.mu[c], job.rstd[c]);
    }
    run_passes<A>(
        {Pass::gradient_sums, job.type, g, kind, job.g.planes}, {Pass::input_gradient, job.type, g, kind, job.g.planes}, job,
        [&](int64_t c, bool quick) {
          if (quick && !(std::isfinite(job.sum[c]) && std::isfinite(job.product[c]))) return false;
          const double rest = job.mu[c] - job.mean[c];  // the loops subtract what A holds of mu
          const double product = job.product[c] - rest * job.sum[c];
          data_of<A>(dbeta)[c] = A(job.sum[c]);
          data_of<A>(dgamma)[c] = A(product * job.rstd[c]);
          if (training) {  // else the terms stay 0
            const double term = job.scale[c] * job.rstd[c] * job.rstd[c] * product / m;
            job.mean_term[c] = A(job.scale[c] * job.sum[c] / m - term * rest);
            job.centered_term[c] = A(term);
          }
          return true;
        });
  });
  return {dx, dgamma, dbeta, dresidual};
}

// running <- (1 - a) * running + a * batch with the unbiased variance (Algorithm 2, line 10); a = momentum, or 1 / batches
// for the plain average. `batches` counts this one first.
void update_running_(
    const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& batches, const Tensor& mu, const Tensor& var,
    int64_t values, std::optional<double> momentum) {
  check_channels("var", var, mu, 0), check_running(running_mean, running_var, batches, momentum, mu, 0);
  const int64_t count = batches ? ++*data_of<int64_t>(*batches) : 0;
  if (values == 0) return;
  const double a = momentum ? *momentum : 1.0 / double(count), unbiased = double(values) / double(values - 1);
  const auto blend = [a](const Tensor& running, const Tensor& batch, double factor) {
    const Type type = type_of(running), from = type_of(batch);
    const int64_t C = running.size(0), stride = running.stride(0);
    void* to = running.mutable_data_ptr();
    const void* data = batch.const_data_ptr();
    for (int64_t c = 0; c < C; ++c)
      set_number(to, type, c * stride, (1 - a) * number_at(to, type, c * stride) + a * factor * number_at(data, from, c));
  };
  blend(running_mean, mu, 1), blend(running_var, var, unbiased);
}

// forward, and the running statistics with it.
std::tuple<Tensor, Tensor, Tensor> train(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& batches,
    std::optional<double> momentum, double eps, int64_t activation, double slope) {
  check_input(x, activation), check_running(running_mean, running_var, batches, momentum, x, 1);
  auto results = forward(x, weight, bias, residual, eps, activation, slope);
  const auto& [y, mu, var] = results;
  if (running_mean && running_var)
    update_running_(*running_mean, *running_var, batches, mu, var, x.size(1) ? x.numel() / x.size(1) : 0, momentum);
  else if (batches) ++*data_of<int64_t>(*batches);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("normalize", TORCH_BOX(&normalize));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("train", TORCH_BOX(&train));
  library.impl("update_running_", TORCH_BOX(&update_running_));
}
