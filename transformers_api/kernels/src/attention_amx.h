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

  // As softmax_block, and with its bits: sixteen queries at once, which wait for none of the others.
  static void softmax(Workspace& workspace, int64_t begin, int64_t end, int64_t block) {
    int64_t m = begin;
    for (; m + TILE_HEIGHT <= end; m += TILE_HEIGHT) {
      const QueryState &first = workspace.queries[m], &last = workspace.queries[m + TILE_HEIGHT - 1];
      const bool is_whole = last.begin <= block && first.end >= block + BLOCK;
      (is_whole ? exponentiate_tile<true> : exponentiate_tile<false>)(workspace, m, block);
    }
    for (; m < end; m++) softmax_block<uint16_t>(workspace, m, block);
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
  template <bool IS_WHOLE>
  static void exponentiate_tile(Workspace& workspace, int64_t m, int64_t block) {
    static_assert(TILE_HEIGHT == 16, "a lane for each query");
    QueryState* queries = workspace.queries + m;
    alignas(64) float largest[16], sums[16], rescale[16];
    f32x16 v[16];
    auto mask_at = [&](int64_t q, int64_t i) -> mask16 {
      if (IS_WHOLE) return 0xffff;
      return first_lanes(queries[q].end - block - i) & ~first_lanes(queries[q].begin - block - i);
    };
    for (int64_t q = 0; q < 16; q++) {
      float* scores = workspace.scores[m + q];
      largest[q] = queries[q].max, sums[q] = queries[q].sum;
      if (queries[q].slope != 0) add_distances(scores, queries[q].slope, queries[q].end - block - 1);
      v[q] = broadcast(-std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < BLOCK; i += 16)
        v[q] = max(mask_at(q, i), v[q], load_aligned(scores + i));
    }
    const f32x16 before = load_aligned(largest), now = max(reduce_each<max>(v), before);
    const f32x16 factor = select(equal(0xffff, before, now), broadcast(1), exp(sub(before, now)));
    store_aligned(largest, now);
    store_aligned(rescale, factor);
    for (int64_t q = 0; q < 16; q++) {
      f32x16 probs[2], sum = zero();
      for (int64_t i = 0; i < BLOCK; i += 16) {
        const f32x16 score = load_aligned(workspace.scores[m + q] + i);
        f32x16& prob = probs[i / 16 % 2];
        prob = exp(sub(score, broadcast(largest[q])));
        if (!IS_WHOLE) prob = masked(mask_at(q, i), prob);
        sum = add(sum, DotFormat<uint16_t>::rounded(prob));
        if (i / 16 % 2)
          store_aligned_i32(workspace.probs[m + q] + i / 2 - 8,
                            DotFormat<uint16_t>::row(probs[0], probs[1]));
      }
      v[q] = sum;
    }
    store_aligned(sums, add(mul(load_aligned(sums), factor), reduce_each<add>(v)));
    for (int64_t q = 0; q < 16; q++)
      queries[q].max = largest[q], queries[q].sum = sums[q], queries[q].rescale = rescale[q];
  }

  // Whole panels: their columns are in another order until the output is written.
  static int64_t num_columns(const Attention& a) { return (a.size + PANEL - 1) / PANEL * PANEL; }
  static int64_t whole_tiles(int64_t lanes) {
    return (lanes + TILE_LANES - 1) / TILE_LANES * TILE_LANES;
  }
};

}  // namespace
