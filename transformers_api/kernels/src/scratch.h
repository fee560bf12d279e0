// Memory that a call prepares its input in.

#pragma once

#include <cstdint>
#include <new>

namespace {

// Grows as needed and is kept for the next call.
struct Scratch {
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size) {
      operator delete(data, PAGE);
      data = operator new(bytes, PAGE, std::nothrow);
      size = data ? bytes : 0;
    }
    return static_cast<T*>(data);
  }
  static constexpr std::align_val_t PAGE{4096};
  void* data = nullptr;
  size_t size = 0;
};

}  // namespace
