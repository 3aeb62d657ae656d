// Random weights in the kernels' layout, as src/bitwright/runtime/cpu.py makes it, and what they decode to.
#pragma once

#include <string>
#include <vector>

#include "exact.hpp"
#include "matmul.hpp"

namespace bitwright::testing {

// How scales and zeros are stored: Python's combinations, all of them.
enum class Kind { symmetric_half, symmetric_float, byte_zero, half_zero, float_zero, byte_zero_float, levels };

struct Layout {
  const char* name;
  std::int64_t out, in;
  std::int64_t group_width;
  Kind kind;
  double outlier_share;
  int outlier_columns = 0;  // the first so many are outliers, all of them
};

struct Sample {
  PackedMatrix matrix{};
  Exact<std::uint8_t> codes;  // [tiles][chunks][bits * QUAD_BYTES], and not a byte more
  Exact<std::uint8_t> byte_scale, byte_zero;
  Exact<std::uint16_t> half_scale, half_zero, statistics;
  Exact<float> float_scale, float_zero;
  Exact<std::int32_t> outlier_start;
  Exact<std::uint16_t> outlier_place;
  Exact<float> outlier_value;
  // Row-major [out, in], from the definition alone: in float32 with one rounding an operation, and in double.
  std::vector<float> decoded;
  std::vector<double> weights;        // with outliers
  std::vector<double> grid_weights;   // without
};

// A weight whose codes have been through `repack_codes`; `odd` shifts every array by an element.
Sample make_sample(const Layout& layout, int bits, Random& random, bool odd, int threads = 1);

// Every instruction set of this machine, the baseline first, as far as this program was built with it.
struct NamedIsa {
  MatmulIsa isa;
  const char* name;
};
std::vector<NamedIsa> machine_isas();

}  // namespace bitwright::testing
