// Softmax over keys and the row-wise kernels beside it.
#pragma once

// Keys beyond the last one have a score of -inf. The maximum may drop NaN: a row that has one becomes NaN by its sum.
template <class V>
void softmax(const SoftmaxArgs& args) {
  using reg = typename V::reg;
  const SoftmaxArgs a = args;  // a copy that no store can change
  constexpr int S = kUnit / V::W;
  for (int r = 0; r < a.rows; ++r) {
    float* s = a.s + r * kUnit;
    reg most[S], sum = V::zero();
    unroll<S>([&](auto j) MNV4_LAMBDA { most[j] = V::load(s + j * V::W); });
    for (int u = 1; u < a.units; ++u) {
      unroll<S>([&](auto j) MNV4_LAMBDA { most[j] = V::max(most[j], V::load(s + u * a.unit + j * V::W)); });
    }
    unroll<S - 1>([&](auto j) MNV4_LAMBDA { most[0] = V::max(most[0], most[j + 1]); });
    const reg top = V::set(V::reduce_max(most[0]));
    for (int u = 0; u < a.units; ++u) {
      reg part;
      unroll<S>([&](auto j) MNV4_LAMBDA {
        float* p = s + u * a.unit + j * V::W;
        const reg e = exp2_nonpositive<V>(V::sub(V::load(p), top));
        V::store(p, e);
        part = j == 0 ? e : V::add(part, e);
      });
      sum = V::add(sum, part);
    }
    a.inverse[r] = V::reduce_add(sum);
  }
  for (int r = 0; r < a.rows; ++r) a.inverse[r] = 1.0f / a.inverse[r];
}

template <class V>
void scale_rows(float* c, std::ptrdiff_t pix, std::ptrdiff_t unit, int units, int rows, const float* factor) {
  using reg = typename V::reg;
  auto row = [](float* p, auto mul) MNV4_LAMBDA {
    unroll<kUnit / V::W>([&](auto j) MNV4_LAMBDA { V::store(p + j * V::W, mul(V::load(p + j * V::W))); });
  };
  for (int u = 0; u < units; ++u, c += unit) {
    float* p = c;
    int r = 0;
    if constexpr (HasLanes<V>) {  // the factors of some rows by one load
      for (; r + V::W <= rows; r += V::W, p += V::W * pix) {
        const reg f = V::load(factor + r);
        unroll<V::W>([&](auto i) MNV4_LAMBDA {
          row(p + i * pix, [&](reg x) MNV4_LAMBDA { return V::template mul_lane<i>(x, f); });
        });
      }
    }
    for (; r < rows; ++r, p += pix) {
      const reg f = V::set(factor[r]);
      row(p, [&](reg x) MNV4_LAMBDA { return V::mul(x, f); });
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
