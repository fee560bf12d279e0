// Products with matrices as they lie in a file, in float32: what a model is held against at load.
//
// Nothing is packed and nothing quantised, so that these share no more with the kernels that serve
// than the reading of blocks.

#include <algorithm>
#include <mutex>
#include <vector>

#include "abi.h"
#include "ggml_blocks.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

constexpr int OUTPUTS = 4;  // rows of weights that are multiplied at once, with
constexpr int INPUTS = 4;   // rows of x

// ``count`` of OUTPUTS rows of weights (OUTPUTS, k) with ``rows`` of INPUTS rows of x.
void multiply_some(const float* weights, int64_t k, const float* x, int64_t rows, float* y, int64_t n,
                   int64_t count) {
  f32x16 sums[OUTPUTS][INPUTS];
  const float* inputs[INPUTS];  // one again where there are fewer
  for (int r = 0; r < INPUTS; r++) inputs[r] = x + std::min<int64_t>(r, rows - 1) * k;
  for (auto& of_output : sums)
    for (auto& sum : of_output) sum = zero();
  for (int64_t i = 0; i < k; i += 16) {
    f32x16 v[INPUTS];
#pragma GCC unroll 4
    for (int r = 0; r < INPUTS; r++) v[r] = load(inputs[r] + i);
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      const f32x16 w = load(weights + o * k + i);
#pragma GCC unroll 4
      for (int r = 0; r < INPUTS; r++) sums[o][r] = fmadd(w, v[r], sums[o][r]);
    }
  }
  for (int o = 0; o < count; o++)
    for (int64_t r = 0; r < rows; r++) y[r * n + o] = reduce_add(sums[o][r]);
}

}  // namespace

extern "C" {

void multiply_blocks(const void* blocks, int32_t number, int64_t k, const int64_t* order, int64_t n,
                     const float* x, int64_t rows, float* y) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const BlockKind& kind = *block_kind_of(number);
  const int64_t stride = k / kind.weights * kind.bytes;
  pool->run((n + OUTPUTS - 1) / OUTPUTS, [&](int64_t b, int64_t e) {
    std::vector<float> weights(OUTPUTS * k);
    for (int64_t first = b * OUTPUTS; first < std::min(e * OUTPUTS, n); first += OUTPUTS) {
      const int64_t count = std::min<int64_t>(OUTPUTS, n - first);
      const auto* source = static_cast<const uint8_t*>(blocks);
      const bool lie_there = number == PlainF32::NUMBER && !order && count == OUTPUTS;
      for (int64_t o = 0; o < count && !lie_there; o++) {
        const int64_t row = order ? order[first + o] : first + o;
        kind.row(source + row * stride, k / GROUP, &weights[o * k]);
      }
      const auto* numbers = reinterpret_cast<const float*>(source + first * stride);
      for (int64_t r = 0; r < rows; r += INPUTS)
        multiply_some(lie_there ? numbers : weights.data(), k, x + r * k, std::min<int64_t>(INPUTS, rows - r),
                      y + r * n + first, n, count);
    }
  });
}

}  // extern "C"
