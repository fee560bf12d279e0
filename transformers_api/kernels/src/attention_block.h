// One block of keys and values in attention: FlashAttention's online softmax, block by block.
//
// The scores of a block are turned into exponentials relative to the largest score so far; where a
// block raises that maximum, what was accumulated before is rescaled (Milakov and Gimelshein,
// "Online normalizer calculation for softmax"; Dao et al., "FlashAttention").

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "abi.h"
#include "kv_codes.h"
#include "simd.h"
#include "tiles.h"
#include "vector_math.h"
#include "weights.h"

namespace {

constexpr int64_t BLOCK = 64, MAX_HEAD_SIZE = 512;
constexpr int64_t ITEM_QUERIES = 96;  // queries, times heads, that go through a row's keys together
constexpr int64_t PAD = 16;           // keeps neighbouring rows out of the same cache sets

// The online softmax of one query.
struct QueryState {
  int64_t begin, end;          // the keys that it attends to
  float max, sum;              // of the scores so far; of their exponentials, relative to max
  float rescale;               // for what was accumulated before the current block
  float slope;                 // of a bias that is linear in the distance of a key (ALiBi)
};

// The first key that the query before ``end`` attends to.
int64_t window_begin(const Attention& a, int64_t end) {
  if (a.window < 0) return (end - 1) / -a.window * -a.window;
  return a.window ? std::max<int64_t>(0, end - a.window) : 0;
}

// The memory of one thread, for the queries of one work item.
struct Workspace {
  QueryState queries[ITEM_QUERIES];
  alignas(64) int32_t q[ITEM_QUERIES][MAX_HEAD_SIZE + PAD];
  alignas(64) float output[ITEM_QUERIES][MAX_HEAD_SIZE + PAD];  // not yet divided by the sum
  alignas(64) float scores[ITEM_QUERIES][BLOCK + PAD];          // of a block
  alignas(64) int32_t probs[ITEM_QUERIES][BLOCK + PAD];         // their exponentials, as lanes
  alignas(64) i32x16 key_panels[BLOCK / PANEL][MAX_HEAD_SIZE][2];
  alignas(64) i32x16 value_panels[MAX_HEAD_SIZE / PANEL][BLOCK][2];
};

template <class T>
struct QueryTiles;

// A row of keys or values as the cache has it, and the lanes of Number that are multiplied; those
// from ``j`` on, a multiple of how many fit. Behind ``size`` may be anything, or it is not read.
template <class S>
struct Stored {
  using Number = S;
  static int64_t bytes(int64_t size) { return size * static_cast<int64_t>(sizeof(S)); }
  static i32x16 lanes(const S* row, int64_t j) { return load_i32(row + j); }
  static i32x16 lanes(const S* row, int64_t j, int64_t size) {
    return DotFormat<S>::load_lanes(row + j, size - j);
  }
};
template <>
struct Stored<int8_t> {
  using Number = uint16_t;
  static_assert(16 * DotFormat<Number>::STEP == KV_GROUP, "a vector of lanes is a group");
  static int64_t bytes(int64_t size) { return kv_code_bytes(size); }
  static i32x16 lanes(const int8_t* row, int64_t j) {
    const int8_t* group = row + j / KV_GROUP * KV_GROUP_BYTES;
    return DotFormat<Number>::row(kv_numbers(group, 0), kv_numbers(group, 1));
  }
  static i32x16 lanes(const int8_t* row, int64_t j, int64_t) { return lanes(row, j); }
};

// Keys and values to prefetch while a block is computed, so that they are in the cache when their
// block comes: those BLOCK keys later, of this work item and then of the next; all of them, and as
// evenly as the current ones are used, since few queries wait for little but memory.
struct KvPrefetch {
  struct Stream {
    const char *current, *next;  // of this work item, of the next
    int64_t stride;
  };
  Stream keys, values;
  int64_t current, count, bytes;  // rows of this work item; rows in all; bytes of each
};
// A macro, because gcc removes a function that only prefetches.
#define PREFETCH_ROWS(stream, from, to)                                                          \
  for (int64_t i = from, last = std::min<int64_t>(to, ahead.count); i < last; i++) {             \
    const char* p = i < ahead.current                                                            \
                        ? ahead.stream.current + i * ahead.stream.stride                         \
                        : ahead.stream.next + (i - ahead.current) * ahead.stream.stride;         \
    for (int64_t b = 0; b < ahead.bytes; b += 64) __builtin_prefetch(p + b, 0, TO_L2);           \
  }

// The keys begin..end of the block that starts at ``keys``, as panels. No other is read.
template <class S>
void load_keys(const Attention& a, const S* keys, int64_t begin, int64_t end,
               const KvPrefetch& ahead, Workspace& workspace) {
  using T = typename Stored<S>::Number;
  constexpr int64_t LANES = 16 * DotFormat<T>::STEP;
  const int64_t from = begin / 16 * 16, to = (end + 31) / 32 * 32;
  const int64_t per_turn = (ahead.count * 16 + to - from - 1) / (to - from);
  for (int64_t k = from, prefetched = 0; k < to; k += 16, prefetched += per_turn) {
    PREFETCH_ROWS(keys, prefetched, prefetched + per_turn);
    for (int64_t j = 0; j < a.size; j += LANES) {
      i32x16 v[16];
      if (k >= begin && k + 16 <= end && j + LANES <= a.size) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; i++)
          v[i] = Stored<S>::lanes(keys + (k + i) * a.k_strides[2], j);
      } else {
        for (int64_t i = 0; i < 16; i++) {
          const bool is_inside = k + i >= begin && k + i < end;
          const S* key = keys + (k + i) * a.k_strides[2];
          v[i] = is_inside ? Stored<S>::lanes(key, j, a.size) : zero_i32();
        }
      }
      transpose(v);
      i32x16 (*panel)[2] = workspace.key_panels[k / PANEL] + j / DotFormat<T>::STEP;
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; i++) panel[i][k / 16 % 2] = v[i];
    }
  }
}

