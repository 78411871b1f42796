// random_masking for the CPU: rank the patches of an image by random keys, so that the first K are the visible ones.
// Bit-equal to fastmae/ops/random_masking.py, which has the definition.
#include <algorithm>
#include <cstring>
#include <vector>

#include "instruction_set.h"
#include "ops.h"
#include "parallel.h"

namespace fastmae {
namespace {

constexpr std::uint64_t kStreamMask = 0;  // STREAM_MASK of fastmae/philox.py

// Keys are evenly distributed, so their first bits nearly determine their position: they go into as many buckets as
// there are keys, and an insertion sort, in which each key then moves only a little, finishes the order.
class Sorter {
 public:
  explicit Sorter(std::int64_t count) : count_(count), sorted_(static_cast<std::size_t>(count)) {
    while ((std::int64_t{1} << bits_) < count) ++bits_;
    ends_.resize(std::size_t{1} << bits_);
  }

  const std::uint64_t* sort(const std::uint64_t* keys) {
    const int shift = 64 - bits_;
    std::fill(ends_.begin(), ends_.end(), 0u);
    for (std::int64_t i = 0; i < count_; ++i) ++ends_[keys[i] >> shift];
    std::uint32_t total = 0;
    for (std::uint32_t& end : ends_) {
      const std::uint32_t size = end;
      end = total;
      total += size;
    }
    for (std::int64_t i = 0; i < count_; ++i) sorted_[ends_[keys[i] >> shift]++] = keys[i];
    for (std::size_t i = 1; i < sorted_.size(); ++i) {
      const std::uint64_t key = sorted_[i];
      std::size_t place = i;
      for (; place > 0 && sorted_[place - 1] > key; --place) sorted_[place] = sorted_[place - 1];
      sorted_[place] = key;
    }
    return sorted_.data();
  }

 private:
  std::int64_t count_;
  int bits_ = 1;
  std::vector<std::uint64_t> sorted_;
  std::vector<std::uint32_t> ends_;
};

}  // namespace

void random_masking(const Array& draw_ids, std::uint64_t seed, int threads, const Array& ids_shuffle) {
  const std::int64_t L = ids_shuffle.shape[1];
  const std::int64_t blocks = (L + 3) / 4;
  const Kernels& loops = kernels();
  // A row costs about as much as copying 32 bytes per patch.
  parallel_for(draw_ids.shape[0], 32 * L, threads, [&](std::int64_t first, std::int64_t last) {
    // A key has the random word above the patch's number, so sorting breaks ties by number and moves the number along.
    std::vector<std::uint64_t> keys(static_cast<std::size_t>((4 * blocks + kLaneBlock - 1) / kLaneBlock * kLaneBlock));
    Sorter sorter(L);
    for (std::int64_t n = first; n < last; ++n) {
      std::int64_t draw_id;
      std::memcpy(&draw_id, draw_ids.at(n), sizeof draw_id);
      loops.random_keys(seed, kStreamMask, static_cast<std::uint64_t>(draw_id), blocks, keys.data());
      const std::uint64_t* sorted = sorter.sort(keys.data());
      std::int32_t* out = reinterpret_cast<std::int32_t*>(ids_shuffle.at(n));
      for (std::int64_t i = 0; i < L; ++i) out[i] = static_cast<std::int32_t>(sorted[i] & 0xFFFFFFFFu);
    }
  });
}

}  // namespace fastmae
