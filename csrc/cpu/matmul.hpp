// Products with packed weights: y = x Wᵀ + bias, from a layout made when a model is loaded and never stored.
//
// Rows are cut into tiles of TILE, one a lane; columns into chunks of CHUNK, eight quads of four columns. A quad of a
// tile is QUAD_BYTES codes, [lane][column], as the dot products of bytes want them. A chunk of b bits is b lines of
// QUAD_BYTES: the bits of its eight quads, as planes of 4, 2 and 1 bits, whichever make up b (3 = 2 + 1), the lowest
// bits first. A plane of p bits has p lines; line i holds quads i * 8/p on, p bits each, in every byte from its lowest
// bit up. Codes of 8 bits are one plane of bytes. So any code takes a shift, an and, and per further plane an or.
//
// Columns are padded so that a chunk belongs to one group, or (groups of 16 and fewer columns) each half of it does.
// Padded codes and inputs are 0; lanes without a row have code 0.
#pragma once

#include <cstdint>

namespace bitwright {

constexpr int TILE = 16;
constexpr int CHUNK = 32;
constexpr int QUADS = 8;
constexpr int QUAD_BYTES = 64;
// Chunks decoded at once where weights are taken as floats: a panel [PANEL_COLUMNS][TILE] of 8 KiB, of which
// the first-level cache holds a batch of tiles' and a block of x.
constexpr int PANEL_CHUNKS = 4;
constexpr int PANEL_COLUMNS = PANEL_CHUNKS * CHUNK;
// Largest block of x that outliers are multiplied by, where weights are not taken as floats.
constexpr int OUTLIER_ROWS = 16;

// What scales and zeros are stored as, [tiles][groups][TILE] each.
//   levels: one byte a group and lane, scale code + 16 * zero code; statistics float16 [tiles][groups][4] as
//   scale = s0 + s1 * code, zero = s2 + s3 * code.
enum class ScaleKind : int { float16, float32, levels };
enum class ZeroKind : int { constant, byte, float16, float32, levels };

struct PackedMatrix {
  const std::uint8_t* codes;           // [tiles][chunks][bits * QUAD_BYTES]
  const void* scale;                   // as `scale_kind` says
  const void* zero;                    // as `zero_kind` says; null for constant and levels
  const std::uint16_t* statistics;     // for levels, else null
  const std::int32_t* outlier_start;   // [tiles * panels + 1] or null: no outliers
  const std::uint16_t* outlier_place;  // column within the panel * TILE + lane, rising within a panel
  const float* outlier_value;
  std::int64_t out;
  std::int64_t in;
  std::int64_t group_width;
  int bits;
  ScaleKind scale_kind;
  ZeroKind zero_kind;
  float constant_zero;

  // What follows from the above; see `complete`.
  std::int64_t tiles, groups, chunks, panels;
  std::int64_t group_chunks;   // chunks of a full group; 0: every half of a chunk is a group
  bool aligned;                // padding only at the end of a row

  std::int64_t tile_bytes;     // of codes
  std::int64_t padded_groups;  // with those of padding, as the kernels walk over them
};

// Fills in what follows from the sizes; no function of the struct's own, which each instruction set would compile.
void complete(PackedMatrix& matrix);

// A block of up to MR rows of x in int8, quantized for each row and chunk: x = scale * code.
struct Quantized {
  std::int8_t* codes;  // [chunks][QUADS][MR][4]
  float* scale;        // [chunks][MR]
  // What zeros multiply, [padded groups][MR]: the group's sum of x as quantized; of its codes, where halves of a chunk
  // are groups.
  float* sum;
};

// One instruction set's kernels; `mr` is 1, 2, 4, 8 or 16, the rows of a block of x, `rows` those that exist.
struct MatmulKernels {
  int exact_rows;  // largest mr of multiply_panel
  int fast_rows;   // largest mr of multiply_codes
  // x [rows] of the matrix's columns, `stride` apart, to packed [padded columns][mr].
  void (*pack)(const PackedMatrix& matrix, const float* x, int rows, int mr, float* packed);
  void (*quantize)(const PackedMatrix& matrix, const float* x, int rows, int mr, const Quantized& quantized);
  // Scales and zeros of a tile, [padded groups][TILE] each; those of padding are 0.
  void (*expand_grid)(const PackedMatrix& matrix, std::int64_t tile, float* scale, float* zero);
  // Weights of one panel without outliers, [columns][TILE].
  void (*decode_panel)(const PackedMatrix& matrix, std::int64_t tile, std::int64_t panel, const float* scale,
                       const float* zero, float* weights);
  // y [mr][TILE] += x [columns][mr] times weights [columns][TILE].
  void (*multiply_panel)(const float* weights, int columns, const float* x, int mr, float* y);
  // The same for two tiles, `weights_stride` and `y_stride` apart, and mr = exact_rows.
  void (*multiply_panel_pair)(const float* weights, std::int64_t weights_stride, int columns, const float* x, float* y,
                              std::int64_t y_stride);
  // y [mr][TILE] = the product with all of a tile's codes, without outliers.
  void (*multiply_codes)(const PackedMatrix& matrix, std::int64_t tile, const float* scale, const float* zero,
                         const Quantized& x, int mr, float* y);
  // y [mr][TILE] += a tile's outliers times x, packed as floats; mr is up to OUTLIER_ROWS.
  void (*multiply_outliers)(const PackedMatrix& matrix, std::int64_t tile, const float* x, int mr, float* y);
};

// In rising order of speed: what runs on one runs on all after it.
#if defined(__aarch64__)
enum class MatmulIsa : int { baseline, neon, neondotprod };
constexpr const char* MATMUL_ISA_NAMES[] = {"baseline", "neon", "neondotprod"};
#else
enum class MatmulIsa : int { baseline, avx2, avx512, avx512vnni };
constexpr const char* MATMUL_ISA_NAMES[] = {"baseline", "avx2", "avx512", "avx512vnni"};
#endif

MatmulIsa best_matmul_isa();
const MatmulKernels& matmul_kernels(MatmulIsa isa);

// Codes from rows of dense bit streams, int32 [out, row_words] (formats/bits.py), to `codes` of the layout above.
void repack_codes(const std::uint32_t* words, std::int64_t row_words, const PackedMatrix& matrix, std::uint8_t* codes,
                  int threads);

struct MatmulTask {
  const float* x;     // [rows, in]
  const float* bias;  // [out] or null
  float* y;           // [rows, out]
  std::int64_t rows;
  bool fast;  // inputs in int8; else all in float32
};

// Every output is summed in an order that does not depend on `threads`.
void multiply(const PackedMatrix& matrix, const MatmulTask& task, MatmulIsa isa, int threads);

// Weights of some rows, [count, in]; `rows` must exist.
void decode_rows(const PackedMatrix& matrix, const std::int64_t* rows, std::int64_t count, float* weights,
                 MatmulIsa isa);

}  // namespace bitwright
