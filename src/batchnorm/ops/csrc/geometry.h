// How a tensor lies in memory, and how it is cut into rows, groups and chunks.
//
// N examples, C channels, S places. Two cuts, both in the order of memory:
//   planes, (N, C, S): a row is one channel's places in one example.
//   otherwise, (N, S, C), (N, C), and (N, C, S) with S small: a row is (outer, C, inner): all channels, `outer` times
//   over so that rows are long and fill vectors, each with `inner` places.
// Planes are worked on in groups of channels whose data stays in cache between the two passes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "kernels.h"

constexpr int64_t WORTH_A_THREAD = 32768;  // values, as in torch
constexpr int64_t ROW = 512;  // places that a row of several channels should have: fewer would be all loop overhead
constexpr int64_t CACHE = 1 << 18;  // bytes of x in a thread's group: with dy, and both of the next group, still in cache
constexpr int64_t RUN = 1 << 15;  // bytes that should be visited in order at the least

struct Geometry {
  int64_t N, C, S;
  bool planes;
  int64_t outer = 1, inner = 1;
  int64_t length = 0;  // of a row
  int64_t group = 0;  // channels that are worked on together
  int64_t threads = 1;
  bool apart = false;  // each thread works on channels of its own

  int64_t values() const { return N * S; }  // m, per channel
  int64_t places() const { return outer * C * inner; }
};

inline Geometry cut(int64_t N, int64_t C, int64_t S, bool channels_last, int64_t item, int64_t threads) {
  constexpr int64_t lanes = VECTOR / sizeof(float);
  Geometry g{N, C, S, !channels_last && S >= lanes};
  g.threads = std::clamp<int64_t>(N * C * S / WORTH_A_THREAD, 1, threads);
  g.group = C;
  g.length = S;
  if (N * C * S == 0) return g;  // nothing to visit
  if (g.planes) {
    const int64_t bytes = S * item;
    g.apart = C >= 4 * g.threads;
    const int64_t cache = CACHE * (g.apart ? 1 : g.threads);
    g.group = std::clamp(std::max(cache / (N * bytes), (RUN + bytes - 1) / bytes), int64_t(1), C);
    return g;
  }
  if (channels_last) {
    const int64_t whole = lanes / std::gcd(C, lanes);  // so many times C fill whole vectors
    if (whole * C <= 4 * ROW) g.outer = std::max<int64_t>(1, ROW / (whole * C)) * whole;
  } else {
    g.inner = S;
  }
  g.length = g.places();
  return g;
}
