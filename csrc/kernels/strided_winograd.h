// Transforms of 3 x 3 convolutions at stride 2, see core/winograd.h: one unit of 16 channels at a time.
#pragma once

// What a row (or column) of five inputs x becomes: x0 - x2, x1 | x2 | x4 - x2, x3.
template <int I, class V>
MNV4_INLINE typename V::reg winograd_input_part(const typename V::reg* x) {
  if constexpr (I == 0) return V::sub(x[0], x[2]);
  if constexpr (I == 1) return x[1];
  if constexpr (I == 2) return x[2];
  if constexpr (I == 3) return V::sub(x[4], x[2]);
  if constexpr (I == 4) return x[3];
}

template <class V>
void winograd_input(const WinogradInputArgs& a) {
  using reg = typename V::reg;
  for (int v = 0; v < kUnit; v += V::W) {
    const float* src = a.src + v;
    float* dst = a.dst + v;
    for (int t = 0; t < a.tiles; ++t, src += 4 * a.pix, dst += kUnit) {
      unroll<5>([&](auto i) MNV4_LAMBDA {
        reg part[5];
        unroll<5>([&](auto x) MNV4_LAMBDA {
          const float* column = src + x * a.pix;
          auto row = [&](int y) MNV4_LAMBDA { return V::load(column + y * a.row); };
          if constexpr (i == 0) part[x] = V::sub(row(0), row(2));
          if constexpr (i == 1) part[x] = row(1);
          if constexpr (i == 2) part[x] = row(2);
          if constexpr (i == 3) part[x] = V::sub(row(4), row(2));
          if constexpr (i == 4) part[x] = row(3);
        });
        unroll<5>([&](auto j) MNV4_LAMBDA {
          constexpr int plane = winograd_plane(i, j);
          V::store(dst + plane * a.plane, winograd_input_part<j, V>(part));
        });
      });
    }
  }
}

template <class V, int A>
unsigned winograd_output_as(const WinogradOutputArgs& a) {
  using reg = typename V::reg;
  unsigned bad = 0;
  for (int v = 0; v < kUnit; v += V::W) {
    const reg bias = a.bias == nullptr ? V::zero() : V::load(a.bias + v), nothing = V::zero();
    const float* src = a.src + v;
    float* dst = a.dst + v;
    reg check[2] = {nothing, nothing};
    for (int t = 0; t < a.tiles; ++t, src += kUnit, dst += 2 * a.pix) {
      auto sum = [&](int i) MNV4_LAMBDA { return V::load(src + i * a.plane); };
      unroll<2>([&](auto y) MNV4_LAMBDA {
        if (!a.row_wanted[y]) return;
        reg part[3];
        unroll<3>([&](auto j) MNV4_LAMBDA { part[j] = V::add(sum(3 * y + j), sum(3 * y + 3 + j)); });
        unroll<2>([&](auto x) MNV4_LAMBDA {
          if (x == 1 && t + 1 == a.tiles && a.odd) return;
          reg value = V::add(V::add(part[x], part[x + 1]), bias);
          check[y] = V::fma(value, nothing, check[y]);
          if constexpr (A == static_cast<int>(Act::relu)) value = relu<V>(value);
          if constexpr (A == static_cast<int>(Act::relu6)) value = relu6<V>(value);
          if constexpr (A == static_cast<int>(Act::gelu)) value = gelu<V>(value);
          V::store(dst + y * a.row + x * a.pix, value);
        });
      });
    }
    unroll<2>([&](auto y) MNV4_LAMBDA {
      if (!(V::reduce_add(check[y]) == 0.0f)) bad |= 1u << y;
    });
  }
  return bad;
}

template <class V>
unsigned winograd_output(const WinogradOutputArgs& a) {
  switch (a.act) {
    case Act::relu: return winograd_output_as<V, static_cast<int>(Act::relu)>(a);
    case Act::relu6: return winograd_output_as<V, static_cast<int>(Act::relu6)>(a);
    case Act::gelu: return winograd_output_as<V, static_cast<int>(Act::gelu)>(a);
    default: return winograd_output_as<V, static_cast<int>(Act::none)>(a);
  }
}
