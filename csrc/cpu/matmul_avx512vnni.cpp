#include "matmul_avx512.hpp"

namespace bitwright {

const MatmulKernels& matmul_kernels_avx512vnni() {
  static constexpr MatmulKernels kernels = table<Avx512>();
  return kernels;
}

}  // namespace bitwright
