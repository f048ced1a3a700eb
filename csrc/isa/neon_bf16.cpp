// NEON with products of bf16 (ARMv8.6): blocks and heads of BFloat16, sums in fp32.
#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

#include "isa/vec_neon.h"
#include "kernels/activation.h"

struct VecBf16 {
  using reg = bfloat16x8_t;
  using Wide = VecNeon;
  static constexpr int W = 8;
  static MNV4_INLINE reg load(const BFloat16* p) { return vreinterpretq_bf16_u16(vld1q_u16(&p->bits)); }
  static MNV4_INLINE void store(BFloat16* p, reg v) { vst1q_u16(&p->bits, vreinterpretq_u16_bf16(v)); }
  // the first n of 8, then zeros
  static MNV4_INLINE reg load_some(const BFloat16* p, int n) {
    BFloat16 t[8] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
  }
  static MNV4_INLINE float32x4_t low(reg v) {
    return vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(vreinterpretq_u16_bf16(v)), 16));
  }
  static MNV4_INLINE float32x4_t high(reg v) {
    return vreinterpretq_f32_u32(vshll_high_n_u16(vreinterpretq_u16_bf16(v), 16));
  }
  static MNV4_INLINE reg narrow(float32x4_t lo, float32x4_t hi) {
    return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(lo), hi);
  }
  // of two vectors the first and the second 64 bits
  static MNV4_INLINE reg first_halves(reg a, reg b) {
    return vreinterpretq_bf16_u64(vzip1q_u64(vreinterpretq_u64_bf16(a), vreinterpretq_u64_bf16(b)));
  }
  static MNV4_INLINE reg second_halves(reg a, reg b) {
    return vreinterpretq_bf16_u64(vzip2q_u64(vreinterpretq_u64_bf16(a), vreinterpretq_u64_bf16(b)));
  }
  static MNV4_INLINE float32x4_t first_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u64(vzip1q_u64(vreinterpretq_u64_f32(a), vreinterpretq_u64_f32(b)));
  }
  static MNV4_INLINE float32x4_t second_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u64(vzip2q_u64(vreinterpretq_u64_f32(a), vreinterpretq_u64_f32(b)));
  }
  // c + a b^T of 2 x 4 elements each
  static MNV4_INLINE float32x4_t mma(reg a, reg b, float32x4_t c) {
#if defined(__clang__)
    return vbfmmlaq_f32(c, a, b);
#else
    // see VecNeon
    asm("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
    return c;
#endif
  }
  // 16 elements, and moves on
  struct Unit {
    reg val[2];
  };
  static MNV4_INLINE Unit load_unit(const BFloat16*& p) {
    const Unit v{{load(p), load(p + 8)}};  // a pair: one instruction
    p = kTies ? hidden(p + 16) : p + 16;
    return v;
  }
#if defined(__clang__)
  static constexpr bool kTies = true;
#else
  static constexpr bool kTies = false;  // g++ keeps to the order of the source: see CMakeLists.txt
#endif
  static MNV4_INLINE const BFloat16* hidden(const BFloat16* p) {
    asm("" : "+r"(p));
    return p;
  }
  template <int N>
  static MNV4_INLINE const BFloat16* after(const BFloat16* p, float32x4_t (&acc)[N]) {
    unroll<N>([&](auto i) MNV4_LAMBDA {
      float32x4_t r = acc[i];
      asm("" : "+r"(p), "+w"(r));
      acc[i] = r;
    });
    return p;
  }
  static MNV4_INLINE const BFloat16* after(const BFloat16* p, reg& a, reg& b) {
    asm("" : "+r"(p), "+w"(a), "+w"(b));
    return p;
  }
  // long, so that it is not unrolled into the tiles
  static __attribute__((noinline)) float32x4_t gelu_of(float32x4_t x) { return gelu<VecNeon>(x); }
};

