// The operations again, from their definitions and in double precision, with a bound on the error that single precision
// may make.
#pragma once

#include <cmath>

#include "core/head.h"
#include "support.h"

namespace mnv4::test {

inline constexpr double kRound = 1.0 / 16777216.0;  // half an ulp of single precision, relative

/// One image [c, h, w]: values and, beside each, how far a single-precision result may lie from it.
struct Image {
  int c = 0, h = 0, w = 0;
  std::vector<double> v, e;
  Image() = default;
  Image(int c_, int h_, int w_) : c(c_), h(h_), w(w_), v(static_cast<std::size_t>(c_) * h_ * w_), e(v.size()) {}
  std::size_t at(int ch, int y, int x) const { return (static_cast<std::size_t>(ch) * h + y) * w + x; }
};

/// Random parameters of one stage in the layout that pack takes; some with BatchNorm, layer scale, or no bias.
struct Params {
  int out = 0, in = 0, kernel = 1;  // in: input channels of a group
  std::vector<float> weight, bias, bn_weight, bn_bias, bn_mean, bn_var, gamma;
  double eps = 0.0;

  Params() = default;
  Params(Random& r, int out_, int in_, int kernel_) : out(out_), in(in_), kernel(kernel_) {
    const std::size_t terms = static_cast<std::size_t>(in) * kernel * kernel;
    weight = r.reals(out * terms, 1.5f / std::sqrt(static_cast<float>(terms)));
    if (r.chance(60)) bias = r.reals(out);
    if (r.chance(50)) {
      bn_mean = r.reals(out);
      bn_var = r.reals(out, 0.5f, 1.0f);
      eps = r.chance(50) ? 1e-5 : 1e-3;
      if (r.chance(80)) bn_weight = r.reals(out, 0.5f, 1.0f);
      if (r.chance(80)) bn_bias = r.reals(out);
    }
    if (r.chance(20)) gamma = r.reals(out);
  }
  StageParams stage() const {
    auto p = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    return {p(weight), p(bias), p(bn_weight), p(bn_bias), p(bn_mean), p(bn_var), eps, p(gamma)};
  }
  /// y = scale * (weight * x + bias) + shift, written out as in the papers of BatchNorm and layer scale.
  void affine(int o, double& scale, double& shift) const {
    const double g = gamma.empty() ? 1.0 : gamma[o], b = bias.empty() ? 0.0 : bias[o];
    if (bn_mean.empty()) {
      scale = g, shift = g * b;
      return;
    }
    const double s = (bn_weight.empty() ? 1.0 : bn_weight[o]) / std::sqrt(bn_var[o] + eps);
    scale = g * s;
    shift = g * ((b - bn_mean[o]) * s + (bn_bias.empty() ? 0.0 : bn_bias[o]));
  }
};

inline void activate(Act act, double& v, double& e) {
  switch (act) {
    case Act::none: break;
    case Act::relu: v = v > 0.0 ? v : 0.0; break;
    case Act::relu6: v = v < 0.0 ? 0.0 : v > 6.0 ? 6.0 : v; break;
    case Act::gelu:
      e = 1.13 * e + 10.0 * kRound * std::fabs(v) + 1e-30;
      v = 0.5 * v * std::erfc(-v / std::sqrt(2.0));
      break;
  }
}

/// Convolution over zero padding; `depthwise`: channel o reads channel o alone. TF SAME: the larger half of the padding
/// comes last.
inline Image convolve(const Image& x, const Params& p, int stride, bool depthwise, bool same, Act act) {
  const int k = p.kernel;
  int pad_y = k / 2, pad_x = k / 2, ho = (x.h + 2 * pad_y - k) / stride + 1, wo = (x.w + 2 * pad_x - k) / stride + 1;
  if (same) {
    ho = (x.h + stride - 1) / stride, wo = (x.w + stride - 1) / stride;
    pad_y = std::max(0, (ho - 1) * stride + k - x.h) / 2, pad_x = std::max(0, (wo - 1) * stride + k - x.w) / 2;
  }
  Image out(p.out, ho, wo);
  const double terms = static_cast<double>(p.in) * k * k;
  const double unit = (terms + terms / 256.0 + 6.0) * kRound;
  for (int o = 0; o < p.out; ++o) {
    double scale, shift;
    p.affine(o, scale, shift);
    for (int y = 0; y < ho; ++y) {
      for (int xx = 0; xx < wo; ++xx) {
        double sum = shift, size = std::fabs(shift), carried = 0.0;
        for (int i = 0; i < p.in; ++i) {
          const int c = depthwise ? o : i;
          const float* w = p.weight.data() + (static_cast<std::size_t>(o) * p.in + i) * k * k;
          for (int ky = 0; ky < k; ++ky) {
            const int sy = y * stride - pad_y + ky;
            if (sy < 0 || sy >= x.h) continue;
            for (int kx = 0; kx < k; ++kx) {
              const int sx = xx * stride - pad_x + kx;
              if (sx < 0 || sx >= x.w) continue;
              const std::size_t at = x.at(c, sy, sx);
              const double term = scale * w[ky * k + kx] * x.v[at];
              sum += term, size += std::fabs(term);
              carried += std::fabs(scale * w[ky * k + kx]) * x.e[at];
            }
          }
        }
        const std::size_t to = out.at(o, y, xx);
        out.v[to] = sum, out.e[to] = carried + unit * (size + carried);
        activate(act, out.v[to], out.e[to]);
      }
    }
  }
  return out;
}

/// A description with parameters for each of its stages.
struct BlockCase {
  BlockDesc d;
  Params p[kStages];