// The values begin..end as panels. With ``checks``: true where all of them are finite.
template <class S>
bool load_values(const Attention& a, const S* values, int64_t begin, int64_t end, bool checks,
                 const KvPrefetch& ahead, Workspace& workspace) {
  using T = typename Stored<S>::Number;
  constexpr int64_t STEP = DotFormat<T>::STEP, LANES = 16 * STEP;
  bool all_finite = true;
  auto lanes_at = [&](int64_t k, int64_t j) {
    const S* value = values + k * a.v_strides[2];
    return k >= begin && k < end && j < a.size ? Stored<S>::lanes(value, j, a.size) : zero_i32();
  };
  const int64_t per_turn = (ahead.count * STEP + end - 1) / end;
  const int64_t filled = (end + QueryTiles<T>::KEYS - 1) / QueryTiles<T>::KEYS * QueryTiles<T>::KEYS;
  for (int64_t k = 0, prefetched = 0; k < filled; k += STEP, prefetched += per_turn) {
    PREFETCH_ROWS(values, prefetched, prefetched + per_turn);
    int64_t j = 0;
    const S* p = values + k * a.v_strides[2];
    for (; k >= begin && k + STEP <= end && j + PANEL <= a.size; j += PANEL) {  // nearly always
      const i32x16 low = Stored<S>::lanes(p, j);
      const i32x16 high =
          STEP == 2 ? Stored<S>::lanes(p + a.v_strides[2], j) : Stored<S>::lanes(p, j + LANES);
      if (checks) all_finite &= DotFormat<T>::all_finite(low) && DotFormat<T>::all_finite(high);
      DotFormat<T>::store_panel(low, high, workspace.value_panels[j / PANEL][k / STEP]);
    }
    for (; j < a.size; j += PANEL) {
      const i32x16 low = lanes_at(k, j);
      const i32x16 high = STEP == 2 ? lanes_at(k + 1, j) : lanes_at(k, j + LANES);
      if (checks) all_finite &= DotFormat<T>::all_finite(low) && DotFormat<T>::all_finite(high);
      DotFormat<T>::store_panel(low, high, workspace.value_panels[j / PANEL][k / STEP]);
    }
  }
  return all_finite;
}

