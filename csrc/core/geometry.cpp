#include <algorithm>

#include "core/block.h"

namespace mnv4 {
namespace {

// output size, padding before and after, of a k-tap stride-s window over n elements
struct Extent {
  int out, before, after;
};

Extent extent(int n, int k, int s, bool same) {
  if (same) {
    const int out = (n + s - 1) / s;
    const int pad = std::max(0, (out - 1) * s + k - n);
    return {out, pad / 2, pad - pad / 2};
  }
  const int pad = k / 2;
  const int out = (n + 2 * pad - k) / s + 1;
  return {out, pad, std::max(0, (out - 1) * s + k - n - pad)};
}

std::string bad(const char* name, int value, const char* expected) {
  return std::string(name) + " = " + std::to_string(value) + ", expected " + expected;
}

bool depthwise_kernel(int k) { return k == 0 || k == 3 || k == 5; }
bool stride_ok(int s) { return s == 1 || s == 2; }

}  // namespace

std::string check(const BlockDesc& d) {
  constexpr int kMaxChannels = 1 << 20;
  if (d.c_in < 1 || d.c_in > kMaxChannels) return bad("c_in", d.c_in, "1 to 2**20");
  if (d.c_mid < 1 || d.c_mid > kMaxChannels) return bad("c_mid", d.c_mid, "1 to 2**20");
  if (d.c_out < 1 || d.c_out > kMaxChannels) return bad("c_out", d.c_out, "1 to 2**20");
  if (!depthwise_kernel(d.start_kernel)) return bad("start_kernel", d.start_kernel, "0, 3 or 5");
  if (!depthwise_kernel(d.mid_kernel)) return bad("mid_kernel", d.mid_kernel, "0, 3 or 5");
  if (d.expand_kernel != 1 && d.expand_kernel != 3 && d.expand_kernel != 5)
    return bad("expand_kernel", d.expand_kernel, "1, 3 or 5");
  if (!stride_ok(d.start_stride)) return bad("start_stride", d.start_stride, "1 or 2");
  if (!stride_ok(d.expand_stride)) return bad("expand_stride", d.expand_stride, "1 or 2");
  if (!stride_ok(d.mid_stride)) return bad("mid_stride", d.mid_stride, "1 or 2");
  if (d.start_kernel == 0 && d.start_stride != 1)
    return bad("start_stride", d.start_stride, "1 without a start depthwise");
  if (d.mid_kernel == 0 && d.mid_stride != 1) return bad("mid_stride", d.mid_stride, "1 without a mid depthwise");
  if (d.expand_kernel == 1 && d.expand_stride != 1) return bad("expand_stride", d.expand_stride, "1 for a 1x1 expand");
  if (!d.expand && d.expand_kernel != 1) return bad("expand_kernel", d.expand_kernel, "1 without an expand stage");
  if (!d.expand && d.c_mid != d.c_in) return bad("c_mid", d.c_mid, "c_in without an expand stage");
  if (!d.project && d.c_out != d.c_mid) return bad("c_out", d.c_out, "c_mid without a project stage");
  if (d.start_kernel == 0 && !d.expand && !d.project)
    return "no stage given, expected at least a start, expand or project stage";
  if (d.mid_kernel != 0 && !d.expand) return bad("mid_kernel", d.mid_kernel, "0 without an expand stage");
  if (d.mid_kernel != 0 && !d.project) return bad("mid_kernel", d.mid_kernel, "0 without a project stage");
  if (d.start_kernel != 0 && d.expand_kernel != 1)
    return bad("expand_kernel", d.expand_kernel, "1 after a start depthwise");
  if (d.mid_kernel != 0 && d.expand_kernel != 1) return bad("mid_kernel", d.mid_kernel, "0 after a dense expand");
  if (d.expand_kernel > 1 && d.c_in * d.expand_kernel * d.expand_kernel > 1 << 20)
    return bad("c_in", d.c_in, "a dense window of at most 2**20 terms");
  if (d.residual && !d.expand && !d.project) return bad("residual", 1, "0 without an expand or project stage");
  if (d.residual && (d.c_in != d.c_out || d.start_stride * d.expand_stride * d.mid_stride != 1)) {
    return bad("residual", 1, "0 unless c_in == c_out and all strides are 1");
  }
  return {};
}

Geometry geometry(const BlockDesc& d, int h, int w) {
  Geometry g;
  g.h = h, g.w = w;
  const bool dense = d.expand_kernel > 1;
  const int k1 = dense ? d.expand_kernel : d.start_kernel;
  const int s1 = dense ? d.expand_stride : d.start_stride;
  if (k1 > 1) {
    const Extent y = extent(h, k1, s1, d.same_padding), x = extent(w, k1, s1, d.same_padding);
    g.h1 = y.out, g.top1 = y.before;
    g.w1 = x.out, g.left1 = x.before, g.right1 = x.after;
  } else {
    g.h1 = h, g.w1 = w;
  }
  if (d.mid_kernel > 0) {
    const Extent y = extent(g.h1, d.mid_kernel, d.mid_stride, d.same_padding);
    const Extent x = extent(g.w1, d.mid_kernel, d.mid_stride, d.same_padding);
    g.h2 = y.out, g.top2 = y.before;
    g.w2 = x.out, g.left2 = x.before, g.right2 = x.after;
  } else {
    g.h2 = g.h1, g.w2 = g.w1;
  }
  return g;
}

}  // namespace mnv4
