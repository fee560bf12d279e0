// What crosses the border to Python: structures, operations and functions, mirrored by ../abi.py.
//
// abi.cpp describes all of it to the caller, which refuses a library that differs. Whoever changes
// anything here changes ../abi.py too, and ABI_VERSION where the meaning changes and no size does.

#pragma once

#include <cstdint>

constexpr int32_t ABI_VERSION = 6;

enum Type : int32_t { F32 = 0, BF16 = 1, I8 = 2, I64 = 3, I4 = 4, BOOL = 5, I4C = 6 };

// The operations of a Step, in the order of their numbers: first the elementwise ones, of one or two
// operands, then WHERE to PUT, which go line by line.
#define FOR_EACH_OP(X)                                                                            \
  X(COPY, copy) X(ADD, add) X(SUB, sub) X(MUL, mul) X(DIV, div) X(NEG, neg) X(CUBE, cube)         \
  X(RSQRT, rsqrt) X(SQRT, sqrt) X(EXP, exp) X(TANH, tanh) X(SILU, silu) X(SIGMOID, sigmoid)       \
  X(GELU, gelu) X(GELU_TANH, gelu_tanh) X(RELU, relu) X(COS, cos) X(SIN, sin) X(ABS, abs)         \
  X(LOG, log) X(FLOOR, floor) X(EXPM1, expm1) X(LOG1P, log1p) X(SOFTPLUS, softplus) X(POWER, power) X(MAXIMUM, maximum) X(MINIMUM, minimum)             \
  X(EQUAL, equal) X(NOT_EQUAL, not_equal) X(LESS, less) X(LESS_EQUAL, less_equal)                 \
  X(WHERE, where) X(MEAN, mean) X(SUM, sum) X(LARGEST, largest) X(SOFTMAX, softmax)               \
  X(LAYER_NORM, layer_norm) X(GATHER, gather) X(MATMUL, matmul) X(TOP_K, top_k) X(TAKE, take)     \
  X(PUT, put) X(LINEAR, linear) X(EXPERTS, experts) X(LOW_RANK, low_rank)                         \
  X(ATTENTION, attention) X(WRITE_CACHE, write_cache) X(READ_CACHE, read_cache)                   \
  X(UNPACK_ROWS, unpack_rows)

#define OP_CONSTANT(constant, name) constant,
enum Op : int32_t { FOR_EACH_OP(OP_CONSTANT) };
#undef OP_CONSTANT

