// The layout of everything in abi.h as text, for the caller to compare with its own.

#include <cstddef>
#include <cstdio>
#include <string>

#include "abi.h"

namespace {

// Without std::to_string: its table of digits would keep a refused library from being unloaded.
std::string decimal(size_t number) {
  char digits[24];
  std::snprintf(digits, sizeof digits, "%zu", number);
  return digits;
}

struct LayoutText {
  std::string text;

  void structure(const char* name, size_t size) {
    text += (text.empty() ? "struct " : "\nstruct ") + std::string(name) + ' ' + decimal(size);
  }
  void field(const char* name, size_t offset) {
    text += ' ' + std::string(name) + ':' + decimal(offset);
  }
};

std::string describe_layout() {
  LayoutText layout;
#define STRUCTURE(type) layout.structure(#type, sizeof(type))
#define FIELD(type, name) layout.field(#name, offsetof(type, name))
  STRUCTURE(Weight);
  FIELD(Weight, type), FIELD(Weight, unused), FIELD(Weight, n), FIELD(Weight, k);
  FIELD(Weight, data), FIELD(Weight, bias);

  STRUCTURE(Packing);
  FIELD(Packing, weight), FIELD(Packing, source), FIELD(Packing, row), FIELD(Packing, count);
  FIELD(Packing, type);

  STRUCTURE(Experts);
  FIELD(Experts, count), FIELD(Experts, weights);

  STRUCTURE(LowRankPart);
  FIELD(LowRankPart, down), FIELD(LowRankPart, up), FIELD(LowRankPart, adapter);
  FIELD(LowRankPart, column), FIELD(LowRankPart, gain), FIELD(LowRankPart, offset);

  STRUCTURE(LowRank);
  FIELD(LowRank, count), FIELD(LowRank, parts), FIELD(LowRank, n), FIELD(LowRank, adapters);

  STRUCTURE(Attention);
  FIELD(Attention, q), FIELD(Attention, k), FIELD(Attention, v), FIELD(Attention, out);
  FIELD(Attention, starts), FIELD(Attention, cache_rows), FIELD(Attention, sinks);
  FIELD(Attention, slopes);
  FIELD(Attention, rows), FIELD(Attention, queries), FIELD(Attention, heads), FIELD(Attention, kv_heads);
  FIELD(Attention, size), FIELD(Attention, q_strides), FIELD(Attention, k_strides);
  FIELD(Attention, v_strides), FIELD(Attention, window), FIELD(Attention, scale);
  FIELD(Attention, softcap), FIELD(Attention, q_type), FIELD(Attention, kv_type);

  STRUCTURE(CacheWrite);
  FIELD(CacheWrite, source), FIELD(CacheWrite, target), FIELD(CacheWrite, starts);
  FIELD(CacheWrite, cache_rows), FIELD(CacheWrite, rows), FIELD(CacheWrite, heads), FIELD(CacheWrite, queries);
  FIELD(CacheWrite, size), FIELD(CacheWrite, source_strides), FIELD(CacheWrite, target_strides);
  FIELD(CacheWrite, source_type), FIELD(CacheWrite, target_type);

  STRUCTURE(Operand);
  FIELD(Operand, data), FIELD(Operand, strides), FIELD(Operand, type), FIELD(Operand, unused);

  STRUCTURE(Step);
  FIELD(Step, op), FIELD(Step, operands), FIELD(Step, sizes), FIELD(Step, out);
  FIELD(Step, inputs), FIELD(Step, scalar), FIELD(Step, call), FIELD(Step, fused);

  STRUCTURE(ChangeState);
  FIELD(ChangeState, failed), FIELD(ChangeState, nanoseconds);

  STRUCTURE(RowChange);
  FIELD(RowChange, at), FIELD(RowChange, rows), FIELD(RowChange, count), FIELD(RowChange, stride);
  FIELD(RowChange, width), FIELD(RowChange, type), FIELD(RowChange, op), FIELD(RowChange, vector);
  FIELD(RowChange, vector_stride), FIELD(RowChange, factor), FIELD(RowChange, largest);
  FIELD(RowChange, number), FIELD(RowChange, state), FIELD(RowChange, target);
  FIELD(RowChange, tokens);

  STRUCTURE(SampleRow);
  FIELD(SampleRow, logits), FIELD(SampleRow, size), FIELD(SampleRow, key);
  FIELD(SampleRow, top_k), FIELD(SampleRow, temperature), FIELD(SampleRow, top_p);
  FIELD(SampleRow, min_p), FIELD(SampleRow, allowed);

  STRUCTURE(TokenStats);
  FIELD(TokenStats, logits), FIELD(TokenStats, size), FIELD(TokenStats, token);
  FIELD(TokenStats, count), FIELD(TokenStats, logprob), FIELD(TokenStats, entropy);
  FIELD(TokenStats, rank);
#undef FIELD
#undef STRUCTURE
#define OP_NAME(constant, name) " " #name
  layout.text += "\nops" FOR_EACH_OP(OP_NAME);
#undef OP_NAME
#define TYPE_NUMBER(constant) layout.field(#constant, constant)
  layout.text += "\ntypes";
  TYPE_NUMBER(F32), TYPE_NUMBER(BF16), TYPE_NUMBER(I8), TYPE_NUMBER(I64), TYPE_NUMBER(I4);
  TYPE_NUMBER(BOOL), TYPE_NUMBER(I4C);
#undef TYPE_NUMBER
  return layout.text;
}

}  // namespace

extern "C" {

int32_t abi_version() { return ABI_VERSION; }

// A line per structure (its size, then name:offset of each field), one of operations, one of types.
const char* abi_layout() {
  static const std::string layout = describe_layout();
  return layout.c_str();
}

}  // extern "C"
