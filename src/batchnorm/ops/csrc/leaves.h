// The leaf loops: one pass over one block of memory, in the vectors of one instruction set. No allocation, no threads.
#pragma once

#include <algorithm>

#include "activations.h"

namespace {

// Values from `at` to the next address where a vector can be streamed to.
template <class T> inline int64_t lanes_to_boundary(const T* at) {
  constexpr int64_t bytes = W<typename Compute<T>::type> * sizeof(T);
  return (bytes - int64_t(reinterpret_cast<uintptr_t>(at) % bytes)) % bytes / int64_t(sizeof(T));
}

// A per-channel value at place i of a row: the same everywhere, or one for each place.
template <class A, bool planes> struct PerChannel {
  const A* values;
  V<A> one;
  PerChannel(const void* from, int64_t row) : values(static_cast<const A*>(from)), one{} {
    if constexpr (planes) one = splat(values[row]);
  }
  V<A> at(int64_t i) const {
    if constexpr (planes) return one;
    else return widen(values + i);
  }
};

// Sums: over a row in registers for planes, else over the rows in memory, one for each place.
template <class A, bool planes> struct Sums {
  double* to;
  Sum<A> sum;
  Sums(double* to, int64_t row) : to(planes ? to + row * LANES : to) {}
  Sum<A>& at(int64_t i) {
    if constexpr (planes) return sum;
    else return *reinterpret_cast<Sum<A>*>(to + i);
  }
  ~Sums() {
    if constexpr (planes) *reinterpret_cast<V<double>*>(to) += folded(sum);
  }
};

// A loader of whole vectors, which asks for what comes later, and one of the first n places of a vector: the others are
// what its second argument says, by default 0.
template <class T, class A = typename Compute<T>::type> inline auto loader(const Block& block) {
  return [ahead = block.ahead](const T* from, V<A> = V<A>{}) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead);
    return widen(from);
  };
}
template <class T, class A = typename Compute<T>::type> inline auto loader_of(int64_t n) {
  return [n](const T* from, V<A> beyond = V<A>{}) { return widen(from, int(n), beyond); };
}

// Calls body(offset of the vector, its place in the row, a loader) for every vector of a row from place i on.
template <class T, class Body> inline void read_vectors(const Block& block, int64_t row, int64_t i, Body body) {
  constexpr int64_t width = W<typename Compute<T>::type>;
  const int64_t begin = row * block.length, length = block.length;
  for (; i + width <= length; i += width) body(begin + i, i, loader<T>(block));
  if (i < length) body(begin + i, i, loader_of<T>(length - i));
}

// The same with a storer, for results that are all written from values read elsewhere: then a row's last vector may lie
// across the one before. Not so in a streaming pass, where a line is either streamed or written through the caches.
template <class T, bool planes, class Body> inline void write_vectors(const Block& block, int64_t row, Body body) {
  using A = typename Compute<T>::type;
  const int64_t begin = row * block.length, length = block.length, last = length - W<A>;
  const auto whole = [&](int64_t i) { body(begin + i, i, loader<T>(block), [](T* to, V<A> v) { narrow(to, v); }); };
  const auto part = [&](int64_t i, int64_t n) {
    body(begin + i, i, loader_of<T>(n), [n](T* to, V<A> v) { narrow(to, v, int(n)); });
  };
  int64_t i = 0;
  if (block.streaming) {
    if constexpr (planes) {
      i = std::min(length, lanes_to_boundary<T>(static_cast<const T*>(block.y ? block.y : block.dx) + begin));
      if (i) part(0, i);
    }
    for (; i <= last; i += W<A>) body(begin + i, i, loader<T>(block), [](T* to, V<A> v) { stream(to, v); });
  } else {
    for (; i <= last; i += W<A>) whole(i);
    if (i < length && last >= 0) return whole(last);
  }
  if (i < length) part(i, length - i);
}

// What a vector adds to the two sums.
template <class A> struct Terms {
  V<A> first, second;
};
template <class A> inline Terms<A> operator+(Terms<A> a, Terms<A> b) { return {a.first + b.first, a.second + b.second}; }
// The sum of n terms, by halves; terms(k) makes number k.
template <int n, class Make> inline auto summed(Make terms, int k = 0) {
  if constexpr (n > 1) return summed<n / 2>(terms, k) + summed<n / 2>(terms, k + n / 2);
  else return terms(k);
}

