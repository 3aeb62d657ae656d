#include "matmul_neon.hpp"

namespace bitwright {

const MatmulKernels& matmul_kernels_neondotprod() {
  static constexpr MatmulKernels kernels = table<Neon>();
  return kernels;
}

}  // namespace bitwright
