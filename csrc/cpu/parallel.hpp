// Independent tiles of work on a few threads.
//
// Threads start and end inside the call. A pool would save some ten microseconds a call, and would have to survive
// fork and the interpreter's end; starting a thread costs little beside the work of the calls that use one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace bitwright {

// Runs work(tile, worker) for every tile in [0, tiles), worker in [0, threads). `work` must not throw: allocate before.
// Which worker takes which tile is left to chance, so a tile's result must not depend on it.
template <class Work>
void parallel_tiles(std::int64_t tiles, int threads, const Work& work) {
  std::atomic<std::int64_t> next{0};
  const auto run = [&](int worker) {
    for (std::int64_t tile = next++; tile < tiles; tile = next++) work(tile, worker);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(std::max(threads, 1)));
  try {
    for (int worker = 1; worker < threads; ++worker) helpers.emplace_back(run, worker);
  } catch (const std::system_error&) {
    // The system refuses more threads: those that run, this one at least, do all of the work.
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace bitwright
