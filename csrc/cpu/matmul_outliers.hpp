// Outliers times inputs packed as floats, beside the products of codes with int8. As matmul_kernel.hpp, which includes
// it and says what `V` is, compiled once for every instruction set.
#pragma once

#include "matmul_inputs.hpp"

namespace bitwright {
namespace {

// kept [TILE][MR] += x [columns][MR] times `value`, at `place` = column * TILE + lane.
template <class V, int MR>
BITWRIGHT_FORCE void add_outlier(unsigned place, float value, const float* x, float* kept) {
  constexpr int WIDTH = MR < V::LANES ? MR : V::LANES;
  typedef float Inputs __attribute__((vector_size(4 * WIDTH)));
  const float* from = x + static_cast<std::size_t>(place / TILE) * MR;
  float* to = kept + place % TILE * MR;
  for (int m = 0; m < MR; m += WIDTH) {
    if constexpr (WIDTH == V::LANES) {
      V::store(to + m, V::fma(V::set(value), V::load(from + m), V::load(to + m)));
    } else {
      Inputs input, sum;
      std::memcpy(&input, from, sizeof input);
      std::memcpy(&sum, to, sizeof sum);
      sum += input * value;
      std::memcpy(to, &sum, sizeof sum);
    }
  }
}

// Where panels have few outliers, on average no more than FEW, loops over each one's own would end where no processor
// expects it: they are put into one row first, PLACES_STEP at a time.
constexpr int FEW = 8, MOST_PLACES = 512, PLACES_STEP = 16;

// Places of a tile's outliers, counted from its first column. What `places` has room for beyond them is overwritten.
BITWRIGHT_FORCE void whole_places(const PackedMatrix& w, const std::int32_t* start, std::uint32_t* places) {
  std::uint32_t offset = 0;
  for (std::int64_t panel = 0; panel < w.panels; ++panel, offset += PANEL_COLUMNS * TILE) {
    std::int32_t next = start[panel];
    do {
      for (int i = 0; i < PLACES_STEP; ++i) places[next - start[0] + i] = offset + w.outlier_place[next + i];
      next += PLACES_STEP;
    } while (next < start[panel + 1]);
  }
}

// y [MR][TILE] += kept [TILE][MR].
template <int MR>
BITWRIGHT_FORCE void add_turned(const float* kept, float* y) {
  alignas(64) float turned[MR * TILE];
  if constexpr (MR >= 4) {
    for (int lane = 0; lane < TILE; lane += 4) {
      const float* from[4];
      for (int i = 0; i < 4; ++i) from[i] = kept + (lane + i) * MR;
      for (int m = 0; m < MR; m += 4) transpose_four(from, m, TILE, turned + lane);
    }
  } else {
    for (int m = 0; m < MR; ++m) {
      for (int lane = 0; lane < TILE; ++lane) turned[m * TILE + lane] = kept[lane * MR + m];
    }
  }
  for (int i = 0; i < MR * TILE; ++i) y[i] += turned[i];
}

// The next tile's outliers, taken to be as many: too few for the processor to see a stream in them.
BITWRIGHT_FORCE void fetch_next(const PackedMatrix& w, const std::int32_t* start) {
  constexpr int LINE = 64;
  const std::int32_t first = start[w.panels], end = 2 * first - start[0];
  for (std::int32_t i = first; i < end; i += LINE / 4) __builtin_prefetch(w.outlier_value + i);
  for (std::int32_t i = first; i < end; i += LINE / 2) __builtin_prefetch(w.outlier_place + i);
  for (std::int64_t i = w.panels; i < 2 * w.panels; i += LINE / 4) __builtin_prefetch(start + i);
}

// Sums over outliers are kept as [TILE][MR], so that each takes one vector of inputs.
template <class V, int MR>
void multiply_outliers_rows(const PackedMatrix& w, std::int64_t tile, const float* x, float* y) {
  alignas(64) float kept[TILE * MR] = {};
  const std::int32_t *start = w.outlier_start + tile * w.panels, end = start[w.panels], count = end - start[0];
  const bool few = count <= MOST_PLACES && count <= FEW * w.panels;
  fetch_next(w, start);
  if (few && end + PLACES_STEP <= w.outlier_start[w.tiles * w.panels]) {
    alignas(64) std::uint32_t places[MOST_PLACES + PLACES_STEP];
    whole_places(w, start, places);
    const float* values = w.outlier_value + start[0];
    for (int i = 0; i < count; ++i) add_outlier<V, MR>(places[i], values[i], x, kept);
  } else {
    for (std::int64_t panel = 0; panel < w.panels; ++panel, x += PANEL_COLUMNS * MR) {
      for (std::int32_t i = start[panel]; i < start[panel + 1]; ++i) {
        add_outlier<V, MR>(w.outlier_place[i], w.outlier_value[i], x, kept);
      }
    }
  }
  add_turned<MR>(kept, y);
}

}  // namespace
}  // namespace bitwright
