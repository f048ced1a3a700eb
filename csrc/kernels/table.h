// The row of a tier.
#pragma once

template <class Cfg>
constexpr KernelTable make_table(const char* name) {
  using V = typename Cfg::V;
  return {{name, gemm<Cfg>, depthwise<Cfg>, load_unit<V>, store_unit<V>, sum_pixels<V>, load_affine<V>,
           requires {typename Cfg::Pair;
}
}
, softmax<V>, scale_rows<V>, fma_burst<V>
}
;
}
