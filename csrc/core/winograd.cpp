#include "core/winograd.h"

#include <algorithm>
#include <cstring>

#include "core/cpu_features.h"

namespace mnv4 {
namespace {

constexpr int kMost = 128;       // tiles handled together
constexpr int kUnitsIn = 2;      // of the input, at most
constexpr int kUnitsAtOnce = 2;  // output units whose nine products are kept

constexpr int kPlanesOf[kWinogradProducts] = {4, 2, 4, 2, 1, 2, 4, 2, 4};

// tiles whose transformed input takes a part of L2 and leaves room for weights, input and output
int tiles_at_once(const BlockDesc& d) {
  const std::size_t tile = static_cast<std::size_t>(kWinogradPlanes) * units_of(d.c_in) * kUnit;
  return static_cast<int>(std::clamp<std::size_t>(cpu_info().l2 / sizeof(float) / 5 / tile, 8, kMost));
}

// of which there is room for in scratch
int most_tiles(const BlockDesc& d, const Geometry& g) {
  return std::min((g.h1 + 1) / 2 * ((g.w1 + 1) / 2), tiles_at_once(d));
}

// an odd number of lines, so that planes do not share the sets of a cache
std::ptrdiff_t plane_floats(int tiles) { return static_cast<std::ptrdiff_t>(tiles | 1) * kUnit; }

}  // namespace

// longer sums, which are not cut where the direct ones are, would have a larger error
bool winograd_serves(const BlockDesc& d) {
  return d.expand_kernel == 3 && d.expand_stride == 2 && d.c_in >= kUnit && d.c_in <= kUnitsIn * kUnit &&
         d.c_in % 8 == 0;
}

void pack_winograd(const StageParams& p, int c_out, int c_in, float* weight) {
  // what part i of an input is multiplied with: sums of taps
  const auto part = [](int i, const double* w, int step) {
    constexpr int tap[5] = {0, 1, 0, 2, 1};
    return i == 2 ? w[0] + w[2 * step] : w[tap[i] * step];
  };
  constexpr int plane[5][5] = {
      {winograd_plane(0, 0), winograd_plane(0, 1), winograd_plane(0, 2), winograd_plane(0, 3), winograd_plane(0, 4)},
      {winograd_plane(1, 0), winograd_plane(1, 1), winograd_plane(1, 2), winograd_plane(1, 3), winograd_plane(1, 4)},
      {winograd_plane(2, 0), winograd_plane(2, 1), winograd_plane(2, 2), winograd_plane(2, 3), winograd_plane(2, 4)},
      {winograd_plane(3, 0), winograd_plane(3, 1), winograd_plane(3, 2), winograd_plane(3, 3), winograd_plane(3, 4)},
      {winograd_plane(4, 0), winograd_plane(4, 1), winograd_plane(4, 2), winograd_plane(4, 3), winograd_plane(4, 4)}};
  const std::size_t unit = static_cast<std::size_t>(kWinogradPlanes) * c_in * kUnit;
  for (int o = 0; o < units_of(c_out) * kUnit; ++o) {
    float* w = weight + o / kUnit * unit + o % kUnit;
    const double scale = o < c_out ? affine(p, o).scale : 0.0;
    for (int c = 0; c < c_in; ++c) {
      double taps[9] = {};
      if (o < c_out) {
        for (int t = 0; t < 9; ++t) taps[t] = p.weight[(static_cast<std::size_t>(o) * c_in + c) * 9 + t] * scale;
      }
      for (int i = 0; i < 5; ++i) {
        double row[3];
        for (int x = 0; x < 3; ++x) row[x] = part(i, taps + x, 3);
        for (int j = 0; j < 5; ++j)
          w[(static_cast<std::size_t>(plane[i][j]) * c_in + c) * kUnit] = static_cast<float>(part(j, row, 1));
      }
    }
  }
}

std::size_t winograd_floats(const BlockDesc& d, const Geometry& g) {
  const int tiles = most_tiles(d, g);
  const std::size_t planes = kWinogradPlanes * units_of(d.c_in) + kWinogradProducts * kUnitsAtOnce;
  const std::size_t patches = static_cast<std::size_t>(kPatches) * 9 * d.c_in;
  return planes * plane_floats(tiles) + 5 * (4 * static_cast<std::size_t>(tiles) + 1) * kUnit + round_line(patches);
}

namespace {

// A group of tiles: whole rows of tiles, or a part of one.
struct Group {
  int row = 0, rows = 0;    // of tiles
  int first = 0, each = 0;  // tiles of each row
  int tiles() const { return rows * each; }
};

class Convolution {
 public:
  Convolution(const BasicKernels<float>& k, const Team& t, const View& v, const BlockDesc& d, const Geometry& g, int y0,
              int y1, const GemmArgs& to, const float* weight)
      : k_(k), v_(v), d_(d), g_(g), y0_(y0), y1_(y1), to_(to), weight_(weight), ui_(units_of(d.c_in)) {
    const int tiles = most_tiles(d, g);
    input_ = t.local;
    sums_ = input_ + kWinogradPlanes * ui_ * plane_floats(tiles);
    rows_ = sums_ + kWinogradProducts * kUnitsAtOnce * plane_floats(tiles);
    patches_ = rows_ + 5 * (4 * static_cast<std::ptrdiff_t>(tiles) + 1) * kUnit;
  }

