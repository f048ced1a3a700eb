// Activations. max and min take the bound first: x86 returns the second operand when one is NaN, so NaN goes through as
// in torch.
#pragma once

template <class V>
MNV4_INLINE typename V::reg relu(typename V::reg x) {
  return V::max(V::zero(), x);
}

template <class V>
MNV4_INLINE typename V::reg relu6(typename V::reg x) {
  return V::min(V::set(6.0f), relu<V>(x));
}

// 2^x for x <= 0, below 1.4 ulp (1.6 without a fused multiply-add; own minimax fits, Lawson iteration); 0 from -127
// down in tiers without V::scale. NaN stays NaN.
template <class V>
MNV4_INLINE typename V::reg exp2_nonpositive(typename V::reg x) {
  using reg = typename V::reg;
  if constexpr (V::kScales) {
    const reg r = V::fraction(x);
    reg p = V::set(2.161291631637141e-4f);
    p = V::fma(p, r, V::set(1.2467845808714628e-3f));
    p = V::fma(p, r, V::set(9.675451554358006e-3f));
    p = V::fma(p, r, V::set(5.5485282093286514e-2f));
    p = V::fma(p, r, V::set(2.402293086051941e-1f));
    p = V::fma(p, r, V::set(6.931470632553101e-1f));
    p = V::fma(p, r, V::set(1.0f));
    return V::scale(p, x);
  } else {
    // 1.5 * 2^23 + 127: the last bits of the sum are the nearest integer to x plus the bias of the exponent
    const reg shift = V::set(12583039.0f);
    x = V::max(V::set(-127.0f), x);
    const reg n = V::add(x, shift), r = V::sub(x, V::sub(n, shift)), s = V::mul(r, r);
    // pairs of powers: a constant that is added to needs a copy where fma overwrites its addend
    reg p = V::fma(V::set(1.33908063e-3f), r, V::set(9.61850584e-3f));
    p = V::fma(V::set(1.53264627e-4f), s, p);
    p = V::fma(p, s, V::fma(V::set(5.55035993e-2f), r, V::set(2.40226477e-1f)));
    p = V::fma(p, s, V::fma(V::set(6.93147182e-1f), r, V::set(1.0f)));
    return V::mul(p, V::as_exponent(n));
  }
}

// Phi(t), t <= 0, as a polynomial of the distance to the nearest of the points -i * kPhiStep: [power][i], own minimax
// fits (Lawson iteration), absolute error below 4e-8, in the tail that of the rounding. At the last point it is 0.
constexpr float kPhiStep = 0.390625f;
[[maybe_unused]] alignas(64) constexpr float kPhi[6][16] = {
    {0.5f, 0.348037213f, 0.217327744f, 0.120623626f, 0.0590851232f, 0.0254023895f, 0.0095454799f, 0.00312494067f,
     0.00088902557f, 0.000219360401f, 4.686994e-05f, 8.6612099e-06f, 1.38283485e-06f, 1.90594193e-07f, 2.26620696e-08f,
     0.0f},
    {0.398942262f, 0.369637489f, 0.294018f, 0.200772271f, 0.117697015f, 0.0592323653f, 0.0255908426f, 0.00949165691f,
     0.00302225747f, 0.00082613877f, 0.000193868298f, 3.90564819e-05f, 6.7547976e-06f, 1.00291697e-06f, 1.27835563e-07f,
     6.0869155e-07f},
    {-3.63123291e-07f, 0.0721926242f, 0.114848375f, 0.117639154f, 0.0919515043f, 0.0578452311f, 0.0299899373f,
     0.0129769938f, 0.00472214352f, 0.00145205122f, 0.000378566328f, 8.38772103e-05f, 1.58213097e-05f, 2.5439474e-06f,
     3.49045791e-07f, -2.43181094e-05f},
    {-0.0664983168f, -0.0522048101f, -0.0190946516f, 0.0124896523f, 0.0282740649f, 0.0277869832f, 0.0191644561f,
     0.010246261f, 0.00441540871f, 0.00156406476f, 0.000460671843f, 0.000113647431f, 2.36006708e-05f, 4.14031911e-06f,
     6.15226952e-07f, 0.000349290262f},
    {-7.19685777e-05f, -0.0169766992f, -0.0227026232f, -0.0158882625f, -0.00433021085f, 0.00384844071f, 0.00618420914f,
     0.00483316975f, 0.00267187506f, 0.00114283583f, 0.00039255232f, 0.000110419605f, 2.57351421e-05f, 5.00816805e-06f,
     8.18145679e-07f, -0.00204329239f},
    {0.00972294621f, 0.0064452854f, -0.00067816308f, -0.00554776751f, -0.00554329157f, -0.00263932534f, 2.4967394e-05f,
     0.00109646167f, 0.000998267089f, 0.00056349067f, 0.000235232947f, 7.70516781e-05f, 2.03699128e-05f,
     4.41669681e-06f, 7.93486549e-07f, 0.00418503396f},
};

