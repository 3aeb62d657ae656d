#include "matmul.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "pool.hpp"
#include "scratch.hpp"

namespace bitwright {

const MatmulKernels& matmul_kernels_baseline();
#if defined(__x86_64__)
const MatmulKernels& matmul_kernels_avx2();
const MatmulKernels& matmul_kernels_avx512();
const MatmulKernels& matmul_kernels_avx512vnni();
#elif defined(__aarch64__)
const MatmulKernels& matmul_kernels_neon();
const MatmulKernels& matmul_kernels_neondotprod();
#endif

namespace {

// Rows of x packed at once: bounds memory, and decodes weights often enough not to matter.
constexpr std::int64_t MOST_ROWS = 256;
// Tiles that take turns over one block of x, so that x comes from memory once for all of them.
constexpr int BATCH = 8;

// Blocks of rows of x: full ones of `size`, and a last one of the least power of two that holds the rest.
struct Blocks {
  std::int64_t rows;
  int size;

  std::int64_t count() const { return (rows + size - 1) / size; }
  int mr(std::int64_t block) const {
    int power = 1;
    while (power < rows - block * size && power < size) power *= 2;
    return power;
  }
  std::int64_t covered() const { return (count() - 1) * size + mr(count() - 1); }
  int valid(std::int64_t block) const { return static_cast<int>(std::min<std::int64_t>(size, rows - block * size)); }
};

// One call's inputs, packed, and where they are: floats in blocks [padded columns][mr], and int8 likewise, in blocks of
// their own.
struct Inputs {
  Blocks blocks;        // of int8, or of floats where weights are floats
  Blocks float_blocks;  // of floats
  float* floats = nullptr;
  std::int8_t* codes = nullptr;
  float* steps = nullptr;
  float* sums = nullptr;

