// The interpreter of recorded forward passes: a list of operations over memory that was planned
// beforehand (../graph/planner.py). One call runs a whole pass.

#include <algorithm>
#include <array>
#include <mutex>
#include <utility>

#include "abi.h"
#include "elementwise.h"
#include "gemm.h"
#include "kv_write.h"
#include "line_ops.h"
#include "row_changes.h"
#include "thread_pool.h"

namespace {

void multiply(const Weight&, const void* x, int64_t rows, int64_t x_stride, void* y, Type,
              const Gate*);  // gemm.cpp
bool takes_gate(const Weight&, int64_t rows);
void note_attention(const RowChange&, const Attention&);                                    // inspect.cpp

constexpr int64_t MIN_PARALLEL_ELEMENTS = 16384;  // below, a loop is not worth sharing
constexpr int64_t CACHE_BLOCK_ELEMENTS = 4096;    // of a step, before the next step reads them

// For the tokens begin..end, or whatever the first of the four sizes counts.
using TokenKernel = void (*)(const Step&, int64_t, int64_t);

template <void (*F)(const Step&, int64_t)>
void for_each_line(const Step& s, int64_t begin, int64_t end) {
  const int64_t lines = s.sizes[1] * s.sizes[2];
  for (int64_t i = begin * lines; i < end * lines; i++) F(s, i);
}

void write_cache_tokens(const Step& s, int64_t begin, int64_t end) {
  const CacheWrite& c = *static_cast<const CacheWrite*>(s.call);
  if (c.queries == 1) return write_positions(c, begin, end, 0, 1);  // tokens are rows
  write_positions(c, 0, c.rows, begin, end);
}

template <size_t... I>
constexpr std::array<TokenKernel, sizeof...(I)> make_elementwise(std::index_sequence<I...>) {
  return {elementwise<I>...};
}
constexpr auto ELEMENTWISE = make_elementwise(std::make_index_sequence<WHERE>{});

// A change before the step ``next``.
void apply(const RowChange& c, const Step* next) {
  if (c.op != ATTENTION) return change_rows(c);
  do next--;
  while (next->op != ATTENTION);
  note_attention(c, *static_cast<const Attention*>(next->call));
}

TokenKernel kernel_of(int32_t op) {
  switch (op) {
    case WHERE: return for_each_line<where>;
    case MEAN: return for_each_line<mean>;
    case SUM: return for_each_line<sum>;
    case LARGEST: return for_each_line<largest>;
    case SOFTMAX: return for_each_line<softmax>;
    case LAYER_NORM: return for_each_line<layer_norm>;
    case GATHER: return for_each_line<gather>;
    case MATMUL: return for_each_line<matmul>;
    case TOP_K: return for_each_line<top_k>;
    case TAKE: return for_each_line<take>;
    case PUT: return for_each_line<put>;
    case WRITE_CACHE: return write_cache_tokens;
    default: return ELEMENTWISE[op];
  }
}

int64_t elements_per_token(const Step& s) {
  if (s.op != WRITE_CACHE) return s.sizes[1] * s.sizes[2] * s.sizes[3];
  const CacheWrite& c = *static_cast<const CacheWrite*>(s.call);
  return c.rows * c.queries * c.heads * c.size / s.sizes[0];
}

// A fused group: each thread does all steps for its tokens, a few tokens at a time. So it finds the
// results of the step before in its cache, and there is no barrier in between.
void run_fused(const Step* steps) {
  const int64_t tokens = steps->sizes[0];
  int64_t widest = 1, total = 0;
  for (const Step* s = steps; s < steps + steps->fused; s++) {
    const int64_t elements = elements_per_token(*s);
    widest = std::max(widest, elements), total += elements;
  }
  const int64_t block = std::max<int64_t>(1, CACHE_BLOCK_ELEMENTS / widest);
  auto run_tokens = [&](int64_t b, int64_t e) {
    for (; b < e; b += block)
      for (const Step* s = steps; s < steps + steps->fused; s++)
        kernel_of(s->op)(*s, b, std::min(b + block, e));
  };
  if (tokens * total < MIN_PARALLEL_ELEMENTS) return run_tokens(0, tokens);
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool->run(tokens, run_tokens);
}

// A product, and the two steps that join its halves.
void run_gated(const Step* s) {
  const Weight& w = *static_cast<const Weight*>(s->call);
  const Step &activation = s[1], &product = s[2];
  const int64_t rows = s->sizes[0], n = w.n / 2;
  auto is_half = [&](const Operand& o) {
    return o.type == F32 && o.strides[0] == w.n && o.strides[3] == 1 &&
           (o.data == s->out.data || o.data == s->out.data + n * 4);
  };
  const Operand& gates = activation.inputs[0];
  const Operand& others = product.inputs[product.inputs[0].data == activation.out.data];
  const bool is_plain = takes_gate(w, rows) && activation.sizes[0] == rows &&
                        activation.sizes[3] == n && product.sizes[3] == n && is_half(gates) &&
                        is_half(others) && gates.data != others.data && s->out.type == F32 &&
                        product.out.type == F32 && product.out.strides[0] == n &&
                        product.out.strides[3] == 1;
  if (is_plain) {
    const Gate gate{activation.op, gates.data == s->out.data};
    return multiply(w, s->inputs[0].data, rows, w.k, product.out.data, F32, &gate);
  }
  multiply(w, s->inputs[0].data, rows, w.k, s->out.data, static_cast<Type>(s->out.type), nullptr);
  run_fused(s + 1);
}

}  // namespace

