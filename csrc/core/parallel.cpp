#include "core/parallel.h"

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifndef MNV4_OPS_STD_THREADS
#include <dlfcn.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif
#endif

namespace mnv4 {
namespace {

// a forked child inherits a runtime whose threads are gone
std::atomic<bool> g_forked{false};
[[maybe_unused]] const int g_atfork =
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });

thread_local bool t_in_parallel = false;

struct InParallel {
  InParallel() { t_in_parallel = true; }
  ~InParallel() { t_in_parallel = false; }
};

void run_std_threads(int threads, ParallelFn fn, void* ctx) {
  // nobody starts before the number of threads is known
  std::atomic<int> team{0};
  const auto body = [&](int tid) {
    team.wait(0);
    const InParallel mark;
    fn(ctx, tid, team.load());
  };
  std::vector<std::thread> workers;
  workers.reserve(threads - 1);
  try {
    for (int tid = 1; tid < threads; ++tid) workers.emplace_back(body, tid);
  } catch (const std::system_error&) {
  }
  team.store(static_cast<int>(workers.size()) + 1);
  team.notify_all();
  body(0);
  for (std::thread& worker : workers) worker.join();
}

#ifdef MNV4_OPS_STD_THREADS
struct Runtime {
  std::string path;
};
const Runtime* runtime() { return nullptr; }
#else

/// `ident_t` of the LLVM/Intel runtime.
struct Ident {
  std::int32_t reserved1 = 0, flags = 2, reserved2 = 0, reserved3 = 0;
  const char* source = ";unknown;unknown;0;0;;";
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using KmpcMicrotask = void (*)(std::int32_t*, std::int32_t*, ...);
using KmpcForkCall = void (*)(Ident*, std::int32_t, KmpcMicrotask, ...);
using KmpcGlobalThreadNum = std::int32_t (*)(Ident*);
using KmpcPushNumThreads = void (*)(Ident*, std::int32_t, std::int32_t);
using IntFn = int (*)();

/// An OpenMP runtime found in the process; immutable once published, never freed.
struct Runtime {
  std::string path;
  GompParallel gomp_parallel = nullptr;
  KmpcForkCall kmpc_fork_call = nullptr;
  KmpcGlobalThreadNum kmpc_global_thread_num = nullptr;
  KmpcPushNumThreads kmpc_push_num_threads = nullptr;
  IntFn thread_num = nullptr;
  IntFn num_threads = nullptr;
  IntFn in_parallel = nullptr;
};

template <class Fn>
void lookup(Fn& fn, void* library, const char* name) {
  fn = reinterpret_cast<Fn>(dlsym(library, name));
}

/// Handle of a library that is loaded already; never loads one.
void* loaded(const char* path) { return dlopen(path, RTLD_LAZY | RTLD_NOLOAD); }

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

std::vector<std::string> loaded_images() {
  std::vector<std::string> paths;
#if defined(__APPLE__)
  for (std::uint32_t i = 0; i < _dyld_image_count(); ++i) paths.emplace_back(_dyld_get_image_name(i));
#else
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        static_cast<std::vector<std::string>*>(data)->emplace_back(info->dlpi_name);
        return 0;
      },
      &paths);
#endif
  return paths;
}

/// Changes whenever a library is loaded.
unsigned long long loader_generation() {
#if defined(__APPLE__)
  return _dyld_image_count();
#else
  unsigned long long adds = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        *static_cast<unsigned long long*>(data) = info->dlpi_adds;
        return 1;
      },
      &adds);
  return adds;
#endif
}

/// The runtime whose fork entry `scope` resolves to, nullptr when it has none.
const Runtime* runtime_in(void* scope) {
#if defined(__APPLE__)
  const char* const entries[] = {"__kmpc_fork_call", "GOMP_parallel"};
#else
  const char* const entries[] = {"GOMP_parallel", "__kmpc_fork_call"};
#endif
  for (const char* entry : entries) {
    void* symbol = dlsym(scope, entry);
    Dl_info info;
    if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) continue;
    void* library = loaded(info.dli_fname);
    if (library == nullptr) continue;
    Runtime found;
    found.path = info.dli_fname;
    if (entry[0] == 'G') {
      lookup(found.gomp_parallel, library, "GOMP_parallel");
    } else {
      lookup(found.kmpc_fork_call, library, "__kmpc_fork_call");
      lookup(found.kmpc_global_thread_num, library, "__kmpc_global_thread_num");
      lookup(found.kmpc_push_num_threads, library, "__kmpc_push_num_threads");
    }
    lookup(found.thread_num, library, "omp_get_thread_num");
    lookup(found.num_threads, library, "omp_get_num_threads");
    lookup(found.in_parallel, library, "omp_in_parallel");
    const bool can_fork =
        found.gomp_parallel != nullptr || (found.kmpc_fork_call != nullptr && found.kmpc_global_thread_num != nullptr &&
                                           found.kmpc_push_num_threads != nullptr);
    if (can_fork && found.thread_num && found.num_threads && found.in_parallel) return new Runtime(found);
  }
  return nullptr;
}

