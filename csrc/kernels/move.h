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

template <class V>
void sum_pixels(const float* src, int pixels, float* dst) {
  for (int v = 0; v < kUnit; v += V::W) {
    // four interleaved sums: shorter chains, smaller rounding error
    typename V::reg s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int p = 0;
    for (; p + 4 <= pixels; p += 4) {
      unroll<4>([&](auto i) MNV4_LAMBDA { s[i] = V::add(s[i], V::load(src + (p + i) * kUnit + v)); });
    }
    for (; p < pixels; ++p) s[0] = V::add(s[0], V::load(src + p * kUnit + v));
    const typename V::reg sum = V::add(V::add(s[0], s[1]), V::add(s[2], s[3]));
    V::store(dst + v, V::add(V::load(dst + v), sum));
  }
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
