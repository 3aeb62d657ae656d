// Rows are independent given the factor, so a tile of rows is one vector per column: the tile is transposed into a
// buffer [width][LANES], where rounding and error feedback run over its rows at once.
#include "columns.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "targets.hpp"

namespace bitwright {
namespace {

// Rows of a tile, one a lane: as many as one AVX-512 register holds, and several registers of the others.
constexpr int LANES = 16;
// Rows that share one pass over the Hessian, so that each of its rows is read from memory once per tile.
constexpr std::int64_t REFINE_ROWS = 8;
// A thread is worth starting for this many multiplications, a third of a millisecond, or more: for less it mostly
// gets in the way of PyTorch's own threads, which go on spinning for a while after each operation.
constexpr double WORK_PER_THREAD = 1 << 22;
// Adding and taking away 1.5 * 2^23 rounds half to even for values below 2^22, on every instruction set alike.
constexpr float ROUNDER = 12582912.0f;

int useful_threads(int threads, std::int64_t tiles, double work) {
  const double most = std::min(static_cast<double>(tiles), 1.0 + work / WORK_PER_THREAD);
  return static_cast<int>(std::max(1.0, std::min(static_cast<double>(threads), most)));
}

// Nearest code of a position on the grid, for floats or vectors of them. Clamping first gives the same code, as the
// bounds are integers, and keeps the value in the range of ROUNDER. NaN gives 0.
template <class Value>
BITWRIGHT_INLINE void round_code(const Value& position, const Value& max_code, Value& code) {
  const Value low = position > 0.0f ? position : Value{};
  const Value inside = low < max_code ? low : max_code;
  code = (inside + ROUNDER) - ROUNDER;
}

// One worker's buffers, [width][LANES] each; codes and outliers as floats, so that all of them are vectors alike.
struct Tile {
  explicit Tile(std::size_t width) : target(width * LANES), error(target), codes(target), outlier(target) {}
  std::vector<float> target;
  std::vector<float> error;
  std::vector<float> codes;
  std::vector<float> outlier;
};

// Rows [first, first + rows) of a matrix into a tile; lanes without a row are zero.
template <class Value>
BITWRIGHT_INLINE void load_rows(const Value* matrix, std::int64_t width, std::int64_t first, int rows, float* tile) {
  for (std::int64_t column = 0; column < width; ++column) {
    for (int lane = 0; lane < LANES; ++lane) {
      tile[column * LANES + lane] = lane < rows ? static_cast<float>(matrix[(first + lane) * width + column]) : 0.0f;
    }
  }
}

template <class Value>
BITWRIGHT_INLINE void store_rows(const float* tile, std::int64_t width, std::int64_t first, int rows, Value* matrix) {
  for (int lane = 0; lane < rows; ++lane) {
    Value* row = matrix + (first + lane) * width;
    const float* values = tile + lane;
    for (std::int64_t column = 0; column < width; ++column) row[column] = static_cast<Value>(values[column * LANES]);
  }
}

// What the rows of a tile share over its columns; lanes without a row compute harmless zeros.
struct Lanes {
  float scale[LANES];
  float zero[LANES];
  float limit[LANES];
  float poison[LANES];  // zero until a value that is not finite comes up, NaN from then on

  BITWRIGHT_INLINE Lanes(const float* limits, int rows) {
    for (int lane = 0; lane < LANES; ++lane) {
      scale[lane] = 1.0f;
      zero[lane] = 0.0f;
      limit[lane] = limits != nullptr && lane < rows ? limits[lane] : std::numeric_limits<float>::infinity();
      poison[lane] = 0.0f;
    }
  }

