// Compile-time unrolling: array indices stay constants in the front end, so accumulators become registers with every
// compiler.
#pragma once

#include <utility>

#define MNV4_INLINE inline __attribute__((always_inline))
#define MNV4_LAMBDA __attribute__((always_inline))

// Vectors that multiply by one element of another: V::fma_lane<I>(a, b, c) = a * b[I] + c, V::mul_lane<I>(a, b) =
// a * b[I]. V::load_unit(p) loads 16 floats at once and moves p on, V::after(p, r) keeps loads through p behind the
// making of r, where V::kTies says that the compiler would bring them forward.
template <class V>
concept HasLanes = requires(typename V::reg r) { V::template fma_lane<0>(r, r, r); };

// Vectors whose k-loop is written by hand: V::strided_terms and its kin.
template <class V>
concept HasTerms = V::kTerms;

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
