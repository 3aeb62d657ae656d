// Vectors of four lanes in the compiler's own vector types: SSE2 and NEON, or whatever the target has.
#include "matmul_kernel.hpp"

namespace bitwright {
namespace {

struct Baseline {
  static constexpr int LANES = 4;
  static constexpr int FAST_ROWS = 2;
  static constexpr int EXACT_ROWS = 8;
  typedef float Floats __attribute__((vector_size(16)));
  typedef std::uint32_t Codes __attribute__((vector_size(16)));
  typedef std::int32_t Integers __attribute__((vector_size(16)));

  template <class Vector, class Element>
  static BITWRIGHT_FORCE Vector read(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
  }

  static BITWRIGHT_FORCE Floats zero() { return Floats{}; }
  static BITWRIGHT_FORCE Floats set(float value) { return Floats{value, value, value, value}; }
  static BITWRIGHT_FORCE Floats load(const float* from) { return read<Floats>(from); }
  static BITWRIGHT_FORCE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
  static BITWRIGHT_FORCE Floats add(Floats a, Floats b) { return a + b; }
  static BITWRIGHT_FORCE Floats sub(Floats a, Floats b) { return a - b; }
  static BITWRIGHT_FORCE Floats mul(Floats a, Floats b) { return a * b; }
  static BITWRIGHT_FORCE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static BITWRIGHT_FORCE Floats fnma(Floats a, Floats b, Floats c) { return c - a * b; }
  template <int I>
  static BITWRIGHT_FORCE Floats fma_of(Floats a, const float* inputs, Floats c) {
    return fma(a, set(inputs[I]), c);
  }

  static BITWRIGHT_FORCE float half(std::uint16_t stored) {
    // The exponent moves from a bias of 15 to one of 127; the product makes subnormal halves normal.
    const std::uint32_t sized = static_cast<std::uint32_t>(stored & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &sized, 4);
    value *= 0x1p112f;
    return (stored & 0x8000) != 0 ? -value : value;
  }
  static BITWRIGHT_FORCE Floats halves(const std::uint16_t* from) {
    return Floats{half(from[0]), half(from[1]), half(from[2]), half(from[3])};
  }
  static BITWRIGHT_FORCE Floats bytes(const std::uint8_t* from) {
    return Floats{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
  }
  static BITWRIGHT_FORCE void nibbles(const std::uint8_t* from, Floats& low, Floats& high) {
    low = Floats{float(from[0] & 15), float(from[1] & 15), float(from[2] & 15), float(from[3] & 15)};
    high = Floats{float(from[0] >> 4), float(from[1] >> 4), float(from[2] >> 4), float(from[3] >> 4)};
  }

  static BITWRIGHT_FORCE Codes load(const std::uint8_t* from) { return read<Codes>(from); }
  template <int COUNT>
  static BITWRIGHT_FORCE Codes shift(Codes codes) {
    return COUNT >= 0 ? codes >> (COUNT >= 0 ? COUNT : 0) : codes << (COUNT >= 0 ? 0 : -COUNT);
  }
  static BITWRIGHT_FORCE Codes mask(Codes codes, int byte) {
    return codes & (static_cast<unsigned>(byte) * 0x01010101u);
  }
  template <int FIRST, int COUNT>
  static BITWRIGHT_FORCE Codes field(Codes codes) {
    return mask(shift<FIRST>(codes), (1 << COUNT) - 1);
  }
  static BITWRIGHT_FORCE Codes merge(Codes first, Codes second, int byte) { return first | mask(second, byte); }
  template <int J>
  static BITWRIGHT_FORCE Floats byte_floats(Codes codes) {
    return __builtin_convertvector((Integers)((codes >> (8 * J)) & 255u), Floats);
  }

  static BITWRIGHT_FORCE float quantize(const float* values, std::int8_t* codes, std::int32_t* sums) {
    return quantize_plain(values, codes, sums);
  }

  template <int BITS>
  struct Sum {
    Integers value{};
    template <int I>
    BITWRIGHT_FORCE void add(Codes codes, const std::int8_t* x) {
      unrolled<4>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        value += (Integers)((codes >> (8 * J)) & 255u) * static_cast<std::int32_t>(x[4 * I + J]);
      });
    }
    BITWRIGHT_FORCE Floats floats() const { return __builtin_convertvector(value, Floats); }
  };
};

}  // namespace

const MatmulKernels& matmul_kernels_baseline() {
  static constexpr MatmulKernels kernels = table<Baseline>();
  return kernels;
}

}  // namespace bitwright
