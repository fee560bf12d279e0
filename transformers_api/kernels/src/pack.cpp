// Packing: from dense matrices to the layout of weights.h, and back.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "abi.h"
#include "activations.h"
#include "pack.h"
#include "quantize_int4.h"
#include "simd.h"
#include "thread_pool.h"
#include "weights.h"

namespace {

// A row of weights as the lanes of its steps.
template <class T>
void pack_lanes(const Weight& w, const T* source, int64_t row, int32_t* lanes) {
  if (w.type != I8) return convert_row(w, source, lanes);
  for (int64_t g = 0; g < num_groups(w); g++) {
    float x[GROUP];
    for (int i = 0; i < GROUP; i += 16)
      store(x + i, 0xffff, load(source + g * GROUP + i, first_lanes(w.k - g * GROUP - i)));
    quantize_int8_group(w, x, row, g, reinterpret_cast<int8_t*>(lanes) + g * GROUP);
  }
}

// Sixteen rows at a time where possible: their lanes of a step are one line of the panel.
template <class T>
void pack_rows(const Weight& w, const T* source, int64_t row, int64_t end) {
  const int64_t n = num_steps(w);
  std::vector<int32_t> lanes(16 * n);
  for (int64_t count; row < end; row += count, source += count * w.k) {
    count = row % 16 == 0 && end - row >= 16 ? 16 : 1;
    for (int64_t r = 0; r < count; r++) pack_lanes(w, source + r * w.k, row + r, &lanes[r * n]);
    int32_t* panel = reinterpret_cast<int32_t*>(panel_at(w, row));
    for (int64_t i = 0; count == 1 && i < n; i++) panel[lane_index(w, row, i)] = lanes[i];
    for (int64_t i = 0; count == 16 && i < n; i += 16) {
      i32x16 v[16];
      for (int r = 0; r < 16; r++) v[r] = load_i32(&lanes[r * n + i], first_lanes(n - i));
      transpose(v);
      for (int64_t s = i; s < std::min(i + 16, n); s++)
        store_i32(panel + lane_index(w, row, s), v[s - i]);
    }
  }
}

void unpack_row(const Weight& w, int64_t row, float* out) {
  if (is_int4(w)) return unpack_int4_row(w, row, out);
  const int32_t* panel = reinterpret_cast<const int32_t*>(panel_at(w, row));
  for (int64_t i = 0, per_lane = values_per_lane(w); i * per_lane < w.k; i++) {
    const int32_t lane = panel[lane_index(w, row, i)];
    const float scale = w.type == I8 ? half_to_float(int8_scale_at(w, row, i / GROUP_STEPS)) : 0;
    for (int64_t j = 0; j < std::min(per_lane, w.k - i * per_lane); j++) {
      float& value = out[i * per_lane + j];
      if (w.type == I8) {
        value = static_cast<int8_t>(lane >> 8 * j ^ 0x80) * scale;
      } else if (w.type == BF16) {
        value = bf16_to_float(static_cast<uint16_t>(lane >> 16 * j));
      } else {
        std::memcpy(&value, &lane, 4);
      }
    }
  }
}

}  // namespace

extern "C" {

int64_t packed_bytes(const Weight* w) { return num_panels(*w) * panel_bytes(*w); }

uint64_t checksum(const void* data, int64_t bytes) {
  constexpr int CHAINS = 32;  // each step of one waits for the one before
  constexpr uint64_t ODD = 0x9e3779b97f4a7c15;
  constexpr int64_t ROUND = CHAINS * sizeof(uint64_t);
  const auto mixed = [](uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * ODD;
    return sum << 31 | sum >> 33;
  };
  uint64_t sums[CHAINS] = {};
  const auto add = [&](const uint8_t* from) {
    uint64_t words[CHAINS];
    std::memcpy(words, from, ROUND);
    for (int i = 0; i < CHAINS; i++) sums[i] = mixed(sums[i], words[i]);
  };
  const auto* at = static_cast<const uint8_t*>(data);
  for (; bytes >= ROUND; at += ROUND, bytes -= ROUND) add(at);
  if (bytes > 0) {
    uint8_t last[ROUND] = {};
    std::memcpy(last, at, bytes);
    add(last);
  }
  uint64_t sum = 0;
  for (const uint64_t each : sums) sum = mixed(sum, each);
  return sum;
}

void pack(const Weight* w, const void* source, int32_t type, int64_t row, int64_t count) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  for_rows_by_panel(row, count, [&](int64_t begin, int64_t end) {
    const int64_t at = (begin - row) * w->k;
    if (type == F32) {
      pack_rows(*w, static_cast<const float*>(source) + at, begin, end);
    } else {
      pack_rows(*w, static_cast<const uint16_t*>(source) + at, begin, end);
    }
  });
}

void pack_all(const Packing* packings, int64_t count) {
  for (const Packing* each = packings; each < packings + count; each++)
    pack(each->weight, each->source, static_cast<int32_t>(each->type), each->row, each->count);
}

void pack_int4(const Weight* w, const void* source, int32_t type, int64_t row, int64_t count,
               double* sums) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  for_rows_by_panel(row, count, [&](int64_t begin, int64_t end) {
    std::vector<float> x(w->k);
    for (int64_t r = begin; r < end; r++) {
      for (int64_t i = 0; i < w->k; i += 16) {
        const mask16 mask = first_lanes(w->k - i);
        store(x.data() + i, mask, load(source, type, (r - row) * w->k + i, mask));
      }
      for (int64_t g = 0; g < num_groups(*w); g += 16)
        pack_int4_groups(*w, x.data(), r, g, sums + (r - row) * 2);
    }
  });
}

void unpack_rows(const Weight* w, const int64_t* indices, int64_t count, float* out) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool->run(count, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      if (indices[i] >= 0 && indices[i] < w->n) {
        unpack_row(*w, indices[i], out + i * w->k);
      } else {
        std::fill_n(out + i * w->k, w->k, std::numeric_limits<float>::quiet_NaN());
      }
    }
  });
}

}  // extern "C"
