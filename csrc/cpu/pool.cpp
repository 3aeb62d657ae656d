#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define BITWRIGHT_FORKS 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitwright {
namespace {

// How often a helper looks for work before it sleeps: about half a millisecond, longer than what lies between two
// products of a decoding model.
constexpr int SPINS = 10000;
// How often a caller that is done looks whether helpers are, before it lets others run.
constexpr int PATIENCE = 2000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// What a call consists of is written before the call is announced and read by helpers that have joined it. Joining,
// leaving and closing are one change each of a single number, without a lock: some hundred calls make up a token.
class Pool {
 public:
  // One caller at a time holds the helpers.
  std::mutex caller;

  void run(std::int64_t tasks, int threads, PoolWork work, void* context) {
    threads = std::min(threads, MOST_THREADS);
    while (helpers_ < threads - 1 && start_helper()) {
    }
    work_ = work;
    context_ = context;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    const std::uint64_t number = call_of(state_.load(std::memory_order_relaxed)) + 1;
    state_.store(number << CALL | static_cast<std::uint64_t>(threads - 1) << PLACES);
    if (sleeping_.load() > 0) {
      // A helper that is about to sleep does so, and then hears of it.
      mutex_.lock();
      mutex_.unlock();
      wake_.notify_all();
    }
    drain(0);
    // From here on no helper begins.
    state_.fetch_and(~(MASK << PLACES));
    for (int spin = 0; active_of(state_.load(std::memory_order_acquire)) > 0; ++spin) {
      // A helper this late may be waiting for this very processor.
      spin < PATIENCE ? relax() : std::this_thread::yield();
    }
  }

 private:
  // The parts of `state_`: number of the call (above), places left in it, helpers at work on it.
  static constexpr int CALL = 32, PLACES = 16;
  static constexpr std::uint64_t MASK = 0xffff;
  static constexpr int MOST_THREADS = 0xffff;

  static std::uint32_t call_of(std::uint64_t state) { return static_cast<std::uint32_t>(state >> CALL); }
  static int places_of(std::uint64_t state) { return static_cast<int>(state >> PLACES & MASK); }
  static int active_of(std::uint64_t state) { return static_cast<int>(state & MASK); }

  bool start_helper() {
    try {
      std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      return false;  // The system refuses more threads: those that run do all of the work.
    }
    ++helpers_;
    return true;
  }

  void drain(int worker) {
    for (std::int64_t task = next_++; task < tasks_; task = next_++) work_(context_, task, worker);
  }

  [[noreturn]] void help() {
    std::uint64_t state = 0;
    for (;;) {
      state = wait_for_call(call_of(state));
      while (places_of(state) > 0) {
        const int worker = places_of(state);
        // One place less, one at work more.
        if (state_.compare_exchange_weak(state, state - (std::uint64_t{1} << PLACES) + 1)) {
          drain(worker);
          state_.fetch_sub(1, std::memory_order_release);
          break;
        }
      }
    }
  }

  // The state, once it is that of another call than `seen`.
  std::uint64_t wait_for_call(std::uint32_t seen) {
    std::uint64_t state = 0;
    const auto another = [&] {
      state = state_.load();
      return call_of(state) != seen;
    };
    for (int spin = 0; spin < SPINS; ++spin) {
      if (another()) return state;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    wake_.wait(lock, another);
    --sleeping_;
    return state;
  }

  // Each on its own cache line: all threads change the first two.
  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::mutex mutex_;  // of those that sleep
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
  PoolWork work_ = nullptr;
  void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  int helpers_ = 0;  // the caller's
};

// Never destroyed: helpers may outlive every static object.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
#if defined(BITWRIGHT_FORKS)
  // The child's pool is new; the parent's, whose helpers and locks do not exist here, is left behind.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)registered;
#endif
  Pool* made = new Pool;
  if (current.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void run_pool(std::int64_t tasks, int threads, PoolWork work, void* context) {
  if (threads > 1 && tasks > 1) {
    Pool& shared = pool();
    const std::unique_lock<std::mutex> lock(shared.caller, std::try_to_lock);
    if (lock.owns_lock()) {
      shared.run(tasks, threads, work, context);
      return;
    }
  }
  for (std::int64_t task = 0; task < tasks; ++task) work(context, task, 0);
}

}  // namespace bitwright
