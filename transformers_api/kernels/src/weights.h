// The memory layout of packed weights.
//
// A matrix (n outputs, k inputs) is stored in panels of 32 outputs. A panel is a sequence of steps
// along k; a step holds two vectors of 16 outputs, whose 4-byte lanes hold the 1, 2 or 4 weights
// (F32, BF16, I8) of the step, to be multiplied with the same 4 bytes of an input row. Padding to
// whole panels and steps is zero.
//
// I8 is quantised in groups of GROUP weights along k. Each group is followed by 32 scales in
// half precision, one for each output: Q8_0 of GGUF has the same, so that its numbers stay.
//
// I4 has groups too, and one vector per step: the lower four bits of a byte belong to the first 16
// outputs, the upper four to the others. A group is followed by 32 scales and 32 minima in half
// precision; a weight is minimum + scale * (0..15). I4C, the centred one, has no minima: they are
// -8 scales each, as with Q4_0 of GGUF. One stream waits for little but the bytes of weights.

#pragma once

#include <cstdint>

#include "abi.h"

namespace {

constexpr int64_t PANEL = 32, GROUP = 32, INT8_GROUP_BYTES = PANEL * GROUP + PANEL * 2;
constexpr int64_t GROUP_STEPS = GROUP / 4;
constexpr int64_t INT4_CODE_BYTES = PANEL * GROUP / 2;
constexpr int64_t int4_group_bytes(bool has_minima) {
  return INT4_CODE_BYTES + PANEL * (has_minima ? 4 : 2);
}
constexpr float INT4_CENTRE = -8;

int64_t num_panels(const Weight& w) { return (w.n + PANEL - 1) / PANEL; }
int64_t values_per_lane(const Weight& w) { return w.type == F32 ? 1 : w.type == BF16 ? 2 : 4; }
bool is_int4(const Weight& w) { return w.type == I4 || w.type == I4C; }
bool is_grouped(const Weight& w) { return w.type == I8 || is_int4(w); }
int64_t num_steps(const Weight& w) {  // along k; the 4-byte lanes of a prepared input row
  const int64_t unit = is_grouped(w) ? GROUP : values_per_lane(w);
  return (w.k + unit - 1) / unit * unit / values_per_lane(w);
}
int64_t num_groups(const Weight& w) { return (w.k + GROUP - 1) / GROUP; }
int64_t panel_bytes(const Weight& w) {
  if (is_int4(w)) return num_groups(w) * int4_group_bytes(w.type == I4);
  return w.type == I8 ? num_groups(w) * INT8_GROUP_BYTES : num_steps(w) * 2 * 64;
}

uint8_t* panel_at(const Weight& w, int64_t row) { return w.data + row / PANEL * panel_bytes(w); }

// The lane of output ``row`` at a step, as an index from its panel's first byte in units of 4.
int64_t lane_index(const Weight& w, int64_t row, int64_t step) {
  const int64_t index = step * PANEL + row % PANEL;
  if (w.type != I8) return index;
  return index + step / GROUP_STEPS * (INT8_GROUP_BYTES - PANEL * GROUP) / 4;
}

uint16_t& int8_scale_at(const Weight& w, int64_t row, int64_t group) {
  uint8_t* scales = panel_at(w, row) + group * INT8_GROUP_BYTES + PANEL * GROUP;
  return reinterpret_cast<uint16_t*>(scales)[row % PANEL];
}

uint8_t* int4_group_at(const Weight& w, int64_t row, int64_t group) {
  return panel_at(w, row) + group * int4_group_bytes(w.type == I4);
}

}  // namespace
