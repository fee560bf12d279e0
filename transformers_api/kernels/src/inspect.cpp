// Figures for inspection, in float32: attention probabilities and statistics of a token. No token
// depends on them.

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <vector>

#include "abi.h"
#include "attention_block.h"
#include "kv_codes.h"
#include "simd.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace {

constexpr int64_t STATS_CHUNK = 64;  // tokens

// Softmax of one head's query over all keys; returns the probability of its sink. The query has the
// precision in which attention multiplies it: what is rounded away of it grows with the scores.
float attention_row(const Attention& a, int64_t row, int64_t head, int64_t query, int64_t keys,
                    float* probs) {
  const int64_t end = std::min(a.starts[row] + query + 1, keys);
  const int64_t begin = window_begin(a, a.starts[row] + query + 1);
  const int64_t q = row * a.q_strides[0] + head * a.q_strides[1] + query * a.q_strides[2];
  const int64_t cache_row = a.cache_rows ? a.cache_rows[row] : row;
  const int64_t k = cache_row * a.k_strides[0] + head / (a.heads / a.kv_heads) * a.k_strides[1];
  alignas(64) float numbers[MAX_HEAD_SIZE];
  for (int64_t i = 0; i < a.size; i += 16) {
    const f32x16 part = load(a.q, a.q_type, q + i, first_lanes(a.size - i));
    store_aligned(numbers + i, a.kv_type == F32 ? part : round_to_bf16(part));
  }
  std::fill_n(probs, keys, 0.f);
  for (int64_t j = begin; j < end; j++) {
    f32x16 sum = zero();
    for (int64_t i = 0; i < a.size; i += 16) {
      const mask16 mask = first_lanes(a.size - i);
      sum = fmadd(load_aligned(numbers + i),
                  load_kv(a.k, a.kv_type, k + j * a.k_strides[2], i, mask), sum);
    }
    probs[j] = reduce_add(sum) * a.scale;
  }
  const float slope = a.slopes ? a.slopes[head] : 0;
  float max_score = a.sinks ? a.sinks[head] : -INFINITY;
  for (int64_t j = begin; j < end; j += 16) {
    const mask16 mask = first_lanes(end - j);
    if (a.softcap) store(probs + j, mask, apply_softcap(load(probs + j, mask), a.softcap));
    for (int64_t i = j; slope != 0 && i < std::min(j + 16, end); i++)
      probs[i] += slope * static_cast<float>(i - a.starts[row] - query);
    max_score = std::max(max_score, reduce_max(mask, load(probs + j, mask)));
  }
  const float sink = a.sinks ? first_lane(exp(broadcast(a.sinks[head] - max_score))) : 0;
  double sum = sink;
  for (int64_t j = begin; j < end; j += 16) {
    const mask16 mask = first_lanes(end - j);
    const f32x16 e = exp(sub(load(probs + j, mask), broadcast(max_score)));
    store(probs + j, mask, e);
    sum += reduce_add(mask, e);
  }
  for (int64_t j = begin; j < end; j++) probs[j] = static_cast<float>(probs[j] / sum);
  return static_cast<float>(sink / sum);
}

// The ``s.count`` likeliest tokens, the likeliest first, of equals the lower id. ``maxima``: the
// largest logit of each chunk.
void find_likeliest(const TokenStats& s, std::vector<float>& maxima, int64_t* ids) {
  float least = -INFINITY;  // at least ``s.count`` are as large as this
  if (s.count < static_cast<int64_t>(maxima.size())) {
    const auto kth = maxima.begin() + s.count - 1;
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<float>());
    least = *kth;
  }
  std::vector<int64_t> candidates;
  for (int64_t i = 0; i < s.size; i += 16) {
    const mask16 mask = first_lanes(s.size - i);
    int matches = greater_equal(mask, load(s.logits + i, mask), broadcast(least));
    for (; matches; matches &= matches - 1) candidates.push_back(i + __builtin_ctz(matches));
  }
  const auto end = candidates.begin() + s.count;
  std::partial_sort(candidates.begin(), end, candidates.end(), [&](int64_t a, int64_t b) {
    return s.logits[a] > s.logits[b] || (s.logits[a] == s.logits[b] && a < b);
  });
  std::copy_n(candidates.begin(), s.count, ids);
}

// See RowChange. Its threads are awake: the pass goes on.
void note_attention(const RowChange& c, const Attention& a) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  float* const target = reinterpret_cast<float*>(c.target);
  pool->run(c.count * a.heads, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      const int64_t row = c.tokens ? c.tokens[i / a.heads] : i / a.heads;
      float* const probs = target + i * (c.width + 1);
      probs[c.width] = attention_row(a, row, i % a.heads, 0, c.width, probs);
    }
  });
}

}  // namespace

extern "C" {

void attention_probs(const Attention* call, int64_t row, int64_t query, int64_t count, int64_t keys,
                     float* probs, float* sinks) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool->run(call->heads * count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      const float sink =
          attention_row(*call, row, i / count, query + i % count, keys, probs + i * keys);
      if (sinks) sinks[i] = sink;
    }
  });
}

void token_stats(TokenStats* stats, int64_t* ids, float* probs) {
  TokenStats& s = *stats;
  static thread_local std::vector<float> maxima;
  maxima.clear();
  const f32x16 own = broadcast(s.logits[s.token]);
  s.rank = 0;
  for (int64_t chunk = 0; chunk < s.size; chunk += STATS_CHUNK) {
    f32x16 largest = broadcast(-INFINITY);
    for (int64_t i = chunk; i < std::min(chunk + STATS_CHUNK, s.size); i += 16) {
      const mask16 mask = first_lanes(s.size - i);
      const f32x16 x = load(s.logits + i, mask);
      largest = max(mask, largest, x);
      s.rank += __builtin_popcount(greater(mask, x, own));
    }
    maxima.push_back(reduce_max(largest));
  }
  const float top = *std::max_element(maxima.begin(), maxima.end());
  double sum = 0, weighted = 0;  // of e = exp(x), and of x e
  for (int64_t chunk = 0; chunk < s.size; chunk += STATS_CHUNK) {
    f32x16 part = zero(), weighted_part = zero();
    for (int64_t i = chunk; i < std::min(chunk + STATS_CHUNK, s.size); i += 16) {
      const mask16 mask = first_lanes(s.size - i);
      const f32x16 x = sub(load(s.logits + i, mask), broadcast(top));
      const f32x16 e = masked(mask, exp(x));
      part = add(part, e);
      // bounded, because e = 0 of an infinitely unlikely token would make NaN of x e
      weighted_part = fmadd(max(x, broadcast(-104.f)), e, weighted_part);
    }
    sum += reduce_add(part), weighted += reduce_add(weighted_part);
  }
  s.logprob = static_cast<double>(s.logits[s.token]) - top - std::log(sum);
  s.entropy = std::max(0., std::log(sum) - weighted / sum);
  s.count = std::min(s.count, s.size);
  if (!s.count) return;
  find_likeliest(s, maxima, ids);
  for (int64_t i = 0; i < s.count; i++)
    probs[i] = static_cast<float>(std::exp(static_cast<double>(s.logits[ids[i]]) - top) / sum);
}

}  // extern "C"
