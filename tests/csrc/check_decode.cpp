// A decode step and its parts against double precision, on every instruction set and number of threads, in memory
// without slack. Prints nothing where all holds. `check_decode threads` is what threads have a part in.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "decode.hpp"
#include "decode_vectors.hpp"
#include "exact.hpp"
#include "sample.hpp"

namespace bitwright::testing {
namespace {

constexpr double NEAR_DB = 115;
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

using Doubles = std::vector<double>;

Doubles doubles(const Exact<float>& values) { return {values.get(), values.get() + values.size()}; }
std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

// Found on the first instruction set, the baseline: all others must give the same bits.
struct Same {
  void operator()(const Exact<float>& found, const char* what, const char* isa) {
    if (first.size() == 0) first = Exact<float>(std::vector<float>(found.get(), found.get() + found.size()));
    expect(first.same(found), "%s, %s: other bits than the baseline", what, isa);
  }
  Exact<float> first;
};

// --- parts ---------------------------------------------------------------------------------------------------------

void check_exponential() {
  double worst = 0.0;
  for (float x = EXP_LEAST; x <= EXP_MOST; x += 0x1p-11f) {
    Simd<4>::Floats values = {x, x, x, x};
    exponential<4>(values);
    const double wanted = std::exp(static_cast<double>(x));
    const double unit = std::ldexp(1.0, std::ilogb(wanted) - 23);
    worst = std::max(worst, std::fabs(static_cast<double>(values[0]) - wanted) / unit);
  }
  expect(worst < 1.5, "exponential: %f units in the last place", worst);
  Simd<4>::Floats ends = {-1e30f, 1e30f, 0.0f, -std::nanf("1")};
  exponential<4>(ends);
  expect(ends[0] == 0.0f && std::isfinite(ends[1]) && ends[2] == 1.0f && std::isnan(ends[3]), "exponential: ends");
}

void check_norm(std::int64_t count, Random& random) {
  const Exact<float> x = random.normals(count, true), weight = random.normals(count);
  double squares = 0.0;
  Doubles wanted;
  for (const double value : doubles(x)) squares += value * value;
  for (std::int64_t i = 0; i < count; ++i) {
    wanted.push_back(double(x[i]) * double(weight[i]) / std::sqrt(squares / double(count) + 1e-5));
  }
  Same same;
  for (const NamedIsa& isa : machine_isas()) {
    Exact<float> y(count), in_place(std::vector<float>(x.get(), x.get() + count), true);
    decode_kernels(isa.isa).norm(x.get(), weight.get(), 1e-5f, count, y.get());
    decode_kernels(isa.isa).norm(in_place.get(), weight.get(), 1e-5f, count, in_place.get());
    expect(sqnr_db(wanted, y) > NEAR_DB && y.same(in_place), "norm of %d, %s", int(count), isa.name);
    same(y, "norm", isa.name);
  }
}

void check_gate(std::int64_t count, Random& random) {
  const Exact<float> gate = random.normals(count, true), up = random.normals(count);
  Doubles wanted;
  for (std::int64_t i = 0; i < count; ++i) {
    wanted.push_back(double(gate[i]) / (1.0 + std::exp(-double(gate[i]))) * double(up[i]));
  }
  Same same;
  for (const NamedIsa& isa : machine_isas()) {
    Exact<float> y(std::vector<float>(gate.get(), gate.get() + count), true);
    decode_kernels(isa.isa).gate(y.get(), up.get(), count);
    expect(sqnr_db(wanted, y) > NEAR_DB, "gate of %d, %s: %.1f dB", int(count), isa.name, sqnr_db(wanted, y));
    same(y, "gate", isa.name);
  }
}

void check_rotate(std::int64_t dim, Random& random) {
  const Exact<float> x = random.normals(dim), cos = random.normals(dim, true), sin = random.normals(dim);
  Doubles wanted;
  for (std::int64_t i = 0; i < dim; ++i) {
    wanted.push_back(double(x[i]) * double(cos[i]) + double(x[(i + dim / 2) % dim]) * double(sin[i]));
  }
  Same same;
  for (const NamedIsa& isa : machine_isas()) {
    Exact<float> y(std::vector<float>(x.get(), x.get() + dim));
    decode_kernels(isa.isa).rotate(y.get(), cos.get(), sin.get(), dim);
    expect(sqnr_db(wanted, y) > NEAR_DB, "rotate %d, %s", int(dim), isa.name);
    same(y, "rotate", isa.name);
  }
}

// Float weights.
void check_multiply(std::int64_t rows, std::int64_t in, Random& random) {
  const Exact<float> weight = random.normals(rows * in, true), x = random.normals(in);
  Doubles wanted(place(rows));
  for (std::int64_t i = 0; i < rows * in; ++i) wanted[place(i / in)] += double(weight[i]) * double(x[i % in]);
  Same same;
  for (const NamedIsa& isa : machine_isas()) {
    Exact<float> y(rows);
    decode_kernels(isa.isa).multiply(weight.get(), rows, in, x.get(), y.get());
    expect(sqnr_db(wanted, y) > NEAR_DB, "multiply %d x %d, %s", int(rows), int(in), isa.name);
    same(y, "multiply", isa.name);
  }
}

// Heads that share keys, over so many positions; what stands behind them in the cache is not finite.
void check_attention(std::int64_t heads, std::int64_t dim, std::int64_t positions, Random& random) {
  const std::int64_t stride = padded_head(dim), tiles = (positions + KEY_TILE - 1) / KEY_TILE;
  const std::int64_t pieces = (positions + ATTENTION_POSITIONS - 1) / ATTENTION_POSITIONS;
  const Exact<float> query = random.normals(heads * dim, true);
  Exact<float> keys(tiles * dim * KEY_TILE, true), values(positions * stride, true);
  keys.fill(NOT_A_NUMBER);
  values.fill(0.0f);
  Doubles wanted(place(heads * dim)), total(place(heads));
  // Scores stay small enough for double to need no largest one.
  for (std::int64_t t = 0; t < positions; ++t) {
    Doubles score(place(heads));
    for (std::int64_t d = 0; d < dim; ++d) {
      const float key = static_cast<float>(random.normal());
      keys[t / KEY_TILE * KEY_TILE * dim + d * KEY_TILE + t % KEY_TILE] = key;
      values[t * stride + d] = static_cast<float>(random.normal());
      for (std::int64_t h = 0; h < heads; ++h) score[place(h)] += 0.25 * double(query[h * dim + d]) * double(key);
    }
    for (std::int64_t h = 0; h < heads; ++h) {
      const double weight = std::exp(score[place(h)]);
      total[place(h)] += weight;
      for (std::int64_t d = 0; d < dim; ++d) wanted[place(h * dim + d)] += weight * double(values[t * stride + d]);
    }
  }
  for (std::int64_t i = 0; i < heads * dim; ++i) wanted[place(i)] /= total[place(i / dim)];
  Same same;
  for (const NamedIsa& isa : machine_isas()) {
    Exact<float> scores(heads * ATTENTION_POSITIONS), largest(pieces * heads), totals(pieces * heads);
    Exact<float> sums(pieces * heads * stride), factors((pieces + 15) / 16 * 16), attended(heads * dim);
    for (std::int64_t i = 0; i < pieces; ++i) {
      const std::int64_t first = i * ATTENTION_POSITIONS;
      decode_kernels(isa.isa).attend({query.get(), keys.get(), values.get(), heads, dim, first,
                                      std::min(first + ATTENTION_POSITIONS, positions), 0.25f, scores.get(),
                                      largest.get() + i * heads, totals.get() + i * heads,
                                      sums.get() + i * heads * stride});
    }
    decode_kernels(isa.isa).combine(
        {largest.get(), totals.get(), sums.get(), pieces, heads, dim, factors.get(), attended.get()});
    const double db = sqnr_db(wanted, attended);
    expect(db > 100, "attention of %d heads of %d, %d positions, %s: %.1f dB", int(heads), int(dim), int(positions),
           isa.name, db);
    same(attended, "attention", isa.name);
  }
}

// --- products ------------------------------------------------------------------------------------------------------

// Linears of several layouts with the same inputs, as one product, against `multiply` for each.
void check_products(Random& random) {
  constexpr std::int64_t IN = 304, OUT[] = {1000, 33, 40, 7, 530};
  const Sample samples[] = {make_sample({"wide", OUT[0], IN, 64, Kind::byte_zero, 0.0}, 4, random, true),
                            make_sample({"outliers", OUT[1], IN, 64, Kind::byte_zero, 0.05}, 3, random, false),
                            make_sample({"narrow", OUT[2], IN, 16, Kind::levels, 0.02}, 3, random, true),
                            make_sample({"padded", OUT[3], IN, 24, Kind::symmetric_float, 0.0}, 8, random, false)};
  const Exact<float> dense = random.normals(OUT[4] * IN, true), x = random.normals(IN, true);
  const std::int64_t out = OUT[0] + OUT[1] + OUT[2] + OUT[3] + OUT[4];
  const Exact<float> bias = random.normals(out), residual = random.normals(out, true);
  DecodeProduct product;
  std::int64_t first = 0;
  for (int i = 0; i < 4; first += OUT[i], ++i) {
    product.push_back({samples[i].matrix, nullptr, i % 2 == 0 ? bias.get() + first : nullptr, OUT[i], IN});
  }
  product.push_back({PackedMatrix{}, dense.get(), bias.get() + first, OUT[4], IN});
  for (const NamedIsa& isa : machine_isas()) {
    for (const bool fast : {false, true}) {
      Exact<float> wanted(out);
      for (std::int64_t i = 0, from = 0; i < 5; from += OUT[i], ++i) {
        const DecodeLinear& linear = product[place(i)];
        if (linear.dense == nullptr) {
          multiply(linear.packed, {x.get(), linear.bias, wanted.get() + from, 1, fast}, isa.isa, 1);
        } else {
          decode_kernels(isa.isa).multiply(linear.dense, linear.out, IN, x.get(), wanted.get() + from);
          for (std::int64_t j = 0; j < linear.out; ++j) wanted[from + j] += linear.bias[j];
        }
      }
      DecodeProducts products(isa.isa);
      for (const int threads : {1, 2, 3, 4}) {
        Exact<float> y(out, true), onto(std::vector<float>(residual.get(), residual.get() + out));
        products.multiply(product, x.get(), nullptr, y.get(), {fast, threads});
        products.multiply(product, x.get(), onto.get(), onto.get(), {fast, threads});
        bool same = true;
        for (std::int64_t i = 0; i < out; ++i) same = same && onto[i] == wanted[i] + residual[i] && y[i] == wanted[i];
        expect(same, "products, %s, fast %d, %d threads: not those of multiply", isa.name, fast, threads);
      }
    }
  }
}

// --- a whole step --------------------------------------------------------------------------------------------------

// A model of one block whose products are worth four threads; weights of the MLP and the embedding are packed.
struct Tiny {
  static constexpr std::int64_t HIDDEN = 160, HEADS = 6, KV = 2, DIM = 80, MIDDLE = 1600, LENGTH = 300, WORDS = 40;

