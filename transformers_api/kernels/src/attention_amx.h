// attention_block.h's products of bfloat16 by AMX's tile unit; see dots_amx.h.
//
// All of them, those of a single query too: so its sums are the same in a prompt and in a decode step.

#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_block.h"

namespace {

template <>
struct QueryTiles<uint16_t> {
  static constexpr int64_t KEYS = TILE_LANES * 2;  // those of the last tile that are not there are zero
  static_assert(ITEM_QUERIES % TILE_HEIGHT == 0, "a tile of an item is all in its workspace");

  // Of all queries of an item if these are few; else sixteen or 32, some of which may not be there.
  template <class F>
  static void for_each(int64_t begin, int64_t end, int64_t count, const F& f) {
    const int64_t height = std::min(count, TILE_HEIGHT);
    for (int64_t m = begin / height * height, r; m < end; m += r) {
      r = m + height < end ? 2 * height : height;
      f(r, m);
    }
  }

  static void score(const Attention& a, Workspace& workspace, int64_t r, int64_t m, int64_t end) {
    const int64_t height = std::min(r, TILE_HEIGHT), second = m + r - height;
    const TileRows rows{{workspace.q[m], workspace.q[second]}, height, MAX_HEAD_SIZE + PAD};
    const int64_t n = whole_tiles((a.size + 1) / 2);
    shape_tiles(height, TILE_LANES);
    for (int64_t p = 0; p * PANEL < end; p++) {
      float *first = workspace.scores[m] + p * PANEL, *next = workspace.scores[second] + p * PANEL;
      const auto* panel = reinterpret_cast<const uint8_t*>(workspace.key_panels[p]);
      const auto multiply = r > height ? multiply_bf16<NO_PREFETCH, 2> : multiply_bf16<NO_PREFETCH, 1>;
      multiply(panel, {}, rows, n, {{first, next}, BLOCK + PAD});
    }
    for (int64_t i = m; i < m + r; i++)
      for (int64_t k = 0; k < end; k += 16) {
        const f32x16 scores = mul(load_aligned(workspace.scores[i] + k), broadcast(a.scale));
        store_aligned(workspace.scores[i] + k, a.softcap ? apply_softcap(scores, a.softcap) : scores);
      }
  }

  static void add_values(const Attention& a, Workspace& workspace, int64_t r, int64_t m,
                         int64_t end) {
    const int64_t height = std::min(r, TILE_HEIGHT), second = m + r - height;
    const TileRows rows{{workspace.probs[m], workspace.probs[second]}, height, BLOCK + PAD};
    const int64_t n = whole_tiles((end + 1) / 2);
    for (int64_t i = m; i < m + r; i++)
      for (int64_t j = 0; j < num_columns(a); j += 16)
        store_aligned(workspace.output[i] + j, mul(load_aligned(workspace.output[i] + j),
                                                   broadcast(workspace.queries[i].rescale)));
    shape_tiles(height, TILE_LANES);
    for (int64_t p = 0; p * PANEL < num_columns(a); p++) {
      float *first = workspace.output[m] + p * PANEL, *next = workspace.output[second] + p * PANEL;
      const auto* panel = reinterpret_cast<const uint8_t*>(workspace.value_panels[p]);
      const auto multiply =
          r > height ? multiply_bf16<NO_PREFETCH, 2, true> : multiply_bf16<NO_PREFETCH, 1, true>;
      multiply(panel, {}, rows, n, {{first, next}, MAX_HEAD_SIZE + PAD});
    }
  }

 private:
  // Whole panels: their columns are in another order until the output is written.
  static int64_t num_columns(const Attention& a) { return (a.size + PANEL - 1) / PANEL * PANEL; }
  static int64_t whole_tiles(int64_t lanes) {
    return (lanes + TILE_LANES - 1) / TILE_LANES * TILE_LANES;
  }
};

}  // namespace
