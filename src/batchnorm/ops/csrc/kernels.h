// The leaf loops, seen from outside: what they work on, and how one is chosen for a type and an instruction set.
#pragma once

#include <cstdint>
#include <iterator>

constexpr int64_t VECTOR = 64;  // bytes of the widest vector: what per-channel values are padded and aligned to

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

enum class Type { float32, float64, bfloat16, float16 };
// The activations, in the order of ops/activations.py, each with whether y = g(z) tells dg/dz; their equations are in
// activations.h.
#define FOR_EACH_ACTIVATION(_) \
  _(none, always) _(relu, always) _(relu6, always) _(leaky_relu, from_0_on) _(silu, never) _(hardswish, never) \
  _(sigmoid, always) _(tanh, always) _(gelu, never) _(gelu_tanh, never) _(elu, never) _(mish, never) _(hardtanh, never)

#define NAME(name, tells) name,
enum class Activation { FOR_EACH_ACTIVATION(NAME) };
#undef NAME
enum class Tells { always, never, from_0_on };  // from_0_on: where the parameter a is at least 0
#define TELLS(name, tells) Tells::tells,
constexpr Tells result_tells[] = {FOR_EACH_ACTIVATION(TELLS)};
#undef TELLS
constexpr int64_t ACTIVATIONS = std::size(result_tells);

// What is kept of a layer with a residual for its backward: y where that tells dg/dz, else the residual.
enum class Kept { nothing, result, residual };
constexpr bool may_keep(Activation g, Kept kept) {
  return kept == Kept::nothing || result_tells[int(g)] != (kept == Kept::result ? Tells::never : Tells::always);
}
constexpr Kept kept_for(Activation g, double a) {
  const Tells tells = result_tells[int(g)];
  return tells == Tells::always || (tells == Tells::from_0_on && a >= 0) ? Kept::result : Kept::residual;
}
enum class Pass { statistics, normalize, gradient_sums, input_gradient };

// A piece of a tensor: `rows` rows of `length` values that lie one after the other in memory. Per-channel values are of
// the type that is computed in. `planes`: a row is one channel's, and per-channel arrays hold a value for each row.
// Otherwise a row holds several channels, and per-channel arrays hold a value for each place in a row; they are
// padded to whole vectors and aligned to one. Sums have LANES places for each row of planes, else one for each place,
// padded to whole vectors of float.
struct Block {
  int64_t rows, length;
  const void *x, *dy, *kept;  // kept: y or the residual; normalize reads the residual here
  void *y, *dx, *dresidual;
  const void *mean, *scale, *shift;  // z = (x - mean) * scale + shift; statistics sums x - mean, for any mean
  const void *mean_term, *centered_term;  // dx = scale * dz - mean_term - centered_term * (x - mean)
  double *sum, *product;  // added to: (x - mean) and its square; dz and dz * (x - mean)
  double a, b;  // the activation's parameters
  int64_t ahead;  // bytes from a load to what is asked of memory with it
  bool streaming;  // writes go past the caches; without planes rows then begin at whole vectors
};

constexpr int64_t LANES = VECTOR / sizeof(double), LANES_OF_FLOAT = VECTOR / sizeof(float);
constexpr int64_t together(int64_t item) { return item == 2 ? 8 : 4; }  // rows of a quick sum

using Leaf = void (*)(const Block&);

struct Choice {
  Pass pass;
  Type type;
  Activation activation;
  Kept kept;
  bool planes;
  bool quick = false;  // of the two passes that sum: a few values are added in A before they go to a sum in double
};

namespace generic { Leaf choose(Choice); }
namespace avx2 { Leaf choose(Choice); }
namespace avx512 { Leaf choose(Choice); }
namespace avx512_bf16 { Leaf choose(Choice); }

enum class InstructionSet { generic, avx2, avx512, avx512_bf16 };
