// Attention over a KV cache, for prompts and decode steps.
//
// The keys of a row are visited in blocks that begin at multiples of BLOCK, whoever attends to them.
// So a query's result depends neither on the queries that share the call with it, nor on whether a
// prompt came in one piece or token by token.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "abi.h"
#include "attention_block.h"
#include "simd.h"
#include "thread_pool.h"
#include "tiles.h"

namespace {

// Tokens of one row of the cache at consecutive positions; a token is a query of all heads.
struct Run {
  int64_t cache_row, token, position, tokens;
};

// A few queries of a run, with the heads that share its keys and values (grouped-query attention).
struct WorkItem {
  int64_t cache_row, kv_head, head, heads, token, position, tokens;

  int64_t count() const { return heads * tokens; }
  int64_t head_of(int64_t i) const { return head + i % heads; }
  int64_t token_of(int64_t i) const { return token + i / heads; }
  int64_t end_of(int64_t i) const { return position + i / heads + 1; }
};

// The tokens of the call by what they attend to: a prompt may come as queries of a row, or as rows
// of one query each beside those of other sequences.
void find_runs(const Attention& a, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t cache_row = a.cache_rows ? a.cache_rows[row] : row;
    if (!runs.empty() && runs.back().cache_row == cache_row &&
        runs.back().position + runs.back().tokens == a.starts[row])
      runs.back().tokens += a.queries;
    else
      runs.push_back({cache_row, row * a.queries, a.starts[row], a.queries});
  }
}

void find_items(const Attention& a, int threads, std::vector<WorkItem>& items) {
  static std::vector<Run> runs;
  find_runs(a, runs);
  const int64_t group = a.heads / a.kv_heads;
  // the heads of a group stay together, so that their keys are loaded once for all of them, unless
  // they are all the parallelism there is
  const bool splits_heads = a.rows * a.kv_heads * a.queries < threads;
  int64_t heads = splits_heads ? 1 : std::min(ITEM_QUERIES, group);
  while (group % heads) heads--;
  int64_t most = std::max<int64_t>(1, ITEM_QUERIES / heads);
  // smaller ones where threads would wait for the last of a few
  if (a.rows * a.queries * (a.heads / heads) < 4 * threads * most) most = (most + 1) / 2;
  items.clear();
  for (const Run& run : runs) {
    const int64_t tiles = (run.tokens + most - 1) / most;
    for (int64_t head = 0; head < a.heads; head += heads)
      for (int64_t nth = 0; nth < tiles; nth++) {
        // tiles of late queries see more keys: neighbours are an early and a late one
        const int64_t first = (nth % 2 ? tiles - 1 - nth / 2 : nth / 2) * most;
        items.push_back({run.cache_row, head / group, head, heads, run.token + first,
                         run.position + first, std::min(most, run.tokens - first)});
      }
  }
}

template <class S>
const S* keys_of(const Attention& a, const WorkItem& item) {
  return static_cast<const S*>(a.k) + item.cache_row * a.k_strides[0] + item.kv_head * a.k_strides[1];
}

template <class S>
const S* values_of(const Attention& a, const WorkItem& item) {
  return static_cast<const S*>(a.v) + item.cache_row * a.v_strides[0] + item.kv_head * a.v_strides[1];
}

// Load query i of the item and begin its online softmax.
template <class T>
void begin_query(const Attention& a, const WorkItem& item, int64_t i, Workspace& workspace) {
  constexpr int64_t STEP = DotFormat<T>::STEP;
  QueryState& query = workspace.queries[i];
  query.end = item.end_of(i);
  query.begin = window_begin(a, query.end);
  query.max = -std::numeric_limits<float>::max(), query.sum = 0;
  query.slope = a.slopes ? a.slopes[item.head_of(i)] : 0;
  const int64_t token = item.token_of(i);
  const int64_t at = token / a.queries * a.q_strides[0] + item.head_of(i) * a.q_strides[1] +
                     token % a.queries * a.q_strides[2];
  for (int64_t j = 0; j < a.size; j += 16 * STEP) {
    const f32x16 low = load(a.q, a.q_type, at + j, first_lanes(a.size - j));
    const f32x16 high = load(a.q, a.q_type, at + j + 16, first_lanes(a.size - j - 16));
    store_aligned_i32(workspace.q[i] + j / STEP, DotFormat<T>::row(low, high));
  }
  for (int64_t j = 0; j < a.size; j += PANEL)
    for (int64_t half : {0, 16}) store_aligned(workspace.output[i] + j + half, zero());
}

