#pragma once

#include <sched.h>

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mnv4 {

/// Body of a parallel region: `tid` counts from 0 to `n_threads` - 1. Must not throw.
using ParallelFn = void (*)(void* ctx, int tid, int n_threads);

/// Runs `fn` on up to `threads` threads and returns when all are done.
///
/// The threads belong to the OpenMP runtime that the process (torch) has loaded; without one they are std::threads.
/// `n_threads` is the number of threads that really run, at most `threads`: size barriers and work splits by it.
/// Serial (one call, tid 0 of 1): `threads` <= 1, inside another parallel region, in a forked child.
void parallel_run(int threads, ParallelFn fn, void* ctx);

/// Path of the OpenMP runtime that parallel_run would use now, nullptr for std::thread. The string is never freed.
const char* openmp_runtime_path();

/// Tells the core that spins that the thread is waiting.
inline void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb" ::: "memory");
#endif
}

/// Barrier for the threads of one parallel_run: spins briefly, then yields.
class Barrier {
 public:
  explicit Barrier(int n = 0) : n_(n) {}
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  /// Waits for the `n` threads named at construction.
  void wait(int tid) { wait(tid, n_); }

  /// Waits for `n_threads` threads: the number that the parallel body was given, which may be less than asked for.
  void wait(int /*tid*/, int n_threads) {
    if (n_threads <= 1) return;
    const unsigned generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation;) {
      if (spins < kSpins) {
        ++spins;
        spin_pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
  int n_;
};

}  // namespace mnv4
