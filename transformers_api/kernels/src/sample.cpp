// Sampling: a fast form of what ../../engine/sampling/sampler.py defines, for the rows where its
// result cannot differ.
//
// The Gumbel-max trick in its exponential form: every token's score is its probability divided by
// exponential noise, and the largest score wins. The noise is a counter-based random number of the
// step's key and the token (SplitMix64). Two things save work:
//
// * The logarithm in the noise is taken only for tokens that can win by a lower bound of it.
// * Filters are applied to the winner only: it stands if the tokens before it leave it a place in
//   the top k, nucleus (top p) or above min p. Else it is removed, with all that are less likely, and
//   the rest is sampled again.
//
// Probabilities are not normalised, and their last bits may differ from torch's. Wherever that could
// matter the result is UNSURE, and the definition decides.

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "abi.h"
#include "simd.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace {

constexpr float NEGLIGIBLE = 1e-20f;   // times the likeliest: no noise makes up for it
constexpr float TIE = 2e-6f;           // probabilities closer than this may be in either order
constexpr float SCORE_MARGIN = 1e-5f;  // scores closer than this are not told apart
constexpr double SUM_ERROR = 1e-3;     // more than a sum in float32 may be off
constexpr double TINY = 1e-30;         // anything smaller, or its inverse, may not be a normal float
constexpr int64_t UNSURE = -1;
constexpr uint64_t GOLDEN_GAMMA = 0x9E3779B97F4A7C15;
constexpr int64_t CHUNK = 64;  // tokens

// The output function of SplitMix64 (Steele, Lea and Flood).
uint64_t splitmix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

u64x8 splitmix64(u64x8 x) {
  x = xor_u64(x, shift_right_u64<30>(x));
  x = mul_u64(x, broadcast_u64(0xBF58476D1CE4E5B9));
  x = xor_u64(x, shift_right_u64<27>(x));
  x = mul_u64(x, broadcast_u64(0x94D049BB133111EB));
  return xor_u64(x, shift_right_u64<31>(x));
}

// 2^53 (1 - u), a lower bound of 2^53 times the noise -log u.
u64x8 noise_bound(u64x8 x) {
  return shift_right_u64<11>(xor_u64(splitmix64(x), broadcast_u64(~uint64_t{0})));
}

// Of the 16 tokens from ``i`` on, those that may come.
mask16 allowed_lanes(const SampleRow& row, int64_t i) {
  const mask16 mask = first_lanes(row.size - i);
  return row.allowed ? mask & row.allowed[i / 16] : mask;
}

// The likeliest token that may come, the first of equals. UNSURE in a row with NaN, or whose largest
// is infinite or none.
int64_t argmax(const SampleRow& row) {
  f32x16 largest = broadcast(-INFINITY);
  mask16 nans = 0;
  for (int64_t i = 0; i < row.size; i += 16) {
    const f32x16 x = load(row.logits + i, first_lanes(row.size - i));
    nans |= is_nan(x);
    largest = max(allowed_lanes(row, i), largest, x);
  }
  const float top = reduce_max(largest);
  if (nans || !std::isfinite(top)) return UNSURE;
  const f32x16 tops = broadcast(top);
  for (int64_t i = 0;; i += 16) {
    const mask16 mask = allowed_lanes(row, i);
    const int matches = equal(mask, load(row.logits + i, mask), tops);
    if (matches) return i + __builtin_ctz(matches);
  }
}

class RowSampler {
 public:
  // ``probs``: memory for as many floats as there are tokens, rounded up to a multiple of 16.
  RowSampler(const SampleRow& row, int64_t likeliest, float* probs)
      : row_(row), likeliest_(likeliest), probs_(probs) {
    const f32x16 top = broadcast(row.logits[likeliest]);
    const f32x16 temperature = broadcast(static_cast<float>(row.temperature));
    f64x8 sum = zero_f64();
    for (int64_t i = 0; i < row.size; i += 16) {
      const mask16 mask = allowed_lanes(row, i);
      const f32x16 x = sub(load(row.logits + i, mask), top);
      const f32x16 prob = masked(mask, exp(div(x, temperature)));
      store(probs + i, prob);
      sum = add_widened(sum, prob);
    }
    sum_ = reduce_add(sum);
  }

