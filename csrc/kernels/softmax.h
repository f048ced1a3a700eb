// Softmax over keys and the row-wise kernels beside it.
#pragma once

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

// Keys beyond the last one have a score of -inf. The maximum may drop NaN: a row that has one becomes NaN by its sum.
template <class V>
void softmax(const SoftmaxArgs& a) {
  using reg = typename V::reg;
  constexpr int S = kUnit / V::W;
  for (int r = 0; r < a.rows; ++r) {
    float* s = a.s + r * kUnit;
    reg most[S], sum[S];
    unroll<S>([&](auto j) MNV4_LAMBDA { most[j] = V::load(s + j * V::W), sum[j] = V::zero(); });
    for (int u = 1; u < a.units; ++u) {
      unroll<S>([&](auto j) MNV4_LAMBDA { most[j] = V::max(most[j], V::load(s + u * a.unit + j * V::W)); });
    }
    unroll<S - 1>([&](auto j) MNV4_LAMBDA { most[0] = V::max(most[0], most[j + 1]); });
    const reg top = V::set(V::reduce_max(most[0]));
    for (int u = 0; u < a.units; ++u) {
      unroll<S>([&](auto j) MNV4_LAMBDA {
        float* p = s + u * a.unit + j * V::W;
        const reg e = exp2_nonpositive<V>(V::sub(V::load(p), top));
        V::store(p, e);
        sum[j] = V::add(sum[j], e);
      });
    }
    unroll<S - 1>([&](auto j) MNV4_LAMBDA { sum[0] = V::add(sum[0], sum[j + 1]); });
    a.inverse[r] = 1.0f / V::reduce_add(sum[0]);
  }
}

template <class V>
void scale_rows(float* c, std::ptrdiff_t unit, int units, int rows, const float* factor) {
  for (int u = 0; u < units; ++u, c += unit) {
    for (int r = 0; r < rows; ++r) {
      const typename V::reg f = V::set(factor[r]);
      unroll<kUnit / V::W>([&](auto j) MNV4_LAMBDA {
        float* p = c + r * kUnit + j * V::W;
        V::store(p, V::mul(V::load(p), f));
      });
    }
  }
}

template <class V>
void load_affine(const float* src, std::ptrdiff_t pix, std::ptrdiff_t chan, int cols, int channels, float* dst,
                 const float* scale, const float* shift) {
  if (chan != 1 || channels != kUnit) {
    load_unit<V>(src, pix, chan, cols, channels, dst);
    src = dst, pix = kUnit;
  }
  for (int v = 0; v < kUnit; v += V::W) {
    const typename V::reg a = V::load(scale + v), b = V::load(shift + v);
    for (int i = 0; i < cols; ++i) V::store(dst + i * kUnit + v, V::fma(V::load(src + i * pix + v), a, b));
  }
}
