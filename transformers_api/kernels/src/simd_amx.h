// The tile unit of Intel's AMX, beside simd_avx512.h: eight registers of up to sixteen rows of 64
// bytes. What they hold is the thread's own, and for the system to save until they are released.
//
// 0 to 3 hold sums, 4 and 5 rows of input, 6 and 7 weights: dots_amx.h.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t TILE_HEIGHT = 16, TILE_LANES = 16;  // rows, and their lanes of four bytes

// As the instruction reads it.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Compilers do not know that the unit reads this memory, or that they must be done with writing it.
void finish_stores(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

thread_local int64_t tile_shape = 0;  // of this thread's registers; 0: released

// Shape the registers for ``height`` rows of ``lanes`` lanes, and for weights of as many steps.
void shape_tiles(int64_t height, int64_t lanes) {
  const int64_t shape = height * 32 + lanes;
  if (tile_shape == shape) return;
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? height : lanes);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? lanes * 4 : 64);
  }
  finish_stores(&config);
  _tile_loadconfig(&config);
  tile_shape = shape;
}

void release_tiles() {
  if (tile_shape) _tile_release();
  tile_shape = 0;
}

}  // namespace