  explicit BlockCase(Random& r, const BlockDesc& desc) : d(desc) {
    if (d.start_kernel > 0) p[0] = Params(r, d.c_in, 1, d.start_kernel);
    if (d.expand) p[1] = Params(r, d.c_mid, d.c_in, d.expand_kernel);
    if (d.mid_kernel > 0) p[2] = Params(r, d.c_mid, 1, d.mid_kernel);
    if (d.project) p[3] = Params(r, d.c_out, d.c_mid, 1);
  }
  void pack(Block& b) const {
    for (int s = 0; s < kStages; ++s) {
      const Stage stage = static_cast<Stage>(s);
      CHECK(b.pack(stage, p[s].stage()) == b.has(stage), "pack answers whether the stage exists");
    }
    CHECK(b.packed(), "all stages are packed");
  }
  Image run(const Image& x) const {
    Image t = x;
    if (d.start_kernel > 0) t = convolve(t, p[0], d.start_stride, true, d.same_padding, d.act[0]);
    if (d.expand) t = convolve(t, p[1], d.expand_stride, false, d.same_padding, d.act[1]);
    if (d.mid_kernel > 0) t = convolve(t, p[2], d.mid_stride, true, d.same_padding, d.act[2]);
    if (d.project) t = convolve(t, p[3], 1, false, d.same_padding, d.act[3]);
    if (d.residual) {
      for (std::size_t i = 0; i < t.v.size(); ++i) {
        t.v[i] += x.v[i];
        t.e[i] += x.e[i] + kRound * (std::fabs(t.v[i]) + t.e[i]);
      }
    }
    return t;
  }
  /// Multiply-adds of one image, to keep the naive loops short.
  double cost(int h, int w) const {
    const double px = static_cast<double>(h) * w, taps = static_cast<double>(d.expand_kernel) * d.expand_kernel;
    return px * ((d.expand ? taps * d.c_in * d.c_mid : 0.0) +
                 (d.project ? static_cast<double>(d.c_mid) * d.c_out : 0.0) + 25.0 * (d.c_in + d.c_mid));
  }
  std::string text() const {
    char line[320];
    std::snprintf(line, sizeof line,
                  "c %d-%d-%d start %d/%d expand %d k%d/%d mid %d/%d project %d residual %d same %d acts %d%d%d%d",
                  d.c_in, d.c_mid, d.c_out, d.start_kernel, d.start_stride, d.expand, d.expand_kernel, d.expand_stride,
                  d.mid_kernel, d.mid_stride, d.project, d.residual, d.same_padding, static_cast<int>(d.act[0]),
                  static_cast<int>(d.act[1]), static_cast<int>(d.act[2]), static_cast<int>(d.act[3]));
    return line;
  }
};

struct HeadCase {
  HeadDesc d;
  Params p[3];

