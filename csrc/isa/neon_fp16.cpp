// NEON with fp16 arithmetic (ARMv8.2): blocks and heads of 16-bit elements.
#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

#include "isa/vec_neon.h"
#include "kernels/activation.h"

struct VecHalf {
  using reg = float16x8_t;
  using Wide = VecNeon;
  static constexpr int W = 8;
  static MNV4_INLINE reg zero() { return vreinterpretq_f16_u16(vdupq_n_u16(0)); }
  static MNV4_INLINE reg set(float16_t x) { return vdupq_n_f16(x); }
  static MNV4_INLINE reg load(const Half* p) { return vld1q_f16(p); }
  static MNV4_INLINE void store(Half* p, reg v) { vst1q_f16(p, v); }
  static MNV4_INLINE float32x4_t low(reg v) { return vcvt_f32_f16(vget_low_f16(v)); }
  static MNV4_INLINE float32x4_t high(reg v) { return vcvt_high_f32_f16(v); }
  static MNV4_INLINE reg narrow(float32x4_t lo, float32x4_t hi) { return vcvt_high_f16_f32(vcvt_f16_f32(lo), hi); }
  static MNV4_INLINE reg add(reg a, reg b) { return vaddq_f16(a, b); }
  static MNV4_INLINE reg sub(reg a, reg b) { return vsubq_f16(a, b); }
  static MNV4_INLINE reg mul(reg a, reg b) { return vmulq_f16(a, b); }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) { return vfmaq_f16(c, a, b); }
  template <int I>
  static MNV4_INLINE reg fma_lane(reg a, reg b, reg c) {
#if defined(__clang__)
    return vfmaq_laneq_f16(c, a, b, I);
#else
    // see VecNeon
    asm("fmla %0.8h, %1.8h, %2.h[%3]" : "+w"(c) : "w"(a), "x"(b), "i"(I));
    return c;
#endif
  }
  template <int I>
  static MNV4_INLINE reg mul_lane(reg a, reg b) {
#if defined(__clang__)
    return vmulq_laneq_f16(a, b, I);
#else
    reg c;
    asm("fmul %0.8h, %1.8h, %2.h[%3]" : "=w"(c) : "w"(a), "x"(b), "i"(I));
    return c;
#endif
  }
  // FMAX and FMIN return NaN when either operand is one
  static MNV4_INLINE reg max(reg bound, reg x) { return vmaxq_f16(bound, x); }
  static MNV4_INLINE reg min(reg bound, reg x) { return vminq_f16(bound, x); }
  // whether all are 0 or -0
  static MNV4_INLINE bool all_zero(reg x) {
    const uint64x2_t bits = vreinterpretq_u64_f16(x);
    return ((vgetq_lane_u64(bits, 0) | vgetq_lane_u64(bits, 1)) & 0x7fff7fff7fff7fffu) == 0;
  }
  static MNV4_INLINE reg gelu(reg x) { return narrow(::mnv4::gelu<VecNeon>(low(x)), ::mnv4::gelu<VecNeon>(high(x))); }
  // 16 elements, and moves on
#if defined(__clang__)
  using Unit = float16x8x2_t;
  static MNV4_INLINE Unit load_unit(const Half*& p) {
    const Unit v = vld1q_f16_x2(p);  // one instruction
    p = hidden(p + 16);
    return v;
  }
  static constexpr bool kTies = true;
#else
  struct Unit {
    reg val[2];
  };
  static MNV4_INLINE Unit load_unit(const Half*& p) {
    const Unit v{{load(p), load(p + 8)}};
    p += 16;
    return v;
  }
  static constexpr bool kTies = false;
#endif
  static MNV4_INLINE const Half* hidden(const Half* p) {
    asm("" : "+r"(p));
    return p;
  }
  template <int N>
  static MNV4_INLINE const Half* after(const Half* p, reg (&acc)[N]) {
    unroll<N>([&](auto i) MNV4_LAMBDA {
      reg r = acc[i];
      asm("" : "+r"(p), "+w"(r));
      acc[i] = r;
    });
    return p;
  }
};

