// The kernel table: one row per instruction set, filled by csrc/isa/*.cpp and chosen once at run time.
#pragma once

#include "core/types.h"

namespace mnv4 {

// C[pixel][unit] (+)= A[pixel][k] * B[unit][k], k running over k_blocks runs of consecutive floats of A.
// A dense k x k convolution is the same product with a run for each tap (and unit of input channels).
// Sums of more than kSumWhole terms are cut at multiples of kSumBlock: each part starts from zero and is then added,
// which keeps the rounding error of long sums at that of short ones.
inline constexpr int kSumBlock = 160;
inline constexpr int kSumWhole = 288;

template <class T>
struct BasicGemmArgs {
  const T* a = nullptr;                     // first pixel, first k
  std::ptrdiff_t a_pix = 0, a_row = 0;      // elements between pixels of a row, between rows
  int k_blocks = 0, k_len = 0, k_last = 0;  // runs, elements of a run, elements of the last run
  std::ptrdiff_t a_blk = 0;                 // elements between runs
  const std::ptrdiff_t* k_off =
      nullptr;                   // offsets of the runs instead of a_blk, for taps and units of a dense convolution
  const T* b = nullptr;          // packed [unit][k][16], of BFloat16 [unit][k / 4][16][4]
  std::ptrdiff_t b_unit = 0;     // elements between units of b
  const T* then = nullptr;       // weights that this thread reads next, fetched during the last units; may be null
  std::ptrdiff_t then_unit = 0;  // elements between units there
  const float* bias = nullptr;   // [unit][kEpilogue]; when last_k; may be null for floats
  T* c = nullptr;
  std::ptrdiff_t c_pix = 0, c_row = 0, c_unit = 0;
  const T* res = nullptr;  // added after the activation when last_k; may be null
  std::ptrdiff_t r_pix = 0, r_row = 0, r_unit = 0;
  int rows = 0, cols = 0, units = 0;
  std::ptrdiff_t p_begin = 0, p_end = -1;  // range of pixels (row-major); -1: all
  int n_last = kUnit;                      // channels of the last unit that exist in C and res
  bool first_k = true, last_k = true;      // C is written, not added to / bias, activation and residual follow
  bool fine = false;                       // of Half: partial sums of 4 terms instead of 2 x 8
  Act act = Act::none;
};
using GemmArgs = BasicGemmArgs<float>;

// Depthwise k x k over one unit of 16 channels, for `rows` output rows.
template <class T>
struct BasicDepthwiseArgs {
  const T* src = nullptr;                   // plane with zero borders left and right
  const std::ptrdiff_t* row_off = nullptr;  // [rows][kernel]: offset of each input row, negative = outside of the image
  int kernel = 3, stride = 1;
  const T* weight = nullptr;    // [kernel * kernel][16]
  const float* bias = nullptr;  // [kEpilogue]
  T* dst = nullptr;             // [rows][cols][16]
  std::ptrdiff_t dst_row = 0;
  int rows = 0, cols = 0;
  Act act = Act::none;
  // Only for tables with depthwise_in_place: elements between pixels, and an image without borders, `width` pixels of
  // which lie in a row. src is then where input column -left of output column 0 would be, plus stride * first_col
  // pixels.
  std::ptrdiff_t src_pix = kUnit, dst_pix = kUnit;
  int width = 0, left = 0, first_col = 0;
  bool fine = false;  // of Half: fp32 arithmetic
};
using DepthwiseArgs = BasicDepthwiseArgs<float>;

// Transforms of a 3 x 3 convolution at stride 2, see core/winograd.h. Planes of the transformed input come in the order
// of the nine products that read them, 4 2 4 | 2 1 2 | 4 2 4: part i of the rows with part j of the columns.
inline constexpr int kWinogradPlanes = 25, kWinogradProducts = 9;
consteval int winograd_plane(int i, int j) {
  constexpr int product[5] = {0, 0, 1, 2, 2}, index[5] = {0, 1, 0, 0, 1}, size[3] = {2, 1, 2}, before[3] = {0, 2, 3};
  const int rows = size[product[i]], columns = size[product[j]];
  return 5 * before[product[i]] + rows * before[product[j]] + index[i] * columns + index[j];
}

struct WinogradInputArgs {
  const float* src = nullptr;  // five rows of 4 * tiles + 1 pixels
  std::ptrdiff_t pix = kUnit, row = 0;
  float* dst = nullptr;  // [plane][tile][16]
  std::ptrdiff_t plane = 0;
  int tiles = 0;
};

struct WinogradOutputArgs {
  const float* src = nullptr;  // [product][tile][16]
  std::ptrdiff_t plane = 0;
  const float* bias = nullptr;  // [16]; may be null
  float* dst = nullptr;         // two rows of 2 * tiles pixels, or one less
  std::ptrdiff_t pix = kUnit, row = 0;
  int tiles = 0;
  bool odd = false;  // the last tile has one column
  bool row_wanted[2] = {true, true};
  Act act = Act::none;
};

// Softmax over the keys of each row of scores, which are in units of log2 e: S becomes 2^(S - max) in place.
struct SoftmaxArgs {
  float* s = nullptr;       // [unit of keys][row][16]
  std::ptrdiff_t unit = 0;  // floats between units
  int rows = 0, units = 0;
  float* inverse = nullptr;  // [row]: 1 / sum
};

// What blocks and heads of elements T call.
template <class T>
struct BasicKernels {
  const char* name;
  void (*gemm)(const BasicGemmArgs<T>&);
  void (*depthwise)(const BasicDepthwiseArgs<T>&);
  // copy `cols` pixels of up to 16 channels to [cols][16], zero beyond `channels`
  void (*load_unit)(const T* src, std::ptrdiff_t pix, std::ptrdiff_t chan, int cols, int channels, T* dst);
  // the reverse
  void (*store_unit)(const T* src, T* dst, std::ptrdiff_t pix, std::ptrdiff_t chan, int cols, int channels);
  // dst[16] += sum over `pixels` of src[pixels][16]
  void (*sum)(const T* src, int pixels, float* dst);
  // as load_unit, then times scale[16] plus shift[16], which are 0 beyond the channels; null for 16-bit elements
  void (*load_affine)(const T* src, std::ptrdiff_t pix, std::ptrdiff_t chan, int cols, int channels, T* dst,
                      const float* scale, const float* shift);
  bool depthwise_in_place;
  // null in a table that does without; winograd_output returns bit y when a sum of row y is not finite
  void (*winograd_input)(const WinogradInputArgs&);
  unsigned (*winograd_output)(const WinogradOutputArgs&);
};

struct KernelTable : BasicKernels<float> {
  void (*softmax)(const SoftmaxArgs&);
  // c[unit][row][16] *= factor[row], rows `pix` floats apart
  void (*scale_rows)(float* c, std::ptrdiff_t pix, std::ptrdiff_t unit, int units, int rows, const float* factor);
  // floating-point operations of one pass of a register-only multiply-add loop (for the measured peak)
  double (*fma_burst)(int iterations);
};

const KernelTable& scalar_kernels();
#if defined(MNV4_OPS_HAVE_AVX2)
const KernelTable& avx2_kernels();
#endif
#if defined(MNV4_OPS_HAVE_AVX512)
const KernelTable& avx512_kernels();
#endif
#if defined(MNV4_OPS_HAVE_NEON)
const KernelTable& neon_kernels();
#endif
#if defined(MNV4_OPS_HALF)
const BasicKernels<Half>& neon_fp16_kernels();
const BasicKernels<BFloat16>& neon_bf16_kernels();
#endif

template <class T>
struct KernelsOf {
  using type = BasicKernels<T>;
};
template <>
struct KernelsOf<float> {
  using type = KernelTable;
};
/// All kernels for elements T.
template <class T>
using Kernels = typename KernelsOf<T>::type;
/// Those of this machine, null where it has none.
template <class T>
const Kernels<T>* kernels_for();

// Tiers this host can run, best last; `force` by name returns false when the host lacks it.
int available_tiers(const KernelTable** out, int max);
const KernelTable& active_kernels();
bool force_tier(const char* name);
/// All tiers of this host have the Winograd transforms.
bool has_winograd();

}  // namespace mnv4
