// What a decode step computes between its products with packed weights: norms, RoPE, attention and SiLU of one token,
// and products with float weights. In float32, the same bits on every instruction set.
#pragma once

#include <cstdint>

#include "matmul.hpp"

namespace bitwright {

// Positions that one piece of attention looks at: the order of sums depends on it, the number of threads does not.
constexpr std::int64_t ATTENTION_POSITIONS = 64;
// Positions of a tile of keys.
constexpr std::int64_t KEY_TILE = 16;

// Values have room for whole vectors in each position; what lies behind `head_dim` is 0.
constexpr std::int64_t padded_head(std::int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Attention of the heads that share one head of keys and values, over positions [first, end), `first` a multiple of
// KEY_TILE and end - first at most ATTENTION_POSITIONS.
struct AttentionPiece {
  const float* query;   // [heads][head_dim]
  const float* keys;    // [tiles of positions][head_dim][KEY_TILE]
  const float* values;  // [positions][padded_head(head_dim)]
  std::int64_t heads, head_dim, first, end;
  float scaling;
  float* scores;   // room for [heads][ATTENTION_POSITIONS]
  float* largest;  // [heads]: largest score
  float* total;    // [heads]: sum of e^(score - largest)
  float* sums;     // [heads][padded_head(head_dim)]: values times that, summed
};

// The pieces of one such set of heads, in order of position, [pieces] of what AttentionPiece gives.
struct AttentionPieces {
  const float *largest, *total, *sums;
  std::int64_t pieces, heads, head_dim;
  float* factors;   // room for `pieces` rounded up to whole vectors
  float* attended;  // [heads][head_dim]
};

struct DecodeKernels {
  // y = x * weight / root of (mean of x^2 + eps); y may be x.
  void (*norm)(const float* x, const float* weight, float eps, std::int64_t count, float* y);
  // RoPE in place on one head: x * cos + (x with halves exchanged) * sin, the sine negated in its first half.
  void (*rotate)(float* x, const float* cos, const float* sin, std::int64_t head_dim);
  // gate = silu(gate) * up
  void (*gate)(float* gate, const float* up, std::int64_t count);
  void (*attend)(const AttentionPiece& piece);
  void (*combine)(const AttentionPieces& pieces);
  // y [rows] = weight [rows, in] x
  void (*multiply)(const float* weight, std::int64_t rows, std::int64_t in, const float* x, float* y);
};

const DecodeKernels& decode_kernels(MatmulIsa isa);

}  // namespace bitwright
