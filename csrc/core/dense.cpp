#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/block.h"
#include "core/winograd.h"

namespace mnv4 {
namespace {

constexpr int kMaxRuns = 1024;  // runs of one product; a window of more takes the copied patches
constexpr int kCopiedRows = 8;  // output rows whose input is copied at once

// copies the k x k patch of output pixel (y, x) in the order of the packed weights, zero outside of the image
template <class T>
void load_patch(const BasicView<T>& v, const BlockDesc& d, const Geometry& g, int y, int x, T* dst) {
  const int k = d.expand_kernel, s = d.expand_stride;
  for (int ky = 0; ky < k; ++ky) {
    for (int kx = 0; kx < k; ++kx, dst += d.c_in) {
      const int yy = y * s - g.top1 + ky, xx = x * s - g.left1 + kx;
      if (yy < 0 || yy >= g.h || xx < 0 || xx >= g.w) {
        std::memset(dst, 0, sizeof(T) * d.c_in);
        continue;
      }
      const T* src = v.p + yy * v.row + xx * v.pix;
      if (v.chan == 1) {
        for (int c = 0; c < d.c_in; c += kUnit, src += v.unit)
          std::memcpy(dst + c, src, sizeof(T) * std::min(kUnit, d.c_in - c));
        continue;
      }
      for (int c = 0; c < d.c_in; ++c) dst[c] = src[(c / kUnit) * v.unit + (c % kUnit) * v.chan];
    }
  }
}

// the convolution itself, whatever lies around the image
template <class T>
void windows(const BasicKernels<T>& k, const BasicTeam<T>& t, const BasicView<T>& v, const BlockDesc& d,
             const Geometry& g, int y0, int y1, const BasicGemmArgs<T>& to) {
  const int n = d.expand_kernel, s = d.expand_stride, taps = n * n;
  // [ya, yb) x [xa, xb): windows inside of the image
  auto inside = [&](int before, int size, int out, int& lo, int& hi) {
    lo = std::min(out, (before + s - 1) / s);
    hi = size + before >= n ? std::clamp((size + before - n) / s + 1, lo, out) : lo;
  };
  int ya, yb, xa, xb;
  inside(g.top1, g.h, g.h1, ya, yb);
  inside(g.left1, g.w, g.w1, xa, xb);
  ya = std::clamp(ya, y0, y1), yb = std::clamp(yb, ya, y1);
  const bool pieces = v.unit != kUnit && d.c_in % kUnit != 0;  // units of which the last is shorter
  const int worst = v.chan != 1 || (pieces && d.c_in % 8 != 0) ? d.c_in : units_of(d.c_in) * 2;
  if (worst * taps > kMaxRuns) yb = ya;
  // a product of BFloat16 takes runs in steps of 8 terms, but for the few of a copied image
  if (std::is_same_v<T, BFloat16> && (v.chan != 1 || d.c_in % 8 != 0) && !copies_rows(d)) yb = ya;

  if (yb > ya && xb > xa) {
    const bool pixels_apart = v.chan == 1 && v.unit == kUnit;  // channels of a pixel are consecutive
    const bool single = v.chan != 1;                           // any layout: one term a run
    const int ui = units_of(d.c_in);
    // runs must be of equal length
    BasicGemmArgs<T> a = to;
    a.a = v.p + (ya * s - g.top1) * v.row + (xa * s - g.left1) * v.pix;
    a.a_pix = s * v.pix, a.a_row = s * v.row;
    a.rows = yb - ya, a.cols = xb - xa;
    a.c += (ya - y0) * to.c_row + xa * to.c_pix;
    if (a.res != nullptr) a.res += (ya - y0) * to.r_row + xa * to.r_pix;
    std::ptrdiff_t off[kMaxRuns];
    int runs = 0, len = 0;
    for (int ky = 0; ky < n; ++ky) {
      if (pixels_apart && v.pix == d.c_in) {
        off[runs++] = ky * v.row;
        len = n * d.c_in;
        continue;
      }
      for (int kx = 0; kx < n; ++kx) {
        const std::ptrdiff_t tap = ky * v.row + kx * v.pix;
        if (pixels_apart) {
          off[runs++] = tap, len = d.c_in;
        } else if (single) {
          for (int c = 0; c < d.c_in; ++c) off[runs++] = tap + (c / kUnit) * v.unit + (c % kUnit) * v.chan;
          len = 1;
        } else if (!pieces) {
          for (int u = 0; u < ui; ++u) off[runs++] = tap + u * v.unit;
          len = kUnit;
        } else {
          // 8 divides most channel counts: halves keep the runs equal
          const int step = d.c_in % 8 == 0 ? 8 : 1;
          for (int c = 0; c < d.c_in; c += step) off[runs++] = tap + (c / kUnit) * v.unit + c % kUnit;
          len = step;
        }
      }
    }
    a.k_off = off, a.k_blocks = runs, a.k_len = a.k_last = len;
    gemm_split(k, t, a);
  }

  // the frame, in groups of pixels that lie on one line of the output
  const std::ptrdiff_t terms = static_cast<std::ptrdiff_t>(taps) * d.c_in;
  int group = 0;
  auto line = [&](int y, int x, int count, bool down) {
    for (int i = 0; i < count; i += kPatches, ++group) {
      if (group % t.n != t.tid) continue;
      const int m = std::min(kPatches, count - i);
      for (int j = 0; j < m; ++j) load_patch(v, d, g, down ? y + i + j : y, down ? x : x + i + j, t.local + j * terms);
      BasicGemmArgs<T> a = to;
      a.a = t.local, a.a_pix = terms, a.k_blocks = 1, a.k_len = a.k_last = static_cast<int>(terms);
      const int yy = (down ? y + i : y) - y0, xx = down ? x : x + i;
      a.c += yy * to.c_row + xx * to.c_pix;
      if (a.res != nullptr) a.res += yy * to.r_row + xx * to.r_pix;
      if (down) a.c_pix = to.c_row, a.r_pix = to.r_row;
      a.rows = 1, a.cols = m;
      k.gemm(a);
    }
  };
  for (int y = y0; y < ya; ++y) line(y, 0, g.w1, false);
  for (int y = yb; y < y1; ++y) line(y, 0, g.w1, false);
  for (int x = 0; x < xa; ++x) line(ya, x, yb - ya, true);
  for (int x = xb; x < g.w1; ++x) line(ya, x, yb - ya, true);
}

}  // namespace

std::size_t copied_floats(const BlockDesc& d, const Geometry& g, int rows) {
  const std::size_t pitch = static_cast<std::size_t>(g.left1) + g.w + g.right1;
  return pitch * d.c_in * ((std::min(rows, kCopiedRows) - 1) * d.expand_stride + d.expand_kernel);
}

template <class T>
void dense_rows(const BasicKernels<T>& k, const BasicTeam<T>& t, const BasicView<T>& v, const BlockDesc& d,
                const Geometry& g, int y0, int y1, const BasicGemmArgs<T>& to, const float* winograd) {
  if constexpr (std::is_same_v<T, float>) {
    if (winograd != nullptr) {
      winograd_rows(k, t, v, d, g, y0, y1, to, winograd,
                    [](const BasicKernels<float>& k, const Team& t, const View& v, const BlockDesc& d,
                       const Geometry& g, int y, const GemmArgs& to) { windows(k, t, v, d, g, y, y + 1, to); });
      return;
    }
  }
  if (!copies_rows(d)) return windows(k, t, v, d, g, y0, y1, to);
  const int s = d.expand_stride, pitch = g.left1 + g.w + g.right1;
  const bool pixels = v.chan == 1 && v.pix == d.c_in;
  // the copy is an image of its own, with its borders inside
  Geometry inner = g;
  inner.w = pitch, inner.left1 = inner.right1 = inner.top1 = 0;
  BasicTeam<T> alone = t;
  alone.tid = 0, alone.n = 1;
  // [lo, hi) by one thread: bands of a team are dealt out, with no barrier between them
  const auto band = [&](int lo, int hi) {
    const int first = lo * s - g.top1;
    const int rows = (hi - 1 - lo) * s + d.expand_kernel;
    BasicView<T> copy;
    copy.p = t.local;
    if (pixels) {
      copy.unit = kUnit, copy.chan = 1, copy.pix = d.c_in, copy.row = static_cast<std::ptrdiff_t>(pitch) * d.c_in;
    } else {
      copy.chan = static_cast<std::ptrdiff_t>(rows) * pitch, copy.unit = copy.chan * kUnit, copy.pix = 1;
      copy.row = pitch;
    }
    const int planes = pixels ? 1 : d.c_in, wide = pixels ? d.c_in : 1;
    for (int c = 0; c < planes; ++c) {
      for (int y = 0; y < rows; ++y) {
        T* row = t.local + c * copy.chan + y * copy.row;
        const int from = first + y;
        if (from < 0 || from >= g.h) {
          std::memset(row, 0, sizeof(T) * pitch * wide);
          continue;
        }
        const T* src = v.p + from * v.row + c * v.chan;
        T* image = row + g.left1 * wide;
        std::memset(row, 0, sizeof(T) * g.left1 * wide);
        std::memset(image + g.w * wide, 0, sizeof(T) * g.right1 * wide);
        if (pixels || v.pix == 1) {
          std::memcpy(image, src, sizeof(T) * g.w * wide);
        } else {
          for (int x = 0; x < g.w; ++x) image[x] = src[x * v.pix];
        }
      }
    }
    inner.h = rows, inner.h1 = hi - lo;
    BasicGemmArgs<T> part = to;
    part.c += (lo - y0) * to.c_row;
    if (part.res != nullptr) part.res += (lo - y0) * to.r_row;
    windows(k, alone, copy, d, inner, 0, hi - lo, part);
  };
  const int rows = y1 - y0, step = std::clamp(rows / (2 * t.n), 1, kCopiedRows);
  t.share(rows, t.n > 1 ? step : rows, [&](int first, int end, int) {
    for (int lo = first; lo < end; lo += kCopiedRows) band(y0 + lo, y0 + std::min(end, lo + kCopiedRows));
  });
}

#define MNV4_OPS_FOR(T)                                                                                        \
  template void dense_rows(const BasicKernels<T>&, const BasicTeam<T>&, const BasicView<T>&, const BlockDesc&, \
                           const Geometry&, int, int, const BasicGemmArgs<T>&, const float*);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
