// Memory that a call prepares its input in.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

// Grows as needed and is kept for the next call.
struct Scratch {
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size) {
      std::free(data);
      data = std::aligned_alloc(4096, bytes);
      size = data ? bytes : 0;
    }
    return static_cast<T*>(data);
  }
  void* data = nullptr;
  size_t size = 0;
};

}  // namespace
