// random_masking for the CPU: rank the patches of an image by random keys, so that the first K are the visible ones.
// Bit-equal to fastmae/ops/random_masking.py, which has the definition.
#include "random_masking.h"

#include <algorithm>
#include <vector>

#include "philox.h"

namespace fastmae {

void random_masking(const std::int64_t* draw_ids, std::size_t rows, std::uint64_t seed, std::uint32_t num_patches,
                    std::int32_t* ids_shuffle) {
  // The random word above the patch's index: sorting these numbers breaks ties by index, and the index comes along.
  std::vector<std::uint64_t> keys(num_patches);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::uint32_t first = 0; first < num_patches; first += 4) {
      const PhiloxBlock words = philox(first / 4, kStreamMask, static_cast<std::uint64_t>(draw_ids[row]), seed);
      const std::uint32_t count = std::min<std::uint32_t>(4, num_patches - first);
      for (std::uint32_t i = 0; i < count; ++i) keys[first + i] = std::uint64_t{words[i]} << 32 | (first + i);
    }
    std::sort(keys.begin(), keys.end());
    std::int32_t* out = ids_shuffle + row * num_patches;
    for (std::uint32_t i = 0; i < num_patches; ++i) out[i] = static_cast<std::int32_t>(keys[i] & 0xFFFFFFFFu);
  }
}

}  // namespace fastmae
