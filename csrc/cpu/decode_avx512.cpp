#include "decode_bodies.hpp"

namespace bitwright {

const DecodeKernels& decode_kernels_avx512() {
  static constexpr DecodeKernels kernels = decode_table<16>();
  return kernels;
}

}  // namespace bitwright
