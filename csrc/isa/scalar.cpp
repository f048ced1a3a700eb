// Portable tier: GCC/Clang vector extensions, which become the baseline SIMD of the target or scalar code.
#include <cmath>
#include <cstring>
#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

struct Vec4 {
  typedef float reg __attribute__((vector_size(16)));
  typedef std::int32_t ireg __attribute__((vector_size(16)));
  static constexpr int W = 4;
  static MNV4_INLINE reg zero() { return reg{}; }
  static MNV4_INLINE reg set(float x) { return reg{x, x, x, x}; }
  static MNV4_INLINE reg load(const float* p) {
    reg v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static MNV4_INLINE void store(float* p, reg v) { std::memcpy(p, &v, sizeof v); }
  static MNV4_INLINE reg add(reg a, reg b) { return a + b; }
  static MNV4_INLINE reg sub(reg a, reg b) { return a - b; }
  static MNV4_INLINE reg mul(reg a, reg b) { return a * b; }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) { return a * b + c; }
  // the comparison is false for NaN in x, which then goes through
  static MNV4_INLINE reg max(reg bound, reg x) { return pick(bound > x, bound, x); }
  static MNV4_INLINE reg min(reg bound, reg x) { return pick(bound < x, bound, x); }
  static MNV4_INLINE reg minus_abs(reg x) { return as_float(as_int(x) | static_cast<std::int32_t>(0x80000000)); }
  // the last bits moved to where the exponent is
  static MNV4_INLINE reg as_exponent(reg x) { return as_float(as_int(x) << 23); }
  static constexpr bool kScales = false;
  static constexpr bool kLooksUp = false;
  static constexpr int kGeluStep = 1;
  static MNV4_INLINE float reduce_max(reg x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
  static MNV4_INLINE float reduce_add(reg x) { return (x[0] + x[2]) + (x[1] + x[3]); }

 private:
  static MNV4_INLINE ireg as_int(reg x) { return reinterpret_cast<ireg>(x); }
  static MNV4_INLINE reg as_float(ireg x) { return reinterpret_cast<reg>(x); }
  static MNV4_INLINE reg pick(ireg mask, reg yes, reg no) {
    return as_float((as_int(yes) & mask) | (as_int(no) & ~mask));
  }
};

#include "kernels/activation.h"
#include "kernels/depthwise.h"
#include "kernels/gemm.h"
#include "kernels/move.h"
#include "kernels/softmax.h"
#include "kernels/strided_winograd.h"
#include "kernels/table.h"

struct Config {
  using V = Vec4;
  static constexpr int kTallUnits = 1, kTallRows = 2;
  static constexpr int kWideUnits = 2, kWideRows = 1;
  static constexpr int kDwCols = 4;
  static constexpr bool kWinograd = true;
};

constexpr KernelTable kTable = make_table<Config>("scalar");

}  // namespace

const KernelTable& scalar_kernels() { return kTable; }

}  // namespace mnv4
