#include "decode_product.hpp"

#include <algorithm>
#include <cstring>

#include "pool.hpp"
#include "scratch.hpp"

namespace bitwright {

// What one thread gets: some five microseconds of a fast product. Sharing costs about one.
constexpr double AWAKE_MULTIPLICATIONS = 1 << 18;
// Tasks are no smaller than about half a microsecond, which hides what it costs to take one.
constexpr double TASK_MULTIPLICATIONS = 1 << 15;

int awake_threads(int threads, std::int64_t tasks, double multiplications) {
  const double most = std::min(static_cast<double>(tasks), 1.0 + multiplications / AWAKE_MULTIPLICATIONS);
  return static_cast<int>(std::max(1.0, std::min(static_cast<double>(threads), most)));
}

std::int64_t out_features(const DecodeProduct& product) {
  std::int64_t out = 0;
  for (const DecodeLinear& linear : product) out += linear.out;
  return out;
}

struct DecodeProducts::Memory {
  Scratch<float> floats, steps, sums;
  Scratch<std::int8_t> codes;
  std::vector<Scratch<float>> of_workers;
  std::vector<float*> spaces;        // of each worker: grids, a panel of weights, a tile of y
  std::vector<std::int64_t> starts;  // of tasks, in tiles, and their end
  // The inputs as the last packed weight wanted them.
  const float* packed_floats;
  Quantized quantized;
};

struct DecodeProducts::Call {
  const DecodeLinear& linear;
  const MatmulKernels& kernels;
  const Memory& memory;
  const float* x;
  const float* residual;
  float* y;
  bool fast;

  // Rows [first, first + lanes) of y from their products.
  void store(std::int64_t first, std::int64_t lanes, const float* products) const {
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      float sum = products[lane];
      if (linear.bias != nullptr) sum += linear.bias[first + lane];
      if (residual != nullptr) sum += residual[first + lane];
      y[first + lane] = sum;
    }
  }

  void packed_tile(std::int64_t tile, float* space) const {
    const PackedMatrix& w = linear.packed;
    const std::int64_t grid = w.padded_groups * TILE;
    float *scale = space, *zero = space + grid, *sums = space + 2 * grid, *weights = sums + TILE;
    kernels.expand_grid(w, tile, scale, zero);
    if (fast) {
      kernels.multiply_codes(w, tile, scale, zero, memory.quantized, 1, sums);
      if (w.outlier_start != nullptr) kernels.multiply_outliers(w, tile, memory.packed_floats, 1, sums);
    } else {
      std::fill(sums, sums + TILE, 0.0f);
      for (std::int64_t panel = 0; panel < w.panels; ++panel) {
        const std::int64_t chunks = std::min<std::int64_t>(PANEL_CHUNKS, w.chunks - panel * PANEL_CHUNKS);
        kernels.decode_panel(w, tile, panel, scale, zero, weights);
        if (w.outlier_start != nullptr) {
          const std::int32_t* start = w.outlier_start + tile * w.panels + panel;
          for (std::int32_t i = start[0]; i < start[1]; ++i) weights[w.outlier_place[i]] += w.outlier_value[i];
        }
        const float* inputs = memory.packed_floats + panel * PANEL_COLUMNS;
        kernels.multiply_panel(weights, static_cast<int>(chunks) * CHUNK, inputs, 1, sums);
      }
    }
    store(tile * TILE, std::min<std::int64_t>(TILE, w.out - tile * TILE), sums);
  }

  void dense_rows(std::int64_t first, std::int64_t end, const DecodeKernels& dense) const {
    float products[TILE];
    for (; first < end; first += TILE) {
      const std::int64_t rows = std::min<std::int64_t>(TILE, end - first);
      dense.multiply(linear.dense + first * linear.in, rows, linear.in, x, products);
      store(first, rows, products);
    }
  }
};

