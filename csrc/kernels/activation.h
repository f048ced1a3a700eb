// Activations. max and min take the bound first: x86 returns the second operand when one is NaN, so NaN goes through as
// in torch.
#pragma once

template <class V>
MNV4_INLINE typename V::reg relu(typename V::reg x) {
  return V::max(V::zero(), x);
}

template <class V>
MNV4_INLINE typename V::reg relu6(typename V::reg x) {
  return V::min(V::set(6.0f), relu<V>(x));
}

// 2^x for x <= 0, below 1.4 ulp (1.6 without a fused multiply-add; own minimax fit, Lawson iteration); 0 from -127 down
// in tiers without V::scale. NaN stays NaN.
template <class V>
MNV4_INLINE typename V::reg exp2_nonpositive(typename V::reg x) {
  using reg = typename V::reg;
  reg r, n;
  if constexpr (V::kScales) {
    r = V::fraction(x);
  } else {
    x = V::max(V::set(-127.0f), x);
    n = V::floor(x), r = V::sub(x, n);
  }
  reg p = V::set(2.161291631637141e-4f);
  p = V::fma(p, r, V::set(1.2467845808714628e-3f));
  p = V::fma(p, r, V::set(9.675451554358006e-3f));
  p = V::fma(p, r, V::set(5.5485282093286514e-2f));
  p = V::fma(p, r, V::set(2.402293086051941e-1f));
  p = V::fma(p, r, V::set(6.931470632553101e-1f));
  p = V::fma(p, r, V::set(1.0f));
  if constexpr (V::kScales) {
    return V::scale(p, x);
  } else {
    return V::mul(p, V::pow2(n));
  }
}

// erf below 1.4 ulp: odd polynomial below 0.92, 1 - 2^(t * Q(t)) above. Coefficients: own minimax fits (Lawson
// iteration).
template <class V>
MNV4_INLINE typename V::reg erf_value(typename V::reg x) {
  using reg = typename V::reg;
  const reg s = V::mul(x, x);
  const reg t = V::min(V::set(3.95f), V::abs(x));
  reg p = V::set(-6.021806038916111e-4f);
  p = V::fma(p, s, V::set(4.999601282179356e-3f));
  p = V::fma(p, s, V::set(-2.677128277719021e-2f));
  p = V::fma(p, s, V::set(1.1281955242156982e-1f));
  p = V::fma(p, s, V::set(-3.761250674724579e-1f));
  p = V::fma(p, s, V::set(1.2837915122509003e-1f));
  const reg small = V::fma(p, x, x);
  reg q = V::set(-1.6083875379990786e-05f);
  q = V::fma(q, t, V::set(0.0004644113651011139f));
  q = V::fma(q, t, V::set(-0.005249252077192068f));
  q = V::fma(q, t, V::set(0.034268371760845184f));
  q = V::fma(q, t, V::set(-0.15325111150741577f));
  q = V::fma(q, t, V::set(-0.9163402318954468f));
  q = V::fma(q, t, V::set(-1.6282929182052612f));
  const reg tail = exp2_nonpositive<V>(V::mul(q, t));
  const reg large = V::copysign(V::sub(V::set(1.0f), tail), x);
  return V::select_greater(t, V::set(0.92f), large, small);
}

// x * Phi(x), the erf form; NaN stays NaN, +inf stays +inf, -inf gives NaN as in torch (inf * 0).
template <class V>
MNV4_INLINE typename V::reg gelu(typename V::reg x) {
  using reg = typename V::reg;
  const reg e = erf_value<V>(V::mul(x, V::set(0.70710678118654752f)));
  return V::mul(V::mul(V::set(0.5f), x), V::add(V::set(1.0f), e));
}

// Applies an activation to `n` floats in place; n is a multiple of the vector width.
template <class V>
void gelu_inplace(float* p, int n) {
  for (int i = 0; i < n; i += V::W) V::store(p + i, gelu<V>(V::load(p + i)));
}
