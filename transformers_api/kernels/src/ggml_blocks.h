// The blocks of ggml's quantised types, as they lie in a GGUF file, 32 weights at a time.
//
// Plain numbers count as blocks of 32. Each kind of block has ``values``: the weights themselves. Where they are codes times a scale,
// plus a minimum, the kind has ``codes`` too. Layouts and arithmetic: ggml-common.h, ggml-quants.c
// and gguf-py/gguf/quants.py of llama.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "weights.h"

namespace {

// A weight is minimum + scale * code.
struct BlockCodes {
  int8_t codes[GROUP];
  float scale, minimum;
};

inline float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return half_to_float(bits);
}

// 32 codes of four bits: those of the first sixteen weights are the lower ones.
inline void nibbles(const uint8_t* bytes, int8_t* codes) {
  for (int i = 0; i < 16; i++) codes[i] = bytes[i] & 15, codes[i + 16] = bytes[i] >> 4;
}

inline void high_bits(const uint8_t* bits, int8_t* codes) {  // the fifth bit of 32 codes
  for (int i = 0; i < GROUP; i++) codes[i] |= (bits[i / 8] >> i % 8 & 1) << 4;
}

inline void add_to(int8_t* codes, int value) {
  for (int i = 0; i < GROUP; i++) codes[i] = static_cast<int8_t>(codes[i] + value);
}

inline void values_of(const BlockCodes& block, float* values) {
  for (int i = 0; i < GROUP; i++) values[i] = block.scale * block.codes[i] + block.minimum;
}

// Scale and minimum of a group of 32 in the 12 bytes of Q4_K and Q5_K, six bits each.
inline void k_scale(const uint8_t* packed, int64_t group, int& scale, int& minimum) {
  if (group < 4) {
    scale = packed[group] & 63, minimum = packed[group + 4] & 63;
  } else {
    scale = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
    minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
  }
}

// The codes are whole numbers with a sign, and there is no minimum.
struct SignedKind {
  static constexpr bool HAS_CODES = true, IS_SIGNED = true;
};
// The codes are 0..31, or 0..15 where FITS_FOUR_BITS.
struct UnsignedKind {
  static constexpr bool HAS_CODES = true, IS_SIGNED = false;
};
struct ValuesKind {  // two scales in a group of 32
  static constexpr bool HAS_CODES = false, IS_SIGNED = false, FITS_FOUR_BITS = false;
};

struct PlainF32 : ValuesKind {
  static constexpr int NUMBER = 0;
  static constexpr int64_t WEIGHTS = 32, BYTES = 128;
  static void values(const uint8_t* block, int64_t, float* out) { std::memcpy(out, block, BYTES); }
};

struct PlainF16 : ValuesKind {
  static constexpr int NUMBER = 1;
  static constexpr int64_t WEIGHTS = 32, BYTES = 64;
  static void values(const uint8_t* block, int64_t, float* out) {
    alignas(32) uint16_t halves[GROUP];
    std::memcpy(halves, block, BYTES);
    store(out, load_half(halves)), store(out + 16, load_half(halves + 16));
  }
};

struct PlainBF16 : ValuesKind {
  static constexpr int NUMBER = 30;
  static constexpr int64_t WEIGHTS = 32, BYTES = 64;
  static void values(const uint8_t* block, int64_t, float* out) {
    const auto* numbers = reinterpret_cast<const uint16_t*>(block);
    store(out, load(numbers, 0xffff)), store(out + 16, load(numbers + 16, 0xffff));
  }
};

struct Q4_0 : SignedKind {
  static constexpr int NUMBER = 2;
  static constexpr int64_t WEIGHTS = 32, BYTES = 18;
  static constexpr bool FITS_FOUR_BITS = true;  // from -8 on
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    nibbles(block + 2, out.codes), add_to(out.codes, -8);
    out.scale = half_at(block), out.minimum = 0;
  }
};

struct Q4_1 : UnsignedKind {
  static constexpr int NUMBER = 3;
  static constexpr int64_t WEIGHTS = 32, BYTES = 20;
  static constexpr bool FITS_FOUR_BITS = true;
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    nibbles(block + 4, out.codes);
    out.scale = half_at(block), out.minimum = half_at(block + 2);
  }
};

struct Q5_0 : SignedKind {
  static constexpr int NUMBER = 6;
  static constexpr int64_t WEIGHTS = 32, BYTES = 22;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    nibbles(block + 6, out.codes), high_bits(block + 2, out.codes), add_to(out.codes, -16);
    out.scale = half_at(block), out.minimum = 0;
  }
};

