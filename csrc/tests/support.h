// What the native tests share: checks, seeded random numbers, buffers that end (or begin) at a page that cannot be
// touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/block.h"
#include "core/cpu_features.h"
#include "core/kernels.h"

namespace mnv4::test {

inline int failures = 0;

/// Prints what went wrong, without more than 20 lines of it.
inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

#define CHECK(condition, what)                                                                     \
  do {                                                                                             \
    if (!(condition)) mnv4::test::fail(__FILE__, __LINE__, std::string(#condition ": ") + (what)); \
  } while (false)

/// Number from the environment, so that a failure can be run again and a longer search is one variable away.
inline unsigned long env_number(const char* name, unsigned long otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoul(text, nullptr, 10) : otherwise;
}

/// splitmix64: the same numbers with every library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// lo to hi, both included.
  int between(int lo, int hi) { return lo + static_cast<int>(next() % static_cast<std::uint64_t>(hi - lo + 1)); }
  bool chance(int percent) { return between(1, 100) <= percent; }
  /// -1 to 1.
  float real() { return static_cast<float>(static_cast<double>(next() >> 11) / 4503599627370496.0 - 1.0); }
  template <class T, std::size_t N>
  T pick(const T (&from)[N]) {
    return from[next() % N];
  }
  std::vector<float> reals(std::size_t n, float scale = 1.0f, float shift = 0.0f) {
    std::vector<float> v(n);
    for (float& x : v) x = real() * scale + shift;
    return v;
  }

 private:
  std::uint64_t state_;
};

/// A quiet NaN that no arithmetic makes: marks floats that must stay untouched and outputs that must be written.
inline constexpr std::uint32_t kCanary = 0x7fc5a5a5u;

inline bool is_canary(const float& x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits == kCanary;
}

inline void poison(float* p, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) std::memcpy(p + i, &kCanary, sizeof kCanary);
}

/// Memory between two pages that cannot be touched: `at_end` puts the last byte before the second, otherwise the first
/// behind the first. The rest of its pages holds canaries, which `intact` looks at.
class Pages {
 public:
  Pages(std::size_t bytes, bool at_end) : at_end_(at_end) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page - 1) / page * page;
    if (inner_ == 0) inner_ = page;
    size_ = inner_ + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inner_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    poison(reinterpret_cast<float*>(base_ + page), inner_ / sizeof(float));
    data_ = base_ + page + (at_end ? inner_ - bytes : 0);
    slack_ = reinterpret_cast<float*>(base_ + page + (at_end ? 0 : bytes));
    slack_floats_ = (inner_ - bytes) / sizeof(float);
  }
  ~Pages() { munmap(base_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* data() const { return data_; }
  bool intact() const {
    for (std::size_t i = 0; i < slack_floats_; ++i) {
      if (!is_canary(slack_[i])) return false;
    }
    return true;
  }

 private:
  bool at_end_;
  std::size_t inner_ = 0, size_ = 0, slack_floats_ = 0;
  char *base_ = nullptr, *data_ = nullptr;
  float* slack_ = nullptr;
};

/// Floats between guard pages, poisoned.
class Guarded {
 public:
  Guarded(std::size_t floats, bool at_end) : floats_(floats), pages_(floats * sizeof(float), at_end) {}
  float* data() const { return static_cast<float*>(pages_.data()); }
  std::size_t size() const { return floats_; }
  bool intact() const { return pages_.intact(); }
  void fill(const std::vector<float>& from) { std::memcpy(data(), from.data(), from.size() * sizeof(float)); }

 private:
  std::size_t floats_;
  Pages pages_;
};

/// True: what the library allocates (packed parameters) ends at a guard page, otherwise it begins behind one. See
/// guarded_alloc.cpp.
inline bool packed_at_end = true;

/// Lets the planner believe in a small cache, so that small images take every plan. The object is never in read-only
/// memory: it is filled in at run time.
inline void set_l2(std::size_t bytes) { const_cast<CpuInfo&>(cpu_info()).l2 = bytes; }

inline std::vector<const KernelTable*> tiers() {
  const KernelTable* found[8];
  const int n = available_tiers(found, 8);
  return {found, found + n};
}

/// Seed, number of cases and seconds of one executable; prints what it does.
class Budget {
 public:
  Budget(const char* name, int cases, std::uint64_t seed = 1)
      : cases_(static_cast<int>(env_number("MNV4_OPS_TEST_CASES", static_cast<unsigned long>(cases)))),
        seconds_(static_cast<double>(env_number("MNV4_OPS_TEST_SECONDS", 50))),
        seed_(env_number("MNV4_OPS_TEST_SEED", seed)) {
    std::printf("%s: seed %llu, tiers", name, static_cast<unsigned long long>(seed_));
    for (const KernelTable* t : tiers()) std::printf(" %s", t->name);
    std::printf("\n");
    std::fflush(stdout);
  }
  std::uint64_t seed() const { return seed_; }
  /// False when all cases ran or the time is over.
  bool more() {
    const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    if (done_ < cases_ && spent < seconds_) {
      ++done_;
      return true;
    }
    std::printf("%d of %d cases in %.1f s, %d failures\n", done_, cases_, spent, failures);
    return false;
  }

 private:
  int cases_, done_ = 0;
  double seconds_;
  std::uint64_t seed_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace mnv4::test
