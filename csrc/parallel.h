// Loops over several threads; see parallel.cpp.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmae {

// Calls work(first, last) for ranges that together cover [0, count), on this thread and up to threads - 1 others, and
// returns when all is done. bytes_per_item says how much memory an item touches: little work stays on this thread.
// Which thread does which range is left to chance, so work must not let its result depend on it. The first exception
// of work is thrown here. May be called by several threads at once, and in a child after a fork.
void parallel_for(std::int64_t count, std::int64_t bytes_per_item, int threads,
                  const std::function<void(std::int64_t first, std::int64_t last)>& work);

// The same on the threads of OpenMP, where the process has loaded it, as torch does: between two loops these stay awake
// for some milliseconds, in which threads of our own would have to share the processors with them. For what runs
// between products of torch's. Not in a child after a fork, which OpenMP does not survive.
void parallel_for_beside_torch(std::int64_t count, std::int64_t bytes_per_item, int threads,
                               const std::function<void(std::int64_t first, std::int64_t last)>& work);

}  // namespace fastmae