struct Q5_1 : UnsignedKind {
  static constexpr int NUMBER = 7;
  static constexpr int64_t WEIGHTS = 32, BYTES = 24;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    nibbles(block + 8, out.codes), high_bits(block + 4, out.codes);
    out.scale = half_at(block), out.minimum = half_at(block + 2);
  }
};

struct Q8_0 : SignedKind {
  static constexpr int NUMBER = 8;
  static constexpr int64_t WEIGHTS = 32, BYTES = 34;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    std::memcpy(out.codes, block + 2, GROUP);
    out.scale = half_at(block), out.minimum = 0;
  }
};

struct Q2_K : ValuesKind {
  static constexpr int NUMBER = 10;
  static constexpr int64_t WEIGHTS = 256, BYTES = 84;
  static void values(const uint8_t* block, int64_t group, float* out) {
    const float scale = half_at(block + 80), minimum = half_at(block + 82);
    const uint8_t* bytes = block + 16 + group / 4 * 32;
    for (int i = 0; i < GROUP; i++) {
      const uint8_t own = block[group * 2 + i / 16];
      const int code = bytes[i] >> group % 4 * 2 & 3;
      out[i] = scale * (own & 15) * code - minimum * (own >> 4);
    }
  }
};

struct Q3_K : ValuesKind {
  static constexpr int NUMBER = 11;
  static constexpr int64_t WEIGHTS = 256, BYTES = 110;
  static void values(const uint8_t* block, int64_t group, float* out) {
    const uint8_t *high = block, *bytes = block + 32 + group / 4 * 32, *packed = block + 96;
    for (int half = 0; half < 2; half++) {
      const int64_t s = group * 2 + half;
      const int low = packed[s % 8] >> s / 8 * 4 & 15, two = packed[8 + s % 4] >> s / 4 * 2 & 3;
      const float scale = half_at(block + 108) * static_cast<float>((low | two << 4) - 32);
      for (int i = half * 16; i < half * 16 + 16; i++) {
        const int code = (bytes[i] >> group % 4 * 2 & 3) - (high[i] >> group & 1 ? 0 : 4);
        out[i] = scale * static_cast<float>(code);
      }
    }
  }
};

struct Q4_K : UnsignedKind {
  static constexpr int NUMBER = 12;
  static constexpr int64_t WEIGHTS = 256, BYTES = 144;
  static constexpr bool FITS_FOUR_BITS = true;
  static void codes(const uint8_t* block, int64_t group, BlockCodes& out) {
    int scale, minimum;
    k_scale(block + 4, group, scale, minimum);
    const uint8_t* bytes = block + 16 + group / 2 * 32;
    for (int i = 0; i < GROUP; i++)
      out.codes[i] = static_cast<int8_t>(group % 2 ? bytes[i] >> 4 : bytes[i] & 15);
    out.scale = half_at(block) * static_cast<float>(scale);
    out.minimum = -half_at(block + 2) * static_cast<float>(minimum);
  }
};

struct Q5_K : UnsignedKind {
  static constexpr int NUMBER = 13;
  static constexpr int64_t WEIGHTS = 256, BYTES = 176;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t group, BlockCodes& out) {
    int scale, minimum;
    k_scale(block + 4, group, scale, minimum);
    const uint8_t *high = block + 16, *bytes = block + 48 + group / 2 * 32;
    for (int i = 0; i < GROUP; i++) {
      const int low = group % 2 ? bytes[i] >> 4 : bytes[i] & 15;
      out.codes[i] = static_cast<int8_t>(low | (high[i] >> group & 1) << 4);
    }
    out.scale = half_at(block) * static_cast<float>(scale);
    out.minimum = -half_at(block + 2) * static_cast<float>(minimum);
  }
};

struct Q6_K : ValuesKind {
  static constexpr int NUMBER = 14;
  static constexpr int64_t WEIGHTS = 256, BYTES = 210;
  static void values(const uint8_t* block, int64_t group, float* out) {
    const int64_t half = group / 4, part = group % 4;
    const uint8_t* low = block + half * 64 + part % 2 * 32;
    const uint8_t* high = block + 128 + half * 32;
    const auto* scales = reinterpret_cast<const int8_t*>(block + 192) + group * 2;
    const float scale = half_at(block + 208);
    const float both[] = {scale * static_cast<float>(scales[0]),
                          scale * static_cast<float>(scales[1])};
    for (int i = 0; i < GROUP; i++) {
      const int code = (part < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> part * 2 & 3) << 4;
      out[i] = both[i / 16] * static_cast<float>(code - 32);
    }
  }
};