DecodeProducts::DecodeProducts(MatmulIsa isa) : isa_(isa), memory_(new Memory) {}
DecodeProducts::~DecodeProducts() = default;

// The inputs of all packed weights in `w`'s layout.
void DecodeProducts::prepare(const PackedMatrix& w, const float* x, bool fast) {
  Memory& memory = *memory_;
  const MatmulKernels& kernels = matmul_kernels(isa_);
  if (!fast || w.outlier_start != nullptr) {
    float* floats = memory.floats.get(w.chunks * CHUNK);
    kernels.pack(w, x, 1, 1, floats);
    memory.packed_floats = floats;
  }
  if (fast) {
    memory.quantized = {memory.codes.get(w.chunks * CHUNK), memory.steps.get(w.chunks),
                        memory.sums.get(w.padded_groups)};
    kernels.quantize(w, x, 1, 1, memory.quantized);
  }
}

void DecodeProducts::reserve(const DecodeLinear& linear, int threads) {
  Memory& memory = *memory_;
  const std::int64_t grid = linear.dense == nullptr ? linear.packed.padded_groups * TILE : 0;
  if (memory.of_workers.size() < static_cast<std::size_t>(threads)) {
    memory.of_workers.resize(static_cast<std::size_t>(threads));
  }
  memory.spaces.clear();
  for (int worker = 0; worker < threads; ++worker) {
    memory.spaces.push_back(
        memory.of_workers[static_cast<std::size_t>(worker)].get(2 * grid + TILE + PANEL_COLUMNS * TILE));
  }
}

// Tasks that become smaller towards the end, so that few are taken and threads still end together.
void DecodeProducts::cut(std::int64_t tiles, int threads, std::int64_t least) {
  std::vector<std::int64_t>& starts = memory_->starts;
  starts.assign(1, 0);
  while (starts.back() < tiles) {
    const std::int64_t rest = tiles - starts.back();
    const std::int64_t size = threads == 1 ? rest : std::max(least, rest / (2 * threads));
    starts.push_back(starts.back() + std::min(rest, size));
  }
}

void DecodeProducts::multiply(const DecodeProduct& product, const float* x, const float* residual, float* y,
                              const DecodeHow& how) {
  const DecodeKernels& dense = decode_kernels(isa_);
  const DecodeLinear* last = nullptr;
  for (const DecodeLinear& linear : product) {
    const bool packed = linear.dense == nullptr;
    if (packed) {
      // Floats are packed for outliers alone in fast mode.
      const bool same = last != nullptr && last->packed.group_width == linear.packed.group_width &&
                        (last->packed.outlier_start != nullptr || linear.packed.outlier_start == nullptr);
      if (!same) prepare(linear.packed, x, how.fast);
      last = &linear;
    }
    const std::int64_t tiles = (linear.out + TILE - 1) / TILE;
    const double of_tile = static_cast<double>(TILE) * static_cast<double>(linear.in);
    const int threads = awake_threads(how.threads, tiles, of_tile * static_cast<double>(tiles));
    const std::int64_t least = 1 + static_cast<std::int64_t>(TASK_MULTIPLICATIONS / of_tile);
    cut(tiles, threads, least);
    reserve(linear, threads);
    const Call call{linear, matmul_kernels(isa_), *memory_, x, residual, y, how.fast};
    const std::vector<std::int64_t>& starts = memory_->starts;
    run_tasks(static_cast<std::int64_t>(starts.size()) - 1, threads, [&](std::int64_t task, int worker) {
      const std::int64_t *bounds = starts.data() + task, first = bounds[0], end = bounds[1];
      if (!packed) return call.dense_rows(first * TILE, std::min(end * TILE, linear.out), dense);
      for (std::int64_t tile = first; tile < end; ++tile) {
        call.packed_tile(tile, memory_->spaces[static_cast<std::size_t>(worker)]);
      }
    });
    y += linear.out;
    if (residual != nullptr) residual += linear.out;
  }
}

}  // namespace bitwright
