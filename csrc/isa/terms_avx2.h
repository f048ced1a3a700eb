// The k-loop of 1 to 6 pixels x 16 channels on AVX2, 16 terms a pass, as one piece of asm. A core that another guest
// shares dispatches half as many instructions, so the ones beside the FMAs count: 20.8 a term of 6 pixels, where the
// loop of the compiler has 23.5, and g++ 12 keeps sums on the stack when 16 terms are written out in C++. Included
// inside of Vec256.
#pragma once

// Term k: two vectors of weights, then for each pixel its element in all lanes and two FMAs. NEAR: pixels of A lie 16
// floats apart and are addressed from one register; FAR: by threes, p0, p0 + s1, p0 + s2; EACH: by a register each.
#define MNV4_FMA(lo, hi)                 \
  "vfmadd231ps %%ymm13, %%ymm15, %[" #lo \
  "]\n\t"                                \
  "vfmadd231ps %%ymm14, %%ymm15, %[" #hi "]\n\t"
#define MNV4_NEAR(m, k, lo, hi) "vbroadcastss " #m "*64+" #k "*4(%[p0]), %%ymm15\n\t" MNV4_FMA(lo, hi)
#define MNV4_FAR(p, k, lo, hi) "vbroadcastss " #k "*4(" p "), %%ymm15\n\t" MNV4_FMA(lo, hi)
#define MNV4_EACH(m, lo, hi) "vbroadcastss (%[m" #m "],%[off],4), %%ymm15\n\t" MNV4_FMA(lo, hi)

#define MNV4_NEAR_1(k) MNV4_NEAR(0, k, c0, c1)
#define MNV4_NEAR_2(k) MNV4_NEAR_1(k) MNV4_NEAR(1, k, c2, c3)
#define MNV4_NEAR_3(k) MNV4_NEAR_2(k) MNV4_NEAR(2, k, c4, c5)
#define MNV4_NEAR_4(k) MNV4_NEAR_3(k) MNV4_NEAR(3, k, c6, c7)
#define MNV4_NEAR_5(k) MNV4_NEAR_4(k) MNV4_NEAR(4, k, c8, c9)
#define MNV4_NEAR_6(k) MNV4_NEAR_5(k) MNV4_NEAR(5, k, c10, c11)
#define MNV4_FAR_1(k) MNV4_FAR("%[p0]", k, c0, c1)
#define MNV4_FAR_2(k) MNV4_FAR_1(k) MNV4_FAR("%[p0],%[s1],4", k, c2, c3)
#define MNV4_FAR_3(k) MNV4_FAR_2(k) MNV4_FAR("%[p0],%[s2],4", k, c4, c5)
#define MNV4_FAR_4(k) MNV4_FAR_3(k) MNV4_FAR("%[p1]", k, c6, c7)
#define MNV4_FAR_5(k) MNV4_FAR_4(k) MNV4_FAR("%[p1],%[s1],4", k, c8, c9)
#define MNV4_FAR_6(k) MNV4_FAR_5(k) MNV4_FAR("%[p1],%[s2],4", k, c10, c11)
#define MNV4_EACH_1(k) MNV4_EACH(0, c0, c1)
#define MNV4_EACH_2(k) MNV4_EACH_1(k) MNV4_EACH(1, c2, c3)
#define MNV4_EACH_3(k) MNV4_EACH_2(k) MNV4_EACH(2, c4, c5)
#define MNV4_EACH_4(k) MNV4_EACH_3(k) MNV4_EACH(3, c6, c7)
#define MNV4_EACH_5(k) MNV4_EACH_4(k) MNV4_EACH(4, c8, c9)
#define MNV4_EACH_6(k) MNV4_EACH_5(k) MNV4_EACH(5, c10, c11)
#define MNV4_ZERO_1 "vxorps %[c0], %[c0], %[c0]\n\tvxorps %[c1], %[c1], %[c1]\n\t"
#define MNV4_ZERO_2 MNV4_ZERO_1 "vxorps %[c2], %[c2], %[c2]\n\tvxorps %[c3], %[c3], %[c3]\n\t"
#define MNV4_ZERO_3 MNV4_ZERO_2 "vxorps %[c4], %[c4], %[c4]\n\tvxorps %[c5], %[c5], %[c5]\n\t"
#define MNV4_ZERO_4 MNV4_ZERO_3 "vxorps %[c6], %[c6], %[c6]\n\tvxorps %[c7], %[c7], %[c7]\n\t"
#define MNV4_ZERO_5 MNV4_ZERO_4 "vxorps %[c8], %[c8], %[c8]\n\tvxorps %[c9], %[c9], %[c9]\n\t"
#define MNV4_ZERO_6 MNV4_ZERO_5 "vxorps %[c10], %[c10], %[c10]\n\tvxorps %[c11], %[c11], %[c11]\n\t"
#define MNV4_SUMS_1 [c0] "=x"(c0), [c1] "=x"(c1)
#define MNV4_SUMS_2 MNV4_SUMS_1, [c2] "=x"(c2), [c3] "=x"(c3)
#define MNV4_SUMS_3 MNV4_SUMS_2, [c4] "=x"(c4), [c5] "=x"(c5)
#define MNV4_SUMS_4 MNV4_SUMS_3, [c6] "=x"(c6), [c7] "=x"(c7)
#define MNV4_SUMS_5 MNV4_SUMS_4, [c8] "=x"(c8), [c9] "=x"(c9)
#define MNV4_SUMS_6 MNV4_SUMS_5, [c10] "=x"(c10), [c11] "=x"(c11)

