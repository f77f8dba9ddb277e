// Two passes over memory in its order: sums, then what the sums are needed for. Groups of channels, on torch's threads.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string_view>

#include "tensors.h"

namespace {

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
  Leaf leaf = nullptr;
#if defined(__x86_64__)
  if (best == InstructionSet::avx512_bf16) leaf = avx512_bf16::choose(choice);
  if (best == InstructionSet::avx512) leaf = avx512::choose(choice);
  if (best == InstructionSet::avx2) leaf = avx2::choose(choice);
#endif
  if (best == InstructionSet::generic) leaf = generic::choose(choice);
  STD_TORCH_CHECK(leaf, "batchnorm: no loop for activation ", int(choice.activation), " with kept ", int(choice.kept));
  return leaf;
}

int64_t padded(int64_t count) { return (count + LANES_OF_FLOAT - 1) / LANES_OF_FLOAT * LANES_OF_FLOAT; }

// The examples of a tensor that are normalized together, and the threads for them.
struct Part {
  int64_t first, examples, threads;
};
Part whole(const Tensor& x) { return {0, x.size(0), torch::stable::get_num_threads()}; }

// What the passes of one op have in common: where the data lies, and the values of each channel.
template <class A> struct Job {
  Geometry g;
  Type type;
  int64_t item;  // bytes of a value in memory
  int64_t offset, total;  // of the part's first value; values of the whole tensor
  const char *x = nullptr, *dy = nullptr, *kept = nullptr;
  char *y = nullptr, *dx = nullptr, *dresidual = nullptr;
  double a, b;  // the activation's parameters
  Array<A> values;
  Array<double> wide;
  A *mean, *scale, *shift, *mean_term, *centered_term, *gamma, *beta;
  double *sum, *product, *mu, *rstd;

  Job(const Tensor& tensor, Part part, double a = 0, double b = 0)
      : g(geometry_of(tensor, part.examples, part.threads)), type(type_of(tensor)), item(size_of(type)),
        offset(part.first * g.C * g.S), total(tensor.numel()), x(in(tensor)), a(a), b(b), values(7 * padded(g.C)),
        wide(4 * padded(g.C)) {
    A* next = values.get();
    for (A** p : {&mean, &scale, &shift, &mean_term, &centered_term, &gamma, &beta}) *p = next, next += padded(g.C);
    double* next_wide = wide.get();
    for (double** p : {&sum, &product, &mu, &rstd}) *p = next_wide, next_wide += padded(g.C);
  }

  // The part's place in a tensor that lies as x does.
  const char* in(const Tensor& t) const { return static_cast<const char*>(t.const_data_ptr()) + offset * item; }
  char* out(const Tensor& t) const { return static_cast<char*>(t.mutable_data_ptr()) + offset * item; }
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
      for (int64_t o = 0; o < g.outer; ++o) {
        if (g.inner == 1) {
          to = std::copy_n(all[i], g.C, to);
        } else {
          for (int64_t c = 0; c < g.C; ++c, to += g.inner) std::fill_n(to, g.inner, all[i][c]);
        }
      }
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
          sums(sum), sums(product), job.a, job.b, ahead, streaming});
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
template <class A> void sum_group(Choice choice, const Job<A>& job, Group group) {
  const Geometry& g = job.g;
  const Leaf leaf = leaf_for(choice);
  const Lanes<A> lanes(job, choice.pass == Pass::statistics ? 1 : 3);
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
  if (tensors * job.total * job.item < STREAMED) return false;
  if (g.planes) return g.length * job.item >= STREAMED_ROW;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % VECTOR == 0; };
  return g.length * job.item % VECTOR == 0 && aligned(job.y) && aligned(job.dx) && aligned(job.dresidual);
}

// Second pass, from the end to the beginning: what the first one read last is still in cache. Alone it goes forward.
template <class A> void write_group(Choice choice, const Job<A>& job, Group group, bool after_sums = true) {
  const Leaf leaf = leaf_for(choice);
  const Lanes<A> lanes(job, choice.pass == Pass::normalize ? 3 : 5);
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

// The second pass alone.
template <class A> void write_all(Choice choice, const Job<A>& job) {
  write_group(choice, job, {0, job.g.C, job.g.C, job.g.threads}, false);
}

// sums -> finish(channel, quick) -> writes, if any, group by group. `finish` refuses quick sums that are not exact enough: then
// the group is summed again, in double.
template <class A, class Finish> void run_passes(Choice sums, std::optional<Choice> writes, const Job<A>& job, const Finish& finish) {
  const Geometry& g = job.g;
  const auto sum = [&](Choice choice, Group group, bool quick) {
    choice.quick = quick;
    sum_group(choice, job, group);
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
      if (writes) write_group(*writes, job, group);
    }
  });
}

}  // namespace