// Both sums of a block: of a value and of its product with another. at_row(row) makes a function of the offset of a vector,
// its place in the row and a loader, whose result has the two. Quick: products, and sums of a few vectors of a row of
// planes, otherwise of a few rows, are in A before they go to the sums in double.
template <class T, bool planes, bool quick, class AtRow> inline void add_up(const Block& block, AtRow at_row) {
  using A = typename Compute<T>::type;
  constexpr int few = planes ? 4 : together(sizeof(T));
  const auto with_product = [](Terms<A> t) { return Terms<A>{t.first, t.first * t.second}; };
  int64_t row = 0;
  if constexpr (quick && !planes)
    for (; row + few <= block.rows; row += few) {
      const auto factors = at_row(row);
      Sums<A, planes> sum(block.sum, row), product(block.product, row);
      read_vectors<T>(block, row, 0, [&](int64_t offset, int64_t i, auto load) {
        const Terms<A> t = summed<few>([&](int k) { return with_product(factors(offset + k * block.length, i, load)); });
        sum.at(i).add(t.first), product.at(i).add(t.second);
      });
    }
  for (; row < block.rows; ++row) {
    const auto factors = at_row(row);
    Sums<A, planes> sum(block.sum, row), product(block.product, row);
    if constexpr (quick && planes) {
      const int64_t begin = row * block.length;
      int64_t i = 0;
      for (; i + few * W<A> <= block.length; i += few * W<A>) {
        const Terms<A> t =
            summed<few>([&](int k) { return with_product(factors(begin + i + k * W<A>, i, loader<T>(block))); });
        sum.at(i).add(t.first), product.at(i).add(t.second);
      }
      Terms<A> rest{};
      read_vectors<T>(block, row, i, [&](int64_t offset, int64_t at, auto load) {
        rest = rest + with_product(factors(offset, at, load));
      });
      sum.at(i).add(rest.first), product.at(i).add(rest.second);
    } else {
      read_vectors<T>(block, row, 0, [&](int64_t offset, int64_t i, auto load) {
        const Terms<A> t = factors(offset, i, load);
        sum.at(i).add(t.first), product.at(i).add_product(t.first, t.second);
      });
    }
  }
}

// Sums of x - mean and of its square: in double from the start, or quickly.
template <class T, bool planes, bool quick> void statistics(const Block& block) {
  using A = typename Compute<T>::type;
  const auto x = static_cast<const T*>(block.x);
  if constexpr (quick)
    return add_up<T, planes, quick>(block, [&](int64_t row) {
      return [x, mean = PerChannel<A, planes>(block.mean, row)](int64_t offset, int64_t i, auto load) {
        const V<A> centered = load(x + offset, mean.at(i)) - mean.at(i);
        return Terms<A>{centered, centered};
      };
    });
  for (int64_t row = 0; row < block.rows; ++row) {
    const PerChannel<A, planes> mean(block.mean, row);
    Sums<A, planes> sum(block.sum, row), square(block.product, row);
    read_vectors<T>(block, row, 0, [&](int64_t offset, int64_t i, auto load) {
      add_centered(sum.at(i), square.at(i), load(x + offset, mean.at(i)), mean.at(i));
    });
  }
}

template <class T, bool planes, Activation g, bool residual> void normalize(const Block& block) {
  using A = typename Compute<T>::type;
  const auto x = static_cast<const T*>(block.x), other = static_cast<const T*>(block.kept);
  const auto y = static_cast<T*>(block.y);
  const A a = A(block.a), b = A(block.b);
  for (int64_t row = 0; row < block.rows; ++row) {
    const PerChannel<A, planes> mean(block.mean, row), scale(block.scale, row), shift(block.shift, row);
    write_vectors<T, planes>(block, row, [&](int64_t offset, int64_t i, auto load, auto store) {
      V<A> z = (load(x + offset) - mean.at(i)) * scale.at(i) + shift.at(i);
      if constexpr (residual) z += load(other + offset);
      store(y + offset, Row<g>::template value<A>(z, a, b));
    });
  }
  if (block.streaming) fence();
}

