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
  // FMAX and FMIN return NaN when either operand is one
  static MNV4_INLINE reg max(reg bound, reg x) { return vmaxq_f32(bound, x); }
  static MNV4_INLINE reg min(reg bound, reg x) { return vminq_f32(bound, x); }
  static MNV4_INLINE reg abs(reg x) { return vabsq_f32(x); }
  static MNV4_INLINE reg copysign(reg mag, reg sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, mag); }
  static MNV4_INLINE reg round(reg x) { return vrndnq_f32(x); }
  static MNV4_INLINE reg pow2(reg n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static MNV4_INLINE reg select_greater(reg a, reg b, reg yes, reg no) { return vbslq_f32(vcgtq_f32(a, b), yes, no); }
  static constexpr bool kScales = false;
  static MNV4_INLINE reg floor(reg x) { return vrndmq_f32(x); }
  static MNV4_INLINE float reduce_max(reg x) { return vmaxvq_f32(x); }
  static MNV4_INLINE float reduce_add(reg x) { return vaddvq_f32(x); }
};

#include "kernels/activation.h"
#include "kernels/depthwise.h"
#include "kernels/gemm.h"
#include "kernels/move.h"
#include "kernels/softmax.h"
#include "kernels/table.h"

// 32 registers: 6 pixels x 4 vectors of accumulators
struct Config {
  using V = VecNeon;
  static constexpr int kTallUnits = 1, kTallRows = 6;
  static constexpr int kWideUnits = 2, kWideRows = 2;
  static constexpr int kDwCols = 8;
};

constexpr KernelTable kTable = make_table<Config>("neon");

}  // namespace

const KernelTable& neon_kernels() { return kTable; }

}  // namespace mnv4
