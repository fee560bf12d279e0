// Linear layers: GEMM over packed weights, one panel of 32 outputs at a time.

#include <algorithm>
#include <array>
#include <mutex>
#include <utility>

#include "abi.h"
#include "activations.h"
#include "gemm.h"
#ifdef ISA_AMX
#include "gemm_amx.h"
#endif
#include "scratch.h"
#include "simd.h"
#include "thread_pool.h"
#include "tiles.h"
#include "weights.h"

namespace {

Scratch scratch_rows, scratch_groups;

// Prefetches of a tile over all of its steps; each fetches one line of the next panel.
int64_t prefetches(const Weight& w) {
  if (is_int4(w)) return num_groups(w) * (GROUP_STEPS / 2 + 1);
  return num_steps(w) + is_grouped(w) * num_groups(w);
}

template <Prefetch P, int R>
inline void accumulate(const Gemm& gemm, const uint8_t* panel, int64_t m, PrefetchCursor cursor,
                       Accumulators<R>& sums) {
  const Weight& w = gemm.w;
  const int64_t n = num_steps(w);
  const int32_t* x = gemm.x + m * n;
  if (w.type == I8) {
    accumulate_int8<P, R>(panel, cursor, x, gemm.groups + m * num_groups(w), num_groups(w), sums);
  } else if (is_int4(w)) {
    const auto* groups = reinterpret_cast<const Int4Group*>(gemm.groups + m * num_groups(w));
    const auto codes = w.type == I4 ? accumulate_int4<true, P, R> : accumulate_int4<false, P, R>;
    codes(panel, cursor, x, groups, num_groups(w), sums);
  } else if (w.type == BF16) {
    accumulate_dense<DotBF16, P, R>(panel, cursor, x, n, n, sums);
  } else {
    accumulate_dense<DotF32, P, R>(panel, cursor, x, n, n, sums);
  }
}

// The rows m..m+R with panel p: tile ``index`` of ``tiles``. A single tile prefetches its own panel
// a little ahead of its use. Of several each prefetches its part of the next panel: so memory is busy
// all the time that the processor is, and never more than it can bear.
template <int R>
void tile(const Gemm& gemm, int64_t p, int64_t m, int64_t index, int64_t tiles) {
  const Weight& w = gemm.w;
  const uint8_t* panel = w.data + p * panel_bytes(w);
  Accumulators<R> sums;
  for (auto& sum : sums) sum[0] = sum[1] = zero();
  if (tiles == 1) {
    accumulate<SAME_PANEL, R>(gemm, panel, m, {}, sums);
  } else {
    const int64_t part = (panel_bytes(w) + tiles - 1) / tiles;
    const char* next = reinterpret_cast<const char*>(panel + panel_bytes(w) + index * part);
    const int64_t stride = (part + prefetches(w) - 1) / prefetches(w);
    accumulate<NEXT_PANEL, R>(gemm, panel, m, {next, stride}, sums);
  }
  write_outputs(gemm, p, m, R, [&](int64_t r, int half) { return sums[r][half]; });
}

using Tile = void (*)(const Gemm&, int64_t, int64_t, int64_t, int64_t);
template <size_t... I>
constexpr std::array<Tile, sizeof...(I)> make_tiles(std::index_sequence<I...>) {
  return {tile<I + 1>...};
}
constexpr auto TILES = make_tiles(std::make_index_sequence<MAX_TILE_ROWS>{});

// All rows with one panel, which stays in the L2 cache meanwhile.
void multiply_panel(const Gemm& gemm, int64_t p, int64_t rows) {
  const int64_t tiles = rows <= MAX_TILE_ROWS ? std::min<int64_t>(1, rows)
                                              : (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t i = 0; i < tiles; i++) {
    const int64_t m = rows * i / tiles, r = rows * (i + 1) / tiles - m;
    TILES[r - 1](gemm, p, m, i, tiles);
  }
}

#ifndef ISA_AMX
constexpr bool uses_tile_unit(const Weight&, int64_t) { return false; }
Weight multiplied(const Weight& w) { return w; }
int64_t tile_stride(const Weight& w) { return num_steps(w); }
void shape_tiles(const Gemm&, int64_t) {}
void multiply_panel_by_tiles(const Gemm&, int64_t, int64_t) {}
void multiply_gated_by_tiles(const Gemm&, int64_t, int64_t) {}
#endif

// Rows as products with a weight take them, ``by_tiles`` or not.
struct RowForm {
  const bool by_tiles;
  const Weight w;  // or what becomes of it
  const int64_t stride, num_groups;

  RowForm(const Weight& own, bool by_tiles)
      : by_tiles(by_tiles),
        w(by_tiles ? multiplied(own) : own),
        stride(by_tiles ? tile_stride(w) : num_steps(w)),
        num_groups(is_grouped(w) ? ::num_groups(w) : 0) {}

  int32_t* lanes_of(int64_t rows) const { return scratch_rows.get<int32_t>(rows * stride); }
  Int8Group* groups_of(int64_t rows) const {
    return num_groups ? scratch_groups.get<Int8Group>(rows * num_groups) : nullptr;
  }
  // Row m from the numbers at ``from`` on.
  void prepare(const void* x, Type type, int64_t from, int64_t m, int32_t* lanes,
               Int8Group* groups) const {
    int32_t* own = lanes + m * stride;
    std::fill(own + num_steps(w), own + stride, 0);
    if (type == F32) {
      prepare_row(w, static_cast<const float*>(x) + from, own, groups + m * num_groups);
    } else {
      prepare_row(w, static_cast<const uint16_t*>(x) + from, own, groups + m * num_groups);
    }
  }
};

// True where ``multiply`` can take a gate.
bool takes_gate(const Weight& w, int64_t rows) {
  return uses_tile_unit(w, rows) && !w.bias && w.n % (2 * PANEL) == 0;
}

// All rows with all panels; as abi.h says, but that the calling thread keeps its tiles.
void multiply(const Weight& w, const void* x, int64_t rows, int64_t x_stride, void* y, Type type,
              const Gate* gate) {
  if (rows == 0) return;
  std::lock_guard<std::mutex> lock(pool_mutex);
  const RowForm form(w, uses_tile_unit(w, rows));
  int32_t* lanes = form.lanes_of(rows);
  Int8Group* groups = form.groups_of(rows);
  auto prepare_rows = [&](int64_t b, int64_t e) {
    for (int64_t m = b; m < e; m++) form.prepare(x, type, m * x_stride, m, lanes, groups);
  };
  if (rows * w.k < 32768) {
    prepare_rows(0, rows);
  } else {
    pool->run(rows, prepare_rows);
  }
  const Gemm gemm{w, lanes, form.stride, groups, y, type, gate};
  pool->run(num_panels(w) / (gate ? 2 : 1), [&](int64_t b, int64_t e) {
    if (form.by_tiles) shape_tiles(gemm, rows);
    for (int64_t p = b; p < e; p++) {
      if (gate) {
        multiply_gated_by_tiles(gemm, p, rows);
      } else if (form.by_tiles) {
        multiply_panel_by_tiles(gemm, p, rows);
      } else {
        multiply_panel(gemm, p, rows);
      }
    }
  });
}

}  // namespace

extern "C" {

void linear(const Weight* w, const void* x, int64_t rows, int64_t x_stride, void* y, int32_t type) {
  multiply(*w, x, rows, x_stride, y, static_cast<Type>(type), nullptr);
  release_tiles();
}

}  // extern "C"
