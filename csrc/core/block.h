// One MobileNetV4 convolution block: start depthwise, expand (1x1 or dense), mid depthwise, project; each stage
// optional.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/kernels.h"
#include "core/parallel.h"
#include "core/tickets.h"

namespace mnv4 {

enum class Stage : int { start = 0, expand = 1, mid = 2, project = 3 };
inline constexpr int kStages = 4;

struct BlockDesc {
  int c_in = 0, c_mid = 0, c_out = 0;
  int start_kernel = 0, start_stride = 1;
  bool expand = false;
  int expand_kernel = 1, expand_stride = 1;
  int mid_kernel = 0, mid_stride = 1;
  bool project = false;
  bool residual = false;
  bool same_padding = false;  // TF SAME instead of k / 2 on both sides
  Act act[kStages] = {Act::none, Act::none, Act::none, Act::none};
};

/// Empty when the description is valid, otherwise what is wrong (argument, value, expectation).
std::string check(const BlockDesc& d);

/// Sizes after the front (start depthwise or dense expand) and after the mid depthwise, and the padding before each.
struct Geometry {
  int h = 0, w = 0, h1 = 0, w1 = 0, h2 = 0, w2 = 0;
  int top1 = 0, left1 = 0, right1 = 0;
  int top2 = 0, left2 = 0, right2 = 0;
};
Geometry geometry(const BlockDesc& d, int h, int w);

/// How one range of output rows is walked. Sizes in floats.
struct Plan {
  int band = 1;           // output rows of a band
  int chunk = 1;          // units of the expanded activation handled together
  bool ring = false;      // expanded rows stay from band to band (all units kept); otherwise the halo is computed again
  int ring_rows = 0;      // rows of the expanded activation kept
  int step = 1;           // expanded rows computed at a time; the first band of a ring takes several steps
  std::size_t front = 0;  // shared: output of the start depthwise, or the zero-bordered input of a dense convolution
  std::size_t expanded = 0;  // shared: ring of expanded rows (only with a mid depthwise)
  std::size_t middle = 0;    // shared: input of the project stage
  std::size_t local = 0;     // of each thread: zero-bordered input rows of one unit
  std::size_t shared() const { return front + expanded + middle; }
};

inline constexpr int kTask = 4;  // units that a thread of a team takes at a time, where there are enough of them

/// The matrix that a later operation reads first, fetched towards the end of the one before it.
template <class T>
struct BasicUpcoming {
  const T* weight = nullptr;
  std::ptrdiff_t unit = 0;  // elements between units
  int units = 0;
  /// Lets thread tid of a team of n fetch what it takes first.
  void announce(BasicGemmArgs<T>& g, int tid, int n) const {
    if (weight != nullptr) g.then = weight + split(units, n, tid).lo / 2 * 2 * unit, g.then_unit = unit;
  }
};

using Upcoming = BasicUpcoming<float>;

/// The threads that work on one image together, and their scratch.
template <class T>
struct BasicTeam {
  int tid = 0, n = 1;
  Barrier* barrier = nullptr;
  T* shared = nullptr;
  T* local = nullptr;
  Draw* draw = nullptr;      // of a team of several
  bool own_pixels = false;   // each thread keeps to its own pixels of every stage, for all channels
  std::ptrdiff_t apart = 0;  // then: elements from the scratch of a thread to that of the next
  BasicUpcoming<T> after;    // of the next block
  /// Calls f(lo, hi, next) on parts of [0, count): all of it alone, otherwise parts of `size`, since a thread may be
  /// slowed down by others on its core. `next` is where the part starts that comes after this one, -1 if none does.
  template <class F>
  void share(int count, int size, F f) const {
    if (n == 1 || own_pixels) {
      if (count > 0) f(0, count, -1);
      return;
    }
    draw->each((count + size - 1) / size, [&](int i, int next) {
      f(i * size, i * size + size < count ? i * size + size : count, next < 0 ? -1 : next * size);
    });
  }
  /// Before what others have made is read, with or without pixels of one's own.
  void meet() const {
    if (n > 1) barrier->wait(tid, n);
  }
  /// Between stages that read what was dealt out before them; a thread that keeps to its pixels made it itself.
  void sync() const {
    if (!own_pixels) meet();
  }
  /// The pixels of [lo, hi) that this thread computes.
  Range pixels(int lo, int hi) const {
    if (!own_pixels) return {lo, hi};
    const Range r = split(hi - lo, n, tid);
    return {lo + r.lo, lo + r.hi};
  }
};

using Team = BasicTeam<float>;

/// Addresses of the parameters of one stage: contiguous float32, null where absent.
struct StageParams {
  const float *weight = nullptr, *bias = nullptr;
  const float *bn_weight = nullptr, *bn_bias = nullptr, *bn_mean = nullptr, *bn_var = nullptr;
  double eps = 0.0;
  const float* gamma = nullptr;
};

/// What BatchNorm, the convolution's bias and layer scale make of output channel o of a convolution.
struct Affine {
  double scale, shift;
};
Affine affine(const StageParams& p, int o);

struct AlignedFree {
  std::shared_ptr<void> chunk;  // the pool's memory that the buffer is a part of; empty: a buffer of its own
  void operator()(float* p) const;
};
using Buffer = std::unique_ptr<float[], AlignedFree>;
/// 64-byte aligned, zeroed. Null when there is no memory.
Buffer make_buffer(std::size_t floats);
/// From now on buffers share chunks of huge pages, where the system has them: a forward reads all weights once, which
/// on small pages costs an address translation every 4 KB and evicts those of everything else.
void pool_buffers();
/// Asks for huge pages in memory aligned to kHugePage.
void advise_huge(void* p, std::size_t bytes);
inline constexpr std::size_t kHugePage = std::size_t{1} << 21;

/// Folds BatchNorm and layer scale in float64 and writes [unit][k][16] and [unit][16].
/// Weight is [c_out, c_in, kernel, kernel]; k runs over kernel row, kernel column, input channel.
void pack_gemm(const StageParams& p, int c_out, int c_in, int kernel, float* weight, float* bias);
/// The same for depthwise weights [channels, 1, kernel, kernel]: [unit][kernel * kernel][16] and [unit][16].
void pack_depthwise(const StageParams& p, int channels, int kernel, float* weight, float* bias);

#define MNV4_OPS_FOR(T)                                                                              \
  void pack_gemm(const StageParams& p, int c_out, int c_in, int kernel, T* weight, float* epilogue); \
  void pack_depthwise(const StageParams& p, int channels, int kernel, T* weight, float* epilogue);
/// The same in 16 bits, where nothing is folded: the factors come after the sums. In Half a factor of an unusual size
/// gives powers of two to the weights. `epilogue` is [unit][kEpilogue<T>]. Weights of BFloat16 products are
/// [unit][k / 4][16][4]. All products have zeros up to packed_terms.
MNV4_OPS_EACH_HALF(MNV4_OPS_FOR)
#undef MNV4_OPS_FOR

/// What the threads of a parallel region share while they walk a list of operations.
template <class T>
struct BasicRegion {
  const Kernels<T>* kernels = nullptr;
  Barrier* barrier = nullptr;
  T* arena = nullptr;              // scratch_floats of each thread, one after the other
  std::size_t scratch_floats = 0;  // of one thread, in elements
  int tid = 0, n = 1;
  BasicUpcoming<T> after;
  Draw* draw = nullptr;  // images and parts of images
  T* scratch(int t) const { return arena + static_cast<std::size_t>(t) * scratch_floats; }
};
using Region = BasicRegion<float>;

/// A block of activations and weights of type T. Sizes in floats are in elements.
template <class T>
class BasicBlock {
 public:
  explicit BasicBlock(const BlockDesc& d);

