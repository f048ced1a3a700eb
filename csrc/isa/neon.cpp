// NEON tier, ARMv8.0 base.
#include <arm_neon.h>

#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

struct VecNeon {
  using reg = float32x4_t;
  static constexpr int W = 4;
  static MNV4_INLINE reg zero() { return vdupq_n_f32(0.0f); }
  static MNV4_INLINE reg set(float x) { return vdupq_n_f32(x); }
  static MNV4_INLINE reg load(const float* p) { return vld1q_f32(p); }
  static MNV4_INLINE void store(float* p, reg v) { vst1q_f32(p, v); }
  static MNV4_INLINE reg add(reg a, reg b) { return vaddq_f32(a, b); }
  static MNV4_INLINE reg sub(reg a, reg b) { return vsubq_f32(a, b); }
  static MNV4_INLINE reg mul(reg a, reg b) { return vmulq_f32(a, b); }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
  template <int I>
  static MNV4_INLINE reg fma_lane(reg a, reg b, reg c) {
    return vfmaq_laneq_f32(c, a, b, I);
  }
  template <int I>
  static MNV4_INLINE reg mul_lane(reg a, reg b) {
    return vmulq_laneq_f32(a, b, I);
  }
  // 16 floats, and moves on
#if defined(__clang__)
  using Unit = float32x4x4_t;
  static MNV4_INLINE Unit load_unit(const float*& p) {
    const Unit v = vld1q_f32_x4(p);  // one instruction
    p = hidden(p + 16);
    return v;
  }
#else
  struct Unit {  // g++ 12 copies registers to have four in a row
    reg val[4];
  };
  static MNV4_INLINE Unit load_unit(const float*& p) {
    const Unit v{{load(p), load(p + 4), load(p + 8), load(p + 12)}};
    p += 16;
    return v;
  }
#endif
  // the same pointer, but the compiler does not know
  static MNV4_INLINE const float* hidden(const float* p) {
    asm("" : "+r"(p));
    return p;
  }
#if defined(__clang__)
  static constexpr bool kTies = true;
#else
  static constexpr bool kTies = false;  // g++ keeps to the order of the source: see CMakeLists.txt
#endif
  static MNV4_INLINE const float* after(const float* p, reg& r) {
    asm("" : "+r"(p), "+w"(r));
    return p;
  }
  // FMAX and FMIN return NaN when either operand is one
  static MNV4_INLINE reg max(reg bound, reg x) { return vmaxq_f32(bound, x); }
  static MNV4_INLINE reg min(reg bound, reg x) { return vminq_f32(bound, x); }
  static MNV4_INLINE reg abs(reg x) { return vabsq_f32(x); }
  static MNV4_INLINE reg copysign(reg mag, reg sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, mag); }
  // the last bits moved to where the exponent is
  static MNV4_INLINE reg as_exponent(reg x) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23)); }
  static MNV4_INLINE reg select_greater(reg a, reg b, reg yes, reg no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
  static constexpr bool kScales = false;
  static constexpr bool kLooksUp = false;
  static MNV4_INLINE float reduce_max(reg x) { return vmaxvq_f32(x); }
  static MNV4_INLINE float reduce_add(reg x) { return vaddvq_f32(x); }
};

// two vectors of consecutive floats, for instructions that load and store pairs
struct NeonPair {
  using Half = VecNeon;
  struct reg {
    float32x4_t lo, hi;
  };
  static constexpr int W = 8;
  static MNV4_INLINE reg zero() { return {VecNeon::zero(), VecNeon::zero()}; }
  static MNV4_INLINE reg set(float x) { return {VecNeon::set(x), VecNeon::set(x)}; }
  static MNV4_INLINE reg load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  // loads and moves on: one instruction
  static MNV4_INLINE reg load_step(const float*& p, std::ptrdiff_t step) {
    const float32x4x2_t v = vld1q_f32_x2(p);
    p = VecNeon::hidden(p + step);
    return {v.val[0], v.val[1]};
  }
  static MNV4_INLINE void store(float* p, reg v) { vst1q_f32(p, v.lo), vst1q_f32(p + 4, v.hi); }
  static MNV4_INLINE void store_step(float*& p, std::ptrdiff_t step, reg v) {
    const float32x4x2_t both{{v.lo, v.hi}};
    vst1q_f32_x2(p, both);
    p = const_cast<float*>(VecNeon::hidden(p + step));
  }
  static MNV4_INLINE const float* hidden(const float* p) { return VecNeon::hidden(p); }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) {
    return {VecNeon::fma(a.lo, b.lo, c.lo), VecNeon::fma(a.hi, b.hi, c.hi)};
  }
  static constexpr bool kTies = VecNeon::kTies;
  static MNV4_INLINE const float* after(const float* p, const reg& r) {
    asm("" : "+r"(p) : "w"(r.lo), "w"(r.hi));
    return p;
  }
  static MNV4_INLINE reg max(reg a, reg b) { return {VecNeon::max(a.lo, b.lo), VecNeon::max(a.hi, b.hi)}; }
  static MNV4_INLINE reg min(reg a, reg b) { return {VecNeon::min(a.lo, b.lo), VecNeon::min(a.hi, b.hi)}; }
};

#include "kernels/activation.h"
#include "kernels/depthwise_in_place.h"
#include "kernels/gemm.h"
#include "kernels/move.h"
#include "kernels/softmax.h"
#include "kernels/strided_winograd.h"
#include "kernels/table.h"

// 32 registers: 5 pixels x 4 vectors of accumulators, 5 of the pixels' terms, 4 of weights; g++ 12 spills some of them
struct Config {
  using V = VecNeon;
#if defined(__clang__)
  static constexpr int kTallUnits = 1, kTallRows = 5;
#else
  static constexpr int kTallUnits = 1, kTallRows = 4;
#endif
  static constexpr int kWideUnits = 2, kWideRows = 2;
  // 16 registers of sums, 6 or 10 of taps, 2 of a pixel
  using Pair = NeonPair;
  static constexpr int kDwCols = 8;
  static constexpr bool kWinograd = false;
};

constexpr KernelTable kTable = make_table<Config>("neon");

}  // namespace

const KernelTable& neon_kernels() { return kTable; }

}  // namespace mnv4
