// Vectors of sixteen floats, for each instruction set. simd_*.h and dots_*.h alone name instructions:
// all other files compute with these functions.
//
// A mask has one bit per lane. Where a function takes one, what lies outside of it is neither read
// nor written, and zero in the result unless its comment says otherwise.

#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(ISA_AVX512)  // ../variants.py
#include "simd_avx512.h"
#ifdef ISA_AMX
#include "simd_amx.h"
#endif
#elif defined(ISA_AVX2)
#include "simd_avx2.h"
#elif defined(ISA_NEON)
#include "simd_neon.h"
#endif

namespace {

#ifndef ISA_AMX
void release_tiles() {}  // there is no tile unit
#endif

constexpr int TO_L1 = 3, TO_L2 = 2;  // locality, for __builtin_prefetch

float bf16_to_float(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}
// The first n lanes; none below 0, all above 16.
mask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<mask16>((1u << n) - 1);
}

// F32 or BF16, as ``type`` says; ``at`` counts elements.
f32x16 load(const void* p, int32_t type, int64_t at, mask16 mask) {
  return type == F32 ? load(static_cast<const float*>(p) + at, mask)
                     : load(static_cast<const uint16_t*>(p) + at, mask);
}
void store(void* p, int32_t type, int64_t at, mask16 mask, f32x16 x) {
  if (type == F32) return store(static_cast<float*>(p) + at, mask, x);
  store(static_cast<uint16_t*>(p) + at, mask, x);
}

}  // namespace
