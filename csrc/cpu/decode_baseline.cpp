// Four floats at a time: SSE2 and NEON, or whatever the target has.
#include "decode_bodies.hpp"

namespace bitwright {

const DecodeKernels& decode_kernels_baseline() {
  static constexpr DecodeKernels kernels = decode_table<4>();
  return kernels;
}

}  // namespace bitwright
