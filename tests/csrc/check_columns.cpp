// Error feedback over columns and coordinate descent on codes, against the same operations written plainly, bit by bit,
// and against what they promise, in double. Sizes and values are hostile. Prints nothing where all holds.
#include <algorithm>
#include <limits>
#include <string>

#include "columns.hpp"
#include "exact.hpp"

namespace bitwright::testing {
namespace {

constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512"};
constexpr float MARGIN = 0x1p-10f;  // as in src/bitwright/rounding/columns.py

std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

// A random grid; columns may come back to a group.
struct Grid {
  Grid(std::int64_t out, std::int64_t width, std::int64_t groups, float max_code, Random& random)
      : scale(out * groups), zero(out * groups), group(width) {
    for (std::int64_t i = 0; i < scale.size(); ++i) {
      scale[i] = static_cast<float>((0.05 + random.uniform()) * (random.below(4) == 0 ? -1 : 1));
      zero[i] = static_cast<float>(random.uniform() * static_cast<double>(max_code));
    }
    for (std::int64_t i = 0; i < width; ++i) group[i] = static_cast<std::int32_t>(random.below(groups));
    columns = {scale.get(), zero.get(), group.get(), groups, max_code};
  }
  Exact<float> scale, zero;
  Exact<std::int32_t> group;
  ColumnGrid columns;
};

// Round half to even, between 0 and `max_code`; NaN gives 0.
float nearest_code(float position, float max_code) {
  const float low = position > 0.0f ? position : 0.0f;
  return std::nearbyint(std::min(low, max_code));
}

// --- rounding ------------------------------------------------------------------------------------------------------

struct Rounded {
  Rounded(std::int64_t count) : codes(count), outlier(count), target(count), error(count) {
    codes.fill(0xee);
    outlier.fill(0xee);
    target.fill(std::numeric_limits<float>::quiet_NaN());
    error.fill(std::numeric_limits<float>::quiet_NaN());
  }
  bool same(const Rounded& other) const {
    return codes.same(other.codes) && outlier.same(other.outlier) && target.same(other.target) &&
           error.same(other.error);
  }
  Exact<std::uint8_t> codes, outlier;
  Exact<float> target, error;
};

// The definition, one row and column at a time.
Rounded round_plainly(const RoundTask& task) {
  Rounded result(task.out * task.width);
  for (std::int64_t row = 0; row < task.out; ++row) {
    float* target = result.target.get() + row * task.width;
    std::copy_n(task.weight + row * task.width, task.width, target);
    for (std::int64_t column = 0; column < task.width; ++column) {
      const std::int64_t at = row * task.width + column, group = row * task.grid.groups + task.grid.group[column];
      const float* factor = task.factor + column * task.width;
      const float scale = task.grid.scale[group], zero = task.grid.zero[group];
      const float code = nearest_code(target[column] / scale + zero, task.grid.max_code);
      const float difference = (target[column] - scale * (code - zero)) / factor[column];
      const bool masked = task.mask != nullptr && task.mask[at] != 0;
      const bool outlier = masked || (task.limit != nullptr && difference * difference > task.limit[row]);
      result.codes[at] = static_cast<std::uint8_t>(code);
      result.outlier[at] = outlier ? 1 : 0;
      result.error[at] = outlier ? 0.0f : difference;
      for (std::int64_t later = column + 1; later < task.width; ++later) {
        target[later] -= result.error[at] * factor[later];
      }
    }
  }
  return result;
}

// Every target is its weight without the errors passed on to it.
void check_targets(const RoundTask& task, const Rounded& result, const char* name) {
  double worst = 0.0;
  for (std::int64_t row = 0; row < task.out; ++row) {
    for (std::int64_t column = 0; column < task.width; ++column) {
      double target = static_cast<double>(task.weight[row * task.width + column]), size = std::fabs(target);
      for (std::int64_t before = 0; before < column; ++before) {
        const double passed = static_cast<double>(result.error[row * task.width + before]) *
                              static_cast<double>(task.factor[before * task.width + column]);
        target -= passed;
        size += std::fabs(passed);
      }
      const double difference = target - static_cast<double>(result.target[row * task.width + column]);
      worst = std::max(worst, std::fabs(difference) / std::max(size, 1e-30));
    }
  }
  expect(worst < 1e-5, "%s: targets differ from their definition by %g", name, worst);
}

Exact<float> upper_factor(std::int64_t width, Random& random, bool odd) {
  Exact<float> factor(width * width, odd);
  for (std::int64_t i = 0; i < factor.size(); ++i) {
    const std::int64_t row = i / width, column = i % width;
    // What is below the diagonal must not be read.
    factor[i] = column < row    ? std::numeric_limits<float>::quiet_NaN()
                : column == row ? static_cast<float>(0.5 + random.uniform())
                                : static_cast<float>(0.1 * random.normal());
  }
  return factor;
}

struct Sizes {
  std::int64_t out, width, groups;
};

void check_rounding(const Sizes& sizes, float max_code, Random& random, bool odd) {
  const Grid grid(sizes.out, sizes.width, sizes.groups, max_code, random);
  const Exact<float> weight = random.normals(sizes.out * sizes.width, odd);
  const Exact<float> factor = upper_factor(sizes.width, random, odd);
  Exact<float> limit(sizes.out, odd);
  for (std::int64_t i = 0; i < limit.size(); ++i) limit[i] = static_cast<float>(random.uniform());
  Exact<std::uint8_t> mask(sizes.out * sizes.width, odd);
  for (std::int64_t i = 0; i < mask.size(); ++i) mask[i] = random.below(20) == 0;
  for (int kept = 0; kept < 4; ++kept) {
    RoundTask task{weight.get(), factor.get(), kept & 1 ? limit.get() : nullptr, kept & 2 ? mask.get() : nullptr,
                   grid.columns, nullptr, nullptr, nullptr, nullptr, sizes.out, sizes.width};
    const Rounded wanted = round_plainly(task);
    char name[99];
    std::snprintf(name, sizeof name, "rounding %d x %d, %d groups, codes to %g, kept %d", int(sizes.out),
                  int(sizes.width), int(sizes.groups), static_cast<double>(max_code), kept);
    check_targets(task, wanted, name);
    for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
      for (int threads = 1; threads <= (isa == 0 ? 4 : 1); ++threads) {
        Rounded found(sizes.out * sizes.width);
        task.codes = found.codes.get();
        task.target = found.target.get();
        task.error = found.error.get();
        task.outlier = found.outlier.get();
        const bool finite = round_columns(task, static_cast<Isa>(isa), threads);
        expect(finite && found.same(wanted), "%s, %s, %d threads: not the plain result", name, ISA_NAMES[isa], threads);
      }
    }
  }
}

// A value that is not finite, or a division by zero, is reported, and nothing else happens.
void check_poison(Random& random) {
  const std::int64_t out = 19, width = 33;
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (int where = 0; where < 4; ++where) {
    for (const float value : {nan, infinity, -infinity, where == 0 ? nan : where == 2 ? nan : 0.0f}) {
      Grid grid(out, width, 3, 7.0f, random);
      Exact<float> weight = random.normals(out * width), factor = upper_factor(width, random, false);
      if (where == 0) weight[18 * width + 32] = value;
      if (where == 1) factor[5 * width + 5] = value;
      if (where == 2) grid.zero[4 * 3 + grid.group[0]] = value;
      if (where == 3) grid.scale[4 * 3 + grid.group[0]] = value;
      for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
        Rounded found(out * width);
        const RoundTask task{weight.get(),      factor.get(),       nullptr,           nullptr,
                             grid.columns,      found.codes.get(),  found.target.get(), found.error.get(),
                             found.outlier.get(), out,              width};
        expect(!round_columns(task, static_cast<Isa>(isa), 1), "%s: %g at place %d was not reported", ISA_NAMES[isa],
               static_cast<double>(value), where);
      }
    }
  }
}

