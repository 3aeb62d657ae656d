// The layout of matmul.hpp from the native format's bit streams, and single rows back from it.
#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "matmul.hpp"
#include "pool.hpp"
#include "scratch.hpp"

namespace bitwright {
namespace {

// Code `index` of a row's dense stream of `words`.
std::uint32_t stream_code(const std::uint32_t* words, std::int64_t index, int bits) {
  const std::int64_t bit = index * bits, word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  std::uint64_t both = words[word];
  if (shift + bits > 32) both |= static_cast<std::uint64_t>(words[word + 1]) << 32;
  return static_cast<std::uint32_t>(both >> shift) & ((1u << bits) - 1u);
}

// Column of the matrix at a padded column, or -1.
std::int64_t source_column(const PackedMatrix& w, std::int64_t padded) {
  const std::int64_t width = w.group_chunks == 0 ? CHUNK / 2 : w.group_chunks * CHUNK;
  const std::int64_t group = padded / width, offset = padded % width;
  if (w.aligned) return padded < w.in ? padded : -1;
  const std::int64_t column = group * w.group_width + offset;
  return offset < w.group_width && column < w.in ? column : -1;
}

// One chunk's quads [QUADS][QUAD_BYTES] to its lines.
void pack_planes(const std::uint8_t* quads, int bits, std::uint8_t* lines) {
  if (bits == 8) {
    std::memcpy(lines, quads, QUADS * QUAD_BYTES);
    return;
  }
  int first_bit = 0;
  for (int plane = 4; plane >= 1; plane /= 2) {
    if ((bits & plane) == 0) continue;
    const int of_line = 8 / plane;
    const unsigned mask = (1u << plane) - 1u;
    for (int line = 0; line < plane; ++line, lines += QUAD_BYTES) {
      std::memset(lines, 0, QUAD_BYTES);
      for (int quad = 0; quad < of_line; ++quad) {
        const std::uint8_t* from = quads + (line * of_line + quad) * QUAD_BYTES;
        for (int i = 0; i < QUAD_BYTES; ++i) {
          lines[i] = static_cast<std::uint8_t>(lines[i] | (((from[i] >> first_bit) & mask) << (quad * plane)));
        }
      }
    }
    first_bit += plane;
  }
}

void repack_tile(const std::uint32_t* words, std::int64_t row_words, const PackedMatrix& w, std::int64_t tile,
                 std::uint8_t* codes) {
  const int lanes = static_cast<int>(std::min<std::int64_t>(TILE, w.out - tile * TILE));
  std::uint8_t quads[QUADS * QUAD_BYTES];
  codes += tile * w.tile_bytes;
  for (std::int64_t chunk = 0; chunk < w.chunks; ++chunk, codes += w.bits * QUAD_BYTES) {
    std::memset(quads, 0, sizeof quads);
    for (int j = 0; j < CHUNK; ++j) {
      const std::int64_t column = source_column(w, chunk * CHUNK + j);
      if (column < 0) continue;
      for (int lane = 0; lane < lanes; ++lane) {
        quads[j / 4 * QUAD_BYTES + lane * 4 + j % 4] =
            static_cast<std::uint8_t>(stream_code(words + (tile * TILE + lane) * row_words, column, w.bits));
      }
    }
    pack_planes(quads, w.bits, codes);
  }
}

// --- single rows ---------------------------------------------------------------------------------------------------

// One padded column's code of one lane, from a chunk's lines.
unsigned code_at(const std::uint8_t* lines, int bits, int quad, int byte) {
  if (bits == 8) return lines[quad * QUAD_BYTES + byte];
  unsigned code = 0;
  int first_bit = 0;
  for (int plane = 4; plane >= 1; plane /= 2) {
    if ((bits & plane) == 0) continue;
    const int of_line = 8 / plane;
    const unsigned line = lines[quad / of_line * QUAD_BYTES + byte];
    code |= ((line >> (quad % of_line * plane)) & ((1u << plane) - 1u)) << first_bit;
    lines += plane * QUAD_BYTES;
    first_bit += plane;
  }
  return code;
}

void decode_row(const PackedMatrix& w, std::int64_t row, const float* scale, const float* zero, float* weights) {
  const std::int64_t tile = row / TILE, lane = row % TILE;
  const std::uint8_t* lines = w.codes + tile * w.tile_bytes;
  const std::int64_t width = w.group_chunks == 0 ? CHUNK / 2 : w.group_chunks * CHUNK;
  for (std::int64_t padded = 0; padded < w.chunks * CHUNK; ++padded) {
    const std::int64_t column = source_column(w, padded);
    if (column < 0) continue;
    const std::int64_t chunk = padded / CHUNK, j = padded % CHUNK, at = padded / width * TILE + lane;
    const unsigned code = code_at(lines + chunk * w.bits * QUAD_BYTES, w.bits, static_cast<int>(j / 4),
                                  static_cast<int>(lane * 4 + j % 4));
    weights[column] = scale[at] * (static_cast<float>(code) - zero[at]);
  }
  if (w.outlier_start == nullptr) return;
  for (std::int64_t panel = 0; panel < w.panels; ++panel) {
    const std::int32_t* start = w.outlier_start + tile * w.panels + panel;
    for (std::int32_t i = start[0]; i < start[1]; ++i) {
      if (w.outlier_place[i] % TILE != lane) continue;
      weights[source_column(w, panel * PANEL_COLUMNS + w.outlier_place[i] / TILE)] += w.outlier_value[i];
    }
  }
}

}  // namespace

void complete(PackedMatrix& w) {
  w.tiles = (w.out + TILE - 1) / TILE;
  w.groups = (w.in + w.group_width - 1) / w.group_width;
  if (w.groups > 1 && w.group_width <= CHUNK / 2) {
    w.group_chunks = 0;
    w.chunks = (w.groups + 1) / 2;
    w.padded_groups = 2 * w.chunks;
    w.aligned = w.group_width == CHUNK / 2;
  } else {
    w.group_chunks = (w.group_width + CHUNK - 1) / CHUNK;
    const std::int64_t last = w.in - (w.groups - 1) * w.group_width;
    w.chunks = (w.groups - 1) * w.group_chunks + (last + CHUNK - 1) / CHUNK;
    w.padded_groups = w.groups;
    w.aligned = w.groups == 1 || w.group_width % CHUNK == 0;
  }
  w.panels = (w.chunks + PANEL_CHUNKS - 1) / PANEL_CHUNKS;
  w.tile_bytes = w.chunks * w.bits * QUAD_BYTES;
}

// Asks for large pages, of which a matrix of megabytes needs few address translations.
static void prefer_large_pages(std::uint8_t* memory, std::int64_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t PAGE = 4096;
  const auto start = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (start + PAGE - 1) / PAGE * PAGE;
  const std::uintptr_t end = (start + static_cast<std::uintptr_t>(bytes)) / PAGE * PAGE;
  // Only a wish: failure changes nothing.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

void repack_codes(const std::uint32_t* words, std::int64_t row_words, const PackedMatrix& w, std::uint8_t* codes,
                  int threads) {
  prefer_large_pages(codes, w.tiles * w.tile_bytes);
  const auto tile = [&](std::int64_t index, int) { repack_tile(words, row_words, w, index, codes); };
  run_tasks(w.tiles, useful_threads(threads, w.tiles, static_cast<double>(w.out) * w.in), tile);
}

void decode_rows(const PackedMatrix& w, const std::int64_t* rows, std::int64_t count, float* weights, MatmulIsa isa) {
  static thread_local Scratch<float> grids;
  const std::int64_t grid = w.padded_groups * TILE;
  float* scale = grids.get(2 * grid);
  for (std::int64_t i = 0; i < count; ++i) {
    matmul_kernels(isa).expand_grid(w, rows[i] / TILE, scale, scale + grid);
    decode_row(w, rows[i], scale, scale + grid, weights + i * w.in);
  }
}

}  // namespace bitwright
