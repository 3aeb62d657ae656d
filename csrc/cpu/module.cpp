// The extension module bitwright._native: Python passes addresses and sizes that it has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <utility>

#include "columns.hpp"
#include "decode.hpp"
#include "matmul.hpp"

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

using bitwright::MATMUL_ISA_NAMES;

nb::list matmul_isas() {
  nb::list names;
  for (int isa = 0; isa <= static_cast<int>(bitwright::best_matmul_isa()); ++isa) names.append(MATMUL_ISA_NAMES[isa]);
  return names;
}

bitwright::MatmulIsa matmul_isa_of(const std::string& name) {
  for (int isa = 0; isa <= static_cast<int>(bitwright::best_matmul_isa()); ++isa) {
    if (name == MATMUL_ISA_NAMES[isa]) return static_cast<bitwright::MatmulIsa>(isa);
  }
  throw nb::value_error("the instruction set is not one of matmul_isas()");
}

// One repacked weight. It owns no memory: Python keeps the tensors alive whose addresses it holds.
class Matrix {
 public:
  // sizes: (out, in, group width, bits); kinds: (scale, zero, constant zero); tensors: (codes, scale, zero or 0,
  // statistics or 0, outlier start or 0, outlier place or 0, outlier value or 0), addresses, `codes` still empty.
  Matrix(const nb::tuple& sizes, const nb::tuple& kinds, const nb::tuple& tensors, const std::string& isa) {
    matrix_.out = nb::cast<std::int64_t>(sizes[0]);
    matrix_.in = nb::cast<std::int64_t>(sizes[1]);
    matrix_.group_width = nb::cast<std::int64_t>(sizes[2]);
    matrix_.bits = nb::cast<int>(sizes[3]);
    matrix_.scale_kind = static_cast<bitwright::ScaleKind>(nb::cast<int>(kinds[0]));
    matrix_.zero_kind = static_cast<bitwright::ZeroKind>(nb::cast<int>(kinds[1]));
    matrix_.constant_zero = nb::cast<float>(kinds[2]);
    matrix_.codes = at<const std::uint8_t>(nb::cast<Address>(tensors[0]));
    matrix_.scale = at<const void>(nb::cast<Address>(tensors[1]));
    matrix_.zero = at<const void>(nb::cast<Address>(tensors[2]));
    matrix_.statistics = at<const std::uint16_t>(nb::cast<Address>(tensors[3]));
    matrix_.outlier_start = at<const std::int32_t>(nb::cast<Address>(tensors[4]));
    matrix_.outlier_place = at<const std::uint16_t>(nb::cast<Address>(tensors[5]));
    matrix_.outlier_value = at<const float>(nb::cast<Address>(tensors[6]));
    bitwright::complete(matrix_);
    isa_ = matmul_isa_of(isa);
  }

  // Fills `codes`, the tensor given to the constructor, from int32 words [out, row_words].
  void repack(Address words, std::int64_t row_words, Address codes, int threads) const {
    nb::gil_scoped_release released;
    bitwright::repack_codes(at<const std::uint32_t>(words), row_words, matrix_, at<std::uint8_t>(codes), threads);
  }

  void multiply(Address x, Address bias, Address y, std::int64_t rows, bool fast, int threads) const {
    nb::gil_scoped_release released;
    bitwright::multiply(matrix_, {at<const float>(x), at<const float>(bias), at<float>(y), rows, fast}, isa_, threads);
  }

  void decode_rows(Address rows, std::int64_t count, Address weights) const {
    nb::gil_scoped_release released;
    bitwright::decode_rows(matrix_, at<const std::int64_t>(rows), count, at<float>(weights), isa_);
  }

  const bitwright::PackedMatrix& packed() const { return matrix_; }

 private:
  bitwright::PackedMatrix matrix_{};
  bitwright::MatmulIsa isa_ = bitwright::MatmulIsa::baseline;
};

// (Matrix or None, address of float weights or 0, bias or 0, out, in) as Python's tuple.
bitwright::DecodeLinear decode_linear(nb::handle given) {
  const auto linear = nb::cast<nb::tuple>(given);
  const auto dense = at<const float>(nb::cast<Address>(linear[1]));
  if (linear[0].is_none() == (dense == nullptr)) throw nb::value_error("a linear is packed or has float weights");
  return {dense == nullptr ? nb::cast<const Matrix&>(linear[0]).packed() : bitwright::PackedMatrix{}, dense,
          at<const float>(nb::cast<Address>(linear[2])), nb::cast<std::int64_t>(linear[3]),
          nb::cast<std::int64_t>(linear[4])};
}