  int64_t sample() const {
    double sum = sum_;  // of the tokens that top k leaves
    float floor = NEGLIGIBLE;
    const float kth = row_.top_k < row_.size ? kth_largest(row_.top_k) : 0;
    if (kth > NEGLIGIBLE) {
      const Tail above = from(kth * (1 + TIE));
      if (above.count != row_.top_k - 1 || from(kth * (1 - TIE)).count != row_.top_k)
        return UNSURE;
      sum = above.sum + kth;
      floor = kth * (1 - TIE);
    }
    for (;;) {
      const int64_t winner = race(floor);
      if (winner == UNSURE) return UNSURE;
      const float prob = probs_[winner];
      const double min_p = row_.min_p, top_p = row_.top_p;
      if (std::abs(prob - min_p) <= SCORE_MARGIN * min_p && min_p > 0) return UNSURE;
      bool passes = prob >= min_p;
      if (passes && top_p < 1) {
        const double most_before = from(prob * (1 - TIE)).sum - prob;
        const double least_before = from(prob * (1 + TIE)).sum;
        passes = most_before <= 0 || most_before < top_p * (1 - SUM_ERROR) * sum;
        if (!passes && least_before <= top_p * (1 + SUM_ERROR) * sum) return UNSURE;
      }
      if (passes) return winner;
      floor = prob;
    }
  }

 private:
  struct Tail {
    double sum;
    int64_t count;
  };

  double score(int64_t token) const {
    const uint64_t random = splitmix64(row_.key + token * GOLDEN_GAMMA);
    const double u = (static_cast<double>(random >> 11) + .5) * 0x1p-53;
    return u < 1 ? probs_[token] / -std::log(u) : INFINITY;  // without noise: UNSURE
  }

  // The token with the largest score among those more probable than ``floor``.
  int64_t race(float floor) const {
    double largest = score(likeliest_), second = 0;
    int64_t winner = likeliest_;
    const u64x8 step = broadcast_u64(16 * GOLDEN_GAMMA), half = broadcast_u64(8 * GOLDEN_GAMMA);
    u64x8 x = mul_u64(lane_numbers_u64(), broadcast_u64(GOLDEN_GAMMA));
    x = add_u64(x, broadcast_u64(row_.key));
    // a probability below this times the bound of its noise has lost
    f32x16 needed = broadcast(static_cast<float>(largest * (1 - 2 * SCORE_MARGIN) * 0x1p-53));
    for (int64_t i = 0; i < row_.size; i += 16, x = add_u64(x, step)) {
      const f32x16 prob = load(probs_ + i);
      const mask16 mask = greater(prob, broadcast(floor));
      if (!mask) continue;
      const f32x16 bound = to_f32(noise_bound(x), noise_bound(add_u64(x, half)));
      int candidates = greater_equal(mask, prob, mul(needed, bound));
      if (!candidates) continue;
      for (; candidates; candidates &= candidates - 1) {
        const int64_t token = i + __builtin_ctz(candidates);
        const double own = score(token);
        if (token == likeliest_) continue;
        second = std::max(second, std::min(own, largest));
        if (own > largest) largest = own, winner = token;
      }
      needed = broadcast(static_cast<float>(largest * (1 - 2 * SCORE_MARGIN) * 0x1p-53));
    }
    return std::isfinite(largest) && second < largest * (1 - SCORE_MARGIN) ? winner : UNSURE;
  }

  // The tokens at least as probable as ``least``.
  Tail from(float least) const {
    f64x8 sum = zero_f64();
    int64_t count = 0;
    for (int64_t i = 0; i < row_.size; i += 16) {
      const f32x16 prob = load(probs_ + i);
      const mask16 mask = greater_equal(prob, broadcast(least));
      if (!mask) continue;
      sum = add_widened(sum, masked(mask, prob));
      count += __builtin_popcount(mask);
    }
    return {reduce_add(sum), count};
  }

  // The k-th largest probability, k < size. At least k are as large as the k-th largest maximum of a
  // chunk, so only those are compared.
  float kth_largest(int64_t k) const {
    static thread_local std::vector<float> candidates;
    candidates.clear();
    for (int64_t i = 0; i < row_.size; i += CHUNK)
      candidates.push_back(*std::max_element(probs_ + i, probs_ + std::min(i + CHUNK, row_.size)));
    auto select_kth = [k] {
      const auto kth = candidates.begin() + k - 1;
      std::nth_element(candidates.begin(), kth, candidates.end(), std::greater<float>());
      return *kth;
    };
    const float least = k < static_cast<int64_t>(candidates.size()) ? select_kth() : 0;
    candidates.clear();
    for (int64_t i = 0; i < row_.size; i++)
      if (probs_[i] >= least) candidates.push_back(probs_[i]);
    return select_kth();
  }

  const SampleRow& row_;
  const int64_t likeliest_;
  float* const probs_;  // relative to the likeliest token's
  double sum_;
};

int64_t sample_row(const SampleRow& row) {
  const int64_t likeliest = argmax(row);
  if (row.temperature == 0 || likeliest == UNSURE) return likeliest;
  if (!(row.temperature > TINY && row.temperature < 1 / TINY)) return UNSURE;
  static thread_local std::vector<float> probs;
  probs.resize((row.size + 15) / 16 * 16);
  return RowSampler(row, likeliest, probs.data()).sample();
}

}  // namespace

extern "C" {

void sample(const SampleRow* rows, int64_t count, int64_t* tokens) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool->run(count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) tokens[i] = sample_row(rows[i]);
  });
}

}  // extern "C"