extern "C" {

void write_cache(const CacheWrite* call) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  write_positions(*call, 0, call->rows, 0, call->queries);
}

void read_cache(const CacheWrite* call) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  const int64_t parts = (call->size + CACHE_BLOCK_ELEMENTS - 1) / CACHE_BLOCK_ELEMENTS;
  pool->run(call->rows * parts, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; i++) {
      const int64_t begin = i % parts * CACHE_BLOCK_ELEMENTS;
      read_row(*call, i / parts, begin, std::min(begin + CACHE_BLOCK_ELEMENTS, call->size));
    }
  });
}

void run_steps(const Step* steps, int64_t count) { run_changed_steps(steps, count, nullptr, 0); }

void run_changed_steps(const Step* steps, int64_t count, const RowChange* changes,
                       int64_t change_count) {
  const RowChange* const end = changes + change_count;
  for (const Step* s = steps; s < steps + count; s += std::max<int64_t>(1, s->fused)) {
    for (; changes < end && changes->at <= s - steps; changes++) apply(*changes, s);
    const Operand& x = s->inputs[0];
    if (s->fused && s->op == LINEAR) {
      run_gated(s);
    } else if (s->fused) {
      run_fused(s);
    } else if (s->op == LINEAR) {
      const Weight* w = static_cast<const Weight*>(s->call);
      multiply(*w, x.data, s->sizes[0], w->k, s->out.data, static_cast<Type>(s->out.type), nullptr);
    } else if (s->op == EXPERTS) {
      experts(static_cast<const Experts*>(s->call), x.data,
              reinterpret_cast<const int64_t*>(s->inputs[1].data), s->sizes[0],
              static_cast<int64_t>(s->scalar), s->out.data, s->out.type);
    } else if (s->op == LOW_RANK) {
      low_rank(static_cast<const LowRank*>(s->call), x.data,
               reinterpret_cast<const int64_t*>(s->inputs[1].data), s->sizes[0], s->out.data,
               s->out.type);
    } else if (s->op == UNPACK_ROWS) {
      unpack_rows(static_cast<const Weight*>(s->call), reinterpret_cast<int64_t*>(x.data),
                  s->sizes[0], reinterpret_cast<float*>(s->out.data));
    } else if (s->op == ATTENTION) {
      attention(static_cast<const Attention*>(s->call));
    } else if (s->op == WRITE_CACHE) {
      write_cache(static_cast<const CacheWrite*>(s->call));
    } else if (s->op == READ_CACHE) {
      read_cache(static_cast<const CacheWrite*>(s->call));
    } else {
      kernel_of(s->op)(*s, 0, s->sizes[0]);
    }
  }
  for (; changes < end; changes++) apply(*changes, steps + count);
  release_tiles();
}

}  // extern "C"
