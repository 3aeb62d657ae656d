// Vectors of sixteen floats for what lies between the products of a decode step. On narrower instruction sets one is
// several registers, so that sums keep their order: every instruction set computes the same bits.
//
// Included by one file for each instruction set, compiled with that set's flags (in functions that only get an
// instruction set's attribute, GCC takes such vectors apart before it inlines them): all is in an unnamed namespace and
// no function of the standard library is called, as in matmul_kernel.hpp.
#pragma once

#include <cstdint>
#include <utility>

#include "targets.hpp"

namespace bitwright {
namespace {

constexpr int LANES = 16;

template <class Body, int... I>
BITWRIGHT_INLINE void each_of(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// body(integral_constant) for 0 .. COUNT - 1, written out.
template <int COUNT, class Body>
BITWRIGHT_INLINE void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, COUNT>{});
}

// e^x as sixteen lanes or fewer: x = n ln 2 + r, a polynomial of r, and n in the exponent. Within 1.5 units in the last
// place; 0 below EXP_LEAST, that of EXP_MOST above it, NaN of NaN.
constexpr float EXP_LEAST = -87.0f, EXP_MOST = 88.0f;

template <int WIDTH>
BITWRIGHT_INLINE void exponential(typename Simd<WIDTH>::Floats& x) {
  using Floats = typename Simd<WIDTH>::Floats;
  typedef std::uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
  // Adding and taking away 1.5 * 2^23 rounds to an integer, which meanwhile stands in the lowest bits.
  constexpr float ROUNDER = 12582912.0f, LOG2_E = 1.44269504f;
  // ln 2 in two parts, so that n times the first is exact.
  constexpr float LN2_HIGH = 355.0f / 512.0f, LN2_LOW = -2.12194440e-4f;
  // (e^r - 1 - r) / r^2 where |r| <= ln 2 / 2, fitted for the least largest error relative to e^r: 2^-28.
  constexpr float C[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.123a20p-7f, 0x1.6a23cep-10f};
  const Floats zero{}, low = x < EXP_LEAST ? zero + EXP_LEAST : x, inside = low > EXP_MOST ? zero + EXP_MOST : low;
  const Floats shifted = inside * LOG2_E + ROUNDER, n = shifted - ROUNDER;
  const Floats r = (inside - n * LN2_HIGH) - n * LN2_LOW;
  const Floats curve = (((C[4] * r + C[3]) * r + C[2]) * r + C[1]) * r + C[0];
  const Floats power = (curve * (r * r) + r) + 1.0f;
  const Floats scaled = (Floats)((Bits)power + ((Bits)shifted << 23));
  const Floats bounded = x < EXP_LEAST ? zero : scaled;
  x = x == x ? bounded : x;
}

template <int WIDTH>
struct Lanes {
  using Floats = typename Simd<WIDTH>::Floats;
  static constexpr int PARTS = LANES / WIDTH;

  BITWRIGHT_INLINE void set(float value) {
    // Taken from, since -0 + 0 is 0.
    each<PARTS>([&](auto i) __attribute__((always_inline)) { part[i] = value - Floats{}; });
  }
  BITWRIGHT_INLINE void load(const float* from) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) {
      part[i] = vector_at<WIDTH>(const_cast<float*>(from) + i * WIDTH);
    });
  }
  BITWRIGHT_INLINE void store(float* to) const {
    each<PARTS>([&](auto i) __attribute__((always_inline)) { vector_at<WIDTH>(to + i * WIDTH) = part[i]; });
  }
  BITWRIGHT_INLINE void add(const Lanes& other) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) { part[i] += other.part[i]; });
  }
  BITWRIGHT_INLINE void multiply(float factor) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) { part[i] *= factor; });
  }
  BITWRIGHT_INLINE void add_product(const Lanes& a, const Lanes& b) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) { part[i] += a.part[i] * b.part[i]; });
  }
  BITWRIGHT_INLINE void add_product(const Lanes& a, float b) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) { part[i] += a.part[i] * b; });
  }
  // The larger of each lane; NaN of `other` is passed over.
  BITWRIGHT_INLINE void raise_to(const Lanes& other) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) {
      part[i] = other.part[i] > part[i] ? other.part[i] : part[i];
    });
  }
  // Each lane to e^(lane - shift).
  BITWRIGHT_INLINE void exponentiate(float shift) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) {
      part[i] -= shift;
      exponential<WIDTH>(part[i]);
    });
  }
  // x / (1 + e^-x) of each lane x, times `factor`.
  BITWRIGHT_INLINE void silu_times(const Lanes& factor) {
    each<PARTS>([&](auto i) __attribute__((always_inline)) {
      Floats power = -part[i];
      exponential<WIDTH>(power);
      part[i] = part[i] / (power + 1.0f) * factor.part[i];
    });
  }
  BITWRIGHT_INLINE float sum() const {
    float lanes[LANES];
    store(lanes);
    for (int half = LANES / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }
  BITWRIGHT_INLINE float largest() const {
    float lanes[LANES];
    store(lanes);
    for (int half = LANES / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        lanes[lane] = lanes[lane + half] > lanes[lane] ? lanes[lane + half] : lanes[lane];
      }
    }
    return lanes[0];
  }

  Floats part[PARTS];
};

}  // namespace
}  // namespace bitwright