// --- refining ------------------------------------------------------------------------------------------------------

void refine_plainly(const RefineTask& task) {
  for (int sweep = 0; sweep < task.sweeps; ++sweep) {
    for (std::int64_t row = 0; row < task.out; ++row) {
      float* gradient = task.gradient + row * task.in;
      for (std::int64_t column = 0; column < task.in; ++column) {
        const std::int64_t at = row * task.in + column, group = row * task.grid.groups + task.grid.group[column];
        const float* hessian = task.hessian + column * task.in;
        if (!(hessian[column] > 0.0f) || (task.frozen != nullptr && task.frozen[at] != 0)) continue;
        const float scale = task.grid.scale[group], zero = task.grid.zero[group];
        const float decoded = scale * (static_cast<float>(task.codes[at]) - zero);
        const float best = decoded + gradient[column] / hessian[column];
        const float code = nearest_code(best / scale + zero, task.grid.max_code);
        const float step = scale * (code - zero) - decoded, curvature = step * step * hessian[column];
        if (!(2.0f * (step * gradient[column]) - curvature > curvature * task.margin)) continue;
        task.codes[at] = static_cast<std::uint8_t>(code);
        for (std::int64_t other = 0; other < task.in; ++other) gradient[other] -= step * hessian[other];
      }
    }
  }
}

