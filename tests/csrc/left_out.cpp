// Tables of instruction sets that a program is built without, to save compiling them; `machine_isas` names none.
#include <cstdlib>

#include "matmul.hpp"

namespace bitwright {

#if defined(LEFT_OUT_AVX2)
const MatmulKernels& matmul_kernels_avx2();
const MatmulKernels& matmul_kernels_avx2() { std::abort(); }
#endif
#if defined(LEFT_OUT_AVX512)
const MatmulKernels& matmul_kernels_avx512();
const MatmulKernels& matmul_kernels_avx512() { std::abort(); }
#endif
#if defined(LEFT_OUT_AVX512VNNI)
const MatmulKernels& matmul_kernels_avx512vnni();
const MatmulKernels& matmul_kernels_avx512vnni() { std::abort(); }
#endif

}  // namespace bitwright
