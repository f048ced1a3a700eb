// Compile-time unrolling: array indices stay constants in the front end, so accumulators become registers with every
// compiler.
#pragma once

#include <utility>

#define MNV4_INLINE inline __attribute__((always_inline))
#define MNV4_LAMBDA __attribute__((always_inline))

template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};

template <class F, int... I>
MNV4_INLINE void unroll_impl(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}

template <int N, class F>
MNV4_INLINE void unroll(F&& f) {
  unroll_impl(f, std::make_integer_sequence<int, N>{});
}