// scores = scale * q k^T, of R queries from m on with the first ``end`` keys of the block.
template <class T, int R>
void score_tile(const Attention& a, Workspace& workspace, int64_t m, int64_t end) {
  const int64_t n = (a.size + DotFormat<T>::STEP - 1) / DotFormat<T>::STEP;
  for (int64_t p = 0; p * PANEL < end; p++) {
    Accumulators<R> sums;
    for (auto& sum : sums) sum[0] = sum[1] = zero();
    const auto* panel = reinterpret_cast<const uint8_t*>(workspace.key_panels[p]);
    accumulate_dense<typename DotFormat<T>::Dot, NO_PREFETCH, R>(
        panel, {}, workspace.q[m], MAX_HEAD_SIZE + PAD, n, sums);
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++) {
        const f32x16 scores = mul(sums[r][half], broadcast(a.scale));
        store_aligned(workspace.scores[m + r] + p * PANEL + 16 * half,
                      a.softcap ? apply_softcap(scores, a.softcap) : scores);
      }
  }
}

// Add ``slope`` times the distance of each key of a block behind the key ``at`` (negative) to its score.
void add_distances(float* scores, float slope, int64_t at) {
  for (int64_t i = 0; i < BLOCK; i++) scores[i] += slope * static_cast<float>(i - at);
}

// Exponentials of the scores of query m with the keys begin..end of a block. IS_WHOLE: with all.
template <class T, bool IS_WHOLE>
void exponentiate(Workspace& workspace, int64_t m, int64_t begin, int64_t end) {
  QueryState& query = workspace.queries[m];
  auto mask_at = [&](int64_t i) -> mask16 {
    return IS_WHOLE ? 0xffff : first_lanes(end - i) & ~first_lanes(begin - i);
  };
  f32x16 largest = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < BLOCK; i += 16) {
    largest = max(mask_at(i), largest, load_aligned(workspace.scores[m] + i));
  }
  const float new_max = std::max(query.max, reduce_max(largest));
  if (query.max != new_max) query.rescale = first_lane(exp(broadcast(query.max - new_max)));
  query.max = new_max;
  f32x16 sum = zero(), probs[2];
  for (int64_t i = 0; i < BLOCK; i += 16) {
    const mask16 mask = mask_at(i);
    f32x16& prob = probs[i / 16 % DotFormat<T>::STEP];
    prob = sub(load_aligned(workspace.scores[m] + i), broadcast(new_max));
    prob = IS_WHOLE ? exp(prob) : mask ? masked(mask, exp(prob)) : zero();
    sum = add(sum, DotFormat<T>::rounded(prob));
    if ((i / 16 + 1) % DotFormat<T>::STEP == 0)
      store_aligned_i32(workspace.probs[m] + (i + 16) / DotFormat<T>::STEP - 16,
                        DotFormat<T>::row(probs[0], probs[1]));
  }
  query.sum = query.sum * query.rescale + reduce_add(sum);
}

// From the scores of query m with the block whose first key is ``block`` to their exponentials.
template <class T>
void softmax_block(Workspace& workspace, int64_t m, int64_t block) {
  QueryState& query = workspace.queries[m];
  const int64_t begin = query.begin - block, end = query.end - block;
  query.rescale = 1;
  if (begin >= BLOCK || end <= 0) {
    std::memset(workspace.probs[m], 0, BLOCK / DotFormat<T>::STEP * 4);
    return;
  }
  if (query.slope != 0) add_distances(workspace.scores[m], query.slope, end - 1);
  const bool is_whole = begin <= 0 && end >= BLOCK;
  (is_whole ? exponentiate<T, true> : exponentiate<T, false>)(workspace, m, begin, end);
}

// output = rescale * output + probs v, of R queries from m on with the first ``end`` keys.
template <class T, int R>
void accumulate_values(const Attention& a, Workspace& workspace, int64_t m, int64_t end) {
  const int64_t n = (end + DotFormat<T>::STEP - 1) / DotFormat<T>::STEP;
  for (int64_t p = 0; p * PANEL < a.size; p++) {
    Accumulators<R> sums;
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++)
        sums[r][half] = mul(load_aligned(workspace.output[m + r] + p * PANEL + 16 * half),
                            broadcast(workspace.queries[m + r].rescale));
    const auto* panel = reinterpret_cast<const uint8_t*>(workspace.value_panels[p]);
    accumulate_dense<typename DotFormat<T>::Dot, NO_PREFETCH, R>(
        panel, {}, workspace.probs[m], BLOCK + PAD, n, sums);
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++)
        store_aligned(workspace.output[m + r] + p * PANEL + 16 * half, sums[r][half]);
  }
}