  HeadCase(Random& r, const HeadDesc& desc) : d(desc) {
    int c = d.c_in;
    const int outs[3] = {d.c_feat, d.c_hidden, d.classes};
    for (int s = 0; s < 3; ++s) {
      if (outs[s] == 0) continue;
      p[s] = Params(r, outs[s], c, 1);
      c = outs[s];
    }
  }
  void pack(Head& head) const {
    for (int s = 0; s < 3; ++s)
      CHECK(head.pack(s, p[s].stage()) == (p[s].out > 0), "pack answers whether the stage exists");
    CHECK(head.packed(), "all stages are packed");
  }
  Image run(const Image& x) const {
    const Image t = d.c_feat > 0 ? convolve(x, p[0], 1, false, false, d.feat_act) : x;
    Image pool(t.c, 1, 1);
    const double pixels = static_cast<double>(t.h) * t.w;
    for (int c = 0; c < t.c; ++c) {
      double sum = 0.0, size = 0.0, e = 0.0;
      for (std::size_t i = t.at(c, 0, 0), end = i + static_cast<std::size_t>(t.h) * t.w; i < end; ++i) {
        sum += t.v[i], size += std::fabs(t.v[i]), e += t.e[i];
      }
      pool.v[c] = sum / pixels;
      pool.e[c] = (e + (pixels + 4.0) * kRound * (size + e)) / pixels;
    }
    Image out = pool;
    if (d.c_hidden > 0) out = convolve(out, p[1], 1, false, false, d.hidden_act);
    if (d.classes > 0) out = convolve(out, p[2], 1, false, false, Act::none);
    return out;
  }
  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "head c %d feat %d hidden %d classes %d acts %d%d", d.c_in, d.c_feat, d.c_hidden,
                  d.classes, static_cast<int>(d.feat_act), static_cast<int>(d.hidden_act));
    return line;
  }
};

/// A valid description of a random kind; `kind` counts up, so that all kinds come up equally often.
inline BlockDesc random_desc(Random& r, int kind) {
  static constexpr int channels[] = {1, 3, 4, 7, 8, 12, 15, 16, 17, 24, 32, 40, 48, 96, 130};
  static constexpr int kernels[] = {3, 5};
  BlockDesc d;
  const bool start = kind == 0 || kind == 1 || kind == 2 || kind == 3 || kind == 4;
  const bool dense = kind == 5 || kind == 6;
  d.expand = kind != 0 && kind != 1 && kind != 11;
  d.project = kind != 0 && kind != 2 && kind != 5 && kind != 7;
  const bool mid = kind == 4 || kind == 8 || kind == 10;
  d.c_in = d.c_mid = d.c_out = r.pick(channels);
  if (d.expand) d.c_mid = d.c_out = r.chance(15) ? r.between(380, 600) : r.pick(channels);
  if (d.project) d.c_out = r.pick(channels);
  if (start) d.start_kernel = r.pick(kernels), d.start_stride = r.between(1, 2);
  if (dense) d.expand_kernel = r.pick(kernels), d.expand_stride = r.between(1, 2);
  if (mid) d.mid_kernel = r.pick(kernels), d.mid_stride = r.between(1, 2);
  for (Act& a : d.act) a = static_cast<Act>(r.between(0, 3));
  d.same_padding = r.chance(40);
  if (r.chance(40)) {
    d.start_stride = d.expand_stride = d.mid_stride = 1;
    if (d.project || d.expand) {
      (d.project ? d.c_out : d.c_mid) = d.c_in;
      if (!d.project) d.c_out = d.c_in;
      d.residual = true;
    }
  }
  return d;
}
inline constexpr int kKinds = 12;

/// How an input lies in memory.
enum class Layout { channels_last, gaps, blocked, planar, odd };
inline const char* name_of(Layout l) {
  static const char* const names[] = {"channels_last", "gaps", "blocked", "planar", "odd strides"};
  return names[static_cast<int>(l)];
}