bitwright::DecodeProduct decode_product(nb::handle given) {
  bitwright::DecodeProduct product;
  for (nb::handle linear : nb::cast<nb::tuple>(given)) product.push_back(decode_linear(linear));
  return product;
}

// A model laid out for decoding. As Matrix it owns no memory.
class Decoder {
 public:
  // sizes: (hidden, heads, kv heads, head_dim, intermediate, max_length); numbers: (eps, scaling); tables: (cos, sin,
  // final norm, keys, values); ends: (embedding, head); blocks: (input norm, query norm or 0, key norm or 0, post norm,
  // qkv, output, gate_up, down) each. A head is a product, as the last four are: a tuple of linears.
  Decoder(const nb::tuple& sizes, const nb::tuple& numbers, const nb::tuple& tables, const nb::tuple& ends,
          const nb::tuple& blocks, const std::string& isa)
      : decoder_(model_of(sizes, numbers, tables, ends, blocks, isa)) {}

  void step(std::int64_t token, std::int64_t position, Address logits, bool fast, int threads) {
    nb::gil_scoped_release released;
    decoder_.step(token, position, at<float>(logits), {fast, threads});
  }

  void finish(Address hidden, Address logits, bool fast, int threads) {
    nb::gil_scoped_release released;
    decoder_.finish(at<const float>(hidden), at<float>(logits), {fast, threads});
  }

 private:
  static bitwright::DecodeModel model_of(const nb::tuple& sizes, const nb::tuple& numbers, const nb::tuple& tables,
                                         const nb::tuple& ends, const nb::tuple& blocks, const std::string& isa) {
    bitwright::DecodeModel model{};
    std::int64_t* const fields[] = {&model.hidden,   &model.heads,        &model.kv_heads,
                                    &model.head_dim, &model.intermediate, &model.max_length};
    for (std::size_t i = 0; i < 6; ++i) *fields[i] = nb::cast<std::int64_t>(sizes[i]);
    model.eps = nb::cast<float>(numbers[0]);
    model.scaling = nb::cast<float>(numbers[1]);
    model.cos = at<const float>(nb::cast<Address>(tables[0]));
    model.sin = at<const float>(nb::cast<Address>(tables[1]));
    model.final_norm = at<const float>(nb::cast<Address>(tables[2]));
    model.keys = at<float>(nb::cast<Address>(tables[3]));
    model.values = at<float>(nb::cast<Address>(tables[4]));
    model.embedding = decode_linear(ends[0]);
    model.head = decode_product(ends[1]);
    for (nb::handle given : blocks) {
      const auto block = nb::cast<nb::tuple>(given);
      const auto norm = [&](std::size_t i) { return at<const float>(nb::cast<Address>(block[i])); };
      model.blocks.push_back({norm(0), norm(1), norm(2), norm(3), decode_product(block[4]), decode_product(block[5]),
                              decode_product(block[6]), decode_product(block[7])});
    }
    model.isa = matmul_isa_of(isa);
    return model;
  }

  bitwright::Decoder decoder_;
};

}  // namespace

NB_MODULE(_native, module) {
  module.doc() =
      "Compiled kernels of bitwright. Internal: rounding.columns, runtime.cpu and runtime.decode check what they pass.";
  // Raised with every change of a signature or of the arithmetic, so that a stale build is noticed.
  module.attr("INTERFACE") = 1;
  module.def("isas", &isas);
  module.def("round_columns", &round_columns);
  module.def("refine_codes", &refine_codes);
  // As INTERFACE, for bitwright.runtime.cpu, with the sizes of the layout.
  module.attr("MATMUL_INTERFACE") = nb::make_tuple(1, bitwright::TILE, bitwright::CHUNK, bitwright::PANEL_COLUMNS);
  module.def("matmul_isas", &matmul_isas);
  nb::class_<Matrix>(module, "Matrix")
      .def(nb::init<const nb::tuple&, const nb::tuple&, const nb::tuple&, const std::string&>())
      .def("repack", &Matrix::repack)
      .def("multiply", &Matrix::multiply)
      .def("decode_rows", &Matrix::decode_rows);
  // As INTERFACE, for bitwright.runtime.decode, with the sizes of the cache's layout.
  module.attr("DECODE_INTERFACE") = nb::make_tuple(1, bitwright::KEY_TILE, bitwright::padded_head(1));
  nb::class_<Decoder>(module, "Decoder")
      .def(nb::init<const nb::tuple&, const nb::tuple&, const nb::tuple&, const nb::tuple&, const nb::tuple&,
                    const std::string&>())
      .def("step", &Decoder::step)
      .def("finish", &Decoder::finish);
}
