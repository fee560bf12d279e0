// The size of the pool, set by the caller.

#include "thread_pool.h"

#include <algorithm>
#include <mutex>

#include "abi.h"

extern "C" {

void set_threads(int32_t count) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool && pool->size() == count) return;
  delete pool;
  pool = new ThreadPool(std::max(1, count));
}

}  // extern "C"