constexpr int8_t IQ4_LEVELS[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
constexpr int8_t FP4_LEVELS[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline void levels(const uint8_t* bytes, const int8_t* of, int8_t* codes) {
  for (int i = 0; i < 16; i++) codes[i] = of[bytes[i] & 15], codes[i + 16] = of[bytes[i] >> 4];
}

struct IQ4_NL : SignedKind {
  static constexpr int NUMBER = 20;
  static constexpr int64_t WEIGHTS = 32, BYTES = 18;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    levels(block + 2, IQ4_LEVELS, out.codes);
    out.scale = half_at(block), out.minimum = 0;
  }
};

struct IQ4_XS : SignedKind {
  static constexpr int NUMBER = 23;
  static constexpr int64_t WEIGHTS = 256, BYTES = 136;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t group, BlockCodes& out) {
    const int high = block[2 + group / 4] >> group % 4 * 2 & 3;
    const int low = block[4 + group / 2] >> group % 2 * 4 & 15;
    levels(block + 8 + group * 16, IQ4_LEVELS, out.codes);
    out.scale = half_at(block) * static_cast<float>((low | high << 4) - 32), out.minimum = 0;
  }
};

struct MXFP4 : SignedKind {
  static constexpr int NUMBER = 39;
  static constexpr int64_t WEIGHTS = 32, BYTES = 17;
  static constexpr bool FITS_FOUR_BITS = false;
  static void codes(const uint8_t* block, int64_t, BlockCodes& out) {
    levels(block + 1, FP4_LEVELS, out.codes);
    out.scale = std::ldexp(1.f, block[0] - 128), out.minimum = 0;
  }
};

// A kind as data: packing is compiled once for all of them.
struct BlockKind {
  int number;
  int64_t weights, bytes;
  bool is_signed, fits_four_bits;
  void (*codes)(const uint8_t* block, int64_t group, BlockCodes& out);  // null: none
  void (*values)(const uint8_t* block, int64_t group, float* out);
  void (*row)(const uint8_t* row, int64_t groups, float* out);
  int shift;  // a block has as many groups: to divide takes longer than to read one

  // The block of a row that has this group, and the group's place in it.
  const uint8_t* block_of(const uint8_t* row, int64_t group) const {
    return row + (group >> shift) * bytes;
  }
  int64_t place_of(int64_t group) const { return group & ((1 << shift) - 1); }
  void values_at(const uint8_t* row, int64_t group, float* out) const {
    values(block_of(row, group), place_of(group), out);
  }
};

template <class Kind>
void values_of_kind(const uint8_t* block, int64_t group, float* values) {
  if constexpr (Kind::HAS_CODES) {
    BlockCodes codes;
    Kind::codes(block, group, codes);
    values_of(codes, values);
  } else {
    Kind::values(block, group, values);
  }
}

template <class Kind>
void row_of_kind(const uint8_t* row, int64_t groups, float* out) {
  constexpr int64_t IN_BLOCK = Kind::WEIGHTS / GROUP;
  for (int64_t g = 0; g < groups; g++)
    values_of_kind<Kind>(row + g / IN_BLOCK * Kind::BYTES, g % IN_BLOCK, out + g * GROUP);
}

template <class Kind>
constexpr BlockKind block_kind() {
  static_assert(Kind::WEIGHTS == GROUP || Kind::WEIGHTS == 8 * GROUP);
  BlockKind kind{Kind::NUMBER,
                 Kind::WEIGHTS,
                 Kind::BYTES,
                 Kind::IS_SIGNED,
                 Kind::FITS_FOUR_BITS,
                 nullptr,
                 values_of_kind<Kind>,
                 row_of_kind<Kind>,
                 Kind::WEIGHTS == GROUP ? 0 : 3};
  if constexpr (Kind::HAS_CODES) kind.codes = Kind::codes;
  return kind;
}

constexpr BlockKind BLOCK_KINDS[] = {
    block_kind<PlainF32>(), block_kind<PlainF16>(), block_kind<PlainBF16>(),
    block_kind<Q4_0>(), block_kind<Q4_1>(),   block_kind<Q5_0>(),   block_kind<Q5_1>(),
    block_kind<Q8_0>(), block_kind<Q2_K>(),   block_kind<Q3_K>(),   block_kind<Q4_K>(),
    block_kind<Q5_K>(), block_kind<Q6_K>(),   block_kind<IQ4_NL>(), block_kind<IQ4_XS>(),
    block_kind<MXFP4>()};

// Null for a number that is none of theirs.
inline const BlockKind* block_kind_of(int32_t number) {
  for (const BlockKind& kind : BLOCK_KINDS)
    if (kind.number == number) return &kind;
  return nullptr;
}

}  // namespace
