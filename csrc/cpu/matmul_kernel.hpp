// The bodies of the matmul kernels, over a vector class `V` of one instruction set. Included by one file for each,
// which is compiled with that set's flags: all is in an unnamed namespace and no function of the standard library is
// called, lest the linker keep one instruction set's copy of a shared function for all.
//
// V has LANES (a divisor of TILE), FAST_ROWS, EXACT_ROWS, and static functions on
//   Floats, LANES floats: zero, set, load, store, add, mul, sub, fma (a * b + c), fnma (c - a * b), fma_of<i>
//   (a * b[i] + c, where b has all floats up to the next multiple of four)
//   Codes, four bytes for every lane: load, shift<n> (each lane or byte right by n bits, left if negative),
//   field<first, n> (n bits of every byte), merge (first or second-and-byte, whose bits first has none of),
//   byte_floats<j> (byte j of every lane), halves, bytes, nibbles (floats from memory)
//   Sum<bits>, integer sums of codes times int8: add<i>(codes, x) (four inputs at x + 4 * i, with those up to the next
//   multiple of sixteen), floats()
//   quantize, one chunk of inputs in int8 (matmul_inputs.hpp has it in plain C++), and half, one float16
#include "matmul_inputs.hpp"
#include "matmul_outliers.hpp"

