// One token through all blocks of a model of Llama's shape, in one call: RMSNorm, queries, keys and values with
// optional norms of heads, RoPE, attention over a cache, SiLU gates, residuals; then the final norm and the head.
//
// Keys lie in the cache as [blocks][kv heads][tiles of positions][head_dim][KEY_TILE], so that the scores of a tile are
// one vector; values as [blocks][kv heads][max_length][padded_head(head_dim)]. No result depends on the number of
// threads.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "decode_kernels.hpp"
#include "decode_product.hpp"

namespace bitwright {

struct DecodeBlock {
  const float* input_norm;  // [hidden]
  const float* query_norm;  // [head_dim], or null: none
  const float* key_norm;    // the same
  const float* post_norm;   // [hidden]
  DecodeProduct qkv, output, gate_up, down;
};

// A model; what it points to must outlive its decoder.
struct DecodeModel {
  std::int64_t hidden, heads, kv_heads, head_dim, intermediate, max_length;
  float eps, scaling;
  const float* cos;  // [max_length, head_dim]
  const float* sin;  // the same, negated in the first half of each row
  const float* final_norm;
  float* keys;
  float* values;
  DecodeLinear embedding;
  std::vector<DecodeBlock> blocks;
  DecodeProduct head;
  MatmulIsa isa;
};

class Decoder {
 public:
  // Throws std::invalid_argument where sizes do not fit each other.
  explicit Decoder(DecodeModel model);

  // Logits behind `token` at `position`, whose keys and values the cache receives; those before must be there.
  // Throws std::out_of_range without having changed anything.
  void step(std::int64_t token, std::int64_t position, float* logits, const DecodeHow& how);

  // Logits of a last hidden state [hidden].
  void finish(const float* hidden, float* logits, const DecodeHow& how);

 private:
  void attention(std::int64_t block, std::int64_t position, const DecodeHow& how);
  void remember(std::int64_t block, std::int64_t position);
  void end(const float* hidden, float* logits, const DecodeHow& how);
  float* keys_of(std::int64_t block, std::int64_t head) const;
  float* values_of(std::int64_t block, std::int64_t head) const;

  DecodeModel model_;
  const DecodeKernels& kernels_;
  DecodeProducts products_;
  std::vector<float> hidden_, normed_, qkv_, attended_, mlp_;
  // Of attention: a worker's scores; and of all pieces [kv heads][pieces][heads that share one] and what follows.
  std::vector<float> scores_, largest_, total_, sums_, factors_;
  std::mutex busy_;
};

}  // namespace bitwright
