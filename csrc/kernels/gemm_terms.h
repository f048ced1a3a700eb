// Tiles of the product whose k-loop is written by hand (V::strided_terms and its kin), one after the other in one call:
// what lies between two loops counts, 16 to 28 % of a tile when sums are short.
#pragma once

// Where the terms of a product lie: a fixed distance between each 16 of them, or a list of where each 16 begin, or of
// each one. Otherwise gemm_tile.
enum class Walk { strided, listed, single, other };

MNV4_INLINE Walk walk_of(const GemmArgs& g) {
  if (g.k_last != g.k_len || g.k_blocks == 0) return Walk::other;
  if (g.k_len == kUnit) return g.k_off == nullptr ? Walk::strided : Walk::listed;
  return g.k_len == 1 && g.k_off != nullptr && g.k_blocks % 3 == 0 ? Walk::single : Walk::other;
}

// `count` tiles, each of them the next pixels of a, c and r.
struct Tiles {
  const float *b, *bias;
  float* c;
  const float* res;
  const std::ptrdiff_t *a_off, *c_off, *r_off;
  const char* next;            // fetched while the tiles compute: one line every four terms, then
  std::ptrdiff_t step, bytes;  // `step` bytes on; `bytes` between what two tiles fetch
  int count;
};

template <class V, int MR, bool Packed>
void term_tiles(const GemmArgs& g, Walk walk, const Tiles& t) {
  using reg = typename V::reg;
  constexpr int S = kUnit / V::W;
  // copies: for all the compiler knows a store of floats might change the originals
  const float *a = g.a, *b = t.b, *bias = g.last_k ? t.bias : nullptr;
  const std::ptrdiff_t pix = g.a_pix, apart = g.a_blk, step = t.step, bytes = t.bytes;
  const std::ptrdiff_t* list = g.k_off;
  const std::ptrdiff_t passes = walk == Walk::single ? g.k_blocks / 3 : g.k_blocks;
  const Act act = g.last_k ? g.act : Act::none;
  const bool add = !g.first_k;
  const float* res = g.last_k && act != Act::gelu ? t.res : nullptr;
  float* c = t.c;
  const std::ptrdiff_t *a_off = t.a_off, *c_off = t.c_off, *r_off = t.r_off;
  const char* next = t.next;
  for (int n = t.count; n > 0; --n, a_off += MR, c_off += MR, r_off += MR, next += bytes) {
    reg acc[MR * S];  // [MR, S]
    if (walk == Walk::strided) {
      V::template strided_terms<MR, Packed>(acc, a + a_off[0], pix, b, passes, apart, next, step);
    } else if (walk == Walk::listed) {
      V::template listed_terms<MR, Packed>(acc, a + a_off[0], pix, b, passes, list, next, step);
    } else {
      V::template single_terms<MR>(acc, a + a_off[0], pix, b, passes, list);
    }
    // what follows the sum; Near: the pixels of C and res lie one after the other
    auto finish = [&](auto near) MNV4_LAMBDA {
      const auto at = [&](auto m, const std::ptrdiff_t* off)
                          MNV4_LAMBDA { return decltype(near)::value ? off[0] + m * kUnit : off[m]; };
      auto plus = [&](const float* p, const std::ptrdiff_t* off) MNV4_LAMBDA {
        unroll<MR>([&](auto m) MNV4_LAMBDA {
          const float* q = p + at(m, off);
          unroll<S>([&](auto j) MNV4_LAMBDA { acc[m * S + j] = V::add(acc[m * S + j], V::load(q + j * V::W)); });
        });
      };
      if (add) plus(c, c_off);
      // a bias that outweighs the sum would swallow its low bits if it came first
      if (bias != nullptr) {
        unroll<S>([&](auto j) MNV4_LAMBDA {
          const reg v = V::load(bias + j * V::W);
          unroll<MR>([&](auto m) MNV4_LAMBDA { acc[m * S + j] = V::add(acc[m * S + j], v); });
        });
      }
      if (act == Act::relu) {
        unroll<MR * S>([&](auto i) MNV4_LAMBDA { acc[i] = relu<V>(acc[i]); });
      } else if (act == Act::relu6) {
        unroll<MR * S>([&](auto i) MNV4_LAMBDA { acc[i] = relu6<V>(acc[i]); });
      }
      if (res != nullptr) plus(res, r_off);
      unroll<MR>([&](auto m) MNV4_LAMBDA {
        float* p = c + at(m, c_off);
        unroll<S>([&](auto j) MNV4_LAMBDA { V::store(p + j * V::W, acc[m * S + j]); });
      });
    };
    constexpr std::ptrdiff_t span = (MR - 1) * kUnit;
    if (c_off[MR - 1] - c_off[0] == span && (res == nullptr || r_off[MR - 1] - r_off[0] == span)) {
      finish(std::true_type{});
    } else {
      finish(std::false_type{});
    }
  }
}

using TermTilesFn = void (*)(const GemmArgs&, Walk, const Tiles&);

template <class V, bool Packed, int... M>
MNV4_INLINE TermTilesFn pick_term_tiles(int mr, std::integer_sequence<int, M...>) {
  static constexpr TermTilesFn table[] = {term_tiles<V, M + 1, Packed>...};
  return table[mr - 1];
}
