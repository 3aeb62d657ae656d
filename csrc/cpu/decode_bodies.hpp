// The bodies of the decode kernels, over vectors of WIDTH floats. Included as decode_vectors.hpp is, and in an unnamed
// namespace for the same reason.
#pragma once

#include "decode_kernels.hpp"
#include "decode_vectors.hpp"

namespace bitwright {
namespace {

static_assert(LANES == KEY_TILE && ATTENTION_POSITIONS % KEY_TILE == 0);

// Bytes by which reading of weights is ahead, as in matmul_kernel.hpp.
constexpr std::int64_t AHEAD = 8192;
// Floats by which reading of keys and values is ahead.
constexpr std::int64_t CACHE_AHEAD = 512;

// --- norms, RoPE, SiLU ---------------------------------------------------------------------------------------------

template <int WIDTH>
void norm(const float* x, const float* weight, float eps, std::int64_t count, float* y) {
  Lanes<WIDTH> even, odd, value;
  even.set(0.0f);
  odd.set(0.0f);
  std::int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    value.load(x + i);
    even.add_product(value, value);
    value.load(x + i + LANES);
    odd.add_product(value, value);
  }
  even.add(odd);
  float squares = even.sum();
  for (; i < count; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(count) + eps);
  for (i = 0; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

void rotate(float* x, const float* __restrict cos, const float* __restrict sin, std::int64_t head_dim) {
  const std::int64_t half = head_dim / 2;
  float *__restrict first = x, *__restrict second = x + half;
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cos[i] + b * sin[i];
    second[i] = b * cos[half + i] + a * sin[half + i];
  }
}

template <int WIDTH>
void gate(float* gate, const float* up, std::int64_t count) {
  Lanes<WIDTH> value, factor;
  std::int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    value.load(gate + i);
    factor.load(up + i);
    value.silu_times(factor);
    value.store(gate + i);
  }
  if (i == count) return;
  float rest[2][LANES] = {};
  for (std::int64_t j = i; j < count; ++j) rest[0][j - i] = gate[j], rest[1][j - i] = up[j];
  value.load(rest[0]);
  factor.load(rest[1]);
  value.silu_times(factor);
  value.store(rest[0]);
  for (std::int64_t j = i; j < count; ++j) gate[j] = rest[0][j - i];
}

// --- attention -----------------------------------------------------------------------------------------------------

// Scores of HEADS heads from `head` on. Even and odd features are summed apart, so that additions wait less.
template <int WIDTH, int HEADS>
void score_heads(const AttentionPiece& a, std::int64_t head) {
  const float* query = a.query + head * a.head_dim;
  float* scores = a.scores + head * ATTENTION_POSITIONS;
  for (std::int64_t tile = a.first; tile < a.end; tile += KEY_TILE) {
    const float* keys = a.keys + tile * a.head_dim;
    Lanes<WIDTH> sums[HEADS][2], key;
    each<HEADS>([&](auto h) __attribute__((always_inline)) {
      sums[h][0].set(0.0f);
      sums[h][1].set(0.0f);
    });
    for (std::int64_t d = 0; d < a.head_dim; d += 2) {
      each<2>([&](auto odd) __attribute__((always_inline)) {
        key.load(keys + (d + odd) * KEY_TILE);
        __builtin_prefetch(keys + (d + odd) * KEY_TILE + CACHE_AHEAD);
        each<HEADS>([&](auto h) __attribute__((always_inline)) {
          sums[h][odd].add_product(key, query[h * a.head_dim + d + odd]);
        });
      });
    }
    each<HEADS>([&](auto h) __attribute__((always_inline)) {
      sums[h][0].add(sums[h][1]);
      sums[h][0].multiply(a.scaling);
      sums[h][0].store(scores + h * ATTENTION_POSITIONS + (tile - a.first));
    });
  }
}

// Scores to e^(score - largest); places behind the last position to 0, whatever keys stand there.
template <int WIDTH>
void soften(const AttentionPiece& a, std::int64_t head) {
  float* scores = a.scores + head * ATTENTION_POSITIONS;
  const std::int64_t count = a.end - a.first, whole = (count + LANES - 1) / LANES * LANES;
  for (std::int64_t i = count; i < whole; ++i) scores[i] = -__builtin_inff();
  Lanes<WIDTH> largest, total, value;
  largest.load(scores);
  for (std::int64_t i = LANES; i < whole; i += LANES) {
    value.load(scores + i);
    largest.raise_to(value);
  }
  const float most = largest.largest();
  total.set(0.0f);
  for (std::int64_t i = 0; i < whole; i += LANES) {
    value.load(scores + i);
    value.exponentiate(most);
    value.store(scores + i);
    total.add(value);
  }
  a.largest[head] = most;
  a.total[head] = total.sum();
}

// Values of DEPTH vectors from `column` on, weighed for HEADS heads from `head` on.
template <int WIDTH, int HEADS, int DEPTH>
void weigh_heads(const AttentionPiece& a, std::int64_t head, std::int64_t column) {
  const std::int64_t stride = padded_head(a.head_dim), count = a.end - a.first;
  const float *values = a.values + a.first * stride + column, *weights = a.scores + head * ATTENTION_POSITIONS;
  Lanes<WIDTH> sums[HEADS][DEPTH], value[DEPTH];
  each<HEADS>([&](auto h) __attribute__((always_inline)) {
    each<DEPTH>([&](auto d) __attribute__((always_inline)) { sums[h][d].set(0.0f); });
  });
  for (std::int64_t i = 0; i < count; ++i, values += stride) {
    each<DEPTH>([&](auto d) __attribute__((always_inline)) {
      value[d].load(values + d * LANES);
      __builtin_prefetch(values + d * LANES + CACHE_AHEAD);
    });
    each<HEADS>([&](auto h) __attribute__((always_inline)) {
      const float weight = weights[h * ATTENTION_POSITIONS + i];
      each<DEPTH>([&](auto d) __attribute__((always_inline)) { sums[h][d].add_product(value[d], weight); });
    });
  }
  each<HEADS>([&](auto h) __attribute__((always_inline)) {
    float* to = a.sums + (head + h) * stride + column;
    each<DEPTH>([&](auto d) __attribute__((always_inline)) { sums[h][d].store(to + d * LANES); });
  });
}

template <int WIDTH, int HEADS>
void attend_heads(const AttentionPiece& a, std::int64_t head) {
  // As many sums as registers hold.
  constexpr int DEPTH = WIDTH == LANES ? 4 : 1;
  score_heads<WIDTH, HEADS>(a, head);
  for (int h = 0; h < HEADS; ++h) soften<WIDTH>(a, head + h);
  const std::int64_t stride = padded_head(a.head_dim);
  std::int64_t column = 0;
  for (; column + DEPTH * LANES <= stride; column += DEPTH * LANES) weigh_heads<WIDTH, HEADS, DEPTH>(a, head, column);
  for (; column < stride; column += LANES) weigh_heads<WIDTH, HEADS, 1>(a, head, column);
}

template <int WIDTH>
void attend(const AttentionPiece& a) {
  std::int64_t head = 0;
  for (; head + 4 <= a.heads; head += 4) attend_heads<WIDTH, 4>(a, head);
  if (a.heads - head == 3) attend_heads<WIDTH, 3>(a, head);
  if (a.heads - head == 2) attend_heads<WIDTH, 2>(a, head);
  if (a.heads - head == 1) attend_heads<WIDTH, 1>(a, head);
}

// Each piece's sums times e^(its largest - the largest of all), divided by all that was summed of the softmax.
template <int WIDTH>
void combine(const AttentionPieces& a) {
  const std::int64_t stride = padded_head(a.head_dim);
  Lanes<WIDTH> sums, value;
  for (std::int64_t head = 0; head < a.heads; ++head) {
    float most = a.largest[head], total = 0.0f;
    for (std::int64_t i = 1; i < a.pieces; ++i) {
      const float largest = a.largest[i * a.heads + head];
      most = largest > most ? largest : most;
    }
    for (std::int64_t i = 0; i < a.pieces; i += LANES) {
      float some[LANES] = {};
      for (std::int64_t j = i; j < a.pieces && j < i + LANES; ++j) some[j - i] = a.largest[j * a.heads + head];
      value.load(some);
      value.exponentiate(most);
      value.store(a.factors + i);
    }
    for (std::int64_t i = 0; i < a.pieces; ++i) total += a.total[i * a.heads + head] * a.factors[i];
    for (std::int64_t column = 0; column < stride; column += LANES) {
      sums.set(0.0f);
      for (std::int64_t i = 0; i < a.pieces; ++i) {
        value.load(a.sums + (i * a.heads + head) * stride + column);
        sums.add_product(value, a.factors[i]);
      }
      sums.multiply(1.0f / total);
      float some[LANES];
      sums.store(some);
      float* to = a.attended + head * a.head_dim + column;
      for (std::int64_t j = 0; j < LANES && column + j < a.head_dim; ++j) to[j] = some[j];
    }
  }
}

// --- float weights -------------------------------------------------------------------------------------------------

template <int WIDTH, int ROWS>
void multiply_rows(const float* weight, std::int64_t in, const float* x, float* y) {
  Lanes<WIDTH> sums[ROWS], input, value;
  each<ROWS>([&](auto row) __attribute__((always_inline)) { sums[row].set(0.0f); });
  const std::int64_t whole = in / LANES * LANES;
  for (std::int64_t column = 0; column < whole; column += LANES) {
    input.load(x + column);
    each<ROWS>([&](auto row) __attribute__((always_inline)) {
      const float* from = weight + row * in + column;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD);
      value.load(from);
      sums[row].add_product(value, input);
    });
  }
  each<ROWS>([&](auto row) __attribute__((always_inline)) {
    float sum = sums[row].sum();
    for (std::int64_t column = whole; column < in; ++column) sum += weight[row * in + column] * x[column];
    y[row] = sum;
  });
}

template <int WIDTH>
void multiply(const float* weight, std::int64_t rows, std::int64_t in, const float* x, float* y) {
  constexpr int BLOCK = 4;
  std::int64_t row = 0;
  for (; row + BLOCK <= rows; row += BLOCK) multiply_rows<WIDTH, BLOCK>(weight + row * in, in, x, y + row);
  for (; row < rows; ++row) multiply_rows<WIDTH, 1>(weight + row * in, in, x, y + row);
}

// --- the table -----------------------------------------------------------------------------------------------------

template <int WIDTH>
constexpr DecodeKernels decode_table() {
  return {&norm<WIDTH>, &rotate, &gate<WIDTH>, &attend<WIDTH>, &combine<WIDTH>, &multiply<WIDTH>};
}

}  // namespace
}  // namespace bitwright
