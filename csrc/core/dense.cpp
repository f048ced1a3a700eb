#include <algorithm>
#include <cstring>

#include "core/block.h"

namespace mnv4 {
namespace {

constexpr int kMaxRuns = 1024;  // runs of one product; a window of more takes the copied patches

// copies the k x k patch of output pixel (y, x) in the order of the packed weights, zero outside of the image
void load_patch(const View& v, const BlockDesc& d, const Geometry& g, int y, int x, float* dst) {
  const int k = d.expand_kernel, s = d.expand_stride;
  for (int ky = 0; ky < k; ++ky) {
    for (int kx = 0; kx < k; ++kx, dst += d.c_in) {
      const int yy = y * s - g.top1 + ky, xx = x * s - g.left1 + kx;
      if (yy < 0 || yy >= g.h || xx < 0 || xx >= g.w) {
        std::memset(dst, 0, sizeof(float) * d.c_in);
        continue;
      }
      const float* src = v.p + yy * v.row + xx * v.pix;
      if (v.chan == 1) {
        for (int c = 0; c < d.c_in; c += kUnit, src += v.unit)
          std::memcpy(dst + c, src, sizeof(float) * std::min(kUnit, d.c_in - c));
        continue;
      }
      for (int c = 0; c < d.c_in; ++c) dst[c] = src[(c / kUnit) * v.unit + (c % kUnit) * v.chan];
    }
  }
}

}  // namespace

void dense_rows(const KernelTable& k, const Team& t, const View& v, const BlockDesc& d, const Geometry& g, int y0,
                int y1, const GemmArgs& to) {
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

  if (yb > ya && xb > xa) {
    const bool pixels_apart = v.chan == 1 && v.unit == kUnit;  // channels of a pixel are consecutive
    const bool single = v.chan != 1;                           // any layout: one term a run
    const int ui = units_of(d.c_in);
    // runs must be of equal length
    GemmArgs a = to;
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
      GemmArgs a = to;
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

}  // namespace mnv4
