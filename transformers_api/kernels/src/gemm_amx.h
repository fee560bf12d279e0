// Linear layers by AMX's tile unit; see dots_amx.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elementwise.h"
#include "gemm.h"
#include "scratch.h"

namespace {

bool uses_tile_unit(const Weight& w, int64_t rows) {
  return w.type == BF16 || w.type == I8 || (is_int4(w) && rows > MAX_TILE_ROWS);
}

// The weights that the unit multiplies rows with.
Weight multiplied(Weight w) {
  if (w.type == I8) w.type = BF16;
  return w;
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
  shape_tiles(RowBlocks(rows).height, is_int4(gemm.w) ? GROUP_STEPS : TILE_LANES);
}

// ---- who takes the sums of a panel ------------------------------------------------------------

// Where the unit can store those of two blocks itself; the stride is 0 where it cannot.
using StoredSums = TileSums;

// The outputs of a panel.
struct Outputs {
  const Gemm& gemm;
  const int64_t p;

  void prefetch(int64_t m, int64_t rows) const { prefetch_outputs(gemm, p, m, rows); }
  StoredSums stored(const int64_t (&first)[2]) const {
    const Weight& w = gemm.w;
    const bool are_all = !is_int4(w) && gemm.y_type == F32 && !w.bias && (p + 1) * PANEL <= w.n;
    if (!are_all) return {};
    float* const y = static_cast<float*>(gemm.y) + p * PANEL;
    return {{y + first[0] * w.n, y + first[1] * w.n}, w.n};
  }
  void write(int64_t m, int64_t rows, const float* sums) const {
    write_outputs(gemm, p, m, rows,
                  [&](int64_t r, int half) { return load_aligned(sums + r * PANEL + 16 * half); });
  }
};

// The gates of a panel, which are kept.
struct Gates {
  const Gemm& gemm;
  float* const gates;  // PANEL of each row

  void prefetch(int64_t, int64_t) const {}
  StoredSums stored(const int64_t (&first)[2]) const {
    if (is_int4(gemm.w)) return {};
    return {{gates + first[0] * PANEL, gates + first[1] * PANEL}, PANEL};
  }
  void write(int64_t m, int64_t rows, const float* sums) const {
    std::memcpy(gates + m * PANEL, sums, rows * PANEL * sizeof(float));
  }
};

// A panel's outputs times what the activation OP makes of their gates.
template <int OP>
struct Joined {
  const Gemm& gemm;
  const float* const gates;
  const int64_t p;  // of the result

  float* row(int64_t m) const {
    return static_cast<float*>(gemm.y) + m * (gemm.w.n / 2) + p * PANEL;
  }
  void prefetch(int64_t m, int64_t rows) const {
    for (int64_t r = m; r < m + rows; r++)
      for (int64_t i = 0; i < PANEL; i += 16) __builtin_prefetch(row(r) + i, 1, TO_L2);
  }
  StoredSums stored(const int64_t (&)[2]) const { return {}; }
  void write(int64_t m, int64_t rows, const float* sums) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < PANEL; i += 16) {
        const f32x16 gate = load_aligned(gates + (m + r) * PANEL + i);
        store(row(m + r) + i, mul(apply(OP, gate, gate, 0), load_aligned(sums + r * PANEL + i)));
      }
  }
};

// ---- products ---------------------------------------------------------------------------------

// What a panel of I8 becomes, for all passes.
uint8_t* unpacked_panel(const Weight& w) {
  static thread_local Scratch scratch;
  return scratch.get<uint8_t>(num_groups(w) * UNPACKED_BYTES);
}