// the 16 channels of a pixel
struct HalfPair {
  using Elem = Half;
  struct reg {
    float16x8_t lo, hi;
  };
  static constexpr int W = 16;
  using In = reg;
  static constexpr bool kScalesAfter = true, kShortSums = true;
  static MNV4_INLINE reg zero() { return {VecHalf::zero(), VecHalf::zero()}; }
  static MNV4_INLINE reg set(float x) {
    const float16x8_t v = VecHalf::set(static_cast<float16_t>(x));
    return {v, v};
  }
  static MNV4_INLINE reg load(const Half* p) { return {VecHalf::load(p), VecHalf::load(p + 8)}; }
  // what sums begin with: 0, from memory, whose loads are idle
  static MNV4_INLINE const Half* begins(const float* bias) { return reinterpret_cast<const Half*>(bias) + 3 * kUnit; }
  static MNV4_INLINE reg begin(const Half* p) { return load(p); }
  // sums times their factors, in two parts, and what is added
  template <int N>
  static MNV4_INLINE void finish(reg (&acc)[N], const float* bias, int) {
    const Half* p = reinterpret_cast<const Half*>(bias);
    const reg factor = load(p), rest = load(p + kUnit), shift = load(p + 2 * kUnit);
    unroll<N>([&](auto t) MNV4_LAMBDA { acc[t] = fma(acc[t], factor, fma(acc[t], rest, shift)); });
  }
  // loads and moves on: one instruction
  static MNV4_INLINE reg load_step(const Half*& p, std::ptrdiff_t step) {
    const float16x8x2_t v = vld1q_f16_x2(p);
    p = VecHalf::hidden(p + step);
    return {v.val[0], v.val[1]};
  }
  static MNV4_INLINE void store(Half* p, reg v) { VecHalf::store(p, v.lo), VecHalf::store(p + 8, v.hi); }
  static MNV4_INLINE void store_step(Half*& p, std::ptrdiff_t step, reg v) {
    const float16x8x2_t both{{v.lo, v.hi}};
    vst1q_f16_x2(p, both);
    p = const_cast<Half*>(VecHalf::hidden(p + step));
  }
  static MNV4_INLINE const Half* hidden(const Half* p) { return VecHalf::hidden(p); }
  static MNV4_INLINE reg add(reg a, reg b) { return {VecHalf::add(a.lo, b.lo), VecHalf::add(a.hi, b.hi)}; }
  static MNV4_INLINE reg mul(reg a, reg b) { return {VecHalf::mul(a.lo, b.lo), VecHalf::mul(a.hi, b.hi)}; }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) {
    return {VecHalf::fma(a.lo, b.lo, c.lo), VecHalf::fma(a.hi, b.hi, c.hi)};
  }
  static constexpr bool kTies = VecHalf::kTies;
  static MNV4_INLINE const Half* after(const Half* p, const reg& r) {
    asm("" : "+r"(p) : "w"(r.lo), "w"(r.hi));
    return p;
  }
  static MNV4_INLINE reg max(reg a, reg b) { return {VecHalf::max(a.lo, b.lo), VecHalf::max(a.hi, b.hi)}; }
  static MNV4_INLINE reg min(reg a, reg b) { return {VecHalf::min(a.lo, b.lo), VecHalf::min(a.hi, b.hi)}; }
  static MNV4_INLINE void gelu_unit(Half* p) {
    VecHalf::store(p, VecHalf::gelu(VecHalf::load(p))), VecHalf::store(p + 8, VecHalf::gelu(VecHalf::load(p + 8)));
  }
};

#include "kernels/depthwise_in_place.h"
#include "kernels/gemm.h"
#include "kernels/gemm_half.h"
#include "kernels/gemm_units.h"
#include "kernels/move.h"

// 32 registers: 4 pixels x 2 vectors of running sums, of what they have lost with the first chain, and of the second
// chain; 4 of the pixels' terms, 2 of weights
struct Config {
  using V = VecHalf;
  static constexpr int kTallRows = 4, kPixelsAtOnce = 1;
  static constexpr int kWideUnits = 4, kWideRows = 1;
  // 16 registers of sums, 6 or 10 of taps, 2 of a pixel; with 5 x 5 taps twice as many sums
  using StripVec = HalfPair;
  static constexpr int kDwCols3 = 8, kDwCols5 = 4;
};

// Depthwise in fp32 arithmetic, for convolutions without BatchNorm: torch rounds their result once.
void depthwise_fine(const BasicDepthwiseArgs<Half>& d) {
  const Half* factors = reinterpret_cast<const Half*>(d.bias);
  for (int y = 0; y < d.rows; ++y) {
    for (int x = 0; x < d.cols; ++x) {
      const int first = d.width > 0 ? (d.first_col + x) * d.stride - d.left : 0;  // input column of the first tap
      for (int v = 0; v < kUnit; v += 4) {
        float32x4_t sum = vdupq_n_f32(0.0f);
        for (int ky = 0; ky < d.kernel; ++ky) {
          const std::ptrdiff_t row = d.row_off[y * d.kernel + ky];
          if (row < 0) continue;
          for (int kx = 0; kx < d.kernel; ++kx) {
            if (d.width > 0 && (first + kx < 0 || first + kx >= d.width)) continue;
            const Half* in = d.src + row + (x * d.stride + kx) * d.src_pix + v;
            sum = vfmaq_f32(sum, vcvt_f32_f16(vld1_f16(in)),
                            vcvt_f32_f16(vld1_f16(d.weight + (ky * d.kernel + kx) * kUnit + v)));
          }
        }
        const auto wide = [&](int i) { return vcvt_f32_f16(vld1_f16(factors + i * kUnit + v)); };
        sum = vfmaq_f32(wide(2), sum, vaddq_f32(wide(0), wide(1)));
        if (d.act == Act::relu || d.act == Act::relu6) sum = relu<VecNeon>(sum);
        if (d.act == Act::relu6) sum = VecNeon::min(VecNeon::set(6.0f), sum);
        if (d.act == Act::gelu) sum = gelu<VecNeon>(sum);
        vst1_f16(d.dst + y * d.dst_row + x * d.dst_pix + v, vcvt_f16_f32(sum));
      }
    }
  }
}

void depthwise_half(const BasicDepthwiseArgs<Half>& d) { d.fine ? depthwise_fine(d) : depthwise<Config>(d); }

constexpr BasicKernels<Half> kTable = {"neon_fp16",
                                       gemm_whole<Config, Half>,
                                       depthwise_half,
                                       load_unit<VecHalf, Half>,
                                       store_unit<VecHalf, Half>,
                                       sum_unit<VecHalf, Half>,
                                       nullptr,
                                       true,
                                       nullptr,
                                       nullptr};

}  // namespace

const BasicKernels<Half>& neon_fp16_kernels() { return kTable; }

}  // namespace mnv4
