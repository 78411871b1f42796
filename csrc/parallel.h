// Loops over several threads; see parallel.cpp.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmae {

// Calls work(first, last) for ranges that together cover [0, count), on this thread and up to threads - 1 others, and
// returns when all ranges are done. bytes_per_item is the memory that an item touches: little work stays on this
// thread. Any thread may get any range, so the result of work must not depend on it. The first exception of work is
// thrown here. Several threads may call this at once, and so may a child after a fork.
void parallel_for(std::int64_t count, std::int64_t bytes_per_item, int threads,
                  const std::function<void(std::int64_t first, std::int64_t last)>& work);

// The same on the threads of OpenMP, if the process has loaded it, as torch does. These threads stay awake for some
// milliseconds after a loop, and threads of our own would compete with them, so ops that run between matrix products of
// torch use this function. It must not be called in a child after a fork, which OpenMP does not survive.
void parallel_for_beside_torch(std::int64_t count, std::int64_t bytes_per_item, int threads,
                               const std::function<void(std::int64_t first, std::int64_t last)>& work);

}  // namespace fastmae
