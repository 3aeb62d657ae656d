// What the host side of the matmul kernels shares: memory kept between calls, and how many threads some work is worth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace bitwright {

// Memory of one thread, kept between calls, on whole cache lines.
template <class T>
class Scratch {
 public:
  T* get(std::int64_t count) {
    const std::size_t needed = static_cast<std::size_t>(count) * sizeof(T) + LINE;
    if (bytes_.size() < needed) bytes_.resize(needed);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    return reinterpret_cast<T*>((address + LINE - 1) / LINE * LINE);
  }

 private:
  static constexpr std::size_t LINE = 64;
  std::vector<std::uint8_t> bytes_;
};

// A helper is worth waking for this many multiplications, some ten microseconds.
inline int useful_threads(int threads, std::int64_t tasks, double multiplications) {
  constexpr double PER_THREAD = 1 << 19;
  const double most = std::min(static_cast<double>(tasks), 1.0 + multiplications / PER_THREAD);
  return static_cast<int>(std::max(1.0, std::min(static_cast<double>(threads), most)));
}

}  // namespace bitwright
