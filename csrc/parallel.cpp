// A pool of threads that sleep while there is no work. It starts with the first loop that is large enough, grows to the
// largest number of threads ever asked for and is never destroyed: a process ends with its threads asleep.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastmae {
namespace {

// Waking a thread takes as long as copying about this many bytes.
constexpr std::int64_t kSmallestRange = 128 * 1024;
// There are more ranges than threads, because the machine has other work too and threads are not equally fast.
constexpr std::int64_t kRangesPerThread = 4;

using Work = std::function<void(std::int64_t, std::int64_t)>;

class Loop {
 public:
  Loop(std::int64_t count, std::int64_t range, const Work& work) : count_(count), range_(range), work_(work) {
    std::fegetenv(&arithmetic_);
  }

  // Works on ranges until none is left. Helpers round and flush as the calling thread does, for the same bits.
  void take_part(bool as_helper) noexcept {
    if (as_helper) std::fesetenv(&arithmetic_);
    try {
      for (;;) {
        const std::int64_t first = next_.fetch_add(range_);
        if (first >= count_) return;
        work_(first, std::min(first + range_, count_));
      }
    } catch (...) {
      next_.store(count_);
      const std::lock_guard<std::mutex> lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void rethrow_failure() const {
    if (failure_) std::rethrow_exception(failure_);
  }

  int helpers_wanted = 0, helpers_inside = 0;  // under the pool's mutex
  std::condition_variable helpers_gone;

 private:
  const std::int64_t count_, range_;
  const Work& work_;
  std::atomic<std::int64_t> next_{0};
  std::fenv_t arithmetic_;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

class Pool {
 public:
  void run(Loop& loop, int helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      loop.helpers_wanted = std::min(helpers, threads_);
      if (loop.helpers_wanted > 0) loops_.push_back(&loop);
    }
    for (int i = 0; i < helpers; ++i) work_to_do_.notify_one();
    loop.take_part(false);
    std::unique_lock<std::mutex> lock(mutex_);
    const auto place = std::find(loops_.begin(), loops_.end(), &loop);
    if (place != loops_.end()) loops_.erase(place);
    loop.helpers_gone.wait(lock, [&] { return loop.helpers_inside == 0; });
  }

 private:
  // Signals must go to the threads that existed before: Python runs its handlers on one of them.
  void grow(int threads) {
    if (threads_ >= threads) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; threads_ < threads; ++threads_) std::thread([this] { live(); }).detach();
    } catch (const std::system_error&) {
      // No more threads can be started: fewer do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void live() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_to_do_.wait(lock, [&] { return !loops_.empty(); });
      Loop& loop = *loops_.front();
      ++loop.helpers_inside;
      if (--loop.helpers_wanted == 0) loops_.pop_front();
      lock.unlock();
      loop.take_part(true);
      lock.lock();
      if (--loop.helpers_inside == 0) loop.helpers_gone.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_to_do_;
  std::deque<Loop*> loops_;  // the loops that still want helpers
  int threads_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// Threads do not survive a fork, and a mutex may be left locked: a child forgets the pool and starts its own.
[[maybe_unused]] const int forget_after_fork = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });

Pool& pool() {
  Pool* found = the_pool.load();
  if (found) return *found;
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(found, fresh)) return *fresh;
  delete fresh;
  return *found;
}

// Calls run(loop, helpers) for a loop that is large enough for several threads.
template <class Run>
void split(std::int64_t count, std::int64_t bytes_per_item, int threads, const Work& work, Run run) {
  if (count <= 0) return;
  const std::int64_t smallest = std::max<std::int64_t>(1, kSmallestRange / std::max<std::int64_t>(1, bytes_per_item));
  const std::int64_t most = std::min<std::int64_t>(threads, (count - 1) / smallest + 1);
  if (most <= 1) return work(0, count);
  const std::int64_t ranges = most * kRangesPerThread;
  Loop loop(count, std::max(smallest, (count - 1) / ranges + 1), work);
  run(loop, static_cast<int>(most - 1));
  loop.rethrow_failure();
}

// The function that compilers call for `#pragma omp parallel`; null if OpenMP is not loaded with global visibility.
using OpenMP = void (*)(void (*task)(void*), void* argument, unsigned threads, unsigned flags);

OpenMP openmp() {
  static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t bytes_per_item, int threads, const Work& work) {
  split(count, bytes_per_item, threads, work, [](Loop& loop, int helpers) { pool().run(loop, helpers); });
}

void parallel_for_beside_torch(std::int64_t count, std::int64_t bytes_per_item, int threads, const Work& work) {
  if (!openmp()) return parallel_for(count, bytes_per_item, threads, work);
  // It takes as many threads as torch has, even for fewer ranges: OpenMP ends threads that a team does not need.
  split(count, bytes_per_item, threads, work, [&](Loop& loop, int) {
    openmp()([](void* shared) { static_cast<Loop*>(shared)->take_part(true); }, &loop,
             static_cast<unsigned>(threads), 0);
  });
}

}  // namespace fastmae
