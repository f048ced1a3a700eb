// Layout changes between strided tensors and units of 16 channels, and the sum over pixels.
#pragma once

template <class V, class E = float>
void load_unit(const E* src, std::ptrdiff_t pix, std::ptrdiff_t chan, int cols, int channels, E* dst) {
  if (chan == 1 && channels == kUnit) {
    for (int x = 0; x < cols; ++x, src += pix, dst += kUnit) {
      unroll<kUnit / V::W>([&](auto i) MNV4_LAMBDA { V::store(dst + i * V::W, V::load(src + i * V::W)); });
    }
    return;
  }
  for (int x = 0; x < cols; ++x, src += pix, dst += kUnit) {
    int i = 0;
    for (; i < channels; ++i) dst[i] = src[i * chan];
    for (; i < kUnit; ++i) dst[i] = 0.0f;
  }
}

template <class V, class E = float>
void store_unit(const E* src, E* dst, std::ptrdiff_t pix, std::ptrdiff_t chan, int cols, int channels) {
  if (chan == 1 && channels == kUnit) {
    for (int x = 0; x < cols; ++x, dst += pix, src += kUnit) {
      unroll<kUnit / V::W>([&](auto i) MNV4_LAMBDA { V::store(dst + i * V::W, V::load(src + i * V::W)); });
    }
    return;
  }
  for (int x = 0; x < cols; ++x, dst += pix, src += kUnit) {
    for (int i = 0; i < channels; ++i) dst[i * chan] = src[i];
  }
}

// Sums of 16 in four chains, sums of those in four again: also a chain of equal values, as a flat image gives, keeps
// a small rounding error.
template <class V>
void sum_pixels(const float* src, int pixels, float* dst) {
  constexpr int kRun = 16;
  for (int v = 0; v < kUnit; v += V::W) {
    const auto tree = [](const typename V::reg* s)
                          MNV4_LAMBDA { return V::add(V::add(s[0], s[1]), V::add(s[2], s[3])); };
    const auto run = [&](int p) MNV4_LAMBDA {
      typename V::reg s[4];
      unroll<4>([&](auto i) MNV4_LAMBDA { s[i] = V::load(src + (p + i) * kUnit + v); });
      unroll<3>([&](auto j) MNV4_LAMBDA {
        unroll<4>([&](auto i) MNV4_LAMBDA { s[i] = V::add(s[i], V::load(src + (p + 4 * j + 4 + i) * kUnit + v)); });
      });
      return tree(s);
    };
    typename V::reg s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int p = 0;
    for (; p + 4 * kRun <= pixels; p += 4 * kRun) {
      unroll<4>([&](auto i) MNV4_LAMBDA { s[i] = V::add(s[i], run(p + i * kRun)); });
    }
    for (; p + kRun <= pixels; p += kRun) s[0] = V::add(s[0], run(p));
    typename V::reg rest[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (; p + 4 <= pixels; p += 4) {
      unroll<4>([&](auto i) MNV4_LAMBDA { rest[i] = V::add(rest[i], V::load(src + (p + i) * kUnit + v)); });
    }
    for (; p < pixels; ++p) rest[1] = V::add(rest[1], V::load(src + p * kUnit + v));
    V::store(dst + v, V::add(V::load(dst + v), V::add(tree(s), tree(rest))));
  }
}

// The same in fp32 of elements that are narrower.
template <class V, class E>
void sum_unit(const E* src, int pixels, float* dst) {
  using Wide = typename V::Wide;
  typename Wide::reg s[4];
  unroll<4>([&](auto i) MNV4_LAMBDA { s[i] = Wide::load(dst + 4 * i); });
  for (int p = 0; p < pixels; ++p, src += kUnit) {
    unroll<2>([&](auto i) MNV4_LAMBDA {
      const typename V::reg v = V::load(src + 8 * i);
      s[2 * i] = Wide::add(s[2 * i], V::low(v)), s[2 * i + 1] = Wide::add(s[2 * i + 1], V::high(v));
    });
  }
  unroll<4>([&](auto i) MNV4_LAMBDA { Wide::store(dst + 4 * i, s[i]); });
}

template <class V>
double fma_burst(int iterations) {
  constexpr int N = 12;
  typename V::reg acc[N];
  unroll<N>([&](auto i) MNV4_LAMBDA { acc[i] = V::set(0.5f + i); });
  typename V::reg a = V::set(0.999f), b = V::set(1e-3f);
  for (int it = 0; it < iterations; ++it) {
    asm volatile("" ::: "memory");
    unroll<8>([&](auto) MNV4_LAMBDA { unroll<N>([&](auto i) MNV4_LAMBDA { acc[i] = V::fma(acc[i], a, b); }); });
  }
  typename V::reg sum = acc[0];
  unroll<N>([&](auto i) MNV4_LAMBDA { sum = V::add(sum, acc[i]); });
  alignas(64) float out[V::W];
  V::store(out, sum);
  volatile float sink = out[0];
  (void)sink;
  return 2.0 * 8 * N * V::W * iterations;
}
