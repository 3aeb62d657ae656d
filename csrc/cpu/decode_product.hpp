// Products of one token with linears that share its inputs. `multiply` of matmul.hpp, which is for any number of rows,
// gives the same bits for packed weights; here the inputs are prepared once for all linears, memory is kept, and
// helpers of the pool are taken to be awake.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decode_kernels.hpp"
#include "matmul.hpp"

namespace bitwright {

// One linear, or a table of rows: packed, or float32 [out, in] where `dense` is not null.
struct DecodeLinear {
  PackedMatrix packed;
  const float* dense;
  const float* bias;  // [out] or null
  std::int64_t out, in;
};

using DecodeProduct = std::vector<DecodeLinear>;

std::int64_t out_features(const DecodeProduct& product);

// How a step computes.
struct DecodeHow {
  bool fast;  // inputs of packed weights in int8; else all in float32
  int threads;
};

// Threads worth having for so many multiplications, when helpers are awake.
int awake_threads(int threads, std::int64_t tasks, double multiplications);

class DecodeProducts {
 public:
  DecodeProducts(MatmulIsa isa);
  ~DecodeProducts();

  // y [out of all linears] = their products with x [in], plus their biases, plus `residual` [out], which may be y or
  // null. Sums do not depend on the number of threads.
  void multiply(const DecodeProduct& product, const float* x, const float* residual, float* y, const DecodeHow& how);

 private:
  struct Memory;
  struct Call;

  void prepare(const PackedMatrix& w, const float* x, bool fast);
  void reserve(const DecodeLinear& linear, int threads);
  void cut(std::int64_t tiles, int threads, std::int64_t least);

  MatmulIsa isa_;
  std::unique_ptr<Memory> memory_;
};

}  // namespace bitwright
