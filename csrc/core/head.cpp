#include "core/head.h"

#include <algorithm>
#include <cstring>

namespace mnv4 {
namespace {

constexpr int kGroup = 16;        // images whose pooled features are kept at once
constexpr int kPoolUnits = 4;     // units computed before they are summed
constexpr int kPoolPixels = 256;  // pixels computed before they are summed

}  // namespace

std::string check(const HeadDesc& d) {
  if (d.c_in < 1) return "c_in = " + std::to_string(d.c_in) + ", expected at least 1";
  if (d.c_feat < 0) return "c_feat = " + std::to_string(d.c_feat) + ", expected at least 0";
  if (d.c_hidden < 0) return "c_hidden = " + std::to_string(d.c_hidden) + ", expected at least 0";
  if (d.classes < 0) return "classes = " + std::to_string(d.classes) + ", expected at least 0";
  return {};
}

template <class T>
int BasicHead<T>::depth_of(int stage) const {
  if (stage == 0) return d_.c_in;
  if (stage == 1) return pooled();
  return d_.c_hidden > 0 ? d_.c_hidden : pooled();
}

template <class T>
int BasicHead<T>::features() const {
  return d_.classes > 0 ? d_.classes : d_.c_hidden > 0 ? d_.c_hidden : pooled();
}

template <class T>
BasicHead<T>::BasicHead(const HeadDesc& d) : d_(d) {
  for (int s = 0; s < 3; ++s) {
    if (!has(s)) continue;
    weight_[s] = total_;
    bias_[s] = total_ + units_of(rows_of(s)) * unit_of(s) * sizeof(T) / sizeof(float);
    total_ = bias_[s] + static_cast<std::size_t>(units_of(rows_of(s))) * kEpilogue<T>;
  }
}

template <class T>
bool BasicHead<T>::pack(int stage, const StageParams& p) {
  if (stage < 0 || stage > 2 || !has(stage)) return false;
  if (data_ == nullptr) data_ = make_buffer(total_);
  if (data_ == nullptr) return false;
  pack_gemm(p, rows_of(stage), depth_of(stage), 1, reinterpret_cast<T*>(data_.get() + weight_[stage]),
            data_.get() + bias_[stage]);
  done_[stage] = true, fine_[stage] = p.bn_mean == nullptr;
  return true;
}

template <class T>
bool BasicHead<T>::packed() const {
  return (!has(0) || done_[0]) && (!has(1) || done_[1]) && (!has(2) || done_[2]);
}

template <class T>
void BasicHead<T>::adopt(const float* blob) {
  if (data_ == nullptr) data_ = make_buffer(total_);
  if (data_ == nullptr) return;
  std::memcpy(data_.get(), blob, total_ * sizeof(float));
  for (int s = 0; s < 3; ++s) done_[s] = has(s);
}

template <class T>
std::size_t BasicHead<T>::scratch_floats(int, int, int threads) const {
  const std::size_t group =
      static_cast<std::size_t>(kGroup) * kUnit * (units_of(pooled()) + units_of(std::max(1, d_.c_hidden)));
  return kPoolUnits * kPoolPixels * kUnit + (group + threads - 1) / threads + kUnit;
}

template <class T>
void BasicHead<T>::run(const BasicRegion<T>& r, const BasicTensor<T>& x, T* out, int n, int h, int w) const {
  const int up = units_of(pooled());
  T* feat = r.arena;                                                 // [image][pooled, padded]
  T* hidden = feat + static_cast<std::size_t>(kGroup) * up * kUnit;  // [image][hidden, padded]
  T* own = r.arena + r.n * (r.scratch_floats - kPoolUnits * kPoolPixels * kUnit) +
           static_cast<std::size_t>(r.tid) * kPoolUnits * kPoolPixels * kUnit;
  const std::ptrdiff_t pitch[2] = {static_cast<std::ptrdiff_t>(up) * kUnit,
                                   static_cast<std::ptrdiff_t>(units_of(d_.c_hidden)) * kUnit};
  const BasicKernels<T>& k = *r.kernels;
  const float scale = static_cast<float>(h) * static_cast<float>(w);

  for (int first = 0; first < n; first += kGroup) {
    const int images = std::min(kGroup, n - first);
    const Range mine = split(up, r.n, r.tid);
    for (int i = 0; i < images; ++i) {
      const BasicView<T> v = x.at(first + i);
      for (int u = mine.lo; u < mine.hi; u += kPoolUnits) {
        const int units = std::min(kPoolUnits, mine.hi - u);
        T* mean = feat + i * pitch[0] + u * kUnit;
        alignas(64) float sum[kPoolUnits * kUnit] = {};
        if (has(0)) {
          const int ui = units_of(d_.c_in);
          BasicGemmArgs<T> g;
          g.a = v.p, g.a_pix = v.pix, g.a_row = v.row, g.rows = h, g.cols = w;
          if (v.unit == kUnit) {
            g.k_blocks = 1, g.k_len = g.k_last = d_.c_in;
          } else {
            g.k_blocks = ui, g.k_len = kUnit, g.k_last = d_.c_in - (ui - 1) * kUnit, g.a_blk = v.unit;
          }
          g.b_unit = unit_of(0);
          g.b = weight(0) + u * g.b_unit;
          g.bias = data_.get() + bias_[0] + u * kEpilogue<T>;
          g.act = d_.feat_act, g.fine = fine_[0], g.units = units, g.c_pix = kUnit;
          const std::ptrdiff_t pixels = static_cast<std::ptrdiff_t>(h) * w;
          for (std::ptrdiff_t p = 0; p < pixels; p += kPoolPixels) {
            const int count = static_cast<int>(std::min<std::ptrdiff_t>(kPoolPixels, pixels - p));
            g.p_begin = p, g.p_end = p + count;
            // pixel p of the image lands at the start of the scratch
            g.c = own - p * kUnit, g.c_row = static_cast<std::ptrdiff_t>(w) * kUnit,
            g.c_unit = static_cast<std::ptrdiff_t>(count) * kUnit;
            k.gemm(g);
            for (int j = 0; j < units; ++j) k.sum(own + j * g.c_unit, count, sum + j * kUnit);
          }
        } else {
          for (int j = 0; j < units; ++j) {
            const int channels = std::min(kUnit, d_.c_in - (u + j) * kUnit);
            for (int y = 0; y < h; ++y) {
              for (int x0 = 0; x0 < w; x0 += kPoolPixels) {
                const int count = std::min(kPoolPixels, w - x0);
                k.load_unit(v.p + (u + j) * v.unit + y * v.row + x0 * v.pix, v.pix, v.chan, count, channels, own);
                k.sum(own, count, sum + j * kUnit);
              }
            }
          }
        }
        for (int j = 0; j < units * kUnit; ++j) mean[j] = static_cast<T>(sum[j] / scale);
      }
    }
    if (r.n > 1) r.barrier->wait(r.tid, r.n);

    const T* from = feat;
    std::ptrdiff_t from_pitch = pitch[0];
    for (int s = 1; s <= 2; ++s) {
      if (!has(s)) continue;
      const bool last = s == 2 || !has(2);
      const int units = units_of(rows_of(s));
      const Range u = split(units, r.n, r.tid);
      BasicGemmArgs<T> g;
      g.a = from, g.a_pix = from_pitch, g.k_blocks = 1, g.k_len = g.k_last = depth_of(s);
      g.b_unit = unit_of(s);
      g.b = weight(s) + u.lo * g.b_unit;
      g.bias = data_.get() + bias_[s] + u.lo * kEpilogue<T>;
      g.fine = fine_[s];
      g.act = s == 1 ? d_.hidden_act : Act::none;
      g.units = u.hi - u.lo, g.rows = 1, g.cols = images, g.c_unit = kUnit;
      if (last) {
        g.c = out + static_cast<std::ptrdiff_t>(first) * features() + u.lo * kUnit, g.c_pix = features();
        if (u.hi == units && rows_of(s) % kUnit != 0) g.n_last = rows_of(s) % kUnit;
      } else {
        g.c = hidden + u.lo * kUnit, g.c_pix = pitch[1];
      }
      if (g.units > 0) k.gemm(g);
      if (r.n > 1) r.barrier->wait(r.tid, r.n);
      from = hidden, from_pitch = pitch[1];
    }
    if (!has(1) && !has(2)) {
      if (r.tid == 0) {
        for (int i = 0; i < images; ++i)
          std::memcpy(out + static_cast<std::ptrdiff_t>(first + i) * features(), feat + i * pitch[0],
                      sizeof(T) * features());
      }
      if (r.n > 1) r.barrier->wait(r.tid, r.n);
    }
  }
}

#define MNV4_OPS_FOR(T) template class BasicHead<T>;
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
