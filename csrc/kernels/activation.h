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

// e^x for x <= 0, below 1.2 ulp; flushes to 0 under -87.
template <class V>
MNV4_INLINE typename V::reg exp_nonpositive(typename V::reg x) {
  using reg = typename V::reg;
  x = V::max(V::set(-87.3f), x);
  const reg n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  // ln 2 in two parts: n * hi is exact
  reg r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  reg p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), V::add(r, V::set(1.0f)));
  return V::mul(p, V::pow2(n));
}

// erf to about 1 ulp: odd polynomial below 0.92, 1 - exp(-t * Q(t)) above. Coefficients: own minimax fits (Lawson
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
  reg q = V::set(1.1148493285872974e-5f);
  q = V::fma(q, t, V::set(-3.219054196961224e-4f));
  q = V::fma(q, t, V::set(3.6385043058544397e-3f));
  q = V::fma(q, t, V::set(-2.3753026500344276e-2f));
  q = V::fma(q, t, V::set(1.0622557252645493e-1f));
  q = V::fma(q, t, V::set(6.351586580276489e-1f));
  q = V::fma(q, t, V::set(1.1286466121673584f));
  const reg tail = exp_nonpositive<V>(V::sub(V::zero(), V::mul(q, t)));
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
