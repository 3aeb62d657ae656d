// AVX2 with FMA and F16C: half a tile a vector.
#include <immintrin.h>

#include "matmul_kernel.hpp"

namespace bitwright {
namespace {

struct Avx2 {
  static constexpr int LANES = 8;
  static constexpr int FAST_ROWS = 4;
  static constexpr int EXACT_ROWS = 8;
  using Floats = __m256;
  using Codes = __m256i;

  static BITWRIGHT_FORCE Floats zero() { return _mm256_setzero_ps(); }
  static BITWRIGHT_FORCE Floats set(float value) { return _mm256_set1_ps(value); }
  static BITWRIGHT_FORCE Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static BITWRIGHT_FORCE void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static BITWRIGHT_FORCE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static BITWRIGHT_FORCE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static BITWRIGHT_FORCE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static BITWRIGHT_FORCE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static BITWRIGHT_FORCE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
  template <int I>
  static BITWRIGHT_FORCE Floats fma_of(Floats a, const float* inputs, Floats c) {
    return fma(a, set(inputs[I]), c);
  }

  static BITWRIGHT_FORCE float half(std::uint16_t stored) { return _cvtsh_ss(stored); }
  static BITWRIGHT_FORCE Floats halves(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static BITWRIGHT_FORCE __m256i integers(const std::uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static BITWRIGHT_FORCE Floats bytes(const std::uint8_t* from) { return _mm256_cvtepi32_ps(integers(from)); }
  static BITWRIGHT_FORCE void nibbles(const std::uint8_t* from, Floats& low, Floats& high) {
    low = _mm256_cvtepi32_ps(_mm256_and_si256(integers(from), _mm256_set1_epi32(15)));
    high = _mm256_cvtepi32_ps(_mm256_srli_epi32(integers(from), 4));
  }

  static BITWRIGHT_FORCE Codes load(const std::uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  template <int COUNT>
  static BITWRIGHT_FORCE Codes shift(Codes codes) {
    if constexpr (COUNT == 0) return codes;
    return COUNT > 0 ? _mm256_srli_epi32(codes, COUNT > 0 ? COUNT : 0)
                     : _mm256_slli_epi32(codes, COUNT > 0 ? 0 : -COUNT);
  }
  static BITWRIGHT_FORCE Codes mask(Codes codes, int byte) {
    return _mm256_and_si256(codes, _mm256_set1_epi8(static_cast<char>(byte)));
  }
  template <int FIRST, int COUNT>
  static BITWRIGHT_FORCE Codes field(Codes codes) {
    return mask(shift<FIRST>(codes), (1 << COUNT) - 1);
  }
  static BITWRIGHT_FORCE Codes merge(Codes first, Codes second, int byte) {
    return _mm256_or_si256(first, mask(second, byte));
  }
  template <int J>
  static BITWRIGHT_FORCE Floats byte_floats(Codes codes) {
    const Codes moved = J == 0 ? codes : _mm256_srli_epi32(codes, 8 * J);
    return _mm256_cvtepi32_ps(J == 3 ? moved : _mm256_and_si256(moved, _mm256_set1_epi32(255)));
  }

  static BITWRIGHT_FORCE float quantize(const float* values, std::int8_t* codes, std::int32_t* sums) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), infinity = set(__builtin_inff());
    __m256 value[4], largest = zero(), wild = zero();
    for (int i = 0; i < 4; ++i) {
      value[i] = load(values + 8 * i);
      const __m256 size = _mm256_and_ps(value[i], magnitude);
      largest = _mm256_max_ps(largest, size);
      wild = _mm256_or_ps(wild, _mm256_cmp_ps(size, infinity, _CMP_NLT_UQ));
    }
    const float most = largest_of(largest);
    const __m256 inverse = set(most > SMALLEST ? 127.0f / most : 0.0f);
    __m256i code[4];
    for (int i = 0; i < 4; ++i) code[i] = _mm256_cvtps_epi32(mul(value[i], inverse));
    const __m256i first = _mm256_packs_epi32(code[0], code[1]), second = _mm256_packs_epi32(code[2], code[3]);
    const __m256i packed = _mm256_packs_epi16(first, second);
    // Packing works in halves of a register: put their fours back in order.
    const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), ordered);
    sum_codes(ordered, sums);
    if (_mm256_movemask_ps(wild) != 0) return __builtin_nanf("");
    return most > SMALLEST ? most / 127.0f : 0.0f;
  }

  template <int BITS>
  struct Sum;
};

// Pairs of products are summed in int16, of which up to four bits allow the eight of a chunk: 8 * 2 * 15 * 127 < 2^15.
// Codes of 8 bits go as two nibbles, since a pair of their products overflows.
template <int BITS>
struct Avx2::Sum {
  __m256i value = _mm256_setzero_si256();

  static BITWRIGHT_FORCE __m256i widened(__m256i pairs, short factor) {
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor));
  }
  template <int I>
  BITWRIGHT_FORCE void add(Codes codes, const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x + 4 * I, 4);
    const __m256i inputs = _mm256_set1_epi32(four);
    if constexpr (BITS <= 4) {
      value = _mm256_add_epi16(value, _mm256_maddubs_epi16(codes, inputs));
    } else if constexpr (BITS < 8) {
      value = _mm256_add_epi32(value, widened(_mm256_maddubs_epi16(codes, inputs), 1));
    } else {
      const __m256i low = _mm256_maddubs_epi16(mask(codes, 15), inputs);
      const __m256i high = _mm256_maddubs_epi16(mask(shift<4>(codes), 15), inputs);
      value = _mm256_add_epi32(value, _mm256_add_epi32(widened(low, 1), widened(high, 16)));
    }
  }
  BITWRIGHT_FORCE Floats floats() const { return _mm256_cvtepi32_ps(BITS <= 4 ? widened(value, 1) : value); }
};

}  // namespace

const MatmulKernels& matmul_kernels_avx2() {
  static constexpr MatmulKernels kernels = table<Avx2>();
  return kernels;
}

}  // namespace bitwright