using BlockTile = void (*)(const Attention&, Workspace&, int64_t, int64_t);
template <class T, bool IS_SCORE, size_t... I>
constexpr std::array<BlockTile, sizeof...(I)> make_block_tiles(std::index_sequence<I...>) {
  return {(IS_SCORE ? score_tile<T, I + 1> : accumulate_values<T, I + 1>)...};
}
template <class T>
constexpr auto SCORE_TILES = make_block_tiles<T, true>(std::make_index_sequence<6>{});
template <class T>
constexpr auto VALUE_TILES = make_block_tiles<T, false>(std::make_index_sequence<6>{});

// Tiles of queries of one item, and their products with a block.
template <class T>
struct QueryTiles {
  static constexpr int64_t KEYS = DotFormat<T>::STEP;  // that are multiplied with their values at once

  // f(queries of a tile, the first) for begin..end of ``count``, and maybe for neighbours of theirs.
  template <class F>
  static void for_each(int64_t begin, int64_t end, int64_t, const F& f) {
    for (int64_t m = begin; m < end;) {
      const int64_t left = end - m, r = left <= 6 ? left : left < 12 ? (left + 1) / 2 : 6;
      f(r, m);
      m += r;
    }
  }
  static void score(const Attention& a, Workspace& workspace, int64_t r, int64_t m, int64_t end) {
    SCORE_TILES<T>[r - 1](a, workspace, m, end);
  }
  static void softmax(Workspace& workspace, int64_t begin, int64_t end, int64_t block) {
    for (int64_t m = begin; m < end; m++) softmax_block<T>(workspace, m, block);
  }
  static void add_values(const Attention& a, Workspace& workspace, int64_t r, int64_t m,
                         int64_t end) {
    VALUE_TILES<T>[r - 1](a, workspace, m, end);
  }
};

}  // namespace

#ifdef ISA_AMX
#include "attention_amx.h"
#endif

namespace {

// All ``count`` queries with the block of keys and values that begins at key ``block``.
//
// A value that is not finite would reach, times the probability zero, also the queries that do not
// attend to it. Where there is one, each query accumulates its own values alone.
template <class S>
void attend_block(const Attention& a, Workspace& workspace, int64_t count, const S* keys,
                  const S* values, int64_t block, const KvPrefetch& ahead) {
  using T = typename Stored<S>::Number;
  const QueryState* queries = workspace.queries;
  int64_t last = count, first = 0;
  while (first < count && queries[first].end <= block) first++;
  while (last > first && queries[last - 1].begin >= block + BLOCK) last--;
  if (first == last) return;
  keys += block * a.k_strides[2], values += block * a.v_strides[2];
  const int64_t begin = std::max<int64_t>(0, queries[first].begin - block);
  const int64_t end = std::min(BLOCK, queries[last - 1].end - block);
  auto end_of = [&](int64_t m) { return std::min(BLOCK, queries[m].end - block); };
  load_keys(a, keys, begin, end, ahead, workspace);
  const bool same_end = queries[first].end == queries[last - 1].end;
  const bool all_finite = load_values(a, values, begin, end, !same_end, ahead, workspace);
  QueryTiles<T>::for_each(first, last, count, [&](int64_t r, int64_t m) {
    const int64_t tile_end = end_of(std::min(m + r, last) - 1);
    QueryTiles<T>::score(a, workspace, r, m, tile_end);
    QueryTiles<T>::softmax(workspace, m, std::min(m + r, count), block);
    if (all_finite) QueryTiles<T>::add_values(a, workspace, r, m, tile_end);
  });
  for (int64_t m = first; m < last && !all_finite; m++) {
    if (queries[m].begin >= block + BLOCK) continue;
    const int64_t own_begin = std::max<int64_t>(0, queries[m].begin - block);
    load_values(a, values, own_begin, end_of(m), false, KvPrefetch(), workspace);
    QueryTiles<T>::add_values(a, workspace, 1, m, end_of(m));
  }
}

}  // namespace
