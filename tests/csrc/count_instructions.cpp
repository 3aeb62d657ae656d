// Calls of the kernels for callgrind to count, one after another: `measured` is the call, and everything else is
// not counted. Prints the compiler, then for every call a line: name, weights times rows.
#include <string>

#include "exact.hpp"
#include "matmul.hpp"
#include "sample.hpp"

using namespace bitwright;
using namespace bitwright::testing;

extern "C" __attribute__((noinline, visibility("default"))) void measured(const PackedMatrix& matrix,
                                                                          const MatmulTask& task, MatmulIsa isa) {
  multiply(matrix, task, isa, 1);
}

namespace {

struct Call {
  const char* name;
  int bits;
  std::int64_t group_width;
  Kind kind;
  double outlier_share;
  std::int64_t rows;
  bool fast;
};

const Call CALLS[] = {
    {"4 bits g128 exact", 4, 128, Kind::byte_zero, 0.0, 1, false},
    {"4 bits g128 fast", 4, 128, Kind::byte_zero, 0.0, 1, true},
    {"3 bits g128 exact", 3, 128, Kind::byte_zero, 0.0, 1, false},
    {"3 bits g128 fast", 3, 128, Kind::byte_zero, 0.0, 1, true},
    {"2 bits g128 exact", 2, 128, Kind::byte_zero, 0.0, 1, false},
    {"2 bits g128 fast", 2, 128, Kind::byte_zero, 0.0, 1, true},
    {"3 bits bilevel g16 exact", 3, 16, Kind::levels, 0.0, 1, false},
    {"3 bits bilevel g16 fast", 3, 16, Kind::levels, 0.0, 1, true},
    {"3 bits bilevel g16 outliers exact", 3, 16, Kind::levels, 0.002, 1, false},
    {"3 bits bilevel g16 outliers fast", 3, 16, Kind::levels, 0.002, 1, true},
    {"3 bits bilevel g16 prefill exact", 3, 16, Kind::levels, 0.0, 16, false},
    {"3 bits bilevel g16 prefill fast", 3, 16, Kind::levels, 0.0, 16, true},
    {"3 bits bilevel g16 outliers prefill exact", 3, 16, Kind::levels, 0.002, 16, false},
    {"3 bits bilevel g16 outliers prefill fast", 3, 16, Kind::levels, 0.002, 16, true},
    {"4 bits g128 prefill exact", 4, 128, Kind::byte_zero, 0.0, 16, false},
    {"4 bits g128 prefill fast", 4, 128, Kind::byte_zero, 0.0, 16, true},
};

#if defined(__clang__)
constexpr const char* COMPILER = "Clang " __clang_version__;
#else
constexpr const char* COMPILER = "GCC " __VERSION__;
#endif

}  // namespace

int main() {
  std::printf("%s\n", COMPILER);
  constexpr std::int64_t OUT = 256, IN = 1024;
  for (const Call& call : CALLS) {
    Random random(0);
    const Sample sample = make_sample({call.name, OUT, IN, call.group_width, call.kind, call.outlier_share}, call.bits,
                                      random, false);
    const Exact<float> x = random.normals(call.rows * IN);
    Exact<float> y(call.rows * OUT);
    for (const NamedIsa& isa : machine_isas()) {
      const MatmulTask task{x.get(), nullptr, y.get(), call.rows, call.fast};
      multiply(sample.matrix, task, isa.isa, 1);  // memory that is kept between calls
      measured(sample.matrix, task, isa.isa);
      std::printf("%s, %s\t%lld\n", call.name, isa.name, static_cast<long long>(OUT * IN * call.rows));
    }
  }
  return 0;
}
