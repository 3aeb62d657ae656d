// Products with packed weights against sums in double, on every instruction set. Prints nothing where all holds.
// `check_matmul short-codes ISA` and `short-result ISA` break the contract by one element, to show that the address
// sanitizer sees it; `check_matmul isas` lists the instruction sets.
#include <algorithm>
#include <limits>
#include <string>

#include "exact.hpp"
#include "matmul.hpp"
#include "sample.hpp"

namespace bitwright::testing {
namespace {

// Whole and ragged tiles of rows, chunks, panels and groups; groups padded to 16 and to 32, a whole channel, each kind.
constexpr std::int64_t CHANNEL = std::int64_t{1} << 40;
const std::vector<Layout> LAYOUTS = {
    {"one weight", 1, 1, CHANNEL, Kind::byte_zero, 0.0},
    {"one column", 17, 1, 16, Kind::half_zero, 0.5},
    {"one row", 1, 129, 32, Kind::symmetric_half, 0.05},
    {"17 x 33, groups of 16", 17, 33, 16, Kind::byte_zero, 0.05},
    {"17 x 33, groups of 32", 17, 33, 32, Kind::float_zero, 0.05},
    {"17 x 33, channel", 17, 33, CHANNEL, Kind::symmetric_float, 0.0},
    {"whole", 32, 256, 32, Kind::symmetric_half, 0.0},
    {"ragged rows", 19, 128, 64, Kind::byte_zero, 0.02},
    {"ragged columns", 16, 597, 128, Kind::byte_zero_float, 0.02},
    {"channel", 7, 301, CHANNEL, Kind::half_zero, 0.05},
    {"narrow", 33, 304, 16, Kind::half_zero, 0.02},
    {"odd narrow", 5, 45, 16, Kind::float_zero, 0.1},
    {"padded to 16", 9, 100, 12, Kind::byte_zero, 0.05},
    {"padded to 32", 9, 310, 24, Kind::symmetric_float, 0.05},
    {"padded to 64", 3, 205, 40, Kind::byte_zero, 0.05},
    {"levels", 50, 304, 16, Kind::levels, 0.02},
    {"levels, large", 50, 160, 32, Kind::levels, 0.0},
    {"576 x 1536, tail of rows", 25, 1536, 128, Kind::symmetric_half, 0.002},
    {"few outliers, many in one panel", 40, 1536, 16, Kind::levels, 0.002, 2},
    {"few outliers, none in most panels", 40, 1536, 128, Kind::half_zero, 0.0002},
};

// Order of summation alone; and that of integer sums and their steps.
constexpr double EXACT_DB = 115, FAST_DB = 110;
// Inputs rounded to 8 bits, whatever the weights.
constexpr double ROUNDED_DB = 35;

// Inputs as fast mode sees them: 32 columns of a group, or two groups of up to 16, share a range.
std::vector<double> rounded_inputs(const PackedMatrix& w, const Exact<float>& x, std::int64_t rows) {
  std::vector<double> rounded(static_cast<std::size_t>(rows * w.in));
  const bool halves = w.groups > 1 && w.group_width <= CHUNK / 2;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t group = halves ? 2 * w.group_width : w.group_width;
    for (std::int64_t first = 0, end = 0; first < w.in; first = end) {
      const std::int64_t group_end = (first / group + 1) * group;
      end = std::min({halves ? group_end : first + CHUNK, group_end, w.in});
      const float* values = x.get() + row * w.in;
      float most = 0.0f;
      for (std::int64_t j = first; j < end; ++j) most = std::max(most, std::fabs(values[j]));
      const float inverse = 127.0f / most;
      for (std::int64_t j = first; j < end; ++j) {
        rounded[static_cast<std::size_t>(row * w.in + j)] =
            static_cast<double>(std::nearbyint(values[j] * inverse)) * static_cast<double>(most / 127.0f);
      }
    }
  }
  return rounded;
}

// y [rows, out] += x weightsᵀ, in double.
void add_product(const std::vector<double>& x, const std::vector<double>& weights, std::int64_t in,
                 std::vector<double>& y) {
  const std::size_t columns = static_cast<std::size_t>(in), out = weights.size() / columns;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double *row = x.data() + i / out * columns, *weight = weights.data() + i % out * columns;
    double sum = 0.0;
    for (std::size_t j = 0; j < columns; ++j) sum += row[j] * weight[j];
    y[i] += sum;
  }
}

Exact<float> product(const PackedMatrix& w, const float* x, const float* bias, std::int64_t rows, bool fast,
                     MatmulIsa isa, int threads = 1) {
  Exact<float> y(rows * w.out, rows % 2 == 1);
  y.fill(std::numeric_limits<float>::quiet_NaN());
  multiply(w, {x, bias, y.get(), rows, fast}, isa, threads);
  return y;
}