  explicit Tiny(Random& random)
      : norm(random.normals(HIDDEN)),
        head_norm(random.normals(DIM, true)),
        cos(random.normals(LENGTH * DIM)),
        sin(random.normals(LENGTH * DIM)),
        qkv(random.normals((HEADS + 2 * KV) * DIM * HIDDEN)),
        output(random.normals(HIDDEN * HEADS * DIM)),
        gate_up(make_sample({"gate_up", 2 * MIDDLE, HIDDEN, 32, Kind::byte_zero, 0.01}, 4, random, false)),
        down(make_sample({"down", HIDDEN, MIDDLE, 64, Kind::half_zero, 0.0}, 3, random, false)),
        table(make_sample({"table", WORDS, HIDDEN, 32, Kind::float_zero, 0.0}, 8, random, false)) {}

  DecodeModel model(Exact<float>& keys, Exact<float>& values, MatmulIsa isa) const {
    const DecodeLinear words{table.matrix, nullptr, nullptr, WORDS, HIDDEN};
    DecodeBlock block{norm.get(), head_norm.get(), head_norm.get(), norm.get(), {}, {}, {}, {}};
    block.qkv = {{PackedMatrix{}, qkv.get(), nullptr, (HEADS + 2 * KV) * DIM, HIDDEN}};
    block.output = {{PackedMatrix{}, output.get(), nullptr, HIDDEN, HEADS * DIM}};
    block.gate_up = {{gate_up.matrix, nullptr, nullptr, 2 * MIDDLE, HIDDEN}};
    block.down = {{down.matrix, nullptr, nullptr, HIDDEN, MIDDLE}};
    return {HIDDEN,    HEADS,     KV,         DIM,        MIDDLE,       LENGTH, 1e-5f,   0.1f, cos.get(),
            sin.get(), norm.get(), keys.get(), values.get(), words, {block, block}, {words}, isa};
  }

