// Four floats of NEON. Included inside of the namespace of a tier.
#pragma once

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
#if defined(__clang__)
    return vfmaq_laneq_f32(c, a, b, I);
#else
    // g++ 12 would let sums wander from register to register: copies, and with 20 of them spills
    asm("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(c) : "w"(a), "w"(b), "i"(I));
    return c;
#endif
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
  static MNV4_INLINE reg minus_abs(reg x) { return vnegq_f32(vabsq_f32(x)); }
  // the last bits moved to where the exponent is
  static MNV4_INLINE reg as_exponent(reg x) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23)); }
  static constexpr bool kScales = false;
  static constexpr bool kLooksUp = false;
  static constexpr int kGeluStep = 1;
  static MNV4_INLINE float reduce_max(reg x) { return vmaxvq_f32(x); }
  static MNV4_INLINE float reduce_add(reg x) { return vaddvq_f32(x); }
};
