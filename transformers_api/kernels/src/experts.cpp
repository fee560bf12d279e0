// Mixtures of experts: rows that go through the weights of the expert that each of them is routed to.
//
// Rows are sorted by their expert, so that the weights of each are read once for all of its rows, and
// those that no row has chosen are not read.

#include <cstring>
#include <mutex>

#include "abi.h"
#include "activations.h"
#include "scratch.h"
#include "thread_pool.h"
#include "weights.h"

namespace {

Scratch scratch_routes, scratch_results;

// The rows of each expert: ``order[begins[e]]`` to ``order[begins[e + 1]]``.
struct Routes {
  int64_t *begins, *order, *chosen;  // chosen: the experts that have any
  int64_t active, routed;
};

Routes sort_rows(const int64_t* indices, int64_t rows, int64_t count) {
  int64_t* memory = scratch_routes.get<int64_t>(2 * count + 1 + rows);
  Routes routes{memory, memory + count + 1, memory + count + 1 + rows, 0, 0};
  std::memset(routes.begins, 0, (count + 1) * sizeof(int64_t));
  auto is_expert = [&](int64_t e) { return e >= 0 && e < count; };
  for (int64_t i = 0; i < rows; i++)
    if (is_expert(indices[i])) routes.begins[indices[i] + 1]++;
  for (int64_t e = 0; e < count; e++) {
    if (routes.begins[e + 1]) routes.chosen[routes.active++] = e;
    routes.begins[e + 1] += routes.begins[e];
  }
  routes.routed = routes.begins[count];
  for (int64_t i = 0; i < rows; i++)
    if (is_expert(indices[i])) routes.order[routes.begins[indices[i]]++] = i;
  for (int64_t e = count; e > 0; e--) routes.begins[e] = routes.begins[e - 1];
  routes.begins[0] = 0;
  return routes;
}

}  // namespace

extern "C" {

void experts(const Experts* layer, const void* x, const int64_t* indices, int64_t rows,
             int64_t share, void* y, int32_t type) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const Weight& first = *layer->weights[0];
  const Routes routes = sort_rows(indices, rows, layer->count);
  const int64_t row_bytes = first.n * (type == F32 ? 4 : 2);
  char *out = static_cast<char*>(y), *results = scratch_results.get<char>(rows * row_bytes);
  if (routes.routed < rows) std::memset(out, 0, rows * row_bytes);
  const RowForm form(first, uses_tile_unit(first, 1));  // for any number of an expert's rows
  int32_t* lanes = form.lanes_of(rows);
  Int8Group* groups = form.groups_of(rows);
  auto share_out = [&](int64_t elements, const auto& f) {
    if (elements < 32768) return f(int64_t{0}, routes.routed);
    pool->run(routes.routed, f);
  };
  share_out(routes.routed * first.k, [&](int64_t b, int64_t e) {
    for (int64_t m = b; m < e; m++)
      form.prepare(x, static_cast<Type>(type), routes.order[m] / share * first.k, m, lanes, groups);
  });
  const int64_t panels = num_panels(first);
  pool->run(routes.active * panels, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      const int64_t expert = routes.chosen[i / panels], begin = routes.begins[expert];
      const int64_t own = routes.begins[expert + 1] - begin;
      const Gemm gemm{*layer->weights[expert],
                      lanes + begin * form.stride,
                      form.stride,
                      groups + begin * form.num_groups,
                      results + begin * row_bytes,
                      static_cast<Type>(type)};
      if (form.by_tiles) {
        shape_tiles(gemm, own);
        multiply_panel_by_tiles(gemm, i % panels, own);
      } else {
        multiply_panel(gemm, i % panels, own);
      }
    }
  });
  share_out(routes.routed * first.n, [&](int64_t b, int64_t e) {
    for (int64_t m = b; m < e; m++)
      std::memcpy(out + routes.order[m] * row_bytes, results + m * row_bytes, row_bytes);
  });
  release_tiles();
}

}  // extern "C"
