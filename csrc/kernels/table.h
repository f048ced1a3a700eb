// The row of a tier.
#pragma once

template <class Cfg, auto Depthwise = depthwise<Cfg>>
constexpr KernelTable make_table(const char* name) {
  using V = typename Cfg::V;
  const bool in_place = requires { typename Cfg::StripVec; };
  return {{name, gemm<Cfg>, Depthwise, load_unit<V>, store_unit<V>, sum_pixels<V>, load_affine<V>, in_place,
           Cfg::kWinograd ? winograd_input<V> : nullptr, Cfg::kWinograd ? winograd_output<V> : nullptr},
          softmax<V>,
          scale_rows<V>,
          fma_burst<V>};
}