// What `multiply` should give, [rows, out] each.
struct Expected {
  std::vector<double> exact, fast;
};

Expected expected_products(const Sample& sample, const Exact<float>& x, const Exact<float>& bias, std::int64_t rows) {
  const PackedMatrix& w = sample.matrix;
  Expected expected;
  for (std::int64_t i = 0; i < rows * w.out; ++i) expected.exact.push_back(static_cast<double>(bias[i % w.out]));
  expected.fast = expected.exact;
  const std::vector<double> inputs(x.get(), x.get() + rows * w.in);
  add_product(inputs, sample.weights, w.in, expected.exact);
  // Outliers meet the inputs as they came.
  add_product(rounded_inputs(w, x, rows), sample.grid_weights, w.in, expected.fast);
  if (w.outlier_start != nullptr) {
    std::vector<double> residuals = sample.weights;
    for (std::size_t i = 0; i < residuals.size(); ++i) residuals[i] -= sample.grid_weights[i];
    add_product(inputs, residuals, w.in, expected.fast);
  }
  return expected;
}

std::vector<double> first_rows(const std::vector<double>& y, std::int64_t rows, std::int64_t out) {
  return {y.begin(), y.begin() + static_cast<std::ptrdiff_t>(rows * out)};
}

void check_products(const Layout& layout, int bits, Random& random) {
  const bool odd = bits % 2 == 1;
  const Sample sample = make_sample(layout, bits, random, odd);
  const PackedMatrix& w = sample.matrix;
  // Many rows once in a while: they go through the same code for every number of bits.
  const std::int64_t most_rows = bits == 3 ? 70 : 9;
  std::vector<std::int64_t> row_counts = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  if (most_rows > 9) row_counts.push_back(most_rows);
  const Exact<float> all = random.normals(most_rows * w.in, odd), bias = random.normals(w.out, odd);
  const Expected expected = expected_products(sample, all, bias, most_rows);
  for (const NamedIsa& isa : machine_isas()) {
    for (const std::int64_t rows : row_counts) {
      const Exact<float> x(std::vector<float>(all.get(), all.get() + rows * w.in), odd);
      const Exact<float> exact = product(w, x.get(), bias.get(), rows, false, isa.isa);
      const Exact<float> fast = product(w, x.get(), bias.get(), rows, true, isa.isa);
      const std::vector<double> wanted = first_rows(expected.exact, rows, w.out);
      const double exact_db = sqnr_db(wanted, exact);
      const double fast_db = sqnr_db(first_rows(expected.fast, rows, w.out), fast);
      expect(exact_db > EXACT_DB, "%s, %d bits, %d rows, %s: exact at %.1f dB", layout.name, bits, int(rows), isa.name,
             exact_db);
      expect(fast_db > FAST_DB, "%s, %d bits, %d rows, %s: fast at %.1f dB", layout.name, bits, int(rows), isa.name,
             fast_db);
      // Too few for the errors to be what they are on average.
      if (w.in < CHUNK || w.out * rows < 32) continue;
      const double rounded_db = sqnr_db(wanted, fast);
      expect(rounded_db > ROUNDED_DB, "%s, %d bits, %d rows, %s: fast at %.1f dB of the float inputs", layout.name,
             bits, int(rows), isa.name, rounded_db);
    }
    const Exact<float> without = product(w, all.get(), nullptr, 1, false, isa.isa);
    const Exact<float> with = product(w, all.get(), bias.get(), 1, false, isa.isa);
    for (std::int64_t i = 0; i < w.out; ++i) {
      expect(without[i] + bias[i] == with[i], "%s, %d bits, %s: bias", layout.name, bits, isa.name);
    }
  }
}

void check_rows(const Layout& layout, int bits, Random& random) {
  const Sample sample = make_sample(layout, bits, random, bits % 2 == 0);
  const PackedMatrix& w = sample.matrix;
  Exact<std::int64_t> rows(w.out + 2);
  for (std::int64_t i = 0; i < rows.size(); ++i) rows[i] = w.out - 1 - i % w.out;
  for (const NamedIsa& isa : machine_isas()) {
    Exact<float> weights(rows.size() * w.in);
    weights.fill(std::numeric_limits<float>::quiet_NaN());
    decode_rows(w, rows.get(), rows.size(), weights.get(), isa.isa);
    bool same = true;
    for (std::int64_t i = 0; i < rows.size(); ++i) {
      const float* wanted = sample.decoded.data() + rows[i] * w.in;
      same = same && std::equal(wanted, wanted + w.in, weights.get() + i * w.in);
    }
    expect(same, "%s, %d bits, %s: decoded rows", layout.name, bits, isa.name);
  }
}

