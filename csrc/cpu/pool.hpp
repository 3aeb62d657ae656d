// Threads that stay, for calls too short to start their own: a token's matrix product takes some ten microseconds.
//
// Helpers spin briefly after each piece of work, since the next one mostly follows at once, then sleep. The caller
// works too and never waits for a helper that has not begun, so a helper that is slow to wake costs nothing. One caller
// uses the helpers at a time; another that comes meanwhile does its work alone. After a fork the child, which has no
// helpers, starts its own. Helpers are never joined: at the end of the process they sleep or are killed.
#pragma once

#include <cstdint>

namespace bitwright {

// Work on `task` with `context`; `worker` in [0, threads) is no other's meanwhile. Must not throw: allocate before.
using PoolWork = void (*)(void* context, std::int64_t task, int worker);

// Runs work(context, task, worker) for every task in [0, tasks), in any order.
void run_pool(std::int64_t tasks, int threads, PoolWork work, void* context);

// The same for a callable, work(task, worker).
template <class Work>
void run_tasks(std::int64_t tasks, int threads, const Work& work) {
  const auto call = [](void* context, std::int64_t task, int worker) {
    (*static_cast<const Work*>(context))(task, worker);
  };
  run_pool(tasks, threads, call, const_cast<Work*>(&work));
}

}  // namespace bitwright