namespace bitwright {
namespace {

// Bytes by which reading is ahead: processors' own prefetching ends at every page and starts anew with every stream.
constexpr int AHEAD = 8192;

template <int LINES>
BITWRIGHT_FORCE void fetch_ahead(const std::uint8_t* lines) {
  for (int line = 0; line < LINES; ++line) __builtin_prefetch(lines + AHEAD + line * QUAD_BYTES);
}

// Quad `QUAD` of a chunk: lane `part` of V::LANES of its lines.
template <class V, int BITS, int QUAD>
BITWRIGHT_FORCE typename V::Codes quad_codes(const std::uint8_t* lines) {
  using Codes = typename V::Codes;
  if constexpr (BITS == 8) {
    return V::load(lines + QUAD * QUAD_BYTES);
  } else {
    constexpr int SECOND = BITS & 4;            // first bit of the plane of 2 bits
    constexpr int THIRD = SECOND + (BITS & 2);  // of that of 1 bit
    Codes code{};
    if constexpr ((BITS & 4) != 0) {
      code = V::template field<QUAD % 2 * 4, 4>(V::load(lines + QUAD / 2 * QUAD_BYTES));
    }
    if constexpr ((BITS & 2) != 0) {
      const Codes line = V::load(lines + (SECOND + QUAD / 4) * QUAD_BYTES);
      if constexpr (SECOND == 0) {
        code = V::template field<QUAD % 4 * 2, 2>(line);
      } else {
        code = V::merge(code, V::template shift<QUAD % 4 * 2 - SECOND>(line), 3 << SECOND);
      }
    }
    if constexpr ((BITS & 1) != 0) {
      const Codes bits = V::template shift<QUAD - THIRD>(V::load(lines + THIRD * QUAD_BYTES));
      code = V::merge(code, bits, 1 << THIRD);
    }
    return code;
  }
}

// --- grids -------------------------------------------------------------------------------------------------------

template <class V>
BITWRIGHT_FORCE void expand_halves(const void* stored, std::int64_t first, std::int64_t count, float* values) {
  const std::uint16_t* from = static_cast<const std::uint16_t*>(stored) + first;
  for (std::int64_t i = 0; i < count; i += V::LANES) V::store(values + i, V::halves(from + i));
}

template <class V>
void expand_grid(const PackedMatrix& w, std::int64_t tile, float* scale, float* zero) {
  const std::int64_t count = w.groups * TILE, first = tile * count;
  if (w.scale_kind == ScaleKind::float16) {
    expand_halves<V>(w.scale, first, count, scale);
  } else if (w.scale_kind == ScaleKind::float32) {
    std::memcpy(scale, static_cast<const float*>(w.scale) + first, static_cast<std::size_t>(count) * sizeof(float));
  } else {
    const std::uint8_t* codes = static_cast<const std::uint8_t*>(w.scale) + first;
    for (std::int64_t group = 0; group < w.groups; ++group) {
      __builtin_prefetch(codes + group * TILE + w.groups * TILE);  // the next tile's
      __builtin_prefetch(w.statistics + ((tile + 1) * w.groups + group) * 4);
      const std::uint16_t* s = w.statistics + (tile * w.groups + group) * 4;
      const auto s0 = V::set(V::half(s[0])), s1 = V::set(V::half(s[1]));
      const auto s2 = V::set(V::half(s[2])), s3 = V::set(V::half(s[3]));
      for (int lane = 0; lane < TILE; lane += V::LANES) {
        typename V::Floats low, high;
        V::nibbles(codes + group * TILE + lane, low, high);
        // The products are exact, so a fused addition rounds as two operations do.
        V::store(scale + group * TILE + lane, V::fma(s1, low, s0));
        V::store(zero + group * TILE + lane, V::fma(s3, high, s2));
      }
    }
  }
  if (w.zero_kind == ZeroKind::constant) {
    for (std::int64_t i = 0; i < count; ++i) zero[i] = w.constant_zero;
  } else if (w.zero_kind == ZeroKind::byte) {
    const std::uint8_t* bytes = static_cast<const std::uint8_t*>(w.zero) + first;
    for (std::int64_t i = 0; i < count; i += V::LANES) V::store(zero + i, V::bytes(bytes + i));
  } else if (w.zero_kind == ZeroKind::float16) {
    expand_halves<V>(w.zero, first, count, zero);
  } else if (w.zero_kind == ZeroKind::float32) {
    std::memcpy(zero, static_cast<const float*>(w.zero) + first, static_cast<std::size_t>(count) * sizeof(float));
  }
  for (std::int64_t i = count; i < w.padded_groups * TILE; ++i) scale[i] = zero[i] = 0.0f;
}

// --- float inputs ------------------------------------------------------------------------------------------------

template <class V, int BITS>
void decode_panel_bits(const PackedMatrix& w, std::int64_t tile, std::int64_t panel, const float* scale,
                       const float* zero, float* weights) {
  using Floats = typename V::Floats;
  const std::int64_t end = smaller((panel + 1) * PANEL_CHUNKS, w.chunks);
  const std::uint8_t* lines = w.codes + tile * w.tile_bytes + panel * PANEL_CHUNKS * BITS * QUAD_BYTES;
  for (std::int64_t chunk = panel * PANEL_CHUNKS; chunk < end; ++chunk) {
    const std::int64_t groups[2] = {w.group_chunks == 0 ? 2 * chunk : chunk / w.group_chunks,
                                    w.group_chunks == 0 ? 2 * chunk + 1 : chunk / w.group_chunks};
    for (int lane = 0; lane < TILE; lane += V::LANES) {
      const Floats s[2] = {V::load(scale + groups[0] * TILE + lane), V::load(scale + groups[1] * TILE + lane)};
      const Floats z[2] = {V::load(zero + groups[0] * TILE + lane), V::load(zero + groups[1] * TILE + lane)};
      unrolled<QUADS>([&](auto quad) __attribute__((always_inline)) {
        constexpr int QUAD = decltype(quad)::value, HALF = QUAD / (QUADS / 2);
        const typename V::Codes codes = quad_codes<V, BITS, QUAD>(lines + lane * 4);
        float* to = weights + QUAD * 4 * TILE + lane;
        unrolled<4>([&](auto j) __attribute__((always_inline)) {
          const Floats code = V::template byte_floats<decltype(j)::value>(codes);
          V::store(to + decltype(j)::value * TILE, V::mul(s[HALF], V::sub(code, z[HALF])));
        });
      });
    }
    lines += BITS * QUAD_BYTES;
    weights += CHUNK * TILE;
  }
}

template <class V, int MR>
void multiply_panel_rows(const float* weights, int columns, const float* x, float* y) {
  using Floats = typename V::Floats;
  // Enough sums at once to hide the latency of an addition; columns are a multiple of CHUNK.
  constexpr int SPLIT = MR >= 8 ? 1 : 8 / MR;
  for (int lane = 0; lane < TILE; lane += V::LANES) {
    Floats sums[SPLIT][MR];
    for (int part = 0; part < SPLIT; ++part) {
      for (int m = 0; m < MR; ++m) sums[part][m] = V::zero();
    }
    for (int column = 0; column < columns; column += SPLIT) {
      unrolled<SPLIT>([&](auto part) __attribute__((always_inline)) {
        constexpr int PART = decltype(part)::value;
        const Floats weight = V::load(weights + (column + PART) * TILE + lane);
        unrolled<MR>([&](auto m) __attribute__((always_inline)) {
          constexpr int M = decltype(m)::value;
          sums[PART][M] = V::template fma_of<PART * MR + M>(weight, x + column * MR, sums[PART][M]);
        });
      });
    }
    for (int m = 0; m < MR; ++m) {
      Floats sum = sums[0][m];
      for (int part = 1; part < SPLIT; ++part) sum = V::add(sum, sums[part][m]);
      V::store(y + m * TILE + lane, V::add(V::load(y + m * TILE + lane), sum));
    }
  }
}

// Two tiles and a full block of x, half of its rows at a time: each input is loaded once for both tiles.
template <class V>
void multiply_panel_pair(const float* weights, std::int64_t weights_stride, int columns, const float* x, float* y,
                         std::int64_t y_stride) {
  using Floats = typename V::Floats;
  constexpr int MR = V::EXACT_ROWS, ROWS = MR / 2;
  for (int first = 0; first < MR; first += ROWS) {
    for (int lane = 0; lane < TILE; lane += V::LANES) {
      Floats sums[2][ROWS];
      for (int m = 0; m < ROWS; ++m) sums[0][m] = sums[1][m] = V::zero();
      const float *from = weights + lane, *inputs = x + first;
      for (int column = 0; column < columns; ++column, from += TILE, inputs += MR) {
        const Floats one = V::load(from), two = V::load(from + weights_stride);
        unrolled<ROWS>([&](auto m) __attribute__((always_inline)) {
          constexpr int M = decltype(m)::value;
          sums[0][M] = V::template fma_of<M>(one, inputs, sums[0][M]);
          sums[1][M] = V::template fma_of<M>(two, inputs, sums[1][M]);
        });
      }
      for (int tile = 0; tile < 2; ++tile) {
        float* to = y + tile * y_stride + first * TILE + lane;
        for (int m = 0; m < ROWS; ++m) V::store(to + m * TILE, V::add(V::load(to + m * TILE), sums[tile][m]));
      }
    }
  }
}

// --- int8 inputs -------------------------------------------------------------------------------------------------

template <class V, int BITS, int MR, int FIRST, int COUNT>
BITWRIGHT_FORCE void add_quads(const std::uint8_t* lines, const std::int8_t* x,
                               typename V::template Sum<BITS> (&sums)[MR]) {
  unrolled<COUNT>([&](auto index) __attribute__((always_inline)) {
    constexpr int QUAD = FIRST + decltype(index)::value;
    const typename V::Codes codes = quad_codes<V, BITS, QUAD>(lines);
    unrolled<MR>([&](auto m) __attribute__((always_inline)) {
      constexpr int M = decltype(m)::value;
      sums[M].template add<QUAD * MR + M>(codes, x);
    });
  });
}

// Groups of whole chunks: sum over chunks, then (sum - zero * inputs) * scale once for a group.
template <class V, int BITS, int MR>
void multiply_codes_groups(const PackedMatrix& w, std::int64_t tile, const float* scale, const float* zero,
                           const Quantized& x, float* y) {
  using Floats = typename V::Floats;
  for (int lane = 0; lane < TILE; lane += V::LANES) {
    const std::uint8_t* lines = w.codes + tile * w.tile_bytes + lane * 4;
    const std::int8_t* inputs = x.codes;
    const float* steps = x.scale;
    Floats totals[MR];
    for (int m = 0; m < MR; ++m) totals[m] = V::zero();
    for (std::int64_t group = 0, chunk = 0; group < w.groups; ++group) {
      const std::int64_t end = smaller((group + 1) * w.group_chunks, w.chunks);
      Floats products[MR];
      for (int m = 0; m < MR; ++m) products[m] = V::zero();
      for (; chunk < end; ++chunk) {
        typename V::template Sum<BITS> sums[MR];
        if (lane == 0) fetch_ahead<BITS>(lines);
        add_quads<V, BITS, MR, 0, QUADS>(lines, inputs, sums);
        for (int m = 0; m < MR; ++m) products[m] = V::fma(sums[m].floats(), V::set(steps[m]), products[m]);
        lines += BITS * QUAD_BYTES;
        inputs += QUADS * MR * 4;
        steps += MR;
      }
      const Floats s = V::load(scale + group * TILE + lane), z = V::load(zero + group * TILE + lane);
      const float* input_sums = x.sum + group * MR;
      for (int m = 0; m < MR; ++m) {
        totals[m] = V::fma(s, V::fnma(z, V::set(input_sums[m]), products[m]), totals[m]);
      }
    }
    for (int m = 0; m < MR; ++m) V::store(y + m * TILE + lane, totals[m]);
  }
}

// Two groups in every chunk: scales come before the step of the inputs, which the halves share.
template <class V, int BITS, int MR>
void multiply_codes_halves(const PackedMatrix& w, std::int64_t tile, const float* scale, const float* zero,
                           const Quantized& x, float* y) {
  using Floats = typename V::Floats;
  for (int lane = 0; lane < TILE; lane += V::LANES) {
    const std::uint8_t* lines = w.codes + tile * w.tile_bytes + lane * 4;
    const std::int8_t* inputs = x.codes;
    const float *s = scale + lane, *z = zero + lane, *input_sums = x.sum;
    Floats totals[MR];
    for (int m = 0; m < MR; ++m) totals[m] = V::zero();
    for (std::int64_t chunk = 0; chunk < w.chunks; ++chunk) {
      Floats products[MR];
      for (int m = 0; m < MR; ++m) products[m] = V::zero();
      if (lane == 0) fetch_ahead<BITS>(lines);
      unrolled<2>([&](auto index) __attribute__((always_inline)) {
        constexpr int HALF = decltype(index)::value;
        typename V::template Sum<BITS> sums[MR];
        add_quads<V, BITS, MR, HALF * QUADS / 2, QUADS / 2>(lines, inputs, sums);
        const Floats of_scale = V::load(s + HALF * TILE), of_zero = V::load(z + HALF * TILE);
        for (int m = 0; m < MR; ++m) {
          const Floats centred = V::fnma(of_zero, V::set(input_sums[HALF * MR + m]), sums[m].floats());
          products[m] = V::fma(of_scale, centred, products[m]);
        }
      });
      for (int m = 0; m < MR; ++m) totals[m] = V::fma(products[m], V::set(x.scale[chunk * MR + m]), totals[m]);
      lines += BITS * QUAD_BYTES;
      inputs += QUADS * MR * 4;
      input_sums += 2 * MR;
      s += 2 * TILE;
      z += 2 * TILE;
    }
    for (int m = 0; m < MR; ++m) V::store(y + m * TILE + lane, totals[m]);
  }
}

template <class V, int BITS, int MR>
void multiply_codes_sizes(const PackedMatrix& w, std::int64_t tile, const float* scale, const float* zero,
                          const Quantized& x, float* y) {
  if (w.group_chunks == 0) {
    multiply_codes_halves<V, BITS, MR>(w, tile, scale, zero, x, y);
  } else {
    multiply_codes_groups<V, BITS, MR>(w, tile, scale, zero, x, y);
  }
}

// --- the table ---------------------------------------------------------------------------------------------------

// body(integral_constant) for a number of bits, 2 to 8.
template <class Body>
BITWRIGHT_FORCE void with_bits(int bits, const Body& body) {
  unrolled<7>([&](auto index) __attribute__((always_inline)) {
    if (bits == decltype(index)::value + 2) body(std::integral_constant<int, decltype(index)::value + 2>{});
  });
}

// body(integral_constant) for mr = 1, 2, 4 .. MOST.
template <int MOST, class Body>
BITWRIGHT_FORCE void with_rows(int mr, const Body& body) {
  unrolled<5>([&](auto index) __attribute__((always_inline)) {
    constexpr int MR = 1 << decltype(index)::value;
    if constexpr (MR <= MOST) {
      if (mr == MR) body(std::integral_constant<int, MR>{});
    }
  });
}

template <class V>
void decode_panel(const PackedMatrix& w, std::int64_t tile, std::int64_t panel, const float* scale, const float* zero,
                  float* weights) {
  with_bits(w.bits, [&](auto bits) {
    decode_panel_bits<V, decltype(bits)::value>(w, tile, panel, scale, zero, weights);
  });
}

template <class V>
void multiply_panel(const float* weights, int columns, const float* x, int mr, float* y) {
  with_rows<V::EXACT_ROWS>(mr, [&](auto rows) {
    multiply_panel_rows<V, decltype(rows)::value>(weights, columns, x, y);
  });
}

template <class V>
void multiply_codes(const PackedMatrix& w, std::int64_t tile, const float* scale, const float* zero,
                    const Quantized& x, int mr, float* y) {
  with_bits(w.bits, [&](auto bits) {
    with_rows<V::FAST_ROWS>(mr, [&](auto rows) {
      multiply_codes_sizes<V, decltype(bits)::value, decltype(rows)::value>(w, tile, scale, zero, x, y);
    });
  });
}

template <class V>
void multiply_outliers(const PackedMatrix& w, std::int64_t tile, const float* x, int mr, float* y) {
  with_rows<OUTLIER_ROWS>(mr, [&](auto rows) { multiply_outliers_rows<V, decltype(rows)::value>(w, tile, x, y); });
}

template <class V>
constexpr MatmulKernels table() {
  return {V::EXACT_ROWS,    V::FAST_ROWS,       &pack_rows,         &quantize_rows<V>,    &expand_grid<V>,
          &decode_panel<V>, &multiply_panel<V>, &multiply_panel_pair<V>, &multiply_codes<V>, &multiply_outliers<V>};
}

}  // namespace
}  // namespace bitwright