#define MNV4_TERM(rows, k) \
  "vmovups " #k            \
  "*64(%[b]), %%ymm13\n\t" \
  "vmovups " #k "*64+32(%[b]), %%ymm14\n\t" rows(k)
#define MNV4_FOUR(rows, i, j, k, l)                                                                            \
  "prefetcht1 (%[next])\n\taddq %[step], %[next]\n\t" MNV4_TERM(rows, i) MNV4_TERM(rows, j) MNV4_TERM(rows, k) \
      MNV4_TERM(rows, l)
#define MNV4_SIXTEEN(rows)    \
  MNV4_FOUR(rows, 0, 1, 2, 3) \
  MNV4_FOUR(rows, 4, 5, 6, 7) MNV4_FOUR(rows, 8, 9, 10, 11) MNV4_FOUR(rows, 12, 13, 14, 15) "addq $1024, %[b]\n\t"
#define MNV4_SINGLE(rows, k) "movq " #k "*8(%[list]), %[off]\n\t" MNV4_TERM(rows, k)
#define MNV4_THREE(rows) \
  MNV4_SINGLE(rows, 0) MNV4_SINGLE(rows, 1) MNV4_SINGLE(rows, 2) "addq $192, %[b]\n\taddq $24, %[list]\n\t"
#define MNV4_LOOP(zero, pass) zero ".p2align 4\n1:\n\t" pass "decq %[n]\n\tjnz 1b"
// what the asm reads through p, so far as the compiler has to know
#define MNV4_READ(p) "m"(*reinterpret_cast<const float (*)[1 << 20]>(p))
#define MNV4_TEMPORARY "xmm13", "xmm14", "xmm15", "cc"