  static Exact<float> empty_keys() { return zeros(2 * KV * ((LENGTH + 15) / 16 * 16) * DIM); }
  static Exact<float> empty_values() { return zeros(2 * KV * LENGTH * padded_head(DIM)); }
  static Exact<float> zeros(std::int64_t count) {
    Exact<float> values(count);
    values.fill(0.0f);
    return values;
  }

  Exact<float> norm, head_norm, cos, sin, qkv, output;
  Sample gate_up, down, table;
};

void check_steps(const Tiny& tiny) {
  for (const NamedIsa& isa : machine_isas()) {
    for (const bool fast : {false, true}) {
      Exact<float> wanted;
      for (const int threads : {1, 2, 4}) {
        Exact<float> keys = Tiny::empty_keys(), values = Tiny::empty_values();
        Decoder decoder(tiny.model(keys, values, isa.isa));
        Exact<float> logits(Tiny::WORDS);
        // Behind so many positions of zeros that attention is worth several threads.
        for (std::int64_t t = Tiny::LENGTH - 6; t < Tiny::LENGTH; ++t) {
          decoder.step(t * 7 % Tiny::WORDS, t, logits.get(), {fast, threads});
        }
        bool finite = true;
        for (std::int64_t i = 0; i < Tiny::WORDS; ++i) finite = finite && std::isfinite(logits[i]);
        expect(finite, "%s, fast %d: logits are not finite", isa.name, fast);
        if (threads == 1) wanted = std::move(logits);
        const Exact<float>& found = threads == 1 ? wanted : logits;
        expect(found.same(wanted), "%s, fast %d: %d threads give other logits than one", isa.name, fast, threads);
      }
    }
  }
}

template <class Error, class Body>
void refused(const char* what, const Body& body) {
  bool thrown = false;
  try {
    body();
  } catch (const Error&) {
    thrown = true;
  }
  expect(thrown, "not refused: %s", what);
}

void check_refusals(const Tiny& tiny) {
  Exact<float> keys = Tiny::empty_keys(), values = Tiny::empty_values(), logits(Tiny::WORDS);
  const DecodeModel model = tiny.model(keys, values, MatmulIsa::baseline);
  const auto broken = [&](const char* what, auto change) {
    DecodeModel other = model;
    change(other);
    refused<std::invalid_argument>(what, [&] { Decoder decoder(other); });
  };
  broken("no heads", [](DecodeModel& m) { m.heads = 0; });
  broken("heads that share unevenly", [](DecodeModel& m) { m.kv_heads = 4; });
  broken("odd heads", [](DecodeModel& m) { m.head_dim = 81; });
  broken("no room", [](DecodeModel& m) { m.max_length = 0; });
  broken("no blocks", [](DecodeModel& m) { m.blocks.clear(); });
  broken("no head", [](DecodeModel& m) { m.head.clear(); });
  broken("another hidden size", [](DecodeModel& m) { m.hidden = 161; });
  broken("another intermediate size", [](DecodeModel& m) { m.intermediate += 16; });
  broken("one norm of heads", [](DecodeModel& m) { m.blocks[1].key_norm = nullptr; });
  broken("a linear of another shape", [](DecodeModel& m) { m.blocks[1].down[0].packed.in = 1; });
  Decoder decoder(model);
  for (const std::int64_t token : {std::int64_t{-1}, Tiny::WORDS, std::numeric_limits<std::int64_t>::max()}) {
    refused<std::out_of_range>("a token", [&] { decoder.step(token, 0, logits.get(), {true, 1}); });
  }
  for (const std::int64_t position : {std::int64_t{-1}, Tiny::LENGTH, std::numeric_limits<std::int64_t>::min()}) {
    refused<std::out_of_range>("a position", [&] { decoder.step(0, position, logits.get(), {true, 1}); });
  }
  decoder.step(0, Tiny::LENGTH - 1, logits.get(), {false, -5});
  Exact<float> hidden(Tiny::HIDDEN);
  hidden.fill(NOT_A_NUMBER);
  decoder.finish(hidden.get(), logits.get(), {true, 1});
  expect(std::isnan(logits[0]), "NaN does not stay");
}

void check_threads() {
  Random random(0);
  check_products(random);
  check_steps(Tiny(random));
}

void check_all() {
  Random random(0);
  check_exponential();
  for (const std::int64_t count : {1, 15, 16, 17, 33, 80, 576}) {
    check_norm(count, random);
    check_gate(count, random);
    check_rotate(2 * count, random);
    check_multiply(count, 600 - count, random);
  }
  for (const std::int64_t heads : {1, 2, 3, 4, 7}) {
    for (const std::int64_t dim : {2, 24, 64, 80}) {
      for (const std::int64_t length : {1, 15, 16, 17, 128, 129, 300}) check_attention(heads, dim, length, random);
    }
  }
  check_attention(1, 16, 17 * ATTENTION_POSITIONS + 1, random);
  check_refusals(Tiny(random));
  check_threads();
}

}  // namespace
}  // namespace bitwright::testing

int main(int count, char**) {
  count == 2 ? bitwright::testing::check_threads() : bitwright::testing::check_all();
  return bitwright::testing::failures() == 0 ? 0 : 1;
}
