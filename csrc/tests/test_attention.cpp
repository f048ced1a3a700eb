// The exponential and the softmax of every tier, and attention in buffers that end at a page that cannot be touched.
#include "core/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "naive.h"

namespace mnv4::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// what kernels/softmax.h says of its exponential
double allowed(const KernelTable& k) { return std::strcmp(k.name, "scalar") == 0 ? 1.6 : 1.4; }

/// Scores [unit][row][16] of which the first key of each row is 0, so that the rest is 2^x of what it was.
void exponential(const KernelTable& k, const std::vector<float>& xs, double* worst) {
  const int rows = static_cast<int>(xs.size() + 14) / 15;
  Guarded s(static_cast<std::size_t>(rows) * kUnit, true), inverse(static_cast<std::size_t>(rows), true);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kUnit; ++i) {
      const std::size_t at = static_cast<std::size_t>(r) * 15 + i - 1;
      s.data()[r * kUnit + i] = i == 0 ? 0.0f : at < xs.size() ? xs[at] : -kInf;
    }
  }
  SoftmaxArgs a;
  a.s = s.data(), a.unit = rows * kUnit, a.rows = rows, a.units = 1, a.inverse = inverse.data();
  k.softmax(a);
  for (int r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int i = 0; i < kUnit; ++i) sum += s.data()[r * kUnit + i];
    CHECK(std::abs(inverse.data()[r] * sum - 1.0) < 1e-6, "sum of a row");
    CHECK(s.data()[r * kUnit] == 1.0f, "2^0");
  }
  for (std::size_t i = 0; i < xs.size(); ++i) {
    const float got = s.data()[i / 15 * kUnit + i % 15 + 1];
    const double want = std::exp2(static_cast<double>(xs[i]));
    if (xs[i] < -126.0f) {
      CHECK(got >= 0.0f && got <= 1.2e-38f, "2^x of x = " + std::to_string(xs[i]));
      continue;
    }
    const float near = static_cast<float>(want);
    const double ulp = static_cast<double>(std::nextafter(near, kInf)) - near;
    *worst = std::max(*worst, std::abs(got - want) / ulp);
  }
}

void not_finite(const KernelTable& k) {
  Guarded s(4 * kUnit, true), inverse(4, true);
  for (int i = 0; i < 4 * kUnit; ++i) s.data()[i] = i < kUnit ? 1.0f : i < 2 * kUnit ? -kInf : -1.0f;
  s.data()[2 * kUnit + 5] = std::nanf(""), s.data()[3 * kUnit + 7] = kInf;
  SoftmaxArgs a;
  a.s = s.data(), a.unit = 4 * kUnit, a.rows = 4, a.units = 1, a.inverse = inverse.data();
  k.softmax(a);
  CHECK(inverse.data()[0] == 1.0f / 16.0f, "equal scores");
  for (int r = 1; r < 4; ++r) CHECK(std::isnan(inverse.data()[r]), "row " + std::to_string(r));
}

void attention(const KernelTable& k, Random& random) {
  const int nk = random.between(1, 70), rows = random.between(1, 40), d = random.between(1, 70),
            dv = random.between(1, 70);
  const int ud = units_of(d), uv = units_of(dv);
  const std::vector<float> key = random.reals(static_cast<std::size_t>(nk) * d),
                           query = random.reals(static_cast<std::size_t>(rows) * d, 2.0f),
                           value = random.reals(static_cast<std::size_t>(nk) * dv);
  const bool end = random.chance(50);
  Guarded keys(key_floats(nk, d), end), values(value_floats(nk, dv), end), scores(score_floats(nk, rows), end),
      q(static_cast<std::size_t>(ud) * rows * kUnit, end), o(static_cast<std::size_t>(uv) * rows * kUnit, end);
  for (int u = 0; u < ud; ++u) pack_keys(k, key.data() + u * kUnit, d, 1, u, nk, d, keys.data());
  for (int u = 0; u < uv; ++u)
    k.load_unit(value.data() + u * kUnit, dv, 1, nk, std::min(kUnit, dv - u * kUnit), values.data() + u * nk * kUnit);
  for (int u = 0; u < ud; ++u)
    k.load_unit(query.data() + u * kUnit, d, 1, rows, std::min(kUnit, d - u * kUnit), q.data() + u * rows * kUnit);
  attend(k, {keys.data(), values.data(), nk, d, dv}, {.p = q.data(), .unit = rows * kUnit, .pix = kUnit},
         {.p = o.data(), .unit = rows * kUnit, .pix = kUnit}, rows, scores.data());
  for (int r = 0; r < rows; ++r) {
    std::vector<double> p(nk);
    double top = -1e300, sum = 0.0;
    for (int j = 0; j < nk; ++j) {
      double s = 0.0;
      for (int i = 0; i < d; ++i) s += static_cast<double>(query[r * d + i]) * key[j * d + i];
      p[j] = s, top = std::max(top, s);
    }
    for (double& x : p) sum += x = std::exp2(x - top);
    for (int i = 0; i < dv; ++i) {
      double want = 0.0;
      for (int j = 0; j < nk; ++j) want += p[j] / sum * value[j * dv + i];
      const float got = o.data()[(i / kUnit * rows + r) * kUnit + i % kUnit];
      CHECK(std::abs(got - want) < 2e-5, "nk " + std::to_string(nk) + " d " + std::to_string(d));
    }
  }
  for (const Guarded* g : {&keys, &values, &scores, &q, &o}) CHECK(g->intact(), "a buffer was left");
}

}  // namespace
}  // namespace mnv4::test

int main() {
  using namespace mnv4;
  using namespace mnv4::test;
  const unsigned long seed = env_number("MNV4_OPS_TEST_SEED", 1), cases = env_number("MNV4_OPS_TEST_CASES", 400);
  const std::vector<const KernelTable*> all = tiers();
  for (const KernelTable* kernels : all) {
    Random random(seed);
    std::vector<float> xs;
    for (int j = 0; j < 200000; ++j) xs.push_back(-127.5f * static_cast<float>(j) / 200000.0f);
    for (int j = 0; j < 200000; ++j) xs.push_back(-(random.real() + 1.0f));
    for (float x = -1e-30f; x > -200.0f; x *= 1.01f) xs.push_back(x);
    for (const float x : {-0.0f, -1e30f, -kInf, -1.0f, -126.0f, -127.0f, -160.0f}) xs.push_back(x);
    double worst = 0.0;
    exponential(*kernels, xs, &worst);
    CHECK(worst <= allowed(*kernels),
          "exponential of " + std::string(kernels->name) + ": " + std::to_string(worst) + " ulp");
    std::printf("exponential of %s: %.2f ulp\n", kernels->name, worst);
    not_finite(*kernels);
    for (unsigned long j = 0; j < cases; ++j) attention(*kernels, random);
  }
  std::printf("test_attention: seed %lu, %lu of attention in each of %zu tiers\n", seed, cases, all.size());
  return failures == 0 ? 0 : 1;
}
