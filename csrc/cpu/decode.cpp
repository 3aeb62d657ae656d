#include "decode.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "pool.hpp"

namespace bitwright {

const DecodeKernels& decode_kernels_baseline();
#if defined(__x86_64__)
const DecodeKernels& decode_kernels_avx2();
const DecodeKernels& decode_kernels_avx512();
#endif

const DecodeKernels& decode_kernels(MatmulIsa isa) {
#if defined(__x86_64__)
  if (isa == MatmulIsa::avx512 || isa == MatmulIsa::avx512vnni) return decode_kernels_avx512();
  if (isa == MatmulIsa::avx2) return decode_kernels_avx2();
#endif
  (void)isa;
  return decode_kernels_baseline();
}

namespace {

// More threads than this are asked for by mistake.
constexpr int MOST_THREADS = 1024;

void need(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

void check_linear(const DecodeLinear& linear, std::int64_t in, const std::string& name) {
  need(linear.out > 0 && linear.in == in, name + " takes " + std::to_string(linear.in) + " features and gives " +
                                              std::to_string(linear.out) + ", needed " + std::to_string(in) +
                                              " and 1 or more");
  const bool same = linear.dense != nullptr || (linear.packed.in == in && linear.packed.out == linear.out);
  need(same, name + " is packed in another shape than it says");
}

void check_product(const DecodeProduct& product, std::int64_t in, std::int64_t out, const std::string& name) {
  need(!product.empty(), name + " has no weights");
  for (const DecodeLinear& linear : product) check_linear(linear, in, name);
  need(out_features(product) == out,
       name + " gives " + std::to_string(out_features(product)) + " features, needed " + std::to_string(out));
}

const DecodeModel& checked(const DecodeModel& model) {
  const std::int64_t least = std::min({model.hidden, model.heads, model.kv_heads, model.head_dim, model.intermediate,
                                       model.max_length, static_cast<std::int64_t>(model.blocks.size())});
  need(least > 0, "a size is " + std::to_string(least) + ", needed 1 or more");
  need(model.heads % model.kv_heads == 0, std::to_string(model.heads) + " heads share " +
                                              std::to_string(model.kv_heads) + " of keys, needed a divisor");
  need(model.head_dim % 2 == 0, "head_dim is " + std::to_string(model.head_dim) + ", needed an even number");
  const std::int64_t of_heads = model.heads * model.head_dim;
  for (const DecodeBlock& block : model.blocks) {
    check_product(block.qkv, model.hidden, of_heads + 2 * model.kv_heads * model.head_dim, "qkv");
    check_product(block.output, of_heads, model.hidden, "output");
    check_product(block.gate_up, model.hidden, 2 * model.intermediate, "gate_up");
    check_product(block.down, model.intermediate, model.hidden, "down");
    need((block.query_norm == nullptr) == (block.key_norm == nullptr), "query or key norm, needed both or none");
  }
  check_linear(model.embedding, model.hidden, "embedding");
  check_product(model.head, model.hidden, out_features(model.head), "head");
  return model;
}

DecodeHow bounded(const DecodeHow& how) { return {how.fast, std::clamp(how.threads, 1, MOST_THREADS)}; }

std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

}  // namespace

Decoder::Decoder(DecodeModel model)
    : model_(std::move(model)), kernels_(decode_kernels(checked(model_).isa)), products_(model_.isa) {
  const std::int64_t pieces = (model_.max_length + ATTENTION_POSITIONS - 1) / ATTENTION_POSITIONS;
  hidden_.resize(place(model_.hidden));
  normed_.resize(place(model_.hidden));
  qkv_.resize(place((model_.heads + 2 * model_.kv_heads) * model_.head_dim));
  attended_.resize(place(model_.heads * model_.head_dim));
  mlp_.resize(place(2 * model_.intermediate));
  largest_.resize(place(pieces * model_.heads));
  total_.resize(largest_.size());
  sums_.resize(place(pieces * model_.heads * padded_head(model_.head_dim)));
  factors_.resize(place((pieces + KEY_TILE - 1) / KEY_TILE * KEY_TILE));
}

float* Decoder::keys_of(std::int64_t block, std::int64_t head) const {
  const std::int64_t tiles = (model_.max_length + KEY_TILE - 1) / KEY_TILE;
  return model_.keys + (block * model_.kv_heads + head) * tiles * KEY_TILE * model_.head_dim;
}

float* Decoder::values_of(std::int64_t block, std::int64_t head) const {
  return model_.values + (block * model_.kv_heads + head) * model_.max_length * padded_head(model_.head_dim);
}

void Decoder::step(std::int64_t token, std::int64_t position, float* logits, const DecodeHow& asked) {
  if (token < 0 || token >= model_.embedding.out) {
    throw std::out_of_range("token " + std::to_string(token) + ", needed 0.." +
                            std::to_string(model_.embedding.out - 1));
  }
  if (position < 0 || position >= model_.max_length) {
    throw std::out_of_range("position " + std::to_string(position) + ", needed 0.." +
                            std::to_string(model_.max_length - 1));
  }
  const DecodeHow how = bounded(asked);
  const std::lock_guard<std::mutex> lock(busy_);
  const std::int64_t hidden = model_.hidden;
  float *x = hidden_.data(), *normed = normed_.data(), *mlp = mlp_.data();
  if (model_.embedding.dense != nullptr) {
    std::copy_n(model_.embedding.dense + token * hidden, hidden, x);
  } else {
    decode_rows(model_.embedding.packed, &token, 1, x, model_.isa);
  }
  for (std::size_t i = 0; i < model_.blocks.size(); ++i) {
    const DecodeBlock& block = model_.blocks[i];
    kernels_.norm(x, block.input_norm, model_.eps, hidden, normed);
    products_.multiply(block.qkv, normed, nullptr, qkv_.data(), how);
    remember(static_cast<std::int64_t>(i), position);
    attention(static_cast<std::int64_t>(i), position, how);
    products_.multiply(block.output, attended_.data(), x, x, how);
    kernels_.norm(x, block.post_norm, model_.eps, hidden, normed);
    products_.multiply(block.gate_up, normed, nullptr, mlp, how);
    kernels_.gate(mlp, mlp + model_.intermediate, model_.intermediate);
    products_.multiply(block.down, mlp, x, x, how);
  }
  end(x, logits, how);
}

// Norms of heads and RoPE; keys and values to the cache.
void Decoder::remember(std::int64_t block, std::int64_t position) {
  const DecodeBlock& weights = model_.blocks[place(block)];
  const std::int64_t dim = model_.head_dim, rotated = model_.heads + model_.kv_heads;
  const float *cos = model_.cos + position * dim, *sin = model_.sin + position * dim;
  float* head = qkv_.data();
  for (std::int64_t i = 0; i < rotated; ++i, head += dim) {
    const float* norm = i < model_.heads ? weights.query_norm : weights.key_norm;
    if (norm != nullptr) kernels_.norm(head, norm, model_.eps, dim, head);
    kernels_.rotate(head, cos, sin, dim);
  }
  const float *key = qkv_.data() + model_.heads * dim, *value = qkv_.data() + rotated * dim;
  for (std::int64_t i = 0; i < model_.kv_heads; ++i, key += dim, value += dim) {
    float* keys = keys_of(block, i) + position / KEY_TILE * KEY_TILE * dim + position % KEY_TILE;
    for (std::int64_t j = 0; j < dim; ++j) keys[j * KEY_TILE] = key[j];
    std::copy_n(value, dim, values_of(block, i) + position * padded_head(dim));
  }
}

void Decoder::attention(std::int64_t block, std::int64_t position, const DecodeHow& how) {
  const std::int64_t dim = model_.head_dim, shared = model_.heads / model_.kv_heads, stride = padded_head(dim);
  const std::int64_t positions = position + 1;
  const std::int64_t pieces = (positions + ATTENTION_POSITIONS - 1) / ATTENTION_POSITIONS;
  const std::int64_t tasks = model_.kv_heads * pieces, of_worker = shared * ATTENTION_POSITIONS;
  // Reading four bytes of the cache takes as long as several multiplications.
  const double work = 2.0 * static_cast<double>((model_.heads + 8 * model_.kv_heads) * dim * positions);
  const int threads = awake_threads(how.threads, tasks, work);
  if (scores_.size() < place(threads * of_worker)) scores_.resize(place(threads * of_worker));
  run_tasks(tasks, threads, [&](std::int64_t task, int worker) {
    const std::int64_t head = task / pieces, first = task % pieces * ATTENTION_POSITIONS;
    const std::int64_t end = std::min(first + ATTENTION_POSITIONS, positions);
    kernels_.attend({qkv_.data() + head * shared * dim, keys_of(block, head), values_of(block, head), shared, dim,
                     first, end, model_.scaling, scores_.data() + worker * of_worker, largest_.data() + task * shared,
                     total_.data() + task * shared, sums_.data() + task * shared * stride});
  });
  for (std::int64_t head = 0; head < model_.kv_heads; ++head) {
    const std::int64_t first = head * pieces * shared;
    kernels_.combine({largest_.data() + first, total_.data() + first, sums_.data() + first * stride, pieces, shared,
                      dim, factors_.data(), attended_.data() + head * shared * dim});
  }
}

void Decoder::end(const float* hidden, float* logits, const DecodeHow& how) {
  kernels_.norm(hidden, model_.final_norm, model_.eps, model_.hidden, normed_.data());
  products_.multiply(model_.head, normed_.data(), nullptr, logits, how);
}

void Decoder::finish(const float* hidden, float* logits, const DecodeHow& asked) {
  const std::lock_guard<std::mutex> lock(busy_);
  end(hidden, logits, bounded(asked));
}

}  // namespace bitwright
