// bernoulli_masking for the CPU: hide each feature of a row with the same chance, but never all of them or none.
// Bit-equal to fastmae/ops/bernoulli_masking.py, which has the definition.
#include <cstring>
#include <vector>

#include "instruction_set.h"
#include "ops.h"
#include "parallel.h"

namespace fastmae {
namespace {

constexpr std::uint64_t kStreamBernoulli = 13;  // STREAM_BERNOULLI of fastmae/philox.py

}  // namespace

void bernoulli_masking(const Array& draw_ids, std::uint64_t seed, std::uint64_t below, int threads,
                       const Array& masked) {
  const std::int64_t D = masked.shape[1];
  const std::int64_t blocks = (D + 3) / 4;
  const Kernels& loops = kernels();
  // A row costs about as much as copying 8 bytes per feature.
  parallel_for(draw_ids.shape[0], 8 * D, threads, [&](std::int64_t first, std::int64_t last) {
    // A key has the random word above the number of its feature, so that no two are equal.
    std::vector<std::uint64_t> keys(static_cast<std::size_t>((4 * blocks + kLaneBlock - 1) / kLaneBlock * kLaneBlock));
    for (std::int64_t n = first; n < last; ++n) {
      std::int64_t draw_id;
      std::memcpy(&draw_id, draw_ids.at(n), sizeof draw_id);
      loops.random_keys(seed, kStreamBernoulli, static_cast<std::uint64_t>(draw_id), blocks, keys.data());
      char* out = masked.at(n);
      std::uint64_t smallest = keys[0], largest = keys[0];
      for (std::int64_t i = 0; i < D; ++i) {
        const std::uint64_t key = keys[static_cast<std::size_t>(i)];
        out[i] = (key >> 32) < below;
        smallest = key < smallest ? key : smallest;
        largest = key > largest ? key : largest;
      }
      out[smallest & 0xFFFFFFFFu] = 1;
      out[largest & 0xFFFFFFFFu] = 0;
    }
  });
}

}  // namespace fastmae
