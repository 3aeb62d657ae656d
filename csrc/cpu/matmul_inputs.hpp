// Inputs of the matmul kernels: rows of x packed in blocks, as floats or in int8. As matmul_kernel.hpp, which includes
// it, compiled once for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "matmul.hpp"

#define BITWRIGHT_FORCE inline __attribute__((always_inline))

namespace bitwright {
namespace {

// Adding and taking away 1.5 * 2^23 rounds half to even for values below 2^22.
constexpr float ROUNDER = 12582912.0f;
// Inputs below this are taken as 0 in int8: the reciprocal of their step would overflow.
constexpr float SMALLEST = 1e-30f;

template <class Body, int... I>
BITWRIGHT_FORCE void unrolled_over(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

template <int COUNT, class Body>
BITWRIGHT_FORCE void unrolled(const Body& body) {
  unrolled_over(body, std::make_integer_sequence<int, COUNT>{});
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Where a chunk of a row of x is: in place if that is a whole one, else copied to `values` and padded with 0.
BITWRIGHT_FORCE const float* chunk_values(const PackedMatrix& w, const float* row, std::int64_t chunk, float* values) {
  const std::int64_t width = w.group_width;
  if (w.aligned && (chunk + 1) * CHUNK <= w.in) return row + chunk * CHUNK;
  std::memset(values, 0, CHUNK * sizeof(float));
  if (w.aligned) {
    for (std::int64_t j = 0; j < w.in - chunk * CHUNK; ++j) values[j] = row[chunk * CHUNK + j];
  } else if (w.group_chunks == 0) {
    for (int half = 0; half < 2; ++half) {
      const std::int64_t first = (2 * chunk + half) * width, count = smaller(width, w.in - first);
      for (std::int64_t j = 0; j < count; ++j) values[half * (CHUNK / 2) + j] = row[first + j];
    }
  } else {
    const std::int64_t group = chunk / w.group_chunks, offset = chunk % w.group_chunks * CHUNK;
    const std::int64_t first = group * width + offset;
    const std::int64_t count = smaller(smaller(CHUNK, width - offset), w.in - first);
    for (std::int64_t j = 0; j < count; ++j) values[j] = row[first + j];
  }
  return values;
}

typedef float Four __attribute__((vector_size(16)));
typedef std::int32_t FourPlaces __attribute__((vector_size(16)));

#if defined(__clang__)
#define BITWRIGHT_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define BITWRIGHT_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (FourPlaces{i, j, k, l}))
#endif

// Four columns of four rows, to [column][mr].
BITWRIGHT_FORCE void transpose_four(const float* const* rows, int column, int mr, float* packed) {
  Four r[4];
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], rows[m] + column, sizeof(Four));
  const Four low01 = BITWRIGHT_SHUFFLE(r[0], r[1], 0, 4, 1, 5), high01 = BITWRIGHT_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const Four low23 = BITWRIGHT_SHUFFLE(r[2], r[3], 0, 4, 1, 5), high23 = BITWRIGHT_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  Four columns[4];
  columns[0] = BITWRIGHT_SHUFFLE(low01, low23, 0, 1, 4, 5);
  columns[1] = BITWRIGHT_SHUFFLE(low01, low23, 2, 3, 6, 7);
  columns[2] = BITWRIGHT_SHUFFLE(high01, high23, 0, 1, 4, 5);
  columns[3] = BITWRIGHT_SHUFFLE(high01, high23, 2, 3, 6, 7);
  for (int j = 0; j < 4; ++j) std::memcpy(packed + (column + j) * mr, &columns[j], sizeof(Four));
}

void pack_rows(const PackedMatrix& w, const float* x, int rows, int mr, float* packed) {
  alignas(64) float values[4][CHUNK];
  alignas(64) const float zeros[CHUNK] = {};
  for (std::int64_t chunk = 0; chunk < w.chunks; ++chunk, packed += CHUNK * mr) {
    for (int first = 0; first < mr; first += 4) {
      const float* from[4];
      for (int m = 0; m < 4; ++m) {
        from[m] = first + m < rows ? chunk_values(w, x + (first + m) * w.in, chunk, values[m]) : zeros;
      }
      if (mr >= 4) {
        for (int column = 0; column < CHUNK; column += 4) transpose_four(from, column, mr, packed + first);
      } else {
        for (int m = 0; m < mr; ++m) {
          for (int j = 0; j < CHUNK; ++j) packed[j * mr + m] = from[m][j];
        }
      }
    }
  }
}

// Codes of one chunk of one row, the sum of each half, and their step; NaN if a value is not finite.
inline float quantize_plain(const float* values, std::int8_t* codes, std::int32_t* sums) {
  float largest = 0.0f, poison = 0.0f;
  for (int j = 0; j < CHUNK; ++j) {
    const float size = values[j] < 0.0f ? -values[j] : values[j];
    largest = size > largest ? size : largest;
    poison += values[j] - values[j];
  }
  const float inverse = largest > SMALLEST ? 127.0f / largest : 0.0f;
  for (int half = 0; half < 2; ++half) {
    std::int32_t sum = 0;
    for (int j = half * (CHUNK / 2); j < (half + 1) * (CHUNK / 2); ++j) {
      const float place = values[j] * inverse;
      // NaN becomes -127; without it the bounds change nothing.
      const float low = place > -127.0f ? place : -127.0f, inside = low < 127.0f ? low : 127.0f;
      const std::int32_t code = static_cast<std::int32_t>((inside + ROUNDER) - ROUNDER);
      codes[j] = static_cast<std::int8_t>(code);
      sum += code;
    }
    sums[half] = sum;
  }
  return (largest > SMALLEST ? largest / 127.0f : 0.0f) + poison;
}

#if defined(__AVX2__)
// Sums of both halves of a chunk's codes.
BITWRIGHT_FORCE void sum_codes(__m256i codes, std::int32_t* sums) {
  // Moved to 0 .. 255, whose sums there is an instruction for.
  const __m256i moved = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  const __m256i eights = _mm256_sad_epu8(moved, _mm256_setzero_si256());
  const __m256i both = _mm256_add_epi64(eights, _mm256_bsrli_epi128(eights, 8));
  sums[0] = _mm256_extract_epi32(both, 0) - 128 * (CHUNK / 2);
  sums[1] = _mm256_extract_epi32(both, 4) - 128 * (CHUNK / 2);
}

// The largest of eight, none of them NaN.
BITWRIGHT_FORCE float largest_of(__m256 values) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
#endif

template <class V>
void quantize_rows(const PackedMatrix& w, const float* x, int rows, int mr, const Quantized& q) {
  alignas(64) float values[CHUNK];
  alignas(64) std::int8_t codes[CHUNK];
  std::memset(q.sum, 0, static_cast<std::size_t>(w.padded_groups * mr) * sizeof(float));
  for (std::int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    for (int m = 0; m < mr; ++m) {
      std::int32_t sums[2] = {0, 0};
      float scale = 0.0f;
      if (m < rows) {
        scale = V::quantize(chunk_values(w, x + m * w.in, chunk, values), codes, sums);
      } else {
        std::memset(codes, 0, sizeof codes);
      }
      q.scale[chunk * mr + m] = scale;
      if (w.group_chunks == 0) {
        q.sum[2 * chunk * mr + m] = static_cast<float>(sums[0]);
        q.sum[(2 * chunk + 1) * mr + m] = static_cast<float>(sums[1]);
      } else {
        q.sum[chunk / w.group_chunks * mr + m] += scale * static_cast<float>(sums[0] + sums[1]);
      }
      for (int quad = 0; quad < QUADS; ++quad) {
        std::memcpy(q.codes + ((chunk * QUADS + quad) * mr + m) * 4, codes + quad * 4, 4);
      }
    }
  }
}

}  // namespace
}  // namespace bitwright
