// AVX-512 (F and BW), a tile a vector; included by one file without VNNI and one with it.
#include <immintrin.h>

#include "matmul_kernel.hpp"

namespace bitwright {
namespace {

struct Avx512 {
  static constexpr int LANES = 16;
  static constexpr int FAST_ROWS = 8;
  static constexpr int EXACT_ROWS = 16;
  using Floats = __m512;
  using Codes = __m512i;

  static BITWRIGHT_FORCE Floats zero() { return _mm512_setzero_ps(); }
  static BITWRIGHT_FORCE Floats set(float value) { return _mm512_set1_ps(value); }
  static BITWRIGHT_FORCE Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static BITWRIGHT_FORCE void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static BITWRIGHT_FORCE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static BITWRIGHT_FORCE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static BITWRIGHT_FORCE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static BITWRIGHT_FORCE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static BITWRIGHT_FORCE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  template <int I>
  static BITWRIGHT_FORCE Floats fma_of(Floats a, const float* inputs, Floats c) {
    return fma(a, set(inputs[I]), c);
  }

  static BITWRIGHT_FORCE float half(std::uint16_t stored) { return _cvtsh_ss(stored); }
  static BITWRIGHT_FORCE Floats halves(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static BITWRIGHT_FORCE __m512i integers(const std::uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static BITWRIGHT_FORCE Floats bytes(const std::uint8_t* from) { return _mm512_cvtepi32_ps(integers(from)); }
  static BITWRIGHT_FORCE void nibbles(const std::uint8_t* from, Floats& low, Floats& high) {
    low = _mm512_cvtepi32_ps(_mm512_and_si512(integers(from), _mm512_set1_epi32(15)));
    high = _mm512_cvtepi32_ps(_mm512_srli_epi32(integers(from), 4));
  }

  static BITWRIGHT_FORCE Codes load(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
  template <int COUNT>
  static BITWRIGHT_FORCE Codes shift(Codes codes) {
    if constexpr (COUNT == 0) return codes;
    return COUNT > 0 ? _mm512_srli_epi32(codes, COUNT > 0 ? COUNT : 0)
                     : _mm512_slli_epi32(codes, COUNT > 0 ? 0 : -COUNT);
  }
  static BITWRIGHT_FORCE Codes mask(Codes codes, int byte) {
    return _mm512_and_si512(codes, _mm512_set1_epi32(byte * 0x01010101));
  }
  template <int FIRST, int COUNT>
  static BITWRIGHT_FORCE Codes field(Codes codes) {
    return mask(shift<FIRST>(codes), (1 << COUNT) - 1);
  }
  static BITWRIGHT_FORCE Codes merge(Codes first, Codes second, int byte) {
    // first | (second & byte)
    return _mm512_ternarylogic_epi32(first, second, _mm512_set1_epi32(byte * 0x01010101), 0xf8);
  }
  template <int J>
  static BITWRIGHT_FORCE Floats byte_floats(Codes codes) {
    const Codes moved = J == 0 ? codes : _mm512_srli_epi32(codes, 8 * J);
    return _mm512_cvtepi32_ps(J == 3 ? moved : _mm512_and_si512(moved, _mm512_set1_epi32(255)));
  }

  static BITWRIGHT_FORCE float quantize(const float* values, std::int8_t* codes, std::int32_t* sums) {
    const __m512 first = load(values), second = load(values + LANES), infinity = set(__builtin_inff());
    const __m512 first_size = _mm512_abs_ps(first), second_size = _mm512_abs_ps(second);
    const unsigned wild = _mm512_cmp_ps_mask(first_size, infinity, _CMP_NLT_UQ) |
                          _mm512_cmp_ps_mask(second_size, infinity, _CMP_NLT_UQ);
    const __m512 size = _mm512_max_ps(first_size, second_size);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(size), 1));
    const float most = largest_of(_mm256_max_ps(_mm512_castps512_ps256(size), upper));
    const __m512 inverse = set(most > SMALLEST ? 127.0f / most : 0.0f);
    const __m128i low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(first, inverse)));
    const __m128i high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(second, inverse)));
    const __m256i both = _mm256_set_m128i(high, low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), both);
    sum_codes(both, sums);
    if (wild != 0) return __builtin_nanf("");
    return most > SMALLEST ? most / 127.0f : 0.0f;
  }

  template <int BITS>
  struct Sum;
};

#if defined(__AVX512VNNI__)
template <int BITS>
struct Avx512::Sum {
  __m512i value = _mm512_setzero_si512();

  template <int I>
  BITWRIGHT_FORCE void add(Codes codes, const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x + 4 * I, 4);
    value = _mm512_dpbusd_epi32(value, codes, _mm512_set1_epi32(four));
  }
  BITWRIGHT_FORCE Floats floats() const { return _mm512_cvtepi32_ps(value); }
};
#else
// As in matmul_avx2.cpp.
template <int BITS>
struct Avx512::Sum {
  __m512i value = _mm512_setzero_si512();

  static BITWRIGHT_FORCE __m512i widened(__m512i pairs, short factor) {
    return _mm512_madd_epi16(pairs, _mm512_set1_epi16(factor));
  }
  template <int I>
  BITWRIGHT_FORCE void add(Codes codes, const std::int8_t* x) {
    std::int32_t four;
    std::memcpy(&four, x + 4 * I, 4);
    const __m512i inputs = _mm512_set1_epi32(four);
    if constexpr (BITS <= 4) {
      value = _mm512_add_epi16(value, _mm512_maddubs_epi16(codes, inputs));
    } else if constexpr (BITS < 8) {
      value = _mm512_add_epi32(value, widened(_mm512_maddubs_epi16(codes, inputs), 1));
    } else {
      const __m512i low = _mm512_maddubs_epi16(mask(codes, 15), inputs);
      const __m512i high = _mm512_maddubs_epi16(mask(shift<4>(codes), 15), inputs);
      value = _mm512_add_epi32(value, _mm512_add_epi32(widened(low, 1), widened(high, 16)));
    }
  }
  BITWRIGHT_FORCE Floats floats() const { return _mm512_cvtepi32_ps(BITS <= 4 ? widened(value, 1) : value); }
};
#endif

}  // namespace
}  // namespace bitwright
