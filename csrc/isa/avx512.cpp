// AVX-512 tier (F, BW, DQ, VL).
#include <immintrin.h>

#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

struct Vec512 {
  using reg = __m512;
  static constexpr int W = 16;
  static MNV4_INLINE reg zero() { return _mm512_setzero_ps(); }
  static MNV4_INLINE reg set(float x) { return _mm512_set1_ps(x); }
  static MNV4_INLINE reg load(const float* p) { return _mm512_loadu_ps(p); }
  static MNV4_INLINE void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static MNV4_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static MNV4_INLINE reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static MNV4_INLINE reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static MNV4_INLINE reg max(reg bound, reg x) { return _mm512_max_ps(bound, x); }
  static MNV4_INLINE reg min(reg bound, reg x) { return _mm512_min_ps(bound, x); }
  // x - floor(x), 0 for infinities; a * 2^floor(x) without overflow in between
  static constexpr bool kScales = true;
  static MNV4_INLINE reg fraction(reg x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static MNV4_INLINE reg scale(reg a, reg x) { return _mm512_scalef_ps(a, x); }
  static MNV4_INLINE reg minus_abs(reg x) { return _mm512_or_ps(set(-0.0f), x); }
  // entry of an aligned table of 16 by the last four bits of each index
  static constexpr bool kLooksUp = true;
  static constexpr int kGeluStep = 1;
  static MNV4_INLINE reg lookup(const float* table, reg index) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(index), _mm512_load_ps(table));
  }
  static MNV4_INLINE float reduce_max(reg x) { return _mm512_reduce_max_ps(x); }
  static MNV4_INLINE float reduce_add(reg x) { return _mm512_reduce_add_ps(x); }
};

#include "kernels/activation.h"
#include "kernels/depthwise_near.h"
#include "kernels/gemm.h"
#include "kernels/move.h"
#include "kernels/softmax.h"
#include "kernels/strided_winograd.h"
#include "kernels/table.h"

struct Config {
  using V = Vec512;
  static constexpr int kTallUnits = 2, kTallRows = 13;
  static constexpr int kWideUnits = 4, kWideRows = 6;
  using StripVec = Single<V>;
  static constexpr int kDwCols = 8, kDwCols3 = 8, kDwCols5 = 8;
  static constexpr bool kWinograd = true;
};

constexpr KernelTable kTable = make_table<Config, depthwise_near<Config>>("avx512");

}  // namespace

const KernelTable& avx512_kernels() { return kTable; }

}  // namespace mnv4
