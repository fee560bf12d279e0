// Access to the operands of a Step: sixteen elements at a time, of any type and stride.

#pragma once

#include <cstdint>

#include "abi.h"
#include "simd.h"

namespace {

char* address_of(const Operand& o, int64_t index) {
  return o.data + index * (o.type == F32 ? 4 : o.type == BF16 ? 2 : o.type == BOOL ? 1 : 8);
}

float element_at(const Operand& o, int64_t index) {
  const char* p = address_of(o, index);
  if (o.type == F32) return *reinterpret_cast<const float*>(p);
  if (o.type == BF16) return bf16_to_float(*reinterpret_cast<const uint16_t*>(p));
  if (o.type == BOOL) return *p;
  return static_cast<float>(*reinterpret_cast<const int64_t*>(p));
}

f32x16 load_elements(const Operand& o, int64_t index, int64_t stride, mask16 mask) {
  if (stride == 0) return broadcast(element_at(o, index));
  if (stride == 1 && o.type == F32)
    return load(reinterpret_cast<const float*>(address_of(o, index)), mask);
  if (stride == 1 && o.type == BF16)
    return load(reinterpret_cast<const uint16_t*>(address_of(o, index)), mask);
  alignas(64) float values[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) values[i] = element_at(o, index + i * stride);
  return load_aligned(values);
}

void store_elements(const Operand& o, int64_t index, int64_t stride, mask16 mask, f32x16 v) {
  if (stride == 1 && o.type == F32)
    return store(reinterpret_cast<float*>(address_of(o, index)), mask, v);
  if (stride == 1 && o.type == BF16)
    return store(reinterpret_cast<uint16_t*>(address_of(o, index)), mask, v);
  alignas(64) float values[16];
  store_aligned(values, v);
  for (int i = 0; i < 16; i++) {
    if (!(mask >> i & 1)) continue;
    char* p = address_of(o, index + i * stride);
    if (o.type == F32) *reinterpret_cast<float*>(p) = values[i];
    if (o.type == BF16) store(reinterpret_cast<uint16_t*>(p), 1, broadcast(values[i]));
    if (o.type == BOOL) *p = values[i] != 0;
    if (o.type == I64) *reinterpret_cast<int64_t*>(p) = static_cast<int64_t>(values[i]);
  }
}

// The offset of the index-th line along the last dimension.
int64_t line_offset(const Step& s, const Operand& o, int64_t index) {
  if (s.sizes[1] == 1 && s.sizes[2] == 1) return index * o.strides[0];  // divisions take long
  const int64_t k = index % s.sizes[2], j = index / s.sizes[2] % s.sizes[1];
  return index / s.sizes[2] / s.sizes[1] * o.strides[0] + j * o.strides[1] + k * o.strides[2];
}

}  // namespace