// Divide by the sum of the exponentials, the sink's included.
template <class T>
void write_output(const Attention& a, const Workspace& workspace, int64_t m, int64_t head,
                  int64_t row) {
  const QueryState& query = workspace.queries[m];
  float sum = query.sum, rescale = 1;
  if (a.sinks) {
    const float new_max = std::max(query.max, a.sinks[head]);
    rescale = std::exp(query.max - new_max);
    sum = sum * rescale + std::exp(a.sinks[head] - new_max);
  }
  const f32x16 factor = broadcast(rescale / sum);
  for (int64_t j = 0; j < a.size; j += PANEL) {
    f32x16 low = load_aligned(workspace.output[m] + j);
    f32x16 high = load_aligned(workspace.output[m] + j + 16);
    DotFormat<T>::restore_order(low, high);
    store(a.out, a.q_type, row * a.size + j, first_lanes(a.size - j), mul(low, factor));
    if (j + 16 < a.size)
      store(a.out, a.q_type, row * a.size + j + 16, first_lanes(a.size - j - 16),
            mul(high, factor));
  }
}

// All blocks of a work item. ``next``: the item that this thread takes after it. S: what keys and
// values are stored as.
template <class S>
void attend(const Attention& a, const WorkItem& item, const WorkItem& next, Workspace& workspace) {
  using T = typename Stored<S>::Number;
  const int64_t count = item.count();
  for (int64_t i = 0; i < count; i++) begin_query<T>(a, item, i, workspace);
  const int64_t end = workspace.queries[count - 1].end;
  const int64_t begin = workspace.queries[0].begin / BLOCK * BLOCK;
  const int64_t next_end = next.end_of(0);
  const int64_t next_begin = window_begin(a, next_end) / BLOCK * BLOCK;
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t current = std::clamp<int64_t>(end - at - BLOCK, 0, BLOCK);
    const int64_t done = at == begin ? 0 : std::max<int64_t>(0, at + BLOCK - end);
    const int64_t due = std::min(at + 2 * BLOCK - end, next_end - next_begin);
    auto stream = [&](const S* own, const S* others, int64_t stride) {
      return KvPrefetch::Stream{reinterpret_cast<const char*>(own + (at + BLOCK) * stride),
                                reinterpret_cast<const char*>(others + (next_begin + done) * stride),
                                stride * static_cast<int64_t>(sizeof(S))};
    };
    const KvPrefetch ahead{stream(keys_of<S>(a, item), keys_of<S>(a, next), a.k_strides[2]),
                           stream(values_of<S>(a, item), values_of<S>(a, next), a.v_strides[2]),
                           current, current + std::max<int64_t>(0, due - done),
                           Stored<S>::bytes(a.size)};
    attend_block<S>(a, workspace, count, keys_of<S>(a, item), values_of<S>(a, item), at, ahead);
  }
  for (int64_t i = 0; i < count; i++)
    write_output<T>(a, workspace, i, item.head_of(i),
                    item.token_of(i) * a.heads + item.head_of(i));
}

}  // namespace

extern "C" {

void attention(const Attention* call) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const Attention& a = *call;
  static std::vector<WorkItem> items;
  find_items(a, pool->size(), items);
  const int64_t count = items.size();
  const auto attend_type = a.kv_type == F32  ? attend<float>
                           : a.kv_type == I8 ? attend<int8_t>
                                             : attend<uint16_t>;
  pool->run(count, [&](int64_t b, int64_t e) {
    static thread_local std::unique_ptr<Workspace> workspace(new Workspace);
    for (int64_t i = b; i < e; i++)
      attend_type(a, items[i], items[std::min(i + 1, count - 1)], *workspace);
  });
  release_tiles();
}

}  // extern "C"
