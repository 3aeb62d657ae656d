// Products on several threads, from several callers at once and after a fork: always what one thread gives. For the
// address sanitizer and, on the baseline alone, for the thread sanitizer. Prints nothing where all holds.
#include <atomic>
#include <string>
#include <thread>

// Emulators of processors lose their way in the child of a process with threads.
#if (defined(__unix__) || defined(__APPLE__)) && !defined(WITHOUT_FORK)
#include <sys/wait.h>
#include <unistd.h>
#define FORKS 1
#endif

#include "exact.hpp"
#include "matmul.hpp"
#include "pool.hpp"
#include "sample.hpp"

namespace bitwright::testing {
namespace {

// A weight worth four threads, inputs of few and many rows, and what one thread makes of them.
struct Work {
  explicit Work(Random& random, const Layout& layout) : sample(make_sample(layout, 3, random, false, 4)) {
    for (const std::int64_t rows : {1, 5, 33}) {
      inputs.push_back(random.normals(rows * layout.in));
      row_counts.push_back(rows);
    }
  }
  Exact<float> result(std::size_t i, bool fast, MatmulIsa isa, int threads) const {
    Exact<float> y(row_counts[i] * sample.matrix.out);
    multiply(sample.matrix, {inputs[i].get(), nullptr, y.get(), row_counts[i], fast}, isa, threads);
    return y;
  }

  Sample sample;
  std::vector<Exact<float>> inputs;
  std::vector<std::int64_t> row_counts;
};

void check_thread_counts(const Work& work, const NamedIsa& isa) {
  for (std::size_t i = 0; i < work.inputs.size(); ++i) {
    for (const bool fast : {false, true}) {
      const Exact<float> wanted = work.result(i, fast, isa.isa, 1);
      for (const int threads : {2, 3, 4, 1}) {
        expect(work.result(i, fast, isa.isa, threads).same(wanted), "%s, fast %d, %d rows: %d threads differ from one",
               isa.name, fast, int(work.row_counts[i]), threads);
      }
    }
  }
}

void check_repack(const Layout& layout) {
  Random one(7), four(7);
  const Sample alone = make_sample(layout, 3, one, false, 1), together = make_sample(layout, 3, four, false, 4);
  expect(alone.codes.same(together.codes), "repacked by four threads: not what one gives");
}

void check_callers(const Work& work, const NamedIsa& isa) {
  std::vector<Exact<float>> wanted;
  for (std::size_t i = 0; i < work.inputs.size(); ++i) wanted.push_back(work.result(i, true, isa.isa, 1));
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int again = 0; again < 3; ++again) {
        for (std::size_t i = 0; i < wanted.size(); ++i) {
          if (!work.result(i, true, isa.isa, 3).same(wanted[i])) ++wrong;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "%s: %d results of callers at once were wrong", isa.name, wrong.load());
}

// Every task is done once, and no worker's memory is another's meanwhile.
void check_pool() {
  constexpr int THREADS = 4;
  for (const std::int64_t tasks : {0, 1, 2, 3, 100}) {
    for (int again = 0; again < 50; ++again) {
      Exact<int> done(tasks);
      done.fill(0);
      std::vector<int> of_worker(THREADS, 0);
      run_tasks(tasks, THREADS, [&](std::int64_t task, int worker) {
        ++done[task];
        ++of_worker[static_cast<std::size_t>(worker)];
      });
      int sum = 0;
      for (const int count : of_worker) sum += count;
      bool once = sum == tasks;
      for (std::int64_t i = 0; i < tasks; ++i) once = once && done[i] == 1;
      expect(once, "%d tasks: not each was done once", int(tasks));
    }
  }
}

void check_fork([[maybe_unused]] const Work& work) {
#if defined(FORKS) && !defined(__SANITIZE_THREAD__)
  // The thread sanitizer allows no threads after a fork.
  const Exact<float> wanted = work.result(2, false, MatmulIsa::baseline, 2);
  const pid_t child = fork();
  if (child == 0) _exit(work.result(2, false, MatmulIsa::baseline, 2).same(wanted) ? 0 : 1);
  int status = 1;
  expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a forked child's result is wrong: %d",
         status);
#endif
}

void check_all() {
  Random random(0);
  const Layout layout{"levels", 1000, 640, 16, Kind::levels, 0.01};
  const Work work(random, layout);
  for (const NamedIsa& isa : machine_isas()) {
    check_thread_counts(work, isa);
    check_callers(work, isa);
  }
  check_repack(layout);
  check_pool();
  check_fork(work);
}

}  // namespace
}  // namespace bitwright::testing

int main() {
  bitwright::testing::check_all();
  return bitwright::testing::failures() == 0 ? 0 : 1;
}
