// What the test programs share: memory without slack, random numbers, and a count of what went wrong.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace bitwright::testing {

// Heap memory of exactly the elements asked for: the address sanitizer sees the first byte used beyond them. With
// `odd`, elements begin one element into it, so that they are aligned as Python promises and no better.
template <class T>
class Exact {
 public:
  explicit Exact(std::int64_t count = 0, bool odd = false) : count_(count), skipped_(odd ? 1 : 0) {
    memory_ = static_cast<T*>(std::malloc(static_cast<std::size_t>(count_ + skipped_) * sizeof(T)));
    if (memory_ == nullptr) std::abort();
  }
  explicit Exact(const std::vector<T>& values, bool odd = false)
      : Exact(static_cast<std::int64_t>(values.size()), odd) {
    if (!values.empty()) std::memcpy(get(), values.data(), values.size() * sizeof(T));
  }
  Exact(Exact&& other) noexcept : memory_(other.memory_), count_(other.count_), skipped_(other.skipped_) {
    other.memory_ = nullptr;
  }
  Exact& operator=(Exact&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(count_, other.count_);
    std::swap(skipped_, other.skipped_);
    return *this;
  }
  ~Exact() { std::free(memory_); }

  T* get() { return memory_ + skipped_; }
  const T* get() const { return memory_ + skipped_; }
  std::int64_t size() const { return count_; }
  T& operator[](std::int64_t i) { return get()[i]; }
  const T& operator[](std::int64_t i) const { return get()[i]; }
  void fill(T value) {
    for (std::int64_t i = 0; i < count_; ++i) get()[i] = value;
  }
  // Equal to the last bit; NaN too.
  bool same(const Exact& other) const {
    return count_ == other.count_ && std::memcmp(get(), other.get(), static_cast<std::size_t>(count_) * sizeof(T)) == 0;
  }

 private:
  T* memory_;
  std::int64_t count_;
  int skipped_;
};

// The standard fixes this engine's numbers, but not those of its distributions.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  std::int64_t below(std::int64_t bound) { return static_cast<std::int64_t>(uniform() * static_cast<double>(bound)); }
  // Near enough to normal: mean 0, deviation 1.
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  Exact<float> normals(std::int64_t count, bool odd = false) {
    Exact<float> values(count, odd);
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(normal());
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

// Checks that failed in this program; the first of them are printed.
inline int& failures() {
  static int count = 0;
  return count;
}

__attribute__((format(printf, 2, 3))) inline void expect(bool holds, const char* format, ...) {
  if (holds || ++failures() > 20) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

// Signal over error in dB; infinite without error, and NaN, which passes no check, where a value is NaN.
inline double sqnr_db(const std::vector<double>& expected, const Exact<float>& found) {
  double signal = 0.0, error = 0.0;
  for (std::int64_t i = 0; i < found.size(); ++i) {
    const double wanted = expected[static_cast<std::size_t>(i)], difference = wanted - static_cast<double>(found[i]);
    signal += wanted * wanted;
    error += difference * difference;
  }
  return error == 0.0 ? HUGE_VAL : 10.0 * std::log10(signal / error);
}

}  // namespace bitwright::testing
