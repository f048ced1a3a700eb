// Softmax over keys and the row-wise kernels beside it.
#pragma once

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
