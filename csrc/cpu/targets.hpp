// How one function body is compiled for several instruction sets, and chosen at run time.
//
// A body is a BITWRIGHT_INLINE template over the vector width in floats. Each instruction set has a small function with
// its target attribute that inlines the body at its width; the caller dispatches on `best_isa()`. Helpers that the body
// calls must be BITWRIGHT_INLINE too, or they are compiled for the baseline alone.
#pragma once

#define BITWRIGHT_INLINE inline __attribute__((always_inline))

namespace bitwright {

// In rising order: what runs on one runs on all after it.
enum class Isa : int { baseline, avx2, avx512 };

#if defined(__x86_64__)
#define BITWRIGHT_AVX2 __attribute__((target("avx2")))
#define BITWRIGHT_AVX512 __attribute__((target("avx512f")))
#endif

// The best of this machine. NEON is part of AArch64's baseline.
inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return Isa::avx512;
  if (__builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// Vectors of GCC and Clang: operators work lane by lane, and compile to the instructions at hand. A width beyond the
// target's registers works too, but GCC moves such vectors through the stack. Written out, because both compilers find
// loops over lanes too tangled to vectorise.
template <int WIDTH>
struct Simd {
  typedef float Floats __attribute__((vector_size(4 * WIDTH)));
  // The same in memory: aligned as its elements, whatever the instruction set.
  typedef float Stored __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
};

template <int WIDTH>
BITWRIGHT_INLINE typename Simd<WIDTH>::Stored& vector_at(float* values) {
  return *reinterpret_cast<typename Simd<WIDTH>::Stored*>(values);
}

}  // namespace bitwright
