// The row of a tier.
#pragma once

template <class Cfg>
constexpr KernelTable make_table(const char* name) {
  using V = typename Cfg::V;
  return {name,
          gemm<Cfg>,
          depthwise<Cfg>,
          load_unit<V>,
          store_unit<V>,
          sum_pixels<V>,
          softmax<V>,
          scale_rows<V>,
          load_affine<V>,
          fma_burst<V>,
          requires { typename Cfg::Pair; },
          Cfg::kWinograd ? winograd_input<V> : nullptr,
          Cfg::kWinograd ? winograd_output<V> : nullptr};
}
