#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/mqa.h"

namespace mnv4 {
namespace {

constexpr double kLog2e = 1.4426950408889634074;

std::string bad(const char* name, int value, const char* expected) {
  return std::string(name) + " = " + std::to_string(value) + ", expected " + expected;
}

// A 1x1 whose output channels come in groups of `out` and whose input channels come in groups of `in`, each group
// padded to whole units: [unit][k][16] and [unit][16].
struct Projection {
  int out_groups, out, in_groups, in;
  double factor = 1.0;
  int rows() const { return out_groups * units_of(out) * kUnit; }
  int depth() const { return in % kUnit == 0 || in_groups == 1 ? in_groups * in : in_groups * units_of(in) * kUnit; }
};

void pack_projection(const StageParams& p, const Projection& j, const std::vector<double>& scale,
                     const std::vector<double>& shift, float* weight, float* bias) {
  const int depth = j.depth(), pitch = j.in_groups == 1 ? j.in : depth / j.in_groups;
  std::memset(weight, 0, sizeof(float) * j.rows() * depth);
  std::memset(bias, 0, sizeof(float) * j.rows());
  for (int o = 0; o < j.out_groups * j.out; ++o) {
    const int row = o / j.out * units_of(j.out) * kUnit + o % j.out;
    const Affine a = affine(p, o);
    const float* src = p.weight + static_cast<std::size_t>(o) * j.in_groups * j.in;
    float* dst = weight + static_cast<std::size_t>(row / kUnit) * depth * kUnit + row % kUnit;
    double sum = 0.0;
    for (int i = 0; i < j.in_groups * j.in; ++i) {
      const double w = src[i] * (scale.empty() ? 1.0 : scale[i]);
      if (!shift.empty()) sum += src[i] * shift[i];
      dst[static_cast<std::size_t>(i / j.in * pitch + i % j.in) * kUnit] = static_cast<float>(w * a.scale * j.factor);
    }
    bias[row] = static_cast<float>((sum * a.scale + a.shift) * j.factor);
  }
}

Projection projection(const MqaDesc& d, MqaStage s) {
  switch (s) {
    // the scale of the scores, and the base of the exponential
    case MqaStage::query: return {d.heads, d.key_dim, 1, d.c, kLog2e / std::sqrt(static_cast<double>(d.key_dim))};
    case MqaStage::key: return {1, d.key_dim, 1, d.c};
    case MqaStage::value: return {1, d.value_dim, 1, d.c};
    default: return {1, d.c, d.heads, d.value_dim};
  }
}

bool is_down(MqaStage s) { return s == MqaStage::key_down || s == MqaStage::value_down; }
bool is_norm(MqaStage s) { return s == MqaStage::norm || s == MqaStage::query_norm; }

}  // namespace

std::string check(const MqaDesc& d) {
  constexpr int kMaxChannels = 1 << 20;
  if (d.c < 1 || d.c > kMaxChannels) return bad("c", d.c, "1 to 2**20");
  if (d.heads < 1 || d.heads > 1024) return bad("heads", d.heads, "1 to 1024");
  if (d.key_dim < 1 || d.key_dim > 1024) return bad("key_dim", d.key_dim, "1 to 1024");
  if (d.value_dim < 1 || d.value_dim > 1024) return bad("value_dim", d.value_dim, "1 to 1024");
  if (d.kv_kernel != 3 && d.kv_kernel != 5) return bad("kv_kernel", d.kv_kernel, "3 or 5");
  if (d.kv_stride != 1 && d.kv_stride != 2) return bad("kv_stride", d.kv_stride, "1 or 2");
  if (d.query_stride != 1 && d.query_stride != 2) return bad("query_stride", d.query_stride, "1 or 2");
  if (d.query_norm && d.query_stride == 1) return bad("query_norm", 1, "0 with query_stride 1");
  return {};
}

MqaBlock::MqaBlock(const MqaDesc& d) : d_(d) {
  for (int i = 0; i < kMqaStages; ++i) {
    const MqaStage s = static_cast<MqaStage>(i);
    if (!has(s) || s == MqaStage::query_norm) continue;
    std::size_t floats = 0, units = units_of(d.c);
    if (s == MqaStage::norm) {
      floats = units * kUnit;  // scale; the shift is the bias
    } else if (is_down(s)) {
      floats = units * d.kv_kernel * d.kv_kernel * kUnit;
    } else {
      const Projection j = projection(d, s);
      units = j.rows() / kUnit;
      floats = static_cast<std::size_t>(j.rows()) * j.depth();
    }
    weight_[i] = total_;
    bias_[i] = total_ + floats;
    total_ = bias_[i] + units * kUnit;
  }
}

bool MqaBlock::has(MqaStage s) const {
  if (s == MqaStage::norm) return d_.norm;
  if (s == MqaStage::query_norm) return d_.query_norm;
  return !is_down(s) || d_.kv_stride > 1;
}

// What comes before a 1x1 and folds into it: a norm commutes with the average pool of the queries, but not with the
// zero padding of a depthwise.
MqaBlock::Channels MqaBlock::folded(MqaStage s) const {
  if (s == MqaStage::output || ((s == MqaStage::key || s == MqaStage::value) && d_.kv_stride > 1)) return {};
  Channels c = norm_[0];
  if (s == MqaStage::query && d_.query_norm) {
    const Channels& q = norm_[1];
    if (c.scale.empty()) return q;
    for (int i = 0; i < d_.c; ++i) {
      c.shift[i] = c.shift[i] * q.scale[i] + q.shift[i];
      c.scale[i] *= q.scale[i];
    }
  }
  return c;
}

std::string MqaBlock::pack(MqaStage s, const StageParams& p) {
  if (!has(s)) return "expected a stage that the block has";
  if (data_ == nullptr) data_ = make_buffer(total_);
  if (data_ == nullptr) return "no memory";
  const int i = static_cast<int>(s);
  float* w = data_.get() + weight_[i];
  float* b = data_.get() + bias_[i];
  if (is_norm(s)) {
    Channels& c = norm_[i];
    c.scale.resize(d_.c), c.shift.resize(d_.c);
    for (int o = 0; o < d_.c; ++o) {
      const Affine a = affine(p, o);
      c.scale[o] = a.scale, c.shift[o] = a.shift;
    }
    known_[i] = true;
    // what it was folded into is out of date
    for (int j = i + 1; j < kMqaStages; ++j) done_[j] = done_[j] && is_norm(static_cast<MqaStage>(j));
    for (int o = 0; s == MqaStage::norm && o < units_of(d_.c) * kUnit; ++o) {
      w[o] = o < d_.c ? static_cast<float>(c.scale[o]) : 0.0f;
      b[o] = o < d_.c ? static_cast<float>(c.shift[o]) : 0.0f;
    }
  } else if (is_down(s)) {
    pack_depthwise(p, d_.c, d_.kv_kernel, w, b);
  } else {
    if ((d_.norm && !known_[0]) || (d_.query_norm && !known_[1]))
      return "expected norm and query_norm to be packed first";
    const Channels c = folded(s);
    pack_projection(p, projection(d_, s), c.scale, c.shift, w, b);
  }
  done_[i] = true;
  return {};
}

bool MqaBlock::packed() const {
  for (int i = 0; i < kMqaStages; ++i) {
    if (has(static_cast<MqaStage>(i)) && !done_[i]) return false;
  }
  return true;
}

void MqaBlock::adopt(const float* blob) {
  if (data_ == nullptr) data_ = make_buffer(total_);
  if (data_ == nullptr) return;
  std::memcpy(data_.get(), blob, total_ * sizeof(float));
  for (int i = 0; i < kMqaStages; ++i) done_[i] = has(static_cast<MqaStage>(i));
  known_[0] = known_[1] = false;
}

}  // namespace mnv4
