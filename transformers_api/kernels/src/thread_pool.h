// The calling thread and its workers, which share out one loop at a time.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "simd.h"
#include "system.h"

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// A fork-join pool with work stealing.
//
// Each thread begins with its own range of the loop, always the same one, so that its core finds
// its share of the weights in its own cache; a thread that is done early steals from the other
// ranges. The pool never waits for a worker that is not running because something else has its
// core: its range is stolen. It does wait for a worker that lost its core in the middle of a chunk.
// That is accepted while it takes less than a quarter of the time, as when a token is sent to its
// client; where it takes more, the caller runs loops alone for a while. Workers spin for a moment
// between two loops, yielding to other threads, and then sleep.
//
// Each loop is an epoch. A worker may enter a loop while the gate is open, and the gate counts the
// workers inside: so the caller can close it and knows whom to wait for.
class ThreadPool {
 public:
  using Body = void (*)(const void*, int64_t, int64_t);

  explicit ThreadPool(int size) : size_(size), ranges_(new Range[size]) {
    for (int i = 1; i < size; i++) workers_.emplace_back([this, i] { work_until_stopped(i); });
  }

  ~ThreadPool() {
    is_stopped_ = true;
    begin_epoch();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  // f(begin, end) over chunks of 0..n.
  template <class F>
  void run(int64_t n, const F& f) {
    auto body = [](const void* g, int64_t b, int64_t e) { (*static_cast<const F*>(g))(b, e); };
    if (n <= 0) return;
    if (size_ == 1 || n == 1 || (is_alone_ && Clock::now() < alone_until_)) return f(0, n);
    is_alone_ = false;
    body_ = body, argument_ = &f, chunk_ = std::max<int64_t>(1, n / (size_ * 8));
    for (int i = 0; i < size_; i++) {
      ranges_[i].next.store(n * i / size_, std::memory_order_relaxed);
      ranges_[i].end = n * (i + 1) / size_;
    }
    begin_epoch();
    run_chunks(0);
    gate_.fetch_and(~OPEN);
    if (gate_.load(std::memory_order_acquire) & INSIDE) wait_for_workers();
  }

 private:
  struct alignas(128) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  // gate_: epoch (32 bits) | whether it is open | number of workers inside
  static constexpr uint64_t OPEN = 1 << 16, INSIDE = OPEN - 1;
  static constexpr microseconds SPIN{300}, BEFORE_YIELD{20}, MAX_LOST{3000};
  static constexpr microseconds ALONE{20000}, ALONE_MAX{320000};

  void begin_epoch() {
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    gate_.store(uint64_t{epoch} << 32 | OPEN, std::memory_order_release);
    epoch_.store(epoch);
    if (sleepers_.load()) wake_all(epoch_);
  }

  void run_chunks(int thread) {
    for (int i = 0; i < size_; i++) {
      Range& range = ranges_[(thread + i) % size_];
      for (int64_t b; (b = range.next.fetch_add(chunk_, std::memory_order_relaxed)) < range.end;)
        body_(argument_, b, std::min(b + chunk_, range.end));
    }
  }

  void work_until_stopped(int thread) {
    for (uint32_t epoch = 0;;) {
      epoch = wait_for_epoch_after(epoch);
      if (is_stopped_) return;
      uint64_t gate = gate_.load(std::memory_order_acquire);
      while (gate & OPEN &&
             !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
      }
      if (!(gate & OPEN)) continue;
      run_chunks(thread);
      gate_.fetch_sub(1, std::memory_order_release);
      if (caller_sleeps_.exchange(0)) wake_all(caller_sleeps_);
    }
  }

  uint32_t wait_for_epoch_after(uint32_t last) {
    const auto start = Clock::now();
    for (uint32_t turn = 1; epoch_.load(std::memory_order_acquire) == last; turn++) {
      pause_spinning();
      if (turn % 32) continue;
      const auto spent = Clock::now() - start;
      if (spent > SPIN) {
        release_tiles();
        sleepers_.fetch_add(1);
        wait_while_equal(epoch_, last, 0);
        sleepers_.fetch_sub(1);
      } else if (spent > BEFORE_YIELD) {
        std::this_thread::yield();
      }
    }
    return epoch_.load(std::memory_order_acquire);
  }

  void wait_for_workers() {
    const auto start = Clock::now();
    for (int turn = 1; gate_.load(std::memory_order_acquire) & INSIDE; turn++) {
      pause_spinning();
      if (turn % 32 || Clock::now() - start < microseconds(50)) continue;
      caller_sleeps_.store(1);
      if (gate_.load() & INSIDE) wait_while_equal(caller_sleeps_, 1, 1000000);
    }
    const auto end = Clock::now();
    lost_ = std::max(lost_ - (end - last_wait_) / 4, Clock::duration{}) + (end - start);
    last_wait_ = end;
    if (lost_ < MAX_LOST) return;
    lost_ = {};
    backoff_ = end - alone_until_ < 4 * backoff_ ? std::min(2 * backoff_, ALONE_MAX) : ALONE;
    is_alone_ = true, alone_until_ = end + backoff_;
  }

  const int size_;
  std::unique_ptr<Range[]> ranges_;
  Body body_ = nullptr;
  const void* argument_ = nullptr;
  int64_t chunk_ = 1;
  alignas(128) std::atomic<uint64_t> gate_{0};
  alignas(128) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> caller_sleeps_{0};
  std::atomic<bool> is_stopped_{false};
  Clock::duration lost_{};  // time spent waiting, beyond a quarter of all time
  Clock::time_point last_wait_{};
  bool is_alone_ = false;
  Clock::time_point alone_until_{};
  microseconds backoff_ = ALONE;  // doubles while the workers keep losing their cores
  std::vector<std::thread> workers_;
};

std::mutex pool_mutex;  // one call at a time: calls share the pool and the scratch memory
ThreadPool* pool = nullptr;

}  // namespace
