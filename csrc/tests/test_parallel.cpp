// parallel_run and Barrier: every thread runs once, phases do not overlap, a nested region is serial.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>

#include "core/parallel.h"

namespace {

struct Phases {
  mnv4::Barrier barrier;
  std::atomic<int> arrived{0};
  std::atomic<int> errors{0};
  std::atomic<int> team{0};
};

void phases(void* ctx, int tid, int n_threads) {
  Phases& p = *static_cast<Phases*>(ctx);
  for (int phase = 1; phase <= 50; ++phase) {
    p.arrived.fetch_add(1);
    p.barrier.wait(tid, n_threads);
    if (p.arrived.load() != phase * n_threads) p.errors.fetch_add(1);
    p.barrier.wait(tid, n_threads);
  }
  p.team.store(n_threads);
  std::atomic<int> nested{0};  // written by each thread, should the region not be serial
  mnv4::parallel_run(3, [](void* out, int, int n) { static_cast<std::atomic<int>*>(out)->store(n); }, &nested);
  if (n_threads > 1 && nested.load() != 1) p.errors.fetch_add(1);
}

int run(int threads, int expected) {
  Phases p;
  mnv4::parallel_run(threads, phases, &p);
  if (p.errors.load() == 0 && p.team.load() == expected) return 0;
  std::fprintf(stderr, "%d threads: team of %d, expected %d, %d errors\n", threads, p.team.load(), expected,
               p.errors.load());
  return 1;
}

}  // namespace

int main() {
  int failed = 0;
  for (int repeat = 0; repeat < 20; ++repeat)
    for (int threads : {0, 1, 2, 5}) failed += run(threads, threads > 1 ? threads : 1);
  const pid_t child = fork();
  if (child == 0) _exit(run(4, 1));  // a forked child runs serial
  int status = 1;
  waitpid(child, &status, 0);
  return failed != 0 || status != 0;
}
