// Error feedback over columns (GPTQ, SpQR) and coordinate descent on codes. See src/bitwright/rounding/columns.py for
// the arithmetic: it holds the PyTorch reference, which agrees with these kernels bit for bit. Matrices are row-major
// and contiguous; the caller has checked shapes, types, and that every group index is inside the grid.
#pragma once

#include <cstdint>

#include "targets.hpp"

namespace bitwright {

// The grid of every column: column j of row r decodes as scale[r, group[j]] * (code - zero[r, group[j]]).
struct ColumnGrid {
  const float* scale;         // [out, groups]
  const float* zero;          // [out, groups]
  const std::int32_t* group;  // [width]
  std::int64_t groups;
  float max_code;
};

struct RoundTask {
  const float* weight;       // [out, width]
  const float* factor;       // [width, width], upper triangle
  const float* limit;        // [out] or null
  const std::uint8_t* mask;  // [out, width] or null
  ColumnGrid grid;
  std::uint8_t* codes;    // [out, width]
  float* target;          // [out, width]
  float* error;           // [out, width]
  std::uint8_t* outlier;  // [out, width]
  std::int64_t out;
  std::int64_t width;
};

struct RefineTask {
  std::uint8_t* codes;         // [out, in], changed in place
  float* gradient;             // [out, in], residual @ hessian, changed in place
  const float* hessian;        // [in, in], symmetric
  const std::uint8_t* frozen;  // [out, in] or null
  ColumnGrid grid;
  float margin;  // a change must lower the objective by more than this share of its curvature term
  int sweeps;
  std::int64_t out;
  std::int64_t in;
};

// Rounds every column in order. False: a value that is not finite came up, and the results mean nothing.
bool round_columns(const RoundTask& task, Isa isa, int threads);

// Sweeps over the columns; every accepted change lowers its row's objective.
void refine_codes(const RefineTask& task, Isa isa, int threads);

}  // namespace bitwright