  float* patches() const { return patches_; }

  /// Sets again[row of output - 2 * group.row] where a sum is not finite.
  void run(const Group& group, bool last, bool* again) {
    plane_ = plane_floats(group.tiles());
    for (int r = 0; r < group.rows; ++r) {
      for (int u = 0; u < ui_; ++u) transform(group, r, u);
    }
    for (int u = 0; u < to_.units; u += kUnitsAtOnce) {
      const int units = std::min(kUnitsAtOnce, to_.units - u);
      multiply(group, u, units, last);
      for (int r = 0; r < group.rows; ++r) {
        for (int i = 0; i < units; ++i) {
          const unsigned bad = output(group, r, u, i);
          again[2 * r] |= bad & 1, again[2 * r + 1] |= (bad >> 1) & 1;
        }
      }
    }
  }

 private:
  bool wanted(int y) const { return y >= y0_ && y < y1_; }

  // Input of tile row r: read in place where all pixels exist, otherwise copied between zero borders.
  void transform(const Group& group, int r, int u) {
    const int channels = std::min(kUnit, d_.c_in - u * kUnit), y = 2 * (group.row + r), top = 2 * y - g_.top1;
    const bool readable = v_.chan == 1 && (channels == kUnit || v_.pix == kUnit);
    const bool rows = top >= 0 && top + 5 <= g_.h && wanted(y) && wanted(y + 1);
    int lo = 0, hi = 0;
    if (readable && rows) {
      // tile t starts with column 4 t - left
      lo = std::clamp((g_.left1 + 3) / 4 - group.first, 0, group.each);
      hi = std::clamp((g_.w + g_.left1 - 1) / 4 - group.first, lo, group.each);
    }
    WinogradInputArgs a;
    a.plane = ui_ * plane_;
    float* dst = input_ + u * plane_ + static_cast<std::ptrdiff_t>(r) * group.each * kUnit;
    for (int part = 0; part < 3; ++part) {
      const int from = part == 0 ? 0 : part == 1 ? lo : hi, to = part == 0 ? lo : part == 1 ? hi : group.each;
      if (from == to) continue;
      const int x = 4 * (group.first + from) - g_.left1;
      if (part == 1) {
        a.src = v_.p + u * v_.unit + top * v_.row + x * v_.pix, a.row = v_.row, a.pix = v_.pix;
      } else {
        const int width = 4 * (to - from) + 1;
        copy(u, channels, y, x, width);
        a.src = rows_, a.row = static_cast<std::ptrdiff_t>(width) * kUnit, a.pix = kUnit;
      }
      a.dst = dst + from * kUnit, a.tiles = to - from;
      k_.winograd_input(a);
    }
  }

  // five rows of `width` pixels from column x on for output rows y and y + 1, zero where there is no pixel
  void copy(int u, int channels, int y, int x, int width) {
    const int lo = std::clamp(-x, 0, width), hi = std::clamp(g_.w - x, lo, width);
    for (int i = 0; i < 5; ++i) {
      float* row = rows_ + static_cast<std::ptrdiff_t>(i) * width * kUnit;
      const int from = 2 * y - g_.top1 + i;
      // an output reads no row that is not its own
      if (from < 0 || from >= g_.h || !(i == 2 || wanted(i < 2 ? y : y + 1))) {
        std::memset(row, 0, sizeof(float) * width * kUnit);
        continue;
      }
      std::memset(row, 0, sizeof(float) * lo * kUnit);
      std::memset(row + hi * kUnit, 0, sizeof(float) * (width - hi) * kUnit);
      k_.load_unit(v_.p + u * v_.unit + from * v_.row + (x + lo) * v_.pix, v_.pix, v_.chan, hi - lo, channels,
                   row + lo * kUnit);
    }
  }