  const BlockDesc& desc() const { return d_; }
  bool has(Stage s) const;
  /// False when the block has no such stage.
  bool pack(Stage s, const StageParams& p);
  bool packed() const;
  /// Weights of the first product.
  BasicUpcoming<T> upcoming() const;

  /// Runs a batch inside a parallel region. `padded`: out holds all 16 channels of its last unit. True if all threads
  /// have finished on return, false if they still need a barrier.
  bool run(const BasicRegion<T>& r, const BasicTensor<T>& x, const BasicTensor<T>& out, bool padded, int n, int h,
           int w) const;
  /// Scratch of one thread in floats.
  std::size_t scratch_floats(int h, int w, int threads) const;
  /// Output rows [y0, y1) of one image by one thread; x and out are addressed by absolute rows. `scratch` holds
  /// rows_floats().
  void run_alone(const BasicKernels<T>& k, const BasicView<T>& x, const BasicView<T>& out, bool padded, int h, int w,
                 int y0, int y1, T* scratch) const;
  std::size_t rows_floats(int h, int w, int rows) const;
  /// True when the input is copied row by row, so that any channel stride will do.
  bool any_channel_stride() const { return has(Stage::start) || (d_.expand_kernel > 1 && d_.c_in <= kUnit); }

  /// Floats of all packed parameters, whatever the elements are.
  std::size_t blob_floats() const { return total_; }
  const float* blob() const { return data_.get(); }
  /// Takes a copy of packed parameters of the same description.
  void adopt(const float* blob);

