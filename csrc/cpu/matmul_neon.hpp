// NEON, half a tile in two vectors; included by one file without dot products of bytes and one with them.
#include <arm_neon.h>

#include "matmul_kernel.hpp"

namespace bitwright {
namespace {

struct Neon {
  static constexpr int LANES = 8;
  static constexpr int FAST_ROWS = 4;
  static constexpr int EXACT_ROWS = 8;
  struct Floats {
    float32x4_t low, high;
  };
  struct Codes {
    uint8x16_t low, high;
  };

  static BITWRIGHT_FORCE Floats zero() { return set(0.0f); }
  static BITWRIGHT_FORCE Floats set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static BITWRIGHT_FORCE Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static BITWRIGHT_FORCE void store(float* to, Floats value) {
    vst1q_f32(to, value.low);
    vst1q_f32(to + 4, value.high);
  }
  static BITWRIGHT_FORCE Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static BITWRIGHT_FORCE Floats sub(Floats a, Floats b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  static BITWRIGHT_FORCE Floats mul(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static BITWRIGHT_FORCE Floats fma(Floats a, Floats b, Floats c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static BITWRIGHT_FORCE Floats fnma(Floats a, Floats b, Floats c) {
    return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
  }
  // Multiplies by an element of a vector of inputs, which no copy to all lanes precedes.
  template <int I>
  static BITWRIGHT_FORCE Floats fma_of(Floats a, const float* inputs, Floats c) {
    const float32x4_t four = vld1q_f32(inputs + I / 4 * 4);
    return {vfmaq_laneq_f32(c.low, a.low, four, I % 4), vfmaq_laneq_f32(c.high, a.high, four, I % 4)};
  }

  static BITWRIGHT_FORCE float half(std::uint16_t stored) {
    __fp16 value;
    std::memcpy(&value, &stored, sizeof value);
    return static_cast<float>(value);
  }
  static BITWRIGHT_FORCE Floats halves(const std::uint16_t* from) {
    const float16x8_t stored = vreinterpretq_f16_u16(vld1q_u16(from));
    return {vcvt_f32_f16(vget_low_f16(stored)), vcvt_high_f32_f16(stored)};
  }
  static BITWRIGHT_FORCE Floats floats(uint8x8_t bytes) {
    const uint16x8_t wide = vmovl_u8(bytes);
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))};
  }
  static BITWRIGHT_FORCE Floats bytes(const std::uint8_t* from) { return floats(vld1_u8(from)); }
  static BITWRIGHT_FORCE void nibbles(const std::uint8_t* from, Floats& low, Floats& high) {
    const uint8x8_t both = vld1_u8(from);
    low = floats(vand_u8(both, vdup_n_u8(15)));
    high = floats(vshr_n_u8(both, 4));
  }

  static BITWRIGHT_FORCE Codes load(const std::uint8_t* from) { return {vld1q_u8(from), vld1q_u8(from + 16)}; }
  // Bytes are shifted on their own, so bits that others need the mask for do not come in.
  template <int COUNT>
  static BITWRIGHT_FORCE uint8x16_t shift_one(uint8x16_t codes) {
    if constexpr (COUNT > 0) return vshrq_n_u8(codes, COUNT);
    if constexpr (COUNT < 0) return vshlq_n_u8(codes, -COUNT);
    return codes;
  }
  template <int COUNT>
  static BITWRIGHT_FORCE Codes shift(Codes codes) {
    return {shift_one<COUNT>(codes.low), shift_one<COUNT>(codes.high)};
  }
  template <int FIRST, int COUNT>
  static BITWRIGHT_FORCE Codes field(Codes codes) {
    const Codes moved = shift<FIRST>(codes);
    if constexpr (FIRST + COUNT == 8) return moved;
    const uint8x16_t mask = vdupq_n_u8((1 << COUNT) - 1);
    return {vandq_u8(moved.low, mask), vandq_u8(moved.high, mask)};
  }
  static BITWRIGHT_FORCE Codes merge(Codes first, Codes second, int byte) {
    const uint8x16_t mask = vdupq_n_u8(static_cast<std::uint8_t>(byte));
    return {vbslq_u8(mask, second.low, first.low), vbslq_u8(mask, second.high, first.high)};
  }
  template <int J>
  static BITWRIGHT_FORCE float32x4_t byte_floats_one(uint8x16_t codes) {
    // As fixed-point numbers with 8 * J fractional bits, which saves the shift.
    const uint32x4_t byte = vandq_u32(vreinterpretq_u32_u8(codes), vdupq_n_u32(255u << (8 * J)));
    if constexpr (J == 0) {
      return vcvtq_f32_u32(byte);
    } else {
      return vcvtq_n_f32_u32(byte, 8 * J);
    }
  }
  template <int J>
  static BITWRIGHT_FORCE Floats byte_floats(Codes codes) {
    return {byte_floats_one<J>(codes.low), byte_floats_one<J>(codes.high)};
  }

