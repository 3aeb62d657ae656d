#include "matmul_avx512.hpp"

namespace bitwright {

const MatmulKernels& matmul_kernels_avx512() {
  static constexpr MatmulKernels kernels = table<Avx512>();
  return kernels;
}

}  // namespace bitwright