  BITWRIGHT_INLINE void load_group(const ColumnGrid& grid, std::int32_t group, std::int64_t first, int rows) {
    for (int lane = 0; lane < rows; ++lane) {
      scale[lane] = grid.scale[(first + lane) * grid.groups + group];
      zero[lane] = grid.zero[(first + lane) * grid.groups + group];
    }
  }
};

// Rounds WIDTH lanes, from `lane` on, of the column at `at` = column * LANES. Outliers so far are the mask's.
template <int WIDTH>
BITWRIGHT_INLINE void round_lanes(Tile& tile, std::int64_t at, int lane, float diagonal, float max_code, Lanes& lanes) {
  using Floats = typename Simd<WIDTH>::Floats;
  const Floats target = vector_at<WIDTH>(tile.target.data() + at + lane);
  const Floats scale = vector_at<WIDTH>(lanes.scale + lane);
  const Floats zero = vector_at<WIDTH>(lanes.zero + lane);
  const Floats limit = vector_at<WIDTH>(lanes.limit + lane);
  const Floats masked = vector_at<WIDTH>(tile.outlier.data() + at + lane);
  const Floats position = target / scale + zero;
  Floats code;
  round_code(position, Floats{} + max_code, code);
  const Floats difference = (target - scale * (code - zero)) / diagonal;
  const Floats outlier = difference * difference > limit ? Floats{} + 1.0f : masked;
  const Floats error = outlier > 0.0f ? Floats{} : difference;
  vector_at<WIDTH>(lanes.poison + lane) +=
      (position - position) + (target - target) + (error - error) + (diagonal - diagonal);
  vector_at<WIDTH>(tile.codes.data() + at + lane) = code;
  vector_at<WIDTH>(tile.outlier.data() + at + lane) = outlier;
  vector_at<WIDTH>(tile.error.data() + at + lane) = error;
}

// Takes the error of the column at `from`, times each of `count` factors, from the columns after it.
template <int WIDTH>
BITWRIGHT_INLINE void pass_on(Tile& tile, std::int64_t from, const float* factor, std::int64_t count) {
  constexpr int PARTS = LANES / WIDTH;
  typename Simd<WIDTH>::Floats error[PARTS];
  for (int part = 0; part < PARTS; ++part) error[part] = vector_at<WIDTH>(tile.error.data() + from + part * WIDTH);
  float* target = tile.target.data() + from + LANES;
  for (std::int64_t later = 0; later < count; ++later, target += LANES) {
    for (int part = 0; part < PARTS; ++part) vector_at<WIDTH>(target + part * WIDTH) -= error[part] * factor[later];
  }
}

// Rounds rows [first, first + LANES) of the task, as far as there are; false if a value was not finite.
template <int WIDTH>
BITWRIGHT_INLINE bool round_tile(const RoundTask& task, std::int64_t first, Tile& tile) {
  const int rows = static_cast<int>(std::min<std::int64_t>(LANES, task.out - first));
  const std::int64_t width = task.width;
  const std::int32_t* group = task.grid.group;
  load_rows(task.weight, width, first, rows, tile.target.data());
  if (task.mask != nullptr) {
    load_rows(task.mask, width, first, rows, tile.outlier.data());
  } else {
    std::fill(tile.outlier.begin(), tile.outlier.end(), 0.0f);
  }
  Lanes lanes(task.limit == nullptr ? nullptr : task.limit + first, rows);
  for (std::int64_t column = 0; column < width; ++column) {
    if (column == 0 || group[column] != group[column - 1]) lanes.load_group(task.grid, group[column], first, rows);
    const float* factor = task.factor + column * width + column;
    for (int lane = 0; lane < LANES; lane += WIDTH) {
      round_lanes<WIDTH>(tile, column * LANES, lane, *factor, task.grid.max_code, lanes);
    }
    pass_on<WIDTH>(tile, column * LANES, factor + 1, width - column - 1);
  }
  store_rows(tile.codes.data(), width, first, rows, task.codes);
  store_rows(tile.target.data(), width, first, rows, task.target);
  store_rows(tile.error.data(), width, first, rows, task.error);
  store_rows(tile.outlier.data(), width, first, rows, task.outlier);
  return std::all_of(lanes.poison, lanes.poison + LANES, [](float value) { return value == 0.0f; });
}

// One column of one row: true if a change was accepted.
BITWRIGHT_INLINE bool refine_one(const RefineTask& task, std::int64_t row, std::int64_t column) {
  const std::int64_t at = row * task.in + column;
  if (task.frozen != nullptr && task.frozen[at] != 0) return false;
  const float* __restrict__ hessian = task.hessian + column * task.in;
  float* __restrict__ gradient = task.gradient + row * task.in;
  const float scale = task.grid.scale[row * task.grid.groups + task.grid.group[column]];
  const float zero = task.grid.zero[row * task.grid.groups + task.grid.group[column]];
  const float decoded = scale * (static_cast<float>(task.codes[at]) - zero);
  const float best = decoded + gradient[column] / hessian[column];
  float code;
  round_code(best / scale + zero, task.grid.max_code, code);
  const float step = scale * (code - zero) - decoded;
  const float curvature = step * step * hessian[column];
  if (!(2.0f * (step * gradient[column]) - curvature > curvature * task.margin)) return false;
  task.codes[at] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
  for (std::int64_t other = 0; other < task.in; ++other) gradient[other] -= step * hessian[other];
  return true;
}

BITWRIGHT_INLINE void refine_tile(const RefineTask& task, std::int64_t first) {
  const std::int64_t end = std::min(first + REFINE_ROWS, task.out);
  for (int sweep = 0; sweep < task.sweeps; ++sweep) {
    bool changed = false;
    for (std::int64_t column = 0; column < task.in; ++column) {
      // A column without curvature was never seen in calibration: nothing can be gained there.
      if (!(task.hessian[column * task.in + column] > 0.0f)) continue;
      for (std::int64_t row = first; row < end; ++row) changed |= refine_one(task, row, column);
    }
    if (!changed) return;
  }
}

// The bodies above, once per instruction set.
using RoundRows = bool (*)(const RoundTask&, std::int64_t, Tile&);
using RefineRows = void (*)(const RefineTask&, std::int64_t);

bool round_baseline(const RoundTask& task, std::int64_t first, Tile& tile) { return round_tile<4>(task, first, tile); }
void refine_baseline(const RefineTask& task, std::int64_t first) { refine_tile(task, first); }

#if defined(__x86_64__)
BITWRIGHT_AVX2 bool round_avx2(const RoundTask& task, std::int64_t first, Tile& tile) {
  return round_tile<8>(task, first, tile);
}
BITWRIGHT_AVX512 bool round_avx512(const RoundTask& task, std::int64_t first, Tile& tile) {
  return round_tile<16>(task, first, tile);
}
BITWRIGHT_AVX2 void refine_avx2(const RefineTask& task, std::int64_t first) { refine_tile(task, first); }
BITWRIGHT_AVX512 void refine_avx512(const RefineTask& task, std::int64_t first) { refine_tile(task, first); }

constexpr RoundRows ROUND[] = {round_baseline, round_avx2, round_avx512};
constexpr RefineRows REFINE[] = {refine_baseline, refine_avx2, refine_avx512};
#else
constexpr RoundRows ROUND[] = {round_baseline};
constexpr RefineRows REFINE[] = {refine_baseline};
#endif

}  // namespace

bool round_columns(const RoundTask& task, Isa isa, int threads) {
  const std::int64_t tiles = (task.out + LANES - 1) / LANES;
  const double work = 0.5 * static_cast<double>(task.out) * static_cast<double>(task.width) * (task.width + 32.0);
  threads = useful_threads(threads, tiles, work);
  std::vector<Tile> buffers;
  buffers.reserve(static_cast<std::size_t>(threads));
  for (int worker = 0; worker < threads; ++worker) buffers.emplace_back(static_cast<std::size_t>(task.width));
  std::atomic<bool> finite{true};
  const RoundRows round_rows = ROUND[static_cast<int>(isa)];
  parallel_tiles(tiles, threads, [&](std::int64_t tile, int worker) {
    if (!round_rows(task, tile * LANES, buffers[static_cast<std::size_t>(worker)])) finite = false;
  });
  return finite;
}

void refine_codes(const RefineTask& task, Isa isa, int threads) {
  const std::int64_t tiles = (task.out + REFINE_ROWS - 1) / REFINE_ROWS;
  // Some tenth of the codes change, each of which updates a row of the gradient; looking at one costs 64 at any rate.
  const double work = static_cast<double>(task.out) * static_cast<double>(task.in) * (0.1 * task.in + 64.0);
  const RefineRows refine_rows = REFINE[static_cast<int>(isa)];
  parallel_tiles(tiles, useful_threads(threads, tiles, work),
                 [&](std::int64_t tile, int) { refine_rows(task, tile * REFINE_ROWS); });
}

}  // namespace bitwright