// Sum over rows of r H rᵀ with r = `weight` - decoded, in double.
double objective(const Exact<float>& weight, const Exact<std::uint8_t>& codes, const Exact<float>& hessian,
                 const Grid& grid, std::int64_t in) {
  double sum = 0.0;
  std::vector<double> residual(place(in));
  for (std::int64_t row = 0; row < weight.size() / in; ++row) {
    for (std::int64_t j = 0; j < in; ++j) {
      const std::int64_t group = row * grid.columns.groups + grid.group[j];
      const double centred = codes[row * in + j] - static_cast<double>(grid.zero[group]);
      residual[place(j)] =
          static_cast<double>(weight[row * in + j]) - static_cast<double>(grid.scale[group]) * centred;
    }
    for (std::int64_t j = 0; j < in; ++j) {
      for (std::int64_t k = 0; k < in; ++k) {
        sum += residual[place(j)] * static_cast<double>(hessian[j * in + k]) * residual[place(k)];
      }
    }
  }
  return sum;
}

// Symmetric and positive: inputs that go together, one column of them dead.
Exact<float> any_hessian(std::int64_t in, Random& random) {
  Exact<float> hessian(in * in), x = random.normals(in * 4);
  for (std::int64_t i = 0; i < hessian.size(); ++i) {
    double sum = i / in == i % in ? 0.5 : 0.0;
    for (int k = 0; k < 4; ++k) sum += static_cast<double>(x[i / in * 4 + k]) * static_cast<double>(x[i % in * 4 + k]);
    hessian[i] = in > 2 && (i / in == 2 || i % in == 2) ? 0.0f : static_cast<float>(sum);
  }
  return hessian;
}

