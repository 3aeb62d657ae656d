#include "sample.hpp"

#include <algorithm>

namespace bitwright::testing {
namespace {

double half_value(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

std::uint16_t half_bits(double value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  exponent = std::max(exponent - 1, -14);
  const auto fraction = static_cast<unsigned>(std::nearbyint(std::ldexp(std::fabs(value), 10 - exponent)));
  return static_cast<std::uint16_t>((value < 0 ? 0x8000u : 0u) + (static_cast<unsigned>(exponent + 14) << 10) +
                                    fraction);
}

// Scale and zero of every group, [out][groups], and the arrays of the layout from them.
struct Grid {
  std::vector<float> scale, zero;
};

std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

// One array of the layout, [tiles][groups][TILE]; rows that do not exist are 0.
template <class T, class Value>
Exact<T> tiled(const PackedMatrix& w, bool odd, const Value& value) {
  Exact<T> tensor(w.tiles * w.groups * TILE, odd);
  tensor.fill(T{});
  for (std::int64_t row = 0; row < w.out; ++row) {
    for (std::int64_t group = 0; group < w.groups; ++group) {
      tensor[(row / TILE * w.groups + group) * TILE + row % TILE] = value(row * w.groups + group);
    }
  }
  return tensor;
}

// A positive scale, now and then a subnormal half.
double any_scale(Random& random) { return random.below(50) == 0 ? 3e-6 : 0.001 + 0.02 * random.uniform(); }

Grid one_level(Sample& sample, Kind kind, bool odd, Random& random) {
  PackedMatrix& w = sample.matrix;
  const double max_code = (1 << w.bits) - 1;
  Grid grid;
  for (std::int64_t i = 0; i < w.out * w.groups; ++i) {
    const bool symmetric = kind == Kind::symmetric_half || kind == Kind::symmetric_float;
    const double scale = any_scale(random) * (symmetric && random.below(2) == 0 ? -1 : 1);
    const double zero = symmetric ? 1 << (w.bits - 1) : random.uniform() * (max_code + 2) - 1;
    const bool half = kind == Kind::symmetric_half || kind == Kind::byte_zero || kind == Kind::half_zero;
    grid.scale.push_back(static_cast<float>(half ? half_value(half_bits(scale)) : scale));
    const bool byte = kind == Kind::byte_zero || kind == Kind::byte_zero_float;
    const double stored_zero = byte ? std::clamp(std::nearbyint(zero), 0.0, max_code)
                                    : kind == Kind::half_zero ? half_value(half_bits(zero)) : zero;
    grid.zero.push_back(static_cast<float>(stored_zero));
  }
  const auto half_of = [](const std::vector<float>& values) {
    return [&values](std::int64_t i) { return half_bits(static_cast<double>(values[place(i)])); };
  };
  if (kind == Kind::symmetric_half || kind == Kind::byte_zero || kind == Kind::half_zero) {
    sample.half_scale = tiled<std::uint16_t>(w, odd, half_of(grid.scale));
    w.scale_kind = ScaleKind::float16;
    w.scale = sample.half_scale.get();
  } else {
    sample.float_scale = tiled<float>(w, odd, [&](std::int64_t i) { return grid.scale[place(i)]; });
    w.scale_kind = ScaleKind::float32;
    w.scale = sample.float_scale.get();
  }
  if (kind == Kind::half_zero) {
    sample.half_zero = tiled<std::uint16_t>(w, odd, half_of(grid.zero));
    w.zero_kind = ZeroKind::float16;
    w.zero = sample.half_zero.get();
  } else if (kind == Kind::float_zero) {
    sample.float_zero = tiled<float>(w, odd, [&](std::int64_t i) { return grid.zero[place(i)]; });
    w.zero_kind = ZeroKind::float32;
    w.zero = sample.float_zero.get();
  } else if (kind == Kind::byte_zero || kind == Kind::byte_zero_float) {
    sample.byte_zero =
        tiled<std::uint8_t>(w, odd, [&](std::int64_t i) { return static_cast<std::uint8_t>(grid.zero[place(i)]); });
    w.zero_kind = ZeroKind::byte;
    w.zero = sample.byte_zero.get();
  } else {
    w.zero_kind = ZeroKind::constant;
    w.constant_zero = static_cast<float>(1 << (w.bits - 1));
  }
  return grid;
}

// Codes of scale and zero of 4 bits each, over statistics of every tile.
Grid two_levels(Sample& sample, bool odd, Random& random) {
  PackedMatrix& w = sample.matrix;
  sample.statistics = Exact<std::uint16_t>(w.tiles * w.groups * 4, odd);
  for (std::int64_t i = 0; i < sample.statistics.size(); ++i) sample.statistics[i] = half_bits(any_scale(random));
  std::vector<std::uint8_t> both;
  Grid grid;
  for (std::int64_t row = 0; row < w.out; ++row) {
    for (std::int64_t group = 0; group < w.groups; ++group) {
      const int low = static_cast<int>(random.below(16)), high = static_cast<int>(random.below(16));
      const std::uint16_t* s = sample.statistics.get() + (row / TILE * w.groups + group) * 4;
      both.push_back(static_cast<std::uint8_t>(low | high << 4));
      // Exact in double, then rounded once.
      grid.scale.push_back(static_cast<float>(half_value(s[0]) + half_value(s[1]) * low));
      grid.zero.push_back(static_cast<float>(half_value(s[2]) + half_value(s[3]) * high));
    }
  }
  sample.byte_scale = tiled<std::uint8_t>(w, odd, [&](std::int64_t i) { return both[place(i)]; });
  w.scale_kind = ScaleKind::levels;
  w.zero_kind = ZeroKind::levels;
  w.scale = sample.byte_scale.get();
  w.statistics = sample.statistics.get();
  return grid;
}

// The native format's rows of bits, each padded to whole words.
Exact<std::uint32_t> bit_streams(const std::vector<std::uint8_t>& codes, const PackedMatrix& w, std::int64_t row_words,
                                 bool odd) {
  Exact<std::uint32_t> words(w.out * row_words, odd);
  words.fill(0);
  for (std::int64_t i = 0; i < w.out * w.in; ++i) {
    for (int bit = 0; bit < w.bits; ++bit) {
      const std::int64_t at = i % w.in * w.bits + bit;
      words[i / w.in * row_words + at / 32] |= static_cast<std::uint32_t>(codes[place(i)] >> bit & 1) << (at % 32);
    }
  }
  return words;
}

std::int64_t padded_column(const PackedMatrix& w, std::int64_t column) {
  const bool halves = w.groups > 1 && w.group_width <= CHUNK / 2;
  const std::int64_t width = halves ? CHUNK / 2 : (w.group_width + CHUNK - 1) / CHUNK * CHUNK;
  return column / w.group_width * width + column % w.group_width;
}

void add_outliers(Sample& sample, const Layout& layout, bool odd, Random& random) {
  PackedMatrix& w = sample.matrix;
  std::vector<std::vector<std::pair<int, float>>> buckets(place(w.tiles * w.panels));
  for (std::int64_t i = 0; i < w.out * w.in; ++i) {
    if (random.uniform() >= layout.outlier_share && i % w.in >= layout.outlier_columns) continue;
    const float value = static_cast<float>(half_value(half_bits(random.normal())));
    const std::int64_t row = i / w.in, column = padded_column(w, i % w.in);
    const auto at = static_cast<int>(column % PANEL_COLUMNS * TILE + row % TILE);
    buckets[place(row / TILE * w.panels + column / PANEL_COLUMNS)].emplace_back(at, value);
    sample.weights[place(i)] += static_cast<double>(value);
    sample.decoded[place(i)] += value;
  }
  std::vector<std::int32_t> start{0};
  std::vector<std::uint16_t> places;
  std::vector<float> values;
  for (auto& bucket : buckets) {
    std::sort(bucket.begin(), bucket.end());
    for (const auto& [at, value] : bucket) {
      places.push_back(static_cast<std::uint16_t>(at));
      values.push_back(value);
    }
    start.push_back(static_cast<std::int32_t>(places.size()));
  }
  sample.outlier_start = Exact<std::int32_t>(start, odd);
  sample.outlier_place = Exact<std::uint16_t>(places, odd);
  sample.outlier_value = Exact<float>(values, odd);
  w.outlier_start = sample.outlier_start.get();
  w.outlier_place = sample.outlier_place.get();
  w.outlier_value = sample.outlier_value.get();
}

}  // namespace

Sample make_sample(const Layout& layout, int bits, Random& random, bool odd, int threads) {
  Sample sample;
  PackedMatrix& w = sample.matrix;
  w.out = layout.out;
  w.in = layout.in;
  w.group_width = std::min(layout.group_width, layout.in);
  w.bits = bits;
  complete(w);
  std::vector<std::uint8_t> codes;
  for (std::int64_t i = 0; i < w.out * w.in; ++i) codes.push_back(static_cast<std::uint8_t>(random.below(1 << bits)));
  const Grid grid =
      layout.kind == Kind::levels ? two_levels(sample, odd, random) : one_level(sample, layout.kind, odd, random);
  for (std::int64_t i = 0; i < w.out * w.in; ++i) {
    const std::size_t group = place(i / w.in * w.groups + i % w.in / w.group_width);
    const float centred = static_cast<float>(codes[place(i)]) - grid.zero[group];
    sample.decoded.push_back(grid.scale[group] * centred);
    sample.weights.push_back(static_cast<double>(grid.scale[group]) *
                             (codes[place(i)] - static_cast<double>(grid.zero[group])));
  }
  sample.grid_weights = sample.weights;
  if (layout.outlier_share > 0) add_outliers(sample, layout, odd, random);
  const std::int64_t row_words = (w.in * bits + 31) / 32;
  const Exact<std::uint32_t> words = bit_streams(codes, w, row_words, odd);
  sample.codes = Exact<std::uint8_t>(w.tiles * w.tile_bytes, odd);
  w.codes = sample.codes.get();
  repack_codes(words.get(), row_words, w, sample.codes.get(), threads);
  return sample;
}

std::vector<NamedIsa> machine_isas() {
  int best = static_cast<int>(best_matmul_isa());
#if defined(LEFT_OUT_AVX2)
  best = std::min(best, 0);
#elif defined(LEFT_OUT_AVX512)
  best = std::min(best, 1);
#elif defined(LEFT_OUT_AVX512VNNI)
  best = std::min(best, 2);
#endif
  std::vector<NamedIsa> isas;
  for (int isa = 0; isa <= best; ++isa) isas.push_back({static_cast<MatmulIsa>(isa), MATMUL_ISA_NAMES[isa]});
  return isas;
}

}  // namespace bitwright::testing