// One or two blocks with panel p: pass ``index`` of ``passes``, which prefetches as tile() does,
// from the panel ``next``.
template <int BLOCKS, class Taker>
void tile_pass(const Gemm& gemm, int64_t p, int64_t next, const RowBlocks& blocks, int64_t index,
               int64_t passes, const Taker& taker) {
  const Weight& w = gemm.w;
  alignas(64) float sums[2 * TILE_HEIGHT * PANEL];
  int64_t first[2];
  for (int i = 0; i < 2; i++) first[i] = blocks.first_row(2 * index + i % BLOCKS);
  const uint8_t* panel = w.data + p * panel_bytes(w);
  const TileRows rows{{gemm.x + first[0] * gemm.stride, gemm.x + first[1] * gemm.stride},
                      blocks.height, gemm.stride};
  const int64_t steps = num_steps(multiplied(w)), n = is_int4(w) ? num_groups(w) : steps;
  const int64_t turns = is_int4(w) ? n : (n + TILE_LANES - 1) / TILE_LANES;
  const int64_t part = panel_bytes(w) / passes;
  const uint8_t* ahead = w.data + next * panel_bytes(w) + index * part;
  const PrefetchCursor cursor{reinterpret_cast<const char*>(ahead),
                              (part / turns + LINE - 1) / LINE * LINE};
  for (int i = 0; i < BLOCKS; i++) taker.prefetch(first[i], blocks.height);
  const StoredSums stored = taker.stored(first);
  const TileSums own{{sums, sums + blocks.height * PANEL}, PANEL};
  const TileSums& target = stored.stride ? stored : own;
  auto multiply = [&](auto prefetch) {
    constexpr Prefetch P = decltype(prefetch)::value;
    constexpr Streamed S = P == SAME_PANEL ? WEIGHTS : ROWS;
    if (is_int4(w)) {
      const auto* groups = reinterpret_cast<const Int4Group*>(gemm.groups);
      const Int4Group* const both[2] = {groups + first[0] * n, groups + first[1] * n};
      const auto f = w.type == I4 ? multiply_int4<true, P, BLOCKS> : multiply_int4<false, P, BLOCKS>;
      f(panel, cursor, rows, both, n, sums);
    } else if (w.type == BF16) {
      multiply_bf16<P, BLOCKS, false, S>(panel, cursor, rows, n, target);
    } else if (P == SAME_PANEL) {
      alignas(64) uint8_t memory[4 * UNPACKED_BYTES];
      multiply_tiles<BLOCKS, false, NEITHER>(UnpackedTiles<P, 4>{panel, cursor, memory}, rows, n,
                                             target);
    } else if (index == 0) {
      multiply_tiles<BLOCKS, false, S>(UnpackedTiles<P>{panel, cursor, unpacked_panel(w)}, rows, n,
                                       target);
    } else {
      multiply_bf16<P, BLOCKS, false, S>(unpacked_panel(w), cursor, rows, turns * TILE_LANES, target);
    }
  };
  if (passes == 1) {
    multiply(std::integral_constant<Prefetch, SAME_PANEL>());
  } else {
    multiply(std::integral_constant<Prefetch, NEXT_PANEL>());
  }
  for (int i = 0; i < BLOCKS && !stored.stride; i++)
    taker.write(first[i], blocks.height, sums + i * blocks.height * PANEL);
}

// All rows with one panel, as multiply_panel does.
template <class Taker>
void tile_passes(const Gemm& gemm, int64_t p, int64_t next, int64_t rows, const Taker& taker) {
  const RowBlocks blocks(rows);
  const int64_t passes = (blocks.count + 1) / 2;
  for (int64_t i = 0; i < passes; i++) {
    if (2 * i + 1 < blocks.count) {
      tile_pass<2>(gemm, p, next, blocks, i, passes, taker);
    } else {
      tile_pass<1>(gemm, p, next, blocks, i, passes, taker);
    }
  }
}

void multiply_panel_by_tiles(const Gemm& gemm, int64_t p, int64_t rows) {
  tile_passes(gemm, p, p + 1, rows, Outputs{gemm, p});
}

// Panel p of the result of a gated layer.
void multiply_gated_by_tiles(const Gemm& gemm, int64_t p, int64_t rows) {
  static thread_local Scratch scratch;
  float* const gates = scratch.get<float>(rows * PANEL);
  const int64_t half = num_panels(gemm.w) / 2;
  const int64_t gate = gemm.gate->is_first ? p : p + half, other = 2 * p + half - gate;
  tile_passes(gemm, gate, other, rows, Gates{gemm, gates});
  auto join = [&](auto op) {
    tile_passes(gemm, other, gate + 1, rows, Joined<decltype(op)::value>{gemm, gates, p});
  };
  if (gemm.gate->op == SILU) {
    join(std::integral_constant<int, SILU>());
  } else if (gemm.gate->op == GELU) {
    join(std::integral_constant<int, GELU>());
  } else {
    join(std::integral_constant<int, GELU_TANH>());
  }
}

}  // namespace