// 8 of the channels of a pixel: BFMLALB takes the even ones, BFMLALT the odd ones
struct Bf16Pair {
  using Elem = BFloat16;
  using In = bfloat16x8_t;
  struct reg {
    float32x4_t even, odd;
  };
  static constexpr int W = 8;
  static constexpr bool kScalesAfter = true, kShortSums = false;
  static MNV4_INLINE reg zero() { return {VecNeon::zero(), VecNeon::zero()}; }
  static MNV4_INLINE reg set(float x) { return {VecNeon::set(x), VecNeon::set(x)}; }
  static MNV4_INLINE In load(const BFloat16* p) { return VecBf16::load(p); }
  // sums begin with 0
  static MNV4_INLINE const BFloat16* begins(const float*) { return nullptr; }
  static MNV4_INLINE reg begin(const BFloat16*) { return zero(); }
  // sums times their factors, and what is added
  template <int N>
  static MNV4_INLINE void finish(reg (&acc)[N], const float* epilogue, int v) {
    const float32x4x2_t factor = vld2q_f32(epilogue + v), shift = vld2q_f32(epilogue + kUnit + v);
    unroll<N>([&](auto t) MNV4_LAMBDA {
      acc[t].even = VecNeon::fma(acc[t].even, factor.val[0], shift.val[0]);
      acc[t].odd = VecNeon::fma(acc[t].odd, factor.val[1], shift.val[1]);
    });
  }
  // loads and moves on: one instruction
  static MNV4_INLINE In load_step(const BFloat16*& p, std::ptrdiff_t step) {
    const In v = load(p);
    p = hidden(p + step);
    return v;
  }
  static MNV4_INLINE void store(BFloat16* p, reg v) {
    const uint16x8_t even = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(v.even)),
                     odd = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(v.odd));
    vst1q_u16(&p->bits, vzip1q_u16(even, odd));
  }
  static MNV4_INLINE void store_step(BFloat16*& p, std::ptrdiff_t step, reg v) {
    store(p, v);
    p = const_cast<BFloat16*>(hidden(p + step));
  }
  static MNV4_INLINE const BFloat16* hidden(const BFloat16* p) { return VecBf16::hidden(p); }
  static MNV4_INLINE reg fma(In a, In b, reg c) { return {vbfmlalbq_f32(c.even, a, b), vbfmlaltq_f32(c.odd, a, b)}; }
  static MNV4_INLINE reg mul(In a, In b) { return fma(a, b, zero()); }
  static constexpr bool kTies = VecBf16::kTies;
  static MNV4_INLINE const BFloat16* after(const BFloat16* p, const reg& r) {
    asm("" : "+r"(p) : "w"(r.even), "w"(r.odd));
    return p;
  }
  static MNV4_INLINE void gelu_unit(BFloat16* p) {
    for (int i = 0; i < kUnit; i += 8) {
      const In v = load(p + i);
      VecBf16::store(p + i, VecBf16::narrow(VecBf16::gelu_of(VecBf16::low(v)), VecBf16::gelu_of(VecBf16::high(v))));
    }
  }
  static MNV4_INLINE reg max(reg a, reg b) { return {VecNeon::max(a.even, b.even), VecNeon::max(a.odd, b.odd)}; }
  static MNV4_INLINE reg min(reg a, reg b) { return {VecNeon::min(a.even, b.even), VecNeon::min(a.odd, b.odd)}; }
};

#include "kernels/depthwise_in_place.h"
#include "kernels/gemm.h"
#include "kernels/gemm_bf16.h"
#include "kernels/gemm_units.h"
#include "kernels/move.h"

// 32 registers: 6 pixels x 4 vectors of sums for each two, 6 of the pixels' terms, 2 of weights
struct Config {
  using V = VecBf16;
  static constexpr int kTallRows = 6, kPixelsAtOnce = 2;
  static constexpr int kWideUnits = 2, kWideRows = 2;
  // 16 registers of sums, 3 or 5 of taps, 2 of pixels
  using StripVec = Bf16Pair;
  static constexpr int kDwCols3 = 8, kDwCols5 = 8;
};

constexpr BasicKernels<BFloat16> kTable = {"neon_bf16",
                                           gemm_whole<Config, BFloat16>,
                                           depthwise<Config>,
                                           load_unit<VecBf16, BFloat16>,
                                           store_unit<VecBf16, BFloat16>,
                                           sum_unit<VecBf16, BFloat16>,
                                           nullptr,
                                           true,
                                           nullptr,
                                           nullptr};

}  // namespace

const BasicKernels<BFloat16>& neon_bf16_kernels() { return kTable; }

}  // namespace mnv4
