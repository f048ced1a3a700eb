// Attention of query rows to one key and one value head that all query heads share.
#pragma once

#include "core/kernels.h"

namespace mnv4 {

/// Keys and values of one image, packed as the right-hand sides of two products.
struct Heads {
  const float* keys = nullptr;    // [unit of 16 keys][key_dim][16], then [unit][16]: 0, or -inf beyond the last key
  const float* values = nullptr;  // [unit of 16 of value_dim][nk][16]
  int nk = 0, key_dim = 0, value_dim = 0;
};

/// Query rows handled together, so that their scores stay in L1 or L2.
int attention_rows(int nk, int rows);
/// Floats of the scores of `rows` query rows and their sums.
inline std::size_t score_floats(int nk, int rows) {
  return static_cast<std::size_t>(units_of(nk)) * kUnit * rows + round_line(rows);
}
inline std::size_t key_floats(int nk, int key_dim) {
  return static_cast<std::size_t>(units_of(nk)) * kUnit * (key_dim + 1);
}
inline std::size_t value_floats(int nk, int value_dim) {
  return static_cast<std::size_t>(units_of(value_dim)) * kUnit * nk;
}

/// Packs channels [16 * unit, 16 * unit + 16) of all keys: element (key, i) of the unit is src[key * pix + i * chan].
void pack_keys(const KernelTable& k, const float* src, std::ptrdiff_t pix, std::ptrdiff_t chan, int unit, int nk,
               int key_dim, float* keys);

/// o = softmax(q k^T) v for `rows` query rows of one head, which are pixels of one row of q and of o. The scale of the
/// scores, in units of log2 e, is in q or in the keys. Of o whole units are written. o may be q.
void attend(const KernelTable& k, const Heads& heads, const View& q, const View& o, int rows, float* scores);

/// Strides in floats: image, head, row, element.
struct Strided {
  float* p = nullptr;
  std::ptrdiff_t image = 0, head = 0, row = 0, element = 0;
};

/// softmax(scale q k^T) v of strided tensors q [n, heads, nq, d], k [n, 1, nk, d], v [n, 1, nk, dv] into
/// out [n, heads, nq, dv].
struct AttentionCall {
  Strided q, k, v, out;
  int n = 0, heads = 0, nq = 0, nk = 0, key_dim = 0, value_dim = 0;
  float scale = 1.0f;
  /// Floats that each thread needs.
  std::size_t scratch_floats() const;
  void run(const KernelTable& kernels, float* arena, int threads) const;
};

}  // namespace mnv4
