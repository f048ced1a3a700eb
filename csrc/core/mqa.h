// Mobile multi-query attention: pre-norm, query, key and value branches, attention, output projection, residual.
#pragma once

#include <vector>

#include "core/block.h"

namespace mnv4 {

struct MqaDesc {
  int c = 0, heads = 0, key_dim = 0, value_dim = 0;
  int kv_kernel = 3, kv_stride = 1;  // depthwise before the 1x1 of keys and of values, with stride 2 only
  int query_stride = 1;              // 2: average pool before, bilinear up-sampling after the attention
  bool norm = true, query_norm = false;
  bool same_padding = false;
  bool residual = true;
};

std::string check(const MqaDesc& d);

/// Stages in the order in which they are packed; `norm` and `query_norm` have no weight and fold into those after them.
enum class MqaStage : int { norm, query_norm, query, key_down, key, value_down, value, output };
inline constexpr int kMqaStages = 8;

/// Rows and columns of the input, of queries, of keys and of the output.
struct MqaGeometry {
  int h = 0, w = 0, hq = 0, wq = 0, hk = 0, wk = 0, ho = 0, wo = 0;
  Geometry down;  // of the depthwise
  int nq() const { return hq * wq; }
  int nk() const { return hk * wk; }
};
MqaGeometry geometry(const MqaDesc& d, int h, int w);

/// All of an attention block that does not depend on the elements of its input and output: packing, and the run in
/// fp32.
class MqaBlock {
 public:
  explicit MqaBlock(const MqaDesc& d);
  const MqaDesc& desc() const { return d_; }
  bool has(MqaStage s) const;
  /// Empty, or what was wrong. A norm has to be packed before the stages that it folds into, which then are to be
  /// packed again.
  std::string pack(MqaStage s, const StageParams& p);
  bool packed() const;
  /// Empty when the block takes inputs of this size.
  std::string refuses(int h, int w) const;

  std::size_t blob_floats() const { return total_; }
  const float* blob() const { return data_.get(); }
  void adopt(const float* blob);

 protected:
  struct Plan;
  Plan plan(const MqaGeometry& g, int team) const;
  void run_image(const KernelTable& k, const Team& t, const View& x, const View& out, int n_last,
                 const MqaGeometry& g) const;
  const float* weight(MqaStage s) const { return data_.get() + weight_[static_cast<int>(s)]; }
  int key_units() const { return units_of(d_.key_dim); }

  MqaDesc d_;

 private:
  struct Channels {
    std::vector<double> scale, shift;  // empty: none
  };
  Channels folded(MqaStage s) const;
  void keys_and_values(const KernelTable& k, const Team& t, const View& x, const MqaGeometry& g, const Plan& p) const;
  void finish(const KernelTable& k, const Team& t, const View& x, const View& out, int n_last, const MqaGeometry& g,
              const Plan& p) const;
  const float* bias(MqaStage s) const { return data_.get() + bias_[static_cast<int>(s)]; }
  int value_units() const { return units_of(d_.value_dim); }

  std::size_t weight_[kMqaStages] = {}, bias_[kMqaStages] = {}, total_ = 0;
  bool done_[kMqaStages] = {};
  Channels norm_[2];  // what the norms do, in float64
  bool known_[2] = {};
  Buffer data_;
};

/// An attention block of activations of type T, which in 16 bits are copied to and from fp32. Sizes in floats are in
/// elements.
template <class T>
class BasicMqa : public MqaBlock {
 public:
  using MqaBlock::MqaBlock;
  /// As Block::run.
  bool run(const BasicRegion<T>& r, const BasicTensor<T>& x, const BasicTensor<T>& out, bool padded, int n, int h,
           int w) const;
  std::size_t scratch_floats(int h, int w, int threads) const;
  BasicUpcoming<T> upcoming() const;

 private:
  /// Floats of an image and of what is made of it, copied.
  std::size_t copied(const MqaGeometry& g) const;
};
using Mqa = BasicMqa<float>;

}  // namespace mnv4
