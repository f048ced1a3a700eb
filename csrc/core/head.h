// Classifier head: 1x1 + act -> global average pool -> 1x1 + act -> linear; every stage but the pool optional.
#pragma once

#include "core/block.h"

namespace mnv4 {

struct HeadDesc {
  int c_in = 0, c_feat = 0, c_hidden = 0, classes = 0;  // 0: stage absent
  Act feat_act = Act::none, hidden_act = Act::none;
};

std::string check(const HeadDesc& d);

/// A head of activations and weights of type T; sizes in floats are in elements.
template <class T>
class BasicHead {
 public:
  explicit BasicHead(const HeadDesc& d);
  const HeadDesc& desc() const { return d_; }
  int pooled() const { return d_.c_feat > 0 ? d_.c_feat : d_.c_in; }
  int features() const;
  /// Stage 0: 1x1 before the pool, 1: 1x1 after it, 2: classifier. False when the head has no such stage.
  bool pack(int stage, const StageParams& p);
  bool packed() const;
  /// Inside a parallel region; out is [n, features] contiguous.
  void run(const BasicRegion<T>& r, const BasicTensor<T>& x, T* out, int n, int h, int w) const;
  std::size_t scratch_floats(int h, int w, int threads) const;
  /// Floats of all packed parameters, whatever the elements are.
  std::size_t blob_floats() const { return total_; }
  const float* blob() const { return data_.get(); }
  void adopt(const float* blob);

 private:
  bool has(int stage) const { return (stage == 0 ? d_.c_feat : stage == 1 ? d_.c_hidden : d_.classes) > 0; }
  int rows_of(int stage) const { return stage == 0 ? d_.c_feat : stage == 1 ? d_.c_hidden : d_.classes; }
  int depth_of(int stage) const;
  /// Elements of the weights of a unit of output channels.
  std::ptrdiff_t unit_of(int stage) const { return packed_terms<T>(depth_of(stage)) * kUnit; }
  const T* weight(int stage) const { return reinterpret_cast<const T*>(data_.get() + weight_[stage]); }
  HeadDesc d_;
  std::size_t weight_[3] = {}, bias_[3] = {}, total_ = 0;
  bool done_[3] = {}, fine_[3] = {};  // fine: see BasicBlock
  Buffer data_;
};
using Head = BasicHead<float>;

}  // namespace mnv4