#define MNV4_MOVE_NEAR "addq %[apart], %[p0]\n\t"
#define MNV4_MOVE_FAR "addq %[apart], %[p0]\n\taddq %[apart], %[p1]\n\t"
#define MNV4_STRIDED(where, MR)                                                                                 \
  if constexpr (rows == MR)                                                                                     \
  asm volatile(MNV4_LOOP(MNV4_ZERO_##MR, MNV4_SIXTEEN(MNV4_##where##_##MR) MNV4_MOVE_##where)                   \
               : MNV4_SUMS_##MR, [p0] "+&r"(p0), [p1] "+&r"(p1), [b] "+&r"(b), [n] "+&r"(n), [next] "+&r"(next) \
               : [apart] "r"(apart), [step] "r"(step), [s1] "r"(s1), [s2] "r"(s2), MNV4_READ(a)                 \
               : MNV4_TEMPORARY)
#define MNV4_SEEK_NEAR "movq (%[list]), %[p0]\n\taddq $8, %[list]\n\tleaq (%[a0],%[p0],4), %[p0]\n\t"
#define MNV4_SEEK_FAR                                                            \
  "movq (%[list]), %[p0]\n\taddq $8, %[list]\n\tleaq (%[a1],%[p0],4), %[p1]\n\t" \
  "leaq (%[a0],%[p0],4), %[p0]\n\t"
#define MNV4_LISTED(where, MR)                                                                                   \
  if constexpr (rows == MR)                                                                                      \
  asm volatile(MNV4_LOOP(MNV4_ZERO_##MR, MNV4_SEEK_##where MNV4_SIXTEEN(MNV4_##where##_##MR))                    \
               : MNV4_SUMS_##MR, [p0] "=&r"(p0), [p1] "=&r"(p1), [b] "+&r"(b), [n] "+&r"(n), [next] "+&r"(next), \
                 [list] "+&r"(list)                                                                              \
               : [a0] "r"(a0), [a1] "r"(a1), [step] "r"(step), [s1] "r"(s1), [s2] "r"(s2), MNV4_READ(a)          \
               : MNV4_TEMPORARY)
#define MNV4_SINGLES(where, MR)                                                                                   \
  if constexpr (rows == MR)                                                                                       \
  asm volatile(MNV4_LOOP(MNV4_ZERO_##MR, MNV4_THREE(MNV4_##where##_##MR))                                         \
               : MNV4_SUMS_##MR, [off] "=&r"(off), [b] "+&r"(b), [n] "+&r"(n), [list] "+&r"(list)                 \
               : [m0] "r"(m0), [m1] "r"(m1), [m2] "r"(m2), [m3] "r"(m3), [m4] "r"(m4), [m5] "r"(m5), MNV4_READ(a) \
               : MNV4_TEMPORARY)

#define MNV4_ALL(walk, where) \
  MNV4_##walk(where, 1);      \
  MNV4_##walk(where, 2);      \
  MNV4_##walk(where, 3);      \
  MNV4_##walk(where, 4);      \
  MNV4_##walk(where, 5);      \
  MNV4_##walk(where, 6)

// Variables of their own, since an array whose elements an asm changes stays in memory.
#define MNV4_DECLARE reg c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11
#define MNV4_RESULT                                 \
  acc[0] = c0, acc[1] = c1;                         \
  if constexpr (rows > 1) acc[2] = c2, acc[3] = c3; \
  if constexpr (rows > 2) acc[4] = c4, acc[5] = c5; \
  if constexpr (rows > 3) acc[6] = c6, acc[7] = c7; \
  if constexpr (rows > 4) acc[8] = c8, acc[9] = c9; \
  if constexpr (rows > 5) acc[10] = c10, acc[11] = c11

static constexpr bool kTerms = true;

// In all of them: acc[pixel][2] becomes the sum of 16 (or 3) * n terms, n > 0. a: pixel 0; pix: floats between pixels,
// 16 when `Near`. b: [term][16]. With each 4 terms a line of `next` goes into L2, which then moves on
// by `step` bytes.

// The terms of pass i lie i * apart floats after a.
template <int rows, bool Near, int N>
static MNV4_INLINE void strided_terms(reg (&acc)[N], const float* a, std::ptrdiff_t pix, const float* b,
                                      std::ptrdiff_t n, std::ptrdiff_t apart, const char* next, std::ptrdiff_t step) {
  const float *p0 = a, *p1 = a + 3 * pix;
  const std::ptrdiff_t s1 = pix, s2 = 2 * pix;
  apart *= sizeof(float);
  MNV4_DECLARE;
  if constexpr (Near) {
    MNV4_ALL(STRIDED, NEAR);
  } else {
    MNV4_ALL(STRIDED, FAR);
  }
  MNV4_RESULT;
}

// The terms of pass i lie list[i] floats after a.
template <int rows, bool Near, int N>
static MNV4_INLINE void listed_terms(reg (&acc)[N], const float* a, std::ptrdiff_t pix, const float* b,
                                     std::ptrdiff_t n, const std::ptrdiff_t* list, const char* next,
                                     std::ptrdiff_t step) {
  const float *a0 = a, *a1 = a + 3 * pix, *p0, *p1;
  const std::ptrdiff_t s1 = pix, s2 = 2 * pix;
  MNV4_DECLARE;
  if constexpr (Near) {
    MNV4_ALL(LISTED, NEAR);
  } else {
    MNV4_ALL(LISTED, FAR);
  }
  MNV4_RESULT;
}

// Each term lies somewhere else: 3 * n places in `list`. Nothing is fetched: so few terms are a stem's.
template <int rows, int N>
static MNV4_INLINE void single_terms(reg (&acc)[N], const float* a, std::ptrdiff_t pix, const float* b,
                                     std::ptrdiff_t n, const std::ptrdiff_t* list) {
  const float *m0 = a, *m1 = a + pix, *m2 = m1 + pix, *m3 = m2 + pix, *m4 = m3 + pix, *m5 = m4 + pix;
  std::ptrdiff_t off;
  MNV4_DECLARE;
  MNV4_ALL(SINGLES, EACH);
  MNV4_RESULT;
}
