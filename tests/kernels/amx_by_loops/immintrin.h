// The tile unit of AMX in plain loops, so that the kernels for it can be tested where there is none:
// Intel's "Architecture Instruction Set Extensions Programming Reference", chapter 3, line by line.
// What would be a fault of the processor ends the program with a line that says which.

#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) amx_by_loops::load_config(config)
#define _tile_release() amx_by_loops::release()
#define _tile_loadd(tile, base, stride) amx_by_loops::load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) amx_by_loops::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_by_loops::store(tile, base, stride)
#define _tile_zero(tile) amx_by_loops::clear(tile)
#define _tile_dpbf16ps(sum, a, b) amx_by_loops::multiply_bf16(sum, a, b)
#define _tile_dpbsud(sum, a, b) amx_by_loops::multiply_codes(sum, a, b)

namespace amx_by_loops {

constexpr int TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64;

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t data[MAX_ROWS][MAX_BYTES];  // zero beyond the configured rows and bytes
};

struct Unit {
  bool is_configured;
  Tile tiles[TILES];
};
inline thread_local Unit unit;

inline void check(bool is_right, const char* fault) {
  if (is_right) return;
  std::fprintf(stderr, "tile unit: %s\n", fault);
  std::abort();
}

inline void clear_all(Unit& u) {
  for (Tile& tile : u.tiles) tile = Tile{};
}

inline void load_config(const void* memory) {
  const auto* config = static_cast<const uint8_t*>(memory);
  check(config[0] == 1, "a palette that is not 1");
  check(config[1] == 0, "a start row");
  for (int i = 2; i < 16; i++) check(config[i] == 0, "a reserved byte");
  clear_all(unit);
  for (int i = 0; i < 16; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, 2);
    const int rows = config[48 + i];
    check(i < TILES || (row_bytes == 0 && rows == 0), "a tile of no register");
    check(row_bytes <= MAX_BYTES, "a row of more than 64 bytes");
    check(rows <= MAX_ROWS, "more than 16 rows");
    check((row_bytes == 0) == (rows == 0), "rows without bytes");
    if (i < TILES) unit.tiles[i].rows = rows, unit.tiles[i].row_bytes = row_bytes;
  }
  unit.is_configured = true;
}

inline void release() {
  clear_all(unit);
  unit.is_configured = false;
}

inline Tile& tile_at(int i) {
  check(unit.is_configured, "used without a configuration");
  check(i >= 0 && i < TILES, "a register that there is not");
  check(unit.tiles[i].rows > 0, "a register that is not configured");
  return unit.tiles[i];
}

inline void clear(int i) {
  Tile& tile = tile_at(i);
  std::memset(tile.data, 0, sizeof tile.data);
}

inline void load(int i, const void* base, int64_t stride) {
  Tile& tile = tile_at(i);
  clear(i);
  for (int r = 0; r < tile.rows; r++)
    std::memcpy(tile.data[r], static_cast<const uint8_t*>(base) + r * stride, tile.row_bytes);
}

inline void store(int i, void* base, int64_t stride) {
  const Tile& tile = tile_at(i);
  for (int r = 0; r < tile.rows; r++)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile.data[r], tile.row_bytes);
}

struct Product {
  Tile& sum;
  const Tile &a, &b;

  Product(int i, int j, int k) : sum(tile_at(i)), a(tile_at(j)), b(tile_at(k)) {
    check(i != j && i != k && j != k, "a register that is used twice");
    check(sum.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "part of a lane");
    check(sum.rows == a.rows, "sums and rows of different heights");
    check(sum.row_bytes == b.row_bytes, "sums and weights of different widths");
    check(a.row_bytes / 4 == b.rows, "rows of another length than weights");
  }
  int lanes() const { return sum.row_bytes / 4; }
};

inline float flushed(float x) {  // denormals are zero, as operands and as results
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}

inline float widened(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  const uint32_t wide = uint32_t{bits} << 16;
  float number;
  std::memcpy(&number, &wide, 4);
  return flushed(number);
}

inline void multiply_bf16(int i, int j, int k) {
  const Product p(i, j, k);
  float weights[MAX_ROWS][2][MAX_BYTES / 4];  // even and odd ones
  for (int step = 0; step < p.b.rows; step++)
    for (int n = 0; n < p.lanes(); n++)
      for (int odd = 0; odd < 2; odd++)
        weights[step][odd][n] = widened(p.b.data[step] + 4 * n + 2 * odd);
  for (int m = 0; m < p.sum.rows; m++) {
    float dots[2][MAX_BYTES / 4] = {}, sums[MAX_BYTES / 4];
    for (int step = 0; step < p.b.rows; step++)
      for (int odd = 0; odd < 2; odd++) {
        const float x = widened(p.a.data[m] + 4 * step + 2 * odd);
        for (int n = 0; n < MAX_BYTES / 4; n++)
          if (n < p.lanes()) dots[odd][n] = flushed(std::fma(x, weights[step][odd][n], dots[odd][n]));
      }
    std::memcpy(sums, p.sum.data[m], sizeof sums);
    for (int n = 0; n < p.lanes(); n++)
      sums[n] = flushed(flushed(sums[n]) + flushed(dots[0][n] + dots[1][n]));
    std::memcpy(p.sum.data[m], sums, sizeof sums);
  }
}

// The bytes of ``a`` have a sign, those of ``b`` have none.
inline void multiply_codes(int i, int j, int k) {
  const Product p(i, j, k);
  for (int m = 0; m < p.sum.rows; m++) {
    uint32_t sums[MAX_BYTES / 4];  // which wrap around
    std::memcpy(sums, p.sum.data[m], sizeof sums);
    for (int step = 0; step < p.b.rows; step++)
      for (int byte = 0; byte < 4; byte++) {
        const int x = static_cast<int8_t>(p.a.data[m][4 * step + byte]);
        for (int n = 0; n < p.lanes(); n++)
          sums[n] += static_cast<uint32_t>(x * p.b.data[step][4 * n + byte]);
      }
    std::memcpy(p.sum.data[m], sums, sizeof sums);
  }
}

}  // namespace amx_by_loops
