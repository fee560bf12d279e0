// What threads need of the system, and what differs from one to another.
//
// Linux has the futex, which costs a call only where a thread really sleeps. Elsewhere the standard
// library's lock does as much, for any number of words; PLAIN_WAITS asks for that on Linux, too.

#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__) && !defined(PLAIN_WAITS)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>
#else
#include <chrono>
#include <condition_variable>
#include <mutex>
#endif

namespace {

// wait_while_equal: sleep as long as the word has this value, but no longer than so many
// nanoseconds; 0: without end. It may return early. wake_all: of those that sleep on this word.
#if defined(__linux__) && !defined(PLAIN_WAITS)

void wait_while_equal(std::atomic<uint32_t>& word, uint32_t value, long nanoseconds) {
  timespec limit{0, nanoseconds};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nanoseconds ? &limit : nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

#else

struct Sleepers {
  std::mutex mutex;
  std::condition_variable woken;
};

// Never destroyed: at the end of the process workers still sleep here.
Sleepers& sleepers() {
  static Sleepers& all = *new Sleepers;
  return all;
}

void wait_while_equal(std::atomic<uint32_t>& word, uint32_t value, long nanoseconds) {
  std::unique_lock<std::mutex> lock(sleepers().mutex);
  if (word.load() != value) return;
  if (nanoseconds) {
    sleepers().woken.wait_for(lock, std::chrono::nanoseconds(nanoseconds));
  } else {
    sleepers().woken.wait(lock);
  }
}

// Who has looked at the word and does not sleep yet holds the lock, and is waited for.
void wake_all(std::atomic<uint32_t>&) {
  { std::lock_guard<std::mutex> lock(sleepers().mutex); }
  sleepers().woken.notify_all();
}

#endif

}  // namespace
