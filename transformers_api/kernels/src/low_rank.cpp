// Low-rank products: what adapters add to the results of a layer, each to the rows that are its own.
//
// Rows are sorted by their adapter. Those of none are neither read nor written, so that they keep
// their bits whatever their neighbours have.

#include <algorithm>
#include <mutex>

#include "abi.h"
#include "activations.h"
#include "gemm.h"
#include "scratch.h"
#include "simd.h"
#include "thread_pool.h"
#include "weights.h"

namespace {

Scratch scratch_parts, scratch_narrow, scratch_narrow_rows, scratch_added;
constexpr int64_t MIN_SHARED_BYTES = 1 << 16;  // of weights; below, threads are not worth waking

// A part that has rows, and where its numbers are in the scratch memory.
struct ActivePart {
  const LowRankPart* part;
  int64_t begin, rows;               // among the sorted rows
  int64_t narrow, narrow_row, added;  // first element: x times down; that prepared; times up
  int64_t down_panel, up_panel;      // the first of its panels, counted over all parts
};

struct ActiveParts {
  ActivePart* parts;
  int64_t count, narrow, narrow_rows, added, down_panels, up_panels, bytes;
};

ActiveParts active_parts(const LowRank& layer, const Routes& routes) {
  ActiveParts active{scratch_parts.get<ActivePart>(layer.count), 0, 0, 0, 0, 0, 0, 0};
  for (const LowRankPart* p = layer.parts; p < layer.parts + layer.count; p++) {
    const int64_t begin = routes.begins[p->adapter], rows = routes.begins[p->adapter + 1] - begin;
    if (!rows) continue;
    active.parts[active.count++] = {p, begin, rows, active.narrow, active.narrow_rows,
                                    active.added, active.down_panels, active.up_panels};
    active.narrow += rows * p->down->n;
    active.narrow_rows += rows * num_steps(*p->up);
    active.added += rows * p->up->n;
    active.down_panels += num_panels(*p->down);
    active.up_panels += num_panels(*p->up);
    active.bytes += num_panels(*p->down) * panel_bytes(*p->down);
    active.bytes += num_panels(*p->up) * panel_bytes(*p->up);
  }
  return active;
}

// Adds the outputs of panel p, of all rows of a part, to y, or to what y becomes before.
void add_panel(const LowRank& layer, const ActivePart& a, const int64_t* order, const float* added,
               int64_t p, void* y, int32_t type) {
  const int64_t n = a.part->up->n;
  for (int64_t column = p * PANEL; column < std::min(n, (p + 1) * PANEL); column += 16) {
    const mask16 mask = first_lanes(n - column);
    const LowRankPart& part = *a.part;
    const f32x16 gain = part.gain ? load(part.gain + column, mask) : broadcast(1);
    const f32x16 offset = part.gain ? load(part.offset + column, mask) : zero();
    for (int64_t m = 0; m < a.rows; m++) {
      const int64_t at = order[a.begin + m] * layer.n + a.part->column + column;
      f32x16 own = load(y, type, at, mask);
      if (part.gain) own = fmadd(own, gain, offset);
      const f32x16 sum = add(own, load(added + m * n + column, mask));
      store(y, static_cast<Type>(type), at, mask, sum);
    }
  }
}

}  // namespace

extern "C" {

void low_rank(const LowRank* layer, const void* x, const int64_t* adapters, int64_t rows, void* y,
              int32_t type) {
  if (!layer->count || !rows) return;
  std::lock_guard<std::mutex> lock(pool_mutex);
  const Routes routes = sort_rows(adapters, rows, layer->adapters);
  const ActiveParts active = active_parts(*layer, routes);
  if (!active.count) return;
  auto share_out = [&](int64_t n, const auto& f) {
    if (active.bytes * routes.routed < MIN_SHARED_BYTES) return f(int64_t{0}, n);
    pool->run(n, f);
  };
  const Weight& first = *active.parts->part->down;
  const RowForm form(first, false);
  int32_t* lanes = form.lanes_of(routes.routed);
  auto prepare_rows = [&](int64_t b, int64_t e) {
    for (int64_t m = b; m < e; m++)
      form.prepare(x, static_cast<Type>(type), routes.order[m] * first.k, m, lanes, nullptr);
  };
  if (routes.routed * first.k < 32768) {
    prepare_rows(0, routes.routed);
  } else {
    pool->run(routes.routed, prepare_rows);
  }
  float* narrow = scratch_narrow.get<float>(active.narrow);
  share_out(active.down_panels, [&](int64_t b, int64_t e) {
    const ActivePart* a = active.parts;
    for (int64_t i = b; i < e; i++) {
      while (i >= a->down_panel + num_panels(*a->part->down)) a++;
      const Gemm gemm{*a->part->down, lanes + a->begin * form.stride, form.stride, nullptr,
                      narrow + a->narrow, F32};
      multiply_panel(gemm, i - a->down_panel, a->rows);
    }
  });
  int32_t* narrow_rows = scratch_narrow_rows.get<int32_t>(active.narrow_rows);
  for (const ActivePart* a = active.parts; a < active.parts + active.count; a++)
    for (int64_t m = 0; m < a->rows; m++)
      prepare_row(*a->part->up, narrow + a->narrow + m * a->part->up->k,
                  narrow_rows + a->narrow_row + m * num_steps(*a->part->up), nullptr);
  float* added = scratch_added.get<float>(active.added);
  share_out(active.up_panels, [&](int64_t b, int64_t e) {
    const ActivePart* a = active.parts;
    for (int64_t i = b; i < e; i++) {
      while (i >= a->up_panel + num_panels(*a->part->up)) a++;
      const Gemm gemm{*a->part->up, narrow_rows + a->narrow_row, num_steps(*a->part->up), nullptr,
                      added + a->added, F32};
      multiply_panel(gemm, i - a->up_panel, a->rows);
      add_panel(*layer, *a, routes.order, added + a->added, i - a->up_panel, y, type);
    }
  });
}

}  // extern "C"
