// Per-image random permutations of the patches; see random_masking.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmae {

// draw_ids [rows] → ids_shuffle [rows, num_patches], both contiguous and owned by the caller.
void random_masking(const std::int64_t* draw_ids, std::size_t rows, std::uint64_t seed, std::uint32_t num_patches,
                    std::int32_t* ids_shuffle);

}  // namespace fastmae