// Values that are not finite stay in their rows; the smallest and largest ones stay finite.
void check_hostile_inputs(const Layout& layout, int bits, Random& random) {
  const Sample sample = make_sample(layout, bits, random, true);
  const PackedMatrix& w = sample.matrix;
  const float infinity = std::numeric_limits<float>::infinity();
  for (const NamedIsa& isa : machine_isas()) {
    for (const bool fast : {false, true}) {
      for (const float value : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
        Exact<float> x = random.normals(3 * w.in);
        x[w.in + w.in / 2] = value;
        const Exact<float> y = product(w, x.get(), nullptr, 3, fast, isa.isa);
        for (std::int64_t i = 0; i < y.size(); ++i) {
          const bool finite = std::isfinite(y[i]), wanted = i / w.out != 1;
          expect(finite == wanted, "%s, %d bits, %s, fast %d: finite %d in row %d beside %f", layout.name, bits,
                 isa.name, fast, finite, int(i / w.out), static_cast<double>(value));
        }
      }
      for (const float value : {0.0f, 1e-45f, 1e-38f, -1e-30f, 1e30f, -1e30f}) {
        Exact<float> x(2 * w.in);
        x.fill(value);
        const Exact<float> y = product(w, x.get(), nullptr, 2, fast, isa.isa);
        for (std::int64_t i = 0; i < y.size(); ++i) {
          expect(std::isfinite(y[i]), "%s, %d bits, %s: inputs of %g", layout.name, bits, isa.name,
                 static_cast<double>(value));
        }
      }
    }
  }
}

// Integer sums at their largest: every code and every input at its bound.
void check_largest_sums(int bits) {
  const std::int64_t in = 1024;
  PackedMatrix w{};
  w.out = 16;
  w.in = w.group_width = in;
  w.bits = bits;
  complete(w);
  const float code = static_cast<float>((1 << bits) - 1);
  Exact<std::uint32_t> words(w.out * in * bits / 32);
  words.fill(~0u);
  Exact<std::uint8_t> codes(w.tiles * w.tile_bytes);
  Exact<float> scale(TILE), x(in);
  scale.fill(1.0f);
  w.codes = codes.get();
  w.scale = scale.get();
  w.scale_kind = ScaleKind::float32;
  repack_codes(words.get(), in * bits / 32, w, codes.get(), 1);
  for (const NamedIsa& isa : machine_isas()) {
    for (const float sign : {1.0f, -1.0f}) {
      x.fill(sign);
      for (const bool fast : {false, true}) {
        const Exact<float> y = product(w, x.get(), nullptr, 1, fast, isa.isa);
        const double wanted = static_cast<double>(sign * code) * static_cast<double>(in);
        expect(std::fabs(static_cast<double>(y[7]) / wanted - 1) < 1e-6, "%d bits, %s, fast %d: largest sums %f", bits,
               isa.name, fast, static_cast<double>(y[7]));
      }
    }
  }
}

// One element too few, where the kernels must be caught.
void break_contract(const std::string& what, const std::string& name) {
  Random random(1);
  Sample sample = make_sample(LAYOUTS[6], 4, random, false);
  PackedMatrix& w = sample.matrix;
  const Exact<float> x = random.normals(w.in);
  const bool codes = what == "short-codes";
  const std::uint8_t* whole = sample.codes.get();
  const Exact<std::uint8_t> fewer(std::vector<std::uint8_t>(whole, whole + sample.codes.size() - 1));
  if (codes) w.codes = fewer.get();
  Exact<float> y(w.out - (codes ? 0 : 1));
  for (const NamedIsa& isa : machine_isas()) {
    if (name == isa.name) multiply(w, {x.get(), nullptr, y.get(), 1, true}, isa.isa, 1);
  }
}

void check_all() {
  Random random(0);
  for (int bits = 2; bits <= 8; ++bits) {
    for (const Layout& layout : LAYOUTS) {
      check_products(layout, bits, random);
      check_rows(layout, bits, random);
    }
    check_largest_sums(bits);
  }
  for (const char* name : {"whole", "narrow", "padded to 32"}) {
    for (const Layout& layout : LAYOUTS) {
      if (std::string(name) == layout.name) check_hostile_inputs(layout, 4, random);
    }
  }
}

}  // namespace
}  // namespace bitwright::testing

int main(int count, char** arguments) {
  using namespace bitwright::testing;
  if (count == 2) {
    for (const NamedIsa& isa : machine_isas()) std::printf("%s\n", isa.name);
    return 0;
  }
  if (count == 3) {
    break_contract(arguments[1], arguments[2]);
    return 0;
  }
  check_all();
  return failures() == 0 ? 0 : 1;
}
