#include "pool.hpp"

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

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  // One caller at a time holds the helpers.
  std::mutex caller;

  void run(std::int64_t tasks, int threads, PoolWork work, void* context) {
    while (helpers_ < threads - 1 && start_helper()) {
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      tasks_ = tasks;
      places_ = threads - 1;
      joined_ = 0;
      next_.store(0, std::memory_order_relaxed);
      calls_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    drain(0);
    {
      // From here on no helper begins.
      const std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;
    }
    while (active_.load(std::memory_order_acquire) > 0) relax();
  }

 private:
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
    std::uint64_t seen = 0;
    for (;;) {
      wait_for_call(seen);
      int worker = 0;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = calls_.load();
        if (joined_ < places_) {
          worker = ++joined_;
          active_.fetch_add(1);
        }
      }
      if (worker > 0) {
        drain(worker);
        active_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  void wait_for_call(std::uint64_t seen) {
    for (int spin = 0; spin < SPINS; ++spin) {
      if (calls_.load(std::memory_order_acquire) != seen) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    wake_.wait(lock, [&] { return calls_.load() != seen; });
    --sleeping_;
  }

  std::mutex mutex_;  // guards what a call consists of, and who has joined it
  std::condition_variable wake_;
  std::atomic<std::uint64_t> calls_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> active_{0};
  std::atomic<int> sleeping_{0};
  PoolWork work_ = nullptr;
  void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  int places_ = 0;
  int joined_ = 0;
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