// x * Phi(x), the erf form; NaN stays NaN, +inf stays +inf, -inf gives NaN as in torch (inf * 0).
template <class V>
MNV4_INLINE typename V::reg gelu_by_table(typename V::reg x) {
  using reg = typename V::reg;
  const reg last = V::set(15 * kPhiStep), shift = V::set(12582912.0f);  // 1.5 * 2^23: the last bits of y are i
  const reg a = V::minus_abs(V::min(last, x));                          // finite for +inf
  const reg t = V::max(V::set(-15 * kPhiStep), a);
  const reg y = V::fma(t, V::set(-1 / kPhiStep), shift);
  const reg r = V::fma(V::sub(y, shift), V::set(kPhiStep), t);
  reg p = V::lookup(kPhi[5], y);
  for (int k = 4; k >= 0; --k) p = V::fma(p, r, V::lookup(kPhi[k], y));
  return V::fma(a, p, relu<V>(x));
}

// The same, with Phi(t), t <= 0, as 2^P(t). P falls all the way, to where 2^-127 is 0, so that no end is looked for.
// Absolute error below 2.5e-8 but for rounding; own minimax fits (Lawson iteration): P, 2^r.
[[maybe_unused]] constexpr float kGelu[] = {
    -1.902065719e-6f, -2.805694203e-5f, -1.314732363e-4f,
    2.720757038e-4f,  7.245420944e-3f,  5.262761191e-2f,
    -4.591621459e-1f, 1.151111007f,     -1.0f,  //
    1.326472731e-3f,  9.671512991e-3f,  5.550733581e-2f,
    2.402224243e-1f,  6.931470037e-1f,  1.0f,
};
// N vectors in step: a core whose scheduler holds 64 operations does not overlap chains of 25 by itself.
template <class V, int N>
MNV4_INLINE void gelu_by_power(typename V::reg (&x)[N]) {
  using reg = typename V::reg;
  constexpr float kEnd = 6.0f;
  const reg shift = V::set(12583039.0f);  // see exp2_nonpositive
  const float* k = kGelu;
#if defined(__x86_64__)
  asm("" : "+r"(k));  // else each call begins with copies of all of them to the stack
#endif
  reg a[N], p[N], n[N];
  const auto each = [](auto f) MNV4_LAMBDA { unroll<N>(f); };
  const auto next = [&](reg(&sum)[N], const reg(&by)[N], int c) MNV4_LAMBDA {
    const reg plus = V::set(k[c]);
    each([&](auto i) MNV4_LAMBDA { sum[i] = V::fma(sum[i], by[i], plus); });
  };
  each([&](auto i) MNV4_LAMBDA { a[i] = V::minus_abs(V::min(V::set(kEnd), x[i])); });  // finite for +inf
  each([&](auto i) MNV4_LAMBDA { p[i] = V::set(k[0]); });
  unroll<8>([&](auto c) MNV4_LAMBDA { next(p, a, 1 + c); });
  each([&](auto i) MNV4_LAMBDA { p[i] = V::max(V::set(-127.0f), p[i]); });
  each([&](auto i) MNV4_LAMBDA { n[i] = V::add(p[i], shift); });
  each([&](auto i) MNV4_LAMBDA { p[i] = V::sub(p[i], V::sub(n[i], shift)); });
  each([&](auto i) MNV4_LAMBDA { a[i] = V::mul(a[i], V::as_exponent(n[i])); });
  each([&](auto i) MNV4_LAMBDA { n[i] = V::set(k[9]); });
  unroll<5>([&](auto c) MNV4_LAMBDA { next(n, p, 10 + c); });
  each([&](auto i) MNV4_LAMBDA { x[i] = V::fma(a[i], n[i], relu<V>(x[i])); });
}

template <class V>
MNV4_INLINE typename V::reg gelu(typename V::reg x) {
  if constexpr (V::kLooksUp) {
    return gelu_by_table<V>(x);
  } else {
    typename V::reg one[1] = {x};
    gelu_by_power<V>(one);
    return one[0];
  }
}

template <class V, int N>
MNV4_INLINE void gelu_group(float* p) {
  typename V::reg x[N];
  unroll<N>([&](auto i) MNV4_LAMBDA { x[i] = V::load(p + i * V::W); });
  if constexpr (N == 1) {
    x[0] = gelu<V>(x[0]);
  } else {
    gelu_by_power<V>(x);
  }
  unroll<N>([&](auto i) MNV4_LAMBDA { V::store(p + i * V::W, x[i]); });
}

// Applies GELU to `n` floats in place; n is a multiple of the vector width, of two where V::kGeluStep > 1.
template <class V>
void gelu_inplace(float* p, int n) {
  constexpr int many = V::kGeluStep, few = many > 1 ? 2 : 1;
  const float* end = p + n;
  for (; end - p >= many * V::W; p += many * V::W) gelu_group<V, many>(p);
  if constexpr (few < many) {
    for (; p < end; p += few * V::W) gelu_group<V, few>(p);
  }
}
