// The activations' equations on vectors, a row each: g(z), dg/dz at z (at a kink the one-sided derivative that torch
// takes), and where y = g(z) tells it, dg/dz from y. `a` and `b` are the activation's parameters.
#pragma once

#include "vector.h"

namespace {

// ---- functions that they are made of --------------------------------------------------------------------------------

// e^v to about 1 ulp; 0 below the normal numbers, infinity above the range.
inline V<float> exponential(V<float> v) {
  typedef VectorOf<float>::bits I;
  const V<float> high = splat(88.72284f), low = splat(-87.33654f);
  const V<float> x = v > high ? high : v < low ? low : v;
  const V<float> shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const V<float> n = (x * 1.44269504f + shifter) - shifter;
  V<float> r = x - n * 0.693145752f;  // log 2 in two parts, the first exact in n * part
  r -= n * 1.42860677e-6f;
  V<float> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I exponent = __builtin_convertvector(n, I);
  const I half = exponent >> 1;  // in two factors: 2^128 is no float
  const I first = (half + 127) << 23, second = (exponent - half + 127) << 23;
  V<float> a, b;
  std::memcpy(&a, &first, BYTES);
  std::memcpy(&b, &second, BYTES);
  const V<float> result = p * a * b;
  const V<float> bounded = v > high ? splat(__builtin_inff()) : v < low ? V<float>{} : result;
  return v == v ? bounded : v;
}
inline V<double> exponential(V<double> v) {
  for (int i = 0; i < W<double>; ++i) v[i] = __builtin_exp(v[i]);
  return v;
}
inline V<double> hyperbolic_tangent(V<double> v) {
  for (int i = 0; i < W<double>; ++i) v[i] = __builtin_tanh(v[i]);
  return v;
}
inline V<float> hyperbolic_tangent(V<float> v) {
  const V<float> size = v < 0 ? -v : v, square = v * v;
  V<float> p = -5.70498872745e-3f * square + 2.06390887954e-2f;  // small |v|: 1 - 2 / (...) would cancel
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const V<float> small = p * square * v + v;
  const V<float> large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  const V<float> chosen = size < 0.625f ? small : v < 0 ? -large : large;
  return v == v ? chosen : v;
}
template <class A> inline V<A> logistic(V<A> z) { return A(1) / (A(1) + exponential(-z)); }

// Of the standard normal distribution: the density, and the integral up to z.
struct Normal {
  template <class A> static V<A> density(V<A> z) { return A(0.3989422804014327) * exponential(A(-0.5) * z * z); }
  static V<double> integral(V<double> z) {
    for (int i = 0; i < W<double>; ++i) z[i] = 0.5 * __builtin_erfc(z[i] * -0.7071067811865476);
    return z;
  }
  // Beyond |z| exp(-z^2 / 2) t q(t), t = 1 / (1 + 0.3 |z|), with q fitted to relative 1.1e-7 up to |z| = 13.
  static V<float> integral(V<float> z) {
    const V<float> size = z < 0 ? -z : z, t = 1.0f / (1.0f + 0.3f * size);
    V<float> q = 0.03619479722f * t - 0.1593780734f;
    q = q * t + 0.2101179981f;
    q = q * t - 0.05716701649f;
    q = q * t + 0.1304162781f;
    q = q * t + 0.09934717439f;
    q = q * t + 0.1208455227f;
    q = q * t + 0.1196232631f;
    const V<float> beyond = exponential(-0.5f * z * z) * (t * q);
    return z < 0 ? beyond : z > 0 ? 1.0f - beyond : z == 0 ? splat(0.5f) : z;
  }
};

// ---- the rows -------------------------------------------------------------------------------------------------------

template <Activation g> struct Row;

// Where z and y lie on the same side of all kinks, and dg/dz is the same on a side.
template <Activation g> struct SameSide {
  template <class A> static V<A> from_result(V<A> y, A a, A b) { return Row<g>::template derivative<A>(y, a, b); }
};

template <> struct Row<Activation::none> : SameSide<Activation::none> {
  template <class A> static V<A> value(V<A> z, A, A) { return z; }
  template <class A> static V<A> derivative(V<A>, A, A) { return splat(A(1)); }
};

template <> struct Row<Activation::relu> : SameSide<Activation::relu> {
  template <class A> static V<A> value(V<A> z, A, A) { return z <= V<A>{} ? V<A>{} : z; }
  template <class A> static V<A> derivative(V<A> z, A, A) { return z > V<A>{} ? splat(A(1)) : V<A>{}; }
};

template <> struct Row<Activation::hardtanh> {
  template <class A> static V<A> value(V<A> z, A a, A b) { return z <= splat(a) ? splat(a) : z > splat(b) ? splat(b) : z; }
  template <class A> static V<A> derivative(V<A> z, A a, A b) {
    return (z > splat(a)) & (z < splat(b)) ? splat(A(1)) : V<A>{};
  }
};

template <> struct Row<Activation::relu6> : SameSide<Activation::relu6> {
  using Between = Row<Activation::hardtanh>;
  template <class A> static V<A> value(V<A> z, A, A) { return Between::value<A>(z, 0, 6); }
  template <class A> static V<A> derivative(V<A> z, A, A) { return Between::derivative<A>(z, 0, 6); }
};

template <> struct Row<Activation::leaky_relu> : SameSide<Activation::leaky_relu> {
  template <class A> static V<A> value(V<A> z, A a, A) { return z > V<A>{} ? z : z * a; }
  template <class A> static V<A> derivative(V<A> z, A a, A) { return z > V<A>{} ? splat(A(1)) : splat(a); }
};

template <> struct Row<Activation::silu> {
  template <class A> static V<A> value(V<A> z, A, A) { return z * logistic<A>(z); }
  template <class A> static V<A> derivative(V<A> z, A, A) {
    const V<A> s = logistic<A>(z);
    return s * (A(1) + z * (A(1) - s));
  }
};

template <> struct Row<Activation::hardswish> {
  template <class A> static V<A> value(V<A> z, A, A) {
    return z * Row<Activation::relu6>::value<A>(z + A(3), 0, 0) / A(6);
  }
  template <class A> static V<A> derivative(V<A> z, A, A) {
    return z <= splat(A(-3)) ? V<A>{} : z >= splat(A(3)) ? splat(A(1)) : z / A(3) + A(0.5);
  }
};

template <> struct Row<Activation::sigmoid> {
  template <class A> static V<A> value(V<A> z, A, A) { return logistic<A>(z); }
  template <class A> static V<A> derivative(V<A> z, A a, A b) { return from_result<A>(logistic<A>(z), a, b); }
  template <class A> static V<A> from_result(V<A> y, A, A) { return y * (A(1) - y); }
};

template <> struct Row<Activation::tanh> {
  template <class A> static V<A> value(V<A> z, A, A) { return hyperbolic_tangent(z); }
  template <class A> static V<A> derivative(V<A> z, A a, A b) { return from_result<A>(hyperbolic_tangent(z), a, b); }
  template <class A> static V<A> from_result(V<A> y, A, A) { return A(1) - y * y; }
};

template <> struct Row<Activation::gelu> {
  template <class A> static V<A> value(V<A> z, A, A) { return z * Normal::integral(z); }
  template <class A> static V<A> derivative(V<A> z, A, A) { return Normal::integral(z) + z * Normal::density<A>(z); }
};

template <> struct Row<Activation::gelu_tanh> {  // z (1 + tanh(u)) / 2 = z sigmoid(2 u)
  static constexpr double ROOT = 1.5957691216057308, CUBE = 0.044715;  // 2 sqrt(2 / pi)
  template <class A> static V<A> twice_u(V<A> z) { return A(ROOT) * z * (A(1) + A(CUBE) * z * z); }
  template <class A> static V<A> value(V<A> z, A, A) { return z * logistic<A>(twice_u<A>(z)); }
  template <class A> static V<A> derivative(V<A> z, A, A) {
    const V<A> bound = splat(A(20)), x = z > bound ? bound : z < -bound ? -bound : z;  // beyond it is 0 or 1
    const V<A> e = exponential(x < 0 ? twice_u<A>(x) : -twice_u<A>(x)), s = A(1) / (A(1) + e);  // s (1 - s) is e s^2
    return (x < 0 ? e * s : s) + x * (e * s * s) * (A(ROOT) * (A(1) + A(3 * CUBE) * x * x));
  }
};

template <> struct Row<Activation::elu> {
  template <class A> static V<A> value(V<A> z, A a, A) {
    const V<A> t = hyperbolic_tangent(A(0.5) * z);  // e^z - 1 = 2 t / (1 - t), which does not cancel near 0
    return z > V<A>{} ? z : a * (A(2) * t / (A(1) - t));
  }
  template <class A> static V<A> derivative(V<A> z, A a, A) { return z > V<A>{} ? splat(A(1)) : a * exponential(z); }
};

template <> struct Row<Activation::mish> {  // z tanh(log(1 + e^z)) = z n / (n + 2), n = e^z (e^z + 2)
  template <class A> static V<A> bounded(V<A> z) { return z > splat(A(20)) ? splat(A(20)) : z; }  // there it is z
  template <class A> static V<A> value(V<A> z, A, A) {
    const V<A> e = exponential(bounded<A>(z)), n = e * (e + A(2));
    return z * (n / (n + A(2)));
  }
  template <class A> static V<A> derivative(V<A> z, A, A) {
    const V<A> x = bounded<A>(z), e = exponential(x), n = e * (e + A(2)), w = A(1) / (n + A(2));
    return n * w + A(4) * x * (e * w) * ((e + A(1)) * w);
  }
};

}  // namespace
