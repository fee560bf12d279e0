// Linear layers by AMX's tile unit; see dots_amx.h.

#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm.h"

namespace {

bool uses_tile_unit(const Weight& w, int64_t rows) {
  return w.type == BF16 || (is_grouped(w) && rows > MAX_TILE_ROWS);
}

// The lanes from one prepared row to the next: whole tiles, which begin in different sets of the cache.
int64_t tile_stride(const Weight& w) {
  return ((num_steps(w) + TILE_LANES - 1) / TILE_LANES | 1) * TILE_LANES;
}

// The rows of a call in blocks of one height, so that no tile changes its shape; the last block
// repeats some rows of the one before where need be.
struct RowBlocks {
  int64_t rows, count, height;

  explicit RowBlocks(int64_t n)
      : rows(n),
        count((n + TILE_HEIGHT - 1) / TILE_HEIGHT),
        height((n + count - 1) / count) {}
  int64_t first_row(int64_t i) const { return std::min(i * height, rows - height); }
};

void shape_tiles(const Gemm& gemm, int64_t rows) {
  shape_tiles(RowBlocks(rows).height, is_grouped(gemm.w) ? GROUP_STEPS : TILE_LANES);
}

// True where the sums of panel p are its outputs, and the unit can store all of them.
bool takes_sums(const Gemm& gemm, int64_t p) {
  const Weight& w = gemm.w;
  return w.type == BF16 && gemm.y_type == F32 && !w.bias && (p + 1) * PANEL <= w.n;
}

// One or two blocks with panel p: pass ``index`` of ``passes``, which prefetches as tile() does.
template <int BLOCKS>
void tile_pass(const Gemm& gemm, int64_t p, const RowBlocks& blocks, int64_t index,
               int64_t passes) {
  const Weight& w = gemm.w;
  alignas(64) float sums[2 * TILE_HEIGHT * PANEL];
  int64_t first[2];
  for (int i = 0; i < 2; i++) first[i] = blocks.first_row(2 * index + i % BLOCKS);
  const uint8_t* panel = w.data + p * panel_bytes(w);
  const TileRows rows{{gemm.x + first[0] * gemm.stride, gemm.x + first[1] * gemm.stride},
                      blocks.height, gemm.stride};
  const int64_t n = is_grouped(w) ? num_groups(w) : num_steps(w);
  const int64_t turns = is_grouped(w) ? n : (n + TILE_LANES - 1) / TILE_LANES;
  const int64_t part = panel_bytes(w) / passes;
  const char* next = reinterpret_cast<const char*>(panel + panel_bytes(w) + index * part);
  const PrefetchCursor cursor{next, (part / turns + LINE - 1) / LINE * LINE};
  for (int i = 0; i < BLOCKS; i++) prefetch_outputs(gemm, p, first[i], blocks.height);
  const bool is_direct = takes_sums(gemm, p);
  float* const y = static_cast<float*>(gemm.y) + p * PANEL;
  const TileSums outputs = is_direct ? TileSums{{y + first[0] * w.n, y + first[1] * w.n}, w.n}
                                     : TileSums{{sums, sums + blocks.height * PANEL}, PANEL};
  auto multiply = [&](auto prefetch) {
    constexpr Prefetch P = decltype(prefetch)::value;
    const Int8Group* const groups[2] = {gemm.groups + first[0] * n, gemm.groups + first[1] * n};
    if (w.type == I8) {
      multiply_codes<Int8Tiles, P, BLOCKS>(panel, cursor, rows, groups, n, sums);
    } else if (w.type == I4) {
      const Int4Group* const own[2] = {reinterpret_cast<const Int4Group*>(groups[0]),
                                       reinterpret_cast<const Int4Group*>(groups[1])};
      multiply_codes<Int4Tiles, P, BLOCKS>(panel, cursor, rows, own, n, sums);
    } else {
      constexpr Streamed S = P == SAME_PANEL ? WEIGHTS : ROWS;
      multiply_bf16<P, BLOCKS, false, S>(panel, cursor, rows, n, outputs);
    }
  };
  if (passes == 1) {
    multiply(std::integral_constant<Prefetch, SAME_PANEL>());
  } else {
    multiply(std::integral_constant<Prefetch, NEXT_PANEL>());
  }
  if (is_direct) return;
  for (int i = 0; i < BLOCKS; i++)
    write_outputs(gemm, p, first[i], blocks.height, [&](int64_t r, int half) {
      return load_aligned(sums + (i * blocks.height + r) * PANEL + 16 * half);
    });
}

// All rows with one panel, as multiply_panel does.
void multiply_panel_by_tiles(const Gemm& gemm, int64_t p, int64_t rows) {
  const RowBlocks blocks(rows);
  const int64_t passes = (blocks.count + 1) / 2;
  for (int64_t i = 0; i < passes; i++) {
    if (2 * i + 1 < blocks.count) {
      tile_pass<2>(gemm, p, blocks, i, passes);
    } else {
      tile_pass<1>(gemm, p, blocks, i, passes);
    }
  }
}

}  // namespace
