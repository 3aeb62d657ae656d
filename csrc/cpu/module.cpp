// The extension module bitwright._native: Python passes addresses and sizes that it has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "columns.hpp"

namespace nb = nanobind;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (isa, threads) as Python's tuple; the instruction set by name, among those of `isas`.
struct How {
  bitwright::Isa isa;
  int threads;
};

constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512"};

nb::list isas() {
  nb::list names;
  for (int isa = 0; isa <= static_cast<int>(bitwright::best_isa()); ++isa) names.append(ISA_NAMES[isa]);
  return names;
}

How how_of(const nb::tuple& how) {
  const auto name = nb::cast<std::string>(how[0]);
  for (int isa = 0; isa <= static_cast<int>(bitwright::best_isa()); ++isa) {
    if (name == ISA_NAMES[isa]) return {static_cast<bitwright::Isa>(isa), nb::cast<int>(how[1])};
  }
  throw nb::value_error("the instruction set is not one of isas()");
}

// (scale, zero, group, groups, max_code) as Python's tuple.
bitwright::ColumnGrid grid_of(const nb::tuple& grid) {
  return {at<const float>(nb::cast<Address>(grid[0])), at<const float>(nb::cast<Address>(grid[1])),
          at<const std::int32_t>(nb::cast<Address>(grid[2])), nb::cast<std::int64_t>(grid[3]),
          static_cast<float>(nb::cast<int>(grid[4]))};
}

// inputs: (weight, factor, limit or 0, mask or 0); outputs: (codes, target, error, outlier); shape: (out, width).
// how: see How.
bool round_columns(const nb::tuple& inputs, const nb::tuple& grid, const nb::tuple& outputs, const nb::tuple& shape,
                   const nb::tuple& how_tuple) {
  const How how = how_of(how_tuple);
  const bitwright::RoundTask task{
      at<const float>(nb::cast<Address>(inputs[0])),
      at<const float>(nb::cast<Address>(inputs[1])),
      at<const float>(nb::cast<Address>(inputs[2])),
      at<const std::uint8_t>(nb::cast<Address>(inputs[3])),
      grid_of(grid),
      at<std::uint8_t>(nb::cast<Address>(outputs[0])),
      at<float>(nb::cast<Address>(outputs[1])),
      at<float>(nb::cast<Address>(outputs[2])),
      at<std::uint8_t>(nb::cast<Address>(outputs[3])),
      nb::cast<std::int64_t>(shape[0]),
      nb::cast<std::int64_t>(shape[1]),
  };
  nb::gil_scoped_release released;
  return bitwright::round_columns(task, how.isa, how.threads);
}

// tensors: (codes, gradient, hessian, frozen or 0), the first two changed in place; search: (margin, sweeps).
void refine_codes(const nb::tuple& tensors, const nb::tuple& grid, const nb::tuple& search, const nb::tuple& shape,
                  const nb::tuple& how_tuple) {
  const How how = how_of(how_tuple);
  const bitwright::RefineTask task{
      at<std::uint8_t>(nb::cast<Address>(tensors[0])),
      at<float>(nb::cast<Address>(tensors[1])),
      at<const float>(nb::cast<Address>(tensors[2])),
      at<const std::uint8_t>(nb::cast<Address>(tensors[3])),
      grid_of(grid),
      nb::cast<float>(search[0]),
      nb::cast<int>(search[1]),
      nb::cast<std::int64_t>(shape[0]),
      nb::cast<std::int64_t>(shape[1]),
  };
  nb::gil_scoped_release released;
  bitwright::refine_codes(task, how.isa, how.threads);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Compiled kernels of bitwright. Internal: bitwright.rounding.columns checks what it passes.";
  // Raised with every change of a signature or of the arithmetic, so that a stale build is noticed.
  module.attr("INTERFACE") = 1;
  module.def("isas", &isas);
  module.def("round_columns", &round_columns);
  module.def("refine_codes", &refine_codes);
}