  float* block_floats(const PackedMatrix& w, std::int64_t block) const {
    return floats + block * float_blocks.size * w.chunks * CHUNK;
  }
  Quantized quantized(const PackedMatrix& w, std::int64_t block) const {
    const std::int64_t first = block * blocks.size;
    return {codes + first * w.chunks * CHUNK, steps + first * w.chunks, sums + first * w.padded_groups};
  }
  // Rows of y that any block covers.
  std::int64_t height() const { return std::max(blocks.count() * blocks.size, float_blocks.covered()); }
};

// What a worker needs for a batch of tiles.
struct Workspace {
  float* scale;    // [BATCH][padded groups][TILE]
  float* zero;     // the same
  float* weights;  // [BATCH], a panel each
  float* y;        // [BATCH][height][TILE]
};

struct Call {
  const PackedMatrix& w;
  const MatmulTask& task;
  const MatmulKernels& kernels;
  Inputs inputs;
  std::int64_t first_row;  // of task.x, in this part
};

// Block `index` of each kind, as far as there are.
void prepare_block(const Call& call, std::int64_t index) {
  const Inputs& inputs = call.inputs;
  const float* x = call.task.x + call.first_row * call.w.in;
  if (const Blocks& blocks = inputs.float_blocks; inputs.floats != nullptr && index < blocks.count()) {
    call.kernels.pack(call.w, x + index * blocks.size * call.w.in, blocks.valid(index), blocks.mr(index),
                      inputs.block_floats(call.w, index));
  }
  if (const Blocks& blocks = inputs.blocks; inputs.codes != nullptr && index < blocks.count()) {
    call.kernels.quantize(call.w, x + index * blocks.size * call.w.in, blocks.valid(index), blocks.mr(index),
                          inputs.quantized(call.w, index));
  }
}

// Rows of the matrix to y, with the bias.
void store_tile(const Call& call, std::int64_t tile, const float* y) {
  const std::int64_t first = tile * TILE, rows = call.inputs.blocks.rows;
  const std::size_t lanes = static_cast<std::size_t>(std::min<std::int64_t>(TILE, call.w.out - first));
  float bias[TILE] = {};
  if (call.task.bias != nullptr) std::copy_n(call.task.bias + first, lanes, bias);
  for (std::int64_t m = 0; m < rows; ++m) {
    float* to = call.task.y + (call.first_row + m) * call.w.out + first;
    float sums[TILE];
    for (int lane = 0; lane < TILE; ++lane) sums[lane] = y[m * TILE + lane] + bias[lane];
    if (lanes == TILE) {
      std::memcpy(to, sums, sizeof sums);
    } else {
      std::memcpy(to, sums, lanes * sizeof(float));
    }
  }
}

// Adds the residuals of one panel's outliers to its weights.
void add_outliers(const PackedMatrix& w, std::int64_t tile, std::int64_t panel, float* weights) {
  if (w.outlier_start == nullptr) return;
  const std::int32_t* start = w.outlier_start + tile * w.panels + panel;
  for (std::int32_t i = start[0]; i < start[1]; ++i) weights[w.outlier_place[i]] += w.outlier_value[i];
}

// Panels of all tiles are decoded before x comes by, a block at a time, which each of them then uses.
void exact_tiles(const Call& call, std::int64_t first, std::int64_t end, const Workspace& space) {
  const PackedMatrix& w = call.w;
  const Blocks& blocks = call.inputs.blocks;
  const std::int64_t height = call.inputs.height(), grid = w.padded_groups * TILE;
  std::fill(space.y, space.y + (end - first) * height * TILE, 0.0f);
  for (std::int64_t tile = first; tile < end; ++tile) {
    call.kernels.expand_grid(w, tile, space.scale + (tile - first) * grid, space.zero + (tile - first) * grid);
  }
  for (std::int64_t panel = 0; panel < w.panels; ++panel) {
    const int columns = static_cast<int>(std::min<std::int64_t>(PANEL_CHUNKS, w.chunks - panel * PANEL_CHUNKS)) * CHUNK;
    for (std::int64_t tile = first; tile < end; ++tile) {
      const float *scale = space.scale + (tile - first) * grid, *zero = space.zero + (tile - first) * grid;
      float* weights = space.weights + (tile - first) * PANEL_COLUMNS * TILE;
      call.kernels.decode_panel(w, tile, panel, scale, zero, weights);
      add_outliers(w, tile, panel, weights);
    }
    for (std::int64_t block = 0; block < blocks.count(); ++block) {
      const int mr = blocks.mr(block);
      const float* x = call.inputs.block_floats(w, block) + panel * PANEL_COLUMNS * mr;
      for (std::int64_t tile = first; tile < end; ++tile) {
        const float* weights = space.weights + (tile - first) * PANEL_COLUMNS * TILE;
        float* y = space.y + ((tile - first) * height + block * blocks.size) * TILE;
        if (tile + 1 < end && mr == blocks.size && mr == call.kernels.exact_rows) {
          call.kernels.multiply_panel_pair(weights, PANEL_COLUMNS * TILE, columns, x, y, height * TILE);
          ++tile;
        } else {
          call.kernels.multiply_panel(weights, columns, x, mr, y);
        }
      }
    }
  }
  for (std::int64_t tile = first; tile < end; ++tile) store_tile(call, tile, space.y + (tile - first) * height * TILE);
}

void fast_tiles(const Call& call, std::int64_t first, std::int64_t end, const Workspace& space) {
  const PackedMatrix& w = call.w;
  const Blocks &blocks = call.inputs.blocks, &float_blocks = call.inputs.float_blocks;
  const std::int64_t height = call.inputs.height(), grid = w.padded_groups * TILE;
  for (std::int64_t tile = first; tile < end; ++tile) {
    call.kernels.expand_grid(w, tile, space.scale + (tile - first) * grid, space.zero + (tile - first) * grid);
    // Outliers are multiplied by more rows than the codes write.
    float* y = space.y + (tile - first) * height * TILE;
    std::fill(y + blocks.covered() * TILE, y + height * TILE, 0.0f);
  }
  for (std::int64_t block = 0; block < blocks.count(); ++block) {
    const Quantized x = call.inputs.quantized(w, block);
    const int mr = blocks.mr(block);
    for (std::int64_t tile = first; tile < end; ++tile) {
      const float *scale = space.scale + (tile - first) * grid, *zero = space.zero + (tile - first) * grid;
      float* y = space.y + ((tile - first) * height + block * blocks.size) * TILE;
      call.kernels.multiply_codes(w, tile, scale, zero, x, mr, y);
    }
  }
  for (std::int64_t block = 0; w.outlier_start != nullptr && block < float_blocks.count(); ++block) {
    const float* x = call.inputs.block_floats(w, block);
    for (std::int64_t tile = first; tile < end; ++tile) {
      float* y = space.y + ((tile - first) * height + block * float_blocks.size) * TILE;
      call.kernels.multiply_outliers(w, tile, x, float_blocks.mr(block), y);
    }
  }
  for (std::int64_t tile = first; tile < end; ++tile) store_tile(call, tile, space.y + (tile - first) * height * TILE);
}

// Rows [first, first + rows) of x.
void multiply_part(const PackedMatrix& w, const MatmulTask& task, const MatmulKernels& kernels, std::int64_t first,
                   std::int64_t rows, int threads) {
  static thread_local Scratch<float> floats, steps, sums;
  static thread_local Scratch<std::int8_t> codes;
  static thread_local std::vector<Scratch<float>> of_workers;

  const Blocks blocks{rows, task.fast ? kernels.fast_rows : kernels.exact_rows};
  const Blocks float_blocks = task.fast ? Blocks{rows, OUTLIER_ROWS} : blocks;
  Call call{w, task, kernels, {blocks, float_blocks}, first};
  const std::int64_t height = call.inputs.height(), padded = w.chunks * CHUNK;
  if (!task.fast || w.outlier_start != nullptr) call.inputs.floats = floats.get(height * padded);
  if (task.fast) {
    call.inputs.codes = codes.get(height * padded);
    call.inputs.steps = steps.get(height * w.chunks);
    call.inputs.sums = sums.get(height * w.padded_groups);
  }
  const auto prepare = [&](std::int64_t block, int) { prepare_block(call, block); };
  run_tasks(blocks.count(), useful_threads(threads, blocks.count(), 4.0 * rows * w.in), prepare);

  // Few rows: every tile is a task of its own. Else as many as leave each thread some tasks; no sum depends on it.
  const std::int64_t shared = threads > 1 ? std::clamp<std::int64_t>(w.tiles / (4 * threads), 1, BATCH) : BATCH;
  const std::int64_t batch = blocks.count() > 1 ? shared : 1;
  const std::int64_t tasks = (w.tiles + batch - 1) / batch;
  const double work = static_cast<double>(w.out) * w.in * std::max(1.0, (task.fast ? 0.5 : 1.0) * rows);
  threads = useful_threads(threads, tasks, work);
  const std::int64_t grid = batch * w.padded_groups * TILE, panel = PANEL_COLUMNS * TILE;
  const std::int64_t needed = 2 * grid + batch * (panel + height * TILE);
  if (of_workers.size() < static_cast<std::size_t>(threads)) of_workers.resize(static_cast<std::size_t>(threads));
  std::vector<float*> spaces;
  for (int worker = 0; worker < threads; ++worker) {
    spaces.push_back(of_workers[static_cast<std::size_t>(worker)].get(needed));
  }
  const auto tiles = [&](std::int64_t index, int worker) {
    float* base = spaces[static_cast<std::size_t>(worker)];
    const Workspace space{base, base + grid, base + 2 * grid, base + 2 * grid + batch * panel};
    const std::int64_t begin = index * batch, end = std::min(begin + batch, w.tiles);
    task.fast ? fast_tiles(call, begin, end, space) : exact_tiles(call, begin, end, space);
  };
  run_tasks(tasks, threads, tiles);
}

#if defined(__aarch64__)
// Whether the processor has SDOT (FEAT_DotProd), which not all systems tell.
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long ASIMDDP = 1ul << 20;
  return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
#endif

}  // namespace

MatmulIsa best_matmul_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return MatmulIsa::avx512vnni;
  if (avx512) return MatmulIsa::avx512;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("f16c")) return MatmulIsa::avx2;
  return MatmulIsa::baseline;
#elif defined(__aarch64__)
  return has_dot_products() ? MatmulIsa::neondotprod : MatmulIsa::neon;
#else
  return MatmulIsa::baseline;
#endif
}

const MatmulKernels& matmul_kernels(MatmulIsa isa) {
#if defined(__x86_64__)
  if (isa == MatmulIsa::avx512vnni) return matmul_kernels_avx512vnni();
  if (isa == MatmulIsa::avx512) return matmul_kernels_avx512();
  if (isa == MatmulIsa::avx2) return matmul_kernels_avx2();
#elif defined(__aarch64__)
  if (isa == MatmulIsa::neondotprod) return matmul_kernels_neondotprod();
  if (isa == MatmulIsa::neon) return matmul_kernels_neon();
#endif
  (void)isa;
  return matmul_kernels_baseline();
}

void multiply(const PackedMatrix& w, const MatmulTask& task, MatmulIsa isa, int threads) {
  const MatmulKernels& kernels = matmul_kernels(isa);
  for (std::int64_t first = 0; first < task.rows; first += MOST_ROWS) {
    multiply_part(w, task, kernels, first, std::min(MOST_ROWS, task.rows - first), threads);
  }
}

}  // namespace bitwright