 private:
  Plan plan(const Geometry& g, int rows, int team) const;
  int last_channels(const BasicView<T>& x, bool padded) const;
  /// How the threads share one image.
  enum class Share { rows, pixels, tickets };
  Share share_of(const Geometry& g, int threads) const;
  void run_rows(const BasicKernels<T>& k, const BasicTeam<T>& t, const BasicView<T>& x, const BasicView<T>& out,
                int n_last, const Geometry& g, int y0, int y1) const;
  const T* weight(Stage s) const { return reinterpret_cast<const T*>(data_.get() + weight_[static_cast<int>(s)]); }
  const float* bias(Stage s) const { return data_.get() + bias_[static_cast<int>(s)]; }
  /// Elements of the weights of a unit of output channels.
  std::ptrdiff_t expand_unit() const {
    return packed_terms<T>(static_cast<std::ptrdiff_t>(d_.expand_kernel) * d_.expand_kernel * d_.c_in) * kUnit;
  }
  std::ptrdiff_t project_unit() const { return packed_terms<T>(d_.c_mid) * kUnit; }

  BlockDesc d_;
  std::size_t weight_[kStages] = {}, bias_[kStages] = {}, total_ = 0;
  std::size_t winograd_ = 0;                      // weights of the dense expand once more, transformed; 0: it has none
  bool done_[kStages] = {}, fine_[kStages] = {};  // fine: no BatchNorm, whose rounding in torch the sums could share
  Buffer data_;
};

using Block = BasicBlock<float>;

inline constexpr int kPatches = 12;  // border pixels of a dense convolution handled together

/// Images of few channels are copied between zero borders, some rows at a time: memory is read in order, and no window
/// is cut off.
inline bool copies_rows(const BlockDesc& d) { return d.expand_kernel > 1 && d.c_in <= 4; }
/// Elements of the copy for up to `rows` output rows.
std::size_t copied_floats(const BlockDesc& d, const Geometry& g, int rows);

/// Dense k x k convolution over output rows [y0, y1); `to` says where row y0 goes. Pixels whose window lies inside of
/// the image read the input in place, the others a copied patch. `winograd`: weights of the units of `to` for
/// winograd_rows, null where it does not serve.
template <class T>
void dense_rows(const BasicKernels<T>& k, const BasicTeam<T>& t, const BasicView<T>& v, const BlockDesc& d,
                const Geometry& g, int y0, int y1, const BasicGemmArgs<T>& to, const float* winograd);

/// Runs a product with its units and pixels dealt out over a team.
template <class T>
void gemm_split(const BasicKernels<T>& k, const BasicTeam<T>& t, BasicGemmArgs<T> g);

}  // namespace mnv4
