// AVX2 + FMA tier.
#include <immintrin.h>

#include <utility>

#include "core/kernels.h"

namespace mnv4 {
namespace {

#include "kernels/simd.h"

struct Vec256 {
  using reg = __m256;
  static constexpr int W = 8;
  static MNV4_INLINE reg zero() { return _mm256_setzero_ps(); }
  static MNV4_INLINE reg set(float x) { return _mm256_set1_ps(x); }
  static MNV4_INLINE reg load(const float* p) { return _mm256_loadu_ps(p); }
  static MNV4_INLINE void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static MNV4_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static MNV4_INLINE reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static MNV4_INLINE reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static MNV4_INLINE reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static MNV4_INLINE reg max(reg bound, reg x) { return _mm256_max_ps(bound, x); }
  static MNV4_INLINE reg min(reg bound, reg x) { return _mm256_min_ps(bound, x); }
  static MNV4_INLINE reg minus_abs(reg x) { return _mm256_or_ps(set(-0.0f), x); }
  // the last bits moved to where the exponent is
  static MNV4_INLINE reg as_exponent(reg x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
  }
  static constexpr bool kScales = false;
  static constexpr bool kLooksUp = false;
  static constexpr int kGeluStep = 6;  // vectors that a GELU takes together
  static MNV4_INLINE float reduce_max(reg x) {
    const __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 q = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  static MNV4_INLINE float reduce_add(reg x) {
    const __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
#include "isa/terms_avx2.h"
};

#include "kernels/activation.h"
#include "kernels/depthwise_near.h"
#include "kernels/gemm.h"
#include "kernels/move.h"
#include "kernels/softmax.h"
#include "kernels/strided_winograd.h"
#include "kernels/table.h"

// 16 registers: 6 pixels x 2 vectors of accumulators
struct Config {
  using V = Vec256;
  static constexpr int kTallUnits = 1, kTallRows = 6;
  static constexpr int kWideUnits = 2, kWideRows = 2;
  using StripVec = Single<V>;
  static constexpr int kDwCols = 6, kDwCols3 = 8, kDwCols5 = 8;
  static constexpr bool kWinograd = true;
};

constexpr KernelTable kTable = make_table<Config, depthwise_near<Config>>("avx2");

}  // namespace

const KernelTable& avx2_kernels() { return kTable; }

}  // namespace mnv4