/// Looks for the runtime that torch uses, else for any in the process. `*has_torch`: nothing better can come later.
const Runtime* find_runtime(bool* has_torch) {
  void* torch = nullptr;
  std::vector<std::string> candidates;
  for (const std::string& path : loaded_images()) {
    const std::string name = path.substr(path.rfind('/') + 1);
    if (name.rfind("libtorch_cpu.", 0) == 0) torch = loaded(path.c_str());
    if (contains(name, "libgomp") || contains(name, "libomp") || contains(name, "libiomp5")) candidates.push_back(path);
  }
  *has_torch = torch != nullptr;
#if !defined(__APPLE__)
  // ELF binds torch's calls to the global scope first (LD_PRELOAD), then to its own dependencies
  if (const Runtime* found = runtime_in(RTLD_DEFAULT)) return found;
#endif
  if (torch != nullptr) {
    if (const Runtime* found = runtime_in(torch)) return found;
  }
  for (const std::string& path : candidates) {
    void* library = loaded(path.c_str());
    if (library == nullptr) continue;
    if (const Runtime* found = runtime_in(library)) return found;
  }
  return nullptr;
}

const Runtime* runtime() {
  static std::atomic<const Runtime*> current{nullptr};
  static std::atomic<bool> final{false};
  static std::atomic<unsigned long long> seen{0};
  if (final.load(std::memory_order_acquire)) return current.load(std::memory_order_acquire);
  const unsigned long long generation = loader_generation();
  if (seen.load(std::memory_order_acquire) != generation) {
    bool has_torch = false;
    const Runtime* found = find_runtime(&has_torch);
    const Runtime* old = current.load(std::memory_order_acquire);
    if (old == nullptr || found == nullptr || old->path != found->path) {
      current.store(found, std::memory_order_release);
    } else {
      delete found;
    }
    seen.store(generation, std::memory_order_release);
    if (has_torch) final.store(true, std::memory_order_release);
  }
  return current.load(std::memory_order_acquire);
}

struct Region {
  ParallelFn fn;
  void* ctx;
  const Runtime* runtime;

  void run() const { fn(ctx, runtime->thread_num(), runtime->num_threads()); }
};

void gomp_body(void* data) { static_cast<const Region*>(data)->run(); }

void kmpc_body(std::int32_t*, std::int32_t*, Region* region) { region->run(); }

void run_openmp(const Runtime& runtime, int threads, ParallelFn fn, void* ctx) {
  Region region{fn, ctx, &runtime};
  if (runtime.gomp_parallel != nullptr) {
    runtime.gomp_parallel(gomp_body, &region, static_cast<unsigned>(threads), 0);
  } else {
    static Ident ident;
    runtime.kmpc_push_num_threads(&ident, runtime.kmpc_global_thread_num(&ident), threads);
    runtime.kmpc_fork_call(&ident, 1, reinterpret_cast<KmpcMicrotask>(kmpc_body), &region);
  }
}
#endif

}  // namespace

void parallel_run(int threads, ParallelFn fn, void* ctx) {
  if (threads <= 1 || t_in_parallel || g_forked.load(std::memory_order_relaxed)) {
    fn(ctx, 0, 1);
    return;
  }
#ifndef MNV4_OPS_STD_THREADS
  if (const Runtime* omp = runtime()) {
    if (omp->in_parallel()) {
      fn(ctx, 0, 1);
    } else {
      run_openmp(*omp, threads, fn, ctx);
    }
    return;
  }
#endif
  run_std_threads(threads, fn, ctx);
}

const char* openmp_runtime_path() {
  const Runtime* omp = runtime();
  return omp != nullptr ? omp->path.c_str() : nullptr;
}

}  // namespace mnv4
