// NEON tier, ARMv8.0 base.
#include <arm_neon.h>

#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

#include "isa/vec_neon.h"
#include "kernels/activation.h"

// two vectors of consecutive floats, for instructions that load and store pairs
struct NeonPair {
  using Elem = float;
  struct reg {
    float32x4_t lo, hi;
  };
  static constexpr int W = 8;
  using In = reg;
  static constexpr bool kScalesAfter = false, kShortSums = false;
  static MNV4_INLINE reg zero() { return {VecNeon::zero(), VecNeon::zero()}; }
  static MNV4_INLINE reg set(float x) { return {VecNeon::set(x), VecNeon::set(x)}; }
  static MNV4_INLINE reg load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  // what sums begin with
  static MNV4_INLINE const float* begins(const float* bias) { return bias; }
  static MNV4_INLINE reg begin(const float* p) { return load(p); }
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
  static MNV4_INLINE reg mul(reg a, reg b) { return {VecNeon::mul(a.lo, b.lo), VecNeon::mul(a.hi, b.hi)}; }
  static MNV4_INLINE reg add(reg a, reg b) { return {VecNeon::add(a.lo, b.lo), VecNeon::add(a.hi, b.hi)}; }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) {
    return {VecNeon::fma(a.lo, b.lo, c.lo), VecNeon::fma(a.hi, b.hi, c.hi)};
  }
  static constexpr bool kTies = VecNeon::kTies;
  static MNV4_INLINE const float* after(const float* p, const reg& r) {
    asm("" : "+r"(p) : "w"(r.lo), "w"(r.hi));
    return p;
  }
  template <int N>
  static MNV4_INLINE void finish(reg (&)[N], const float*, int) {}
  static MNV4_INLINE void gelu_unit(float* p) { gelu_inplace<VecNeon>(p, kUnit); }
  static MNV4_INLINE reg max(reg a, reg b) { return {VecNeon::max(a.lo, b.lo), VecNeon::max(a.hi, b.hi)}; }
  static MNV4_INLINE reg min(reg a, reg b) { return {VecNeon::min(a.lo, b.lo), VecNeon::min(a.hi, b.hi)}; }
};

#include "kernels/depthwise_in_place.h"
#include "kernels/gemm.h"
#include "kernels/move.h"
#include "kernels/softmax.h"
#include "kernels/strided_winograd.h"
#include "kernels/table.h"

// 32 registers: 5 pixels x 4 vectors of accumulators, 5 of the pixels' terms, 4 of weights
struct Config {
  using V = VecNeon;
  static constexpr int kTallUnits = 1, kTallRows = 5;
  static constexpr int kWideUnits = 2, kWideRows = 2;
  // 16 registers of sums, 6 or 10 of taps, 2 of a pixel
  using StripVec = NeonPair;
  static constexpr int kDwCols3 = 8, kDwCols5 = 8;
  static constexpr bool kWinograd = false;
};

constexpr KernelTable kTable = make_table<Config>("neon");

}  // namespace

const KernelTable& neon_kernels() { return kTable; }

}  // namespace mnv4