extern "C" {

// A packed weight matrix (n outputs, k inputs); weights.h says how it lies in memory.
struct Weight {
  int32_t type;
  int32_t unused;
  int64_t n, k;
  uint8_t* data;
  const float* bias;  // n of them, or null
};

// Rows ``row``.. of a packed weight, to be made of a dense (count, k) matrix, F32 or BF16.
struct Packing {
  const Weight* weight;
  const void* source;
  int64_t row, count;
  int64_t type;
};

// The matrices of a layer's experts, all of one size and type.
struct Experts {
  int64_t count;
  const Weight* const* weights;
};

// What an adapter adds to some outputs of a layer: ``up`` (m, rank) times ``down`` (rank, k).
struct LowRankPart {
  const Weight *down, *up;  // of one type, F32 or BF16, without bias
  int64_t adapter;          // its number
  int64_t column;           // the first of its outputs
  const float *gain, *offset;  // what the layer's own outputs become before: y gain + offset; or null
};

// All that adapters add to the results of one layer. ``down`` is of one type in all parts.
struct LowRank {
  int64_t count;
  const LowRankPart* parts;
  int64_t n;         // outputs of the layer
  int64_t adapters;  // their numbers are below
};

// Causal attention over a KV cache: the query at position p attends to the keys 0..p of its row, or
// to the last ``window`` of them; below 0 to those of its chunk, each of -``window`` tokens. Keys and
// values are F32, BF16, or I8: groups of codes (kv_codes.h), whose strides are in bytes.
struct Attention {
  const void *q, *k, *v;  // (rows, heads, queries, size), (rows, kv_heads, length, size) twice
  void* out;              // (rows, queries, heads, size), contiguous, of q's type
  const int64_t* starts;  // position of the first query of each row
  const int64_t* cache_rows;  // the row of k and v that each row attends to; null: its own
  const float* sinks;     // per head: a score that takes part in softmax without a value; or null
  const float* slopes;    // per head: added to a score, times the key's distance behind the query; or null
  int64_t rows, queries, heads, kv_heads, size;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // row, head, position; in elements
  int64_t window;                                    // 0: all
  float scale, softcap;                              // softcap 0: none
  int32_t q_type, kv_type;
};

// New keys or values, and the rows of the KV cache that they are written into. Where rows are read,
// source and target change places, and each is read from its beginning. A target of I8 gets groups
// of codes (kv_codes.h), and its strides are in bytes.
struct CacheWrite {
  const void* source;  // (rows, heads, queries, size)
  void* target;        // (rows, heads, length, size), from each row's start on
  const int64_t* starts;      // null: 0
  const int64_t* cache_rows;  // the row of target that each row is written into; null: its own
  int64_t rows, heads, queries, size;
  int64_t source_strides[3], target_strides[3];
  int32_t source_type, target_type;
};

struct Operand {
  char* data;
  int64_t strides[4];  // in elements
  int32_t type, unused;
};

// One operation of a recorded forward pass.
struct Step {
  int32_t op, operands;
  int64_t sizes[4];
  Operand out, inputs[3];
  double scalar;
  const void* call;  // Weight, Experts, LowRank, Attention or CacheWrite
  // Steps of the fused group that this one opens; 0: it is run on its own. In a group sizes[0]
  // counts tokens, and what a step computes for a token is read by the others for the same token.
  // A LINEAR opens a group of three: an elementwise step of a half of its outputs, and a MUL of that
  // with the other half. Nobody reads what lies between; these two are a group of their own, too.
  int64_t fused;
};

// What becomes of the changes of one sequence in a pass.
struct ChangeState {
  int64_t failed;       // the number of the first change that made no number, or too large ones; 0: none
  int64_t nanoseconds;  // that they took
};

// What happens to rows of a tensor within a pass, before its step ``at``: they become themselves plus
// ``vector`` (ADD), times ``factor`` (MUL), or ``vector`` (COPY), computed as floats; or they are
// copied to ``target`` (TAKE). Or what the rows ``tokens`` of the attention before attend to is noted
// there (ATTENTION): the probabilities of ``width`` keys and that of the sink, in each head.
struct RowChange {
  int64_t at;
  char* rows;             // F32 or BF16
  int64_t count, stride;  // rows; elements from one to the next
  int64_t width;          // elements of a row that change
  int32_t type, op;
  const float* vector;
  int64_t vector_stride;  // from the vector of a row to that of the next; 0: all have one
  float factor, largest;  // the length that all rows together may have
  int64_t number;         // above 0
  ChangeState* state;     // of its sequence, whose changes end where one has failed
  char* target;           // (count, width); of ATTENTION (count, heads, width + 1), floats
  const int64_t* tokens;  // (count,) the rows to take; null: in order
};

// One row of logits and how to sample from it.
struct SampleRow {
  const float* logits;
  int64_t size;   // tokens of the vocabulary
  uint64_t key;   // of the step's noise: engine/sampling/rng.py
  int64_t top_k;  // size: all of them
  double temperature, top_p, min_p;
  const uint16_t* allowed;  // bit i % 16 of i / 16: token i may come; null: all may
};

// A token and the distribution it comes from; the last three are results.
struct TokenStats {
  const float* logits;
  int64_t size, token, count;  // ``count`` of the likeliest tokens are asked for
  double logprob, entropy;     // of the token; of the distribution, in nats
  int64_t rank;                // tokens that are likelier than ``token``
};

int32_t abi_version();
const char* abi_layout();

// The threads that share a call, the caller included.
void set_threads(int32_t count);

int64_t packed_bytes(const Weight* w);
// A sum over these bytes that another value of any 8 of them changes. In the calling thread alone.
uint64_t checksum(const void* data, int64_t bytes);
// Pack the rows ``row``.. from a dense (count, k) matrix, F32 or BF16. ``w->data`` must be zeroed.
void pack(const Weight* w, const void* source, int32_t type, int64_t row, int64_t count);
// ``pack`` for each of these; other calls may come in between.
void pack_all(const Packing* packings, int64_t count);
// The same as ``pack`` for I4. ``sums`` (count, 2): of each row its squared error, and its squares.
void pack_int4(const Weight* w, const void* source, int32_t type, int64_t row, int64_t count,
               double* sums);
// Bytes of a row of k weights in ggml's blocks of this kind (its number there); 0: unknown, or no
// whole blocks.
int64_t block_row_bytes(int32_t number, int64_t k);
// Pack the rows ``row``.. of I8, I4 or I4C from ``count`` rows of blocks, in the order of ``order`` unless
// that is null; I4C of Q4_0 alone. ``w->data`` must be zeroed. ``sums`` (count, 2): added to as by
// ``pack_int4``; both stay as they are for a row of a type that loses nothing.
void pack_blocks(const Weight* w, const void* blocks, int32_t number, const int64_t* order,
                 int64_t row, int64_t count, double* sums);
// The rows ``rows`` of a matrix of blocks as (count, k) floats.
void unpack_blocks(const void* blocks, int32_t number, int64_t k, const int64_t* rows,
                   int64_t count, float* out);
// y (rows, n) = x (rows, k) times the transposed matrix (n, k) of blocks; ``order`` as above.
void multiply_blocks(const void* blocks, int32_t number, int64_t k, const int64_t* order, int64_t n,
                     const float* x, int64_t rows, float* y);
// The rows ``indices`` as (count, k) floats; NaN for an index out of range.
void unpack_rows(const Weight* w, const int64_t* indices, int64_t count, float* out);

// y (rows, n) = x (rows, k) times the transposed weights, plus bias; x and y F32, or both BF16.
void linear(const Weight* w, const void* x, int64_t rows, int64_t x_stride, void* y, int32_t type);
// Row i of y (rows, n) from row i / ``share`` of x (…, k), by the expert ``indices[i]``; zeros for an
// index out of range.
void experts(const Experts* layer, const void* x, const int64_t* indices, int64_t rows,
             int64_t share, void* y, int32_t type);
// Add to row i of y (rows, n) what the adapter ``adapters[i]`` makes of row i of x (rows, k); nothing
// for a number out of range. Each part has one adapter, and parts of one share no outputs.
void low_rank(const LowRank* layer, const void* x, const int64_t* adapters, int64_t rows, void* y,
              int32_t type);
void attention(const Attention* call);
void write_cache(const CacheWrite* call);
void read_cache(const CacheWrite* call);
// A whole forward pass, or a part of one.
void run_steps(const Step* steps, int64_t count);
// The same with ``changes``, in the order of their ``at``.
void run_changed_steps(const Step* steps, int64_t count, const RowChange* changes,
                       int64_t change_count);

// A token for each row, or -1 where only the definition in float64 can decide.
void sample(const SampleRow* rows, int64_t count, int64_t* tokens);

// Softmax (heads, count, keys) of the queries ``query``.. of a row, and of the sinks (heads, count)
// unless that is null.
void attention_probs(const Attention* call, int64_t row, int64_t query, int64_t count, int64_t keys,
                     float* probs, float* sinks);
// The results in ``row``, and ``ids`` and ``probs`` (count) of the likeliest tokens. No logit may be
// NaN.
void token_stats(TokenStats* row, int64_t* ids, float* probs);

}  // extern "C"