/// A batch in one of the layouts; `floats` from the first to the last float that exists.
inline Tensor lay_out(Layout l, Random& r, float* p, int n, int c, int h, int w, std::size_t& floats) {
  std::ptrdiff_t pix = c, chan = 1, row, next;
  switch (l) {
    case Layout::blocked: {
      const Tensor t = blocked_tensor(p, c, h, w);
      floats = static_cast<std::size_t>(n) * t.next;
      return t;
    }
    case Layout::planar: pix = 1, row = w, chan = static_cast<std::ptrdiff_t>(h) * w, next = chan * c; break;
    case Layout::odd:
      chan = r.between(2, 5), pix = chan * c + r.between(0, 3), row = pix * w + r.between(0, 7),
      next = row * h + r.between(0, 9);
      break;
    case Layout::gaps:
      pix = c + r.between(1, 19), row = pix * w + r.between(0, 7), next = row * h + r.between(0, 9);
      break;
    default: row = pix * w, next = row * h; break;
  }
  floats = n == 0 ? 0 : static_cast<std::size_t>((n - 1) * next + (h - 1) * row + (w - 1) * pix + (c - 1) * chan + 1);
  Tensor t = strided_tensor(p, next, chan, row, pix);
  // as the bindings do: a single channel may have any stride
  if (c == 1) t.image.chan = 1, t.image.unit = kUnit;
  return t;
}

inline float* element(const Tensor& t, int n, int c, int y, int x) {
  const View v = t.at(n);
  return v.p + (c / kUnit) * v.unit + (c % kUnit) * v.chan + y * v.row + x * v.pix;
}

/// Writes the images where the layout wants them; the padding of blocked channels is zero, everything else stays
/// poisoned.
inline void store(const Tensor& t, Layout l, const std::vector<Image>& images) {
  for (int i = 0; i < static_cast<int>(images.size()); ++i) {
    const Image& im = images[i];
    const int all = l == Layout::blocked ? units_of(im.c) * kUnit : im.c;
    for (int c = 0; c < all; ++c) {
      for (int y = 0; y < im.h; ++y) {
        for (int x = 0; x < im.w; ++x)
          *element(t, i, c, y, x) = c < im.c ? static_cast<float>(im.v[im.at(c, y, x)]) : 0.0f;
      }
    }
  }
}

inline std::vector<Image> random_images(Random& r, int n, int c, int h, int w) {
  std::vector<Image> images(n, Image(c, h, w));
  for (Image& im : images) {
    for (double& v : im.v) v = static_cast<double>(r.real() * 2.0f);
  }
  return images;
}

/// Each element within its bound, nothing else written. `padded`: the last unit's other channels exist and may hold
/// anything.
inline void check_output(const Guarded& memory, const Tensor& t, bool padded, const std::vector<Image>& want,
                         const std::string& what) {
  std::vector<bool> written(memory.size(), false);
  std::size_t bad = 0;
  for (int i = 0; i < static_cast<int>(want.size()); ++i) {
    const Image& im = want[i];
    const int all = padded ? units_of(im.c) * kUnit : im.c;
    for (int c = 0; c < all; ++c) {
      for (int y = 0; y < im.h; ++y) {
        for (int x = 0; x < im.w; ++x) {
          const float* p = element(t, i, c, y, x);
          written[p - memory.data()] = true;
          if (c >= im.c) continue;
          const double ref = im.v[im.at(c, y, x)], bound = 1.01 * im.e[im.at(c, y, x)] + 1e-35;
          if (std::fabs(*p - ref) <= bound) continue;
          if (bad++ == 0) {
            char line[160];
            std::snprintf(line, sizeof line, "image %d channel %d y %d x %d is %.9g, expected %.9g within %.3g", i, c,
                          y, x, static_cast<double>(*p), ref, bound);
            CHECK(false, line + (": " + what));
          }
        }
      }
    }
  }
  for (std::size_t i = 0; i < memory.size(); ++i) {
    if (written[i] || is_canary(memory.data()[i])) continue;
    CHECK(false, "float " + std::to_string(i) + " outside of the output was written: " + what);
    break;
  }
  CHECK(memory.intact(), what);
}

}  // namespace mnv4::test