void check_refining(const Sizes& sizes, float max_code, Random& random) {
  const std::int64_t in = sizes.width, count = sizes.out * in;
  const Grid grid(sizes.out, in, sizes.groups, max_code, random);
  const Exact<float> hessian = any_hessian(in, random), weight = random.normals(count);
  Exact<std::uint8_t> codes(count), frozen(count);
  Exact<float> gradient(count);
  for (std::int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>(random.below(static_cast<std::int64_t>(max_code) + 1));
    frozen[i] = random.below(10) == 0;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (std::int64_t j = 0; j < in; ++j) {
      const std::int64_t at = i / in * in + j, group = i / in * sizes.groups + grid.group[j];
      const double centred = codes[at] - static_cast<double>(grid.zero[group]);
      sum += (static_cast<double>(weight[at]) - static_cast<double>(grid.scale[group]) * centred) *
             static_cast<double>(hessian[j * in + i % in]);
    }
    gradient[i] = static_cast<float>(sum);
  }
  const auto copied = [](const auto& from, auto to) {
    std::copy_n(from.get(), from.size(), to.get());
    return to;
  };
  Exact<std::uint8_t> wanted = copied(codes, Exact<std::uint8_t>(count));
  Exact<float> wanted_gradient = copied(gradient, Exact<float>(count));
  RefineTask task{wanted.get(), wanted_gradient.get(), hessian.get(), frozen.get(), grid.columns,
                  MARGIN,       2,                     sizes.out,     in};
  refine_plainly(task);
  const double before = objective(weight, codes, hessian, grid, in);
  const double after = objective(weight, wanted, hessian, grid, in);
  expect(after <= before * (1 + 1e-9), "refining %d x %d: objective from %g to %g", int(sizes.out), int(in), before,
         after);
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    for (int threads = 1; threads <= (isa == 0 ? 4 : 1); ++threads) {
      Exact<std::uint8_t> found = copied(codes, Exact<std::uint8_t>(count));
      Exact<float> found_gradient = copied(gradient, Exact<float>(count));
      task.codes = found.get();
      task.gradient = found_gradient.get();
      refine_codes(task, static_cast<Isa>(isa), threads);
      expect(found.same(wanted) && found_gradient.same(wanted_gradient), "refining %d x %d, %s, %d threads: %s",
             int(sizes.out), int(in), ISA_NAMES[isa], threads, "not the plain result");
    }
  }
}

// Overflowing steps and scales next to nothing: any code will do, as long as it is one.
void check_wild_refining(Random& random) {
  const std::int64_t out = 9, in = 17;
  for (const float wild : {1e-38f, 1e38f}) {
    for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
      Grid grid(out, in, 2, 15.0f, random);
      grid.scale.fill(wild);
      const Exact<float> hessian = any_hessian(in, random);
      Exact<float> gradient = random.normals(out * in);
      for (std::int64_t i = 0; i < gradient.size(); ++i) gradient[i] *= 1e37f;
      Exact<std::uint8_t> codes(out * in);
      codes.fill(3);
      refine_codes({codes.get(), gradient.get(), hessian.get(), nullptr, grid.columns, MARGIN, 3, out, in},
                   static_cast<Isa>(isa), 1);
      const bool inside = std::all_of(codes.get(), codes.get() + codes.size(), [](int code) { return code <= 15; });
      expect(inside, "%s: codes beyond the grid at scales of %g", ISA_NAMES[isa], static_cast<double>(wild));
    }
  }
}

void check_all() {
  Random random(0);
  const Sizes all[] = {{0, 0, 1}, {0, 5, 2}, {3, 0, 1}, {1, 1, 1},  {1, 2, 2},   {15, 17, 17},
                       {16, 1, 1}, {17, 33, 3}, {33, 127, 4}, {5, 129, 1}, {70, 128, 8}};
  bool odd = false;
  for (const Sizes& sizes : all) {
    for (const float max_code : {1.0f, 7.0f, 255.0f}) {
      check_rounding(sizes, max_code, random, odd);
      if (sizes.width > 0) check_refining(sizes, max_code, random);
      odd = !odd;
    }
  }
  // Worth more than one thread.
  check_rounding({90, 400, 25}, 3.0f, random, false);
  check_refining({150, 256, 16}, 3.0f, random);
  check_poison(random);
  check_wild_refining(random);
}

}  // namespace
}  // namespace bitwright::testing

int main() {
  bitwright::testing::check_all();
  return bitwright::testing::failures() == 0 ? 0 : 1;
}