  static BITWRIGHT_FORCE float quantize(const float* values, std::int8_t* codes, std::int32_t* sums) {
    float32x4_t value[8], largest = vdupq_n_f32(0.0f);
    for (int i = 0; i < 8; ++i) {
      value[i] = vld1q_f32(values + 4 * i);
      largest = vmaxq_f32(largest, vabsq_f32(value[i]));
    }
    // NaN if one of them is.
    const float most = vmaxvq_f32(largest);
    const float inverse = most > SMALLEST ? 127.0f / most : 0.0f;
    int32x4_t code[8];
    for (int i = 0; i < 8; ++i) code[i] = vcvtnq_s32_f32(vmulq_n_f32(value[i], inverse));
    for (int half = 0; half < 2; ++half) {
      const int32x4_t* from = code + 4 * half;
      const int16x8_t first = vqmovn_high_s32(vqmovn_s32(from[0]), from[1]);
      const int16x8_t second = vqmovn_high_s32(vqmovn_s32(from[2]), from[3]);
      const int8x16_t packed = vqmovn_high_s16(vqmovn_s16(first), second);
      vst1q_s8(codes + 16 * half, packed);
      sums[half] = vaddlvq_s8(packed);
    }
    if (!(most < __builtin_inff())) return __builtin_nanf("");
    return most > SMALLEST ? most / 127.0f : 0.0f;
  }

  // Codes of 8 bits are taken as signed, 128 less than they are, which `floats` makes up for.
  template <int BITS>
  static BITWRIGHT_FORCE int8x16_t signed_codes(uint8x16_t codes) {
    return vreinterpretq_s8_u8(BITS < 8 ? codes : veorq_u8(codes, vdupq_n_u8(128)));
  }

  template <int BITS>
  struct Sum;
};

#if defined(__ARM_FEATURE_DOTPROD)
template <int BITS>
struct Neon::Sum {
  int32x4_t low = vdupq_n_s32(0), high = low, inputs = low;

  template <int I>
  BITWRIGHT_FORCE void add(Codes codes, const std::int8_t* x) {
    const int8x16_t four = vld1q_s8(x + I / 4 * 16);
    low = vdotq_laneq_s32(low, signed_codes<BITS>(codes.low), four, I % 4);
    high = vdotq_laneq_s32(high, signed_codes<BITS>(codes.high), four, I % 4);
    if constexpr (BITS == 8) inputs = vdotq_laneq_s32(inputs, vdupq_n_s8(1), four, I % 4);
  }
  BITWRIGHT_FORCE Floats floats() const {
    if constexpr (BITS < 8) return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
    return {vcvtq_f32_s32(vmlaq_n_s32(low, inputs, 128)), vcvtq_f32_s32(vmlaq_n_s32(high, inputs, 128))};
  }
};
#else
// Up to five bits, products are summed in int16, each with those of the same column of the chunk's eight quads:
// 8 * 31 * 127 < 2^15.
template <int BITS>
struct Neon::Sum {
  static constexpr bool NARROW = BITS <= 5;
  int16x8_t narrow[4] = {vdupq_n_s16(0), vdupq_n_s16(0), vdupq_n_s16(0), vdupq_n_s16(0)};
  int32x4_t wide[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}, inputs = wide[0];

  template <int PART>
  BITWRIGHT_FORCE void add_part(int8x16_t codes, int8x16_t four) {
    if constexpr (NARROW) {
      narrow[PART] = vmlal_s8(narrow[PART], vget_low_s8(codes), vget_low_s8(four));
      narrow[PART + 1] = vmlal_high_s8(narrow[PART + 1], codes, four);
    } else {
      wide[PART] = vpadalq_s16(wide[PART], vmull_s8(vget_low_s8(codes), vget_low_s8(four)));
      wide[PART + 1] = vpadalq_s16(wide[PART + 1], vmull_high_s8(codes, four));
    }
  }
  template <int I>
  BITWRIGHT_FORCE void add(Codes codes, const std::int8_t* x) {
    const int8x16_t four = vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const std::int32_t*>(x + 4 * I)));
    add_part<0>(signed_codes<BITS>(codes.low), four);
    add_part<2>(signed_codes<BITS>(codes.high), four);
    if constexpr (BITS == 8) inputs = vpadalq_s16(inputs, vpaddlq_s8(four));
  }
  template <int PART>
  BITWRIGHT_FORCE float32x4_t part_floats() const {
    if constexpr (NARROW) {
      return vcvtq_f32_s32(vpaddq_s32(vpaddlq_s16(narrow[PART]), vpaddlq_s16(narrow[PART + 1])));
    } else {
      const int32x4_t sum = vpaddq_s32(wide[PART], wide[PART + 1]);
      if constexpr (BITS < 8) return vcvtq_f32_s32(sum);
      return vcvtq_f32_s32(vmlaq_n_s32(sum, inputs, 128));
    }
  }
  BITWRIGHT_FORCE Floats floats() const { return {part_floats<0>(), part_floats<2>()}; }
};
#endif

}  // namespace
}  // namespace bitwright
