// Parts of a job dealt out over the threads of a parallel region: each takes its own share in order, then helps the
// others.
#pragma once

#include <atomic>

namespace mnv4 {

/// The half-open part of n that thread tid of `parts` takes.
struct Range {
  int lo, hi;
};
inline Range split(int n, int parts, int tid) {
  return {static_cast<int>(static_cast<long long>(n) * tid / parts),
          static_cast<int>(static_cast<long long>(n) * (tid + 1) / parts)};
}

/// What the threads of a region share: how much of each share is taken. One lane a thread, in a cache line of its own;
/// one for all of a large team, where looking into every lane would cost more than it saves.
struct Tickets {
  static constexpr int kLanes = 8;
  struct alignas(64) Lane {
    std::atomic<int> next{0};
  };
  Lane lane[kLanes];
};

/// One thread's side of it. All threads must deal out the same jobs in the same order, with a barrier between two jobs:
/// a ticket says nothing until all have drawn theirs of the job before.
class Draw {
 public:
  Draw(Tickets* tickets, int tid, int n) : tickets_(tickets), tid_(tid), n_(n) {}

  /// Calls f(part, next) for parts of [0, parts); `next` is the part that this thread is likely to take then, or -1.
  /// Without tickets: its own share alone.
  template <class F>
  void each(int parts, F f) {
    if (parts == 0) return;
    const bool lanes = n_ <= Tickets::kLanes;
    if (tickets_ == nullptr) return own(split(parts, n_, tid_), f);
    if (!lanes) return take(0, {0, parts}, f);
    for (int i = 0; i < n_; ++i) {
      const int lane = (tid_ + i) % n_;
      take(lane, split(parts, n_, lane), f);
    }
  }

 private:
  template <class F>
  static void own(Range r, F f) {
    for (int i = r.lo; i < r.hi; ++i) f(i, i + 1 < r.hi ? i + 1 : -1);
  }
  // each thread draws one ticket that is too high, so that all know where the next job starts
  template <class F>
  void take(int lane, Range r, F f) {
    const int count = r.hi - r.lo;
    std::atomic<int>& next = tickets_->lane[lane].next;
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed) - first_[lane]) < count;)
      f(r.lo + i, i + 1 < count ? r.lo + i + 1 : -1);
    first_[lane] += count + n_;
  }

  Tickets* tickets_;
  int tid_, n_;
  int first_[Tickets::kLanes] = {};
};

}  // namespace mnv4
