#include "decode_bodies.hpp"

namespace bitwright {

const DecodeKernels& decode_kernels_avx2() {
  static constexpr DecodeKernels kernels = decode_table<8>();
  return kernels;
}

}  // namespace bitwright