// dz = dy * g'(z), with z computed again from x (and the residual), or g'(z) from y.
template <class T, Activation g, Kept kept, class Load, class A = typename Compute<T>::type>
inline V<A> pre_activation_gradient(const Block& block, int64_t offset, Load load, V<A> centered, V<A> scale, V<A> shift) {
  const V<A> dy = load(static_cast<const T*>(block.dy) + offset);
  const A a = A(block.a), b = A(block.b);
  if constexpr (g == Activation::none) return dy;
  else if constexpr (kept == Kept::result)
    return dy * Row<g>::template from_result<A>(load(static_cast<const T*>(block.kept) + offset), a, b);
  else {
    V<A> z = centered * scale + shift;
    if constexpr (kept == Kept::residual) z += load(static_cast<const T*>(block.kept) + offset);
    return dy * Row<g>::template derivative<A>(z, a, b);
  }
}

// Sums of dz and of dz * (x - mean).
template <class T, bool planes, bool quick, Activation g, Kept kept> void gradient_sums(const Block& block) {
  using A = typename Compute<T>::type;
  add_up<T, planes, quick>(block, [&](int64_t row) {
    const PerChannel<A, planes> mean(block.mean, row), scale(block.scale, row), shift(block.shift, row);
    return [=, &block, x = static_cast<const T*>(block.x)](int64_t offset, int64_t i, auto load) {
      const V<A> centered = load(x + offset) - mean.at(i);  // beyond the end dy is 0, so dz is
      return Terms<A>{pre_activation_gradient<T, g, kept>(block, offset, load, centered, scale.at(i), shift.at(i)), centered};
    };
  });
}

template <class T, bool planes, Activation g, Kept kept> void input_gradient(const Block& block) {
  using A = typename Compute<T>::type;
  const auto x = static_cast<const T*>(block.x);
  const auto dx = static_cast<T*>(block.dx), dresidual = static_cast<T*>(block.dresidual);
  for (int64_t row = 0; row < block.rows; ++row) {
    const PerChannel<A, planes> mean(block.mean, row), scale(block.scale, row), shift(block.shift, row);
    const PerChannel<A, planes> mean_term(block.mean_term, row), centered_term(block.centered_term, row);
    write_vectors<T, planes>(block, row, [&](int64_t offset, int64_t i, auto load, auto store) {
      const V<A> centered = load(x + offset) - mean.at(i);
      const V<A> dz = pre_activation_gradient<T, g, kept>(block, offset, load, centered, scale.at(i), shift.at(i));
      store(dx + offset, scale.at(i) * dz - mean_term.at(i) - centered_term.at(i) * centered);
      if constexpr (kept != Kept::nothing) store(dresidual + offset, dz);
    });
  }
  if (block.streaming) fence();
}

// The pass for what is kept, of what may be kept for an activation: make<kept>() has it.
template <Activation g, class Make> Leaf for_kept(Kept kept, Make make) {
  if (kept == Kept::nothing) return make.template operator()<Kept::nothing>();
  if constexpr (may_keep(g, Kept::result))
    if (kept == Kept::result) return make.template operator()<Kept::result>();
  if constexpr (may_keep(g, Kept::residual))
    if (kept == Kept::residual) return make.template operator()<Kept::residual>();
  return nullptr;
}

template <class T, bool planes, Activation g> Leaf choose(Choice choice) {
  switch (choice.pass) {
    case Pass::statistics: return choice.quick ? statistics<T, planes, true> : statistics<T, planes, false>;
    case Pass::normalize:
      return choice.kept == Kept::nothing ? normalize<T, planes, g, false> : normalize<T, planes, g, true>;
    case Pass::gradient_sums:
      return for_kept<g>(choice.kept, [&]<Kept kept>() -> Leaf {
        return choice.quick ? gradient_sums<T, planes, true, g, kept> : gradient_sums<T, planes, false, g, kept>;
      });
    case Pass::input_gradient:
      return for_kept<g>(choice.kept, []<Kept kept>() -> Leaf { return input_gradient<T, planes, g, kept>; });
  }
  return nullptr;
}

template <class T, bool planes> Leaf choose(Choice choice) {
#define CASE(name, tells) \
  case Activation::name: return choose<T, planes, Activation::name>(choice);
  switch (choice.activation) { FOR_EACH_ACTIVATION(CASE) }
#undef CASE
  return nullptr;
}

template <class T> Leaf choose(Choice choice) {
  return choice.planes ? choose<T, true>(choice) : choose<T, false>(choice);
}

inline Leaf choose_leaf(Choice choice) {
  switch (choice.type) {
    case Type::float32: return choose<float>(choice);
    case Type::float64: return choose<double>(choice);
    case Type::bfloat16: return choose<BFloat16>(choice);
    case Type::float16: return choose<Float16>(choice);
  }
  return nullptr;
}

}  // namespace