  void multiply(const Group& group, int u, int units, bool last) {
    GemmArgs a;
    a.a_pix = kUnit, a.rows = 1, a.cols = group.tiles(), a.a_row = a.cols * kUnit;
    a.b_unit = winograd_unit(d_), a.units = units;
    a.c_pix = kUnit, a.c_row = a.a_row, a.c_unit = plane_;
    std::ptrdiff_t halves[4 * 2 * kUnitsIn];
    const bool whole = d_.c_in % kUnit == 0;
    if (whole) {
      a.k_len = a.k_last = kUnit, a.a_blk = plane_;
    } else {
      for (int i = 0, n = 0; i < 4; ++i) {
        for (int c = 0; c < d_.c_in; c += kUnit / 2, ++n) halves[n] = (i * ui_ + c / kUnit) * plane_ + c % kUnit;
      }
      a.k_len = a.k_last = kUnit / 2, a.k_off = halves;
    }
    int plane = 0;
    for (int i = 0; i < kWinogradProducts; ++i) {
      a.a = input_ + plane * ui_ * plane_;
      a.k_blocks = kPlanesOf[i] * d_.c_in / a.k_len;
      a.b = weight_ + u * a.b_unit + static_cast<std::ptrdiff_t>(plane) * d_.c_in * kUnit;
      a.c = sums_ + i * kUnitsAtOnce * plane_;
      plane += kPlanesOf[i];
      if (i + 1 < kWinogradProducts) {
        a.then = weight_ + u * a.b_unit + static_cast<std::ptrdiff_t>(plane) * d_.c_in * kUnit, a.then_unit = a.b_unit;
      } else if (u + units < to_.units) {
        a.then = weight_ + (u + units) * a.b_unit;
      } else {
        a.then = last ? to_.then : weight_, a.then_unit = last ? to_.then_unit : a.b_unit;
      }
      k_.gemm(a);
    }
  }

  unsigned output(const Group& group, int r, int u, int i) {
    const int y = 2 * (group.row + r), x = 2 * group.first;
    WinogradOutputArgs a;
    a.src = sums_ + i * plane_ + static_cast<std::ptrdiff_t>(r) * group.each * kUnit;
    a.plane = kUnitsAtOnce * plane_;
    a.bias = to_.bias == nullptr ? nullptr : to_.bias + (u + i) * kUnit;
    a.tiles = group.each, a.odd = x + 2 * group.each > g_.w1;
    a.row_wanted[0] = wanted(y), a.row_wanted[1] = wanted(y + 1);
    a.act = to_.act;
    float* dst = to_.c + (u + i) * to_.c_unit + (y - y0_) * to_.c_row + x * to_.c_pix;
    if (u + i + 1 < to_.units || to_.n_last == kUnit) {
      a.dst = dst, a.pix = to_.c_pix, a.row = to_.c_row;
      return k_.winograd_output(a);
    }
    // the rows of the input are no longer needed
    const int columns = std::min(2 * group.each, g_.w1 - x);
    a.dst = rows_, a.row = static_cast<std::ptrdiff_t>(2) * group.each * kUnit;
    const unsigned bad = k_.winograd_output(a);
    for (int j = 0; j < 2; ++j) {
      if (a.row_wanted[j]) k_.store_unit(rows_ + j * a.row, dst + j * to_.c_row, to_.c_pix, 1, columns, to_.n_last);
    }
    return bad;
  }

  const BasicKernels<float>& k_;
  const View& v_;
  const BlockDesc& d_;
  const Geometry& g_;
  int y0_, y1_;
  const GemmArgs& to_;
  const float* weight_;
  int ui_;
  std::ptrdiff_t plane_ = 0;
  float *input_, *sums_, *rows_, *patches_;
};

}  // namespace

void winograd_rows(const BasicKernels<float>& k, const Team& t, const View& v, const BlockDesc& d, const Geometry& g,
                   int y0, int y1, const GemmArgs& to, const float* weight, DirectRow again) {
  const int wide = (g.w1 + 1) / 2, most = tiles_at_once(d);
  Range rows{y0 / 2, (y1 + 1) / 2};
  if (t.n > 1) {
    const Range own = split(rows.hi - rows.lo, t.n, t.tid);
    rows = {rows.lo + own.lo, rows.lo + own.hi};
  }
  Convolution c(k, t, v, d, g, y0, y1, to, weight);
  const int at_once = std::max(1, most / wide), parts = (wide + most - 1) / most;
  for (int row = rows.lo; row < rows.hi; row += at_once) {
    bool bad[2 * kMost] = {};
    Group group;
    group.row = row, group.rows = std::min(at_once, rows.hi - row);
    for (int i = 0; i < parts; ++i) {
      const Range part = split(wide, parts, i);
      group.first = part.lo, group.each = part.hi - part.lo;
      c.run(group, row + at_once >= rows.hi && i + 1 == parts, bad);
    }
    for (int y = std::max(y0, 2 * row); y < std::min(y1, 2 * (row + group.rows)); ++y) {
      if (!bad[y - 2 * row]) continue;
      Team alone;
      alone.local = c.patches();
      GemmArgs one = to;
      one.c += (y - y0) * to.c_row;
      again(k, alone, v, d, g, y, one);
    }
  }
}

}  // namespace mnv4
