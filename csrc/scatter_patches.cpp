// scatter_patches for the CPU: patches back onto an image that is 0 elsewhere, cell by cell of the grid.
// Equivalent to fastmae/ops/scatter_patches.py, which has the definition.
#include <cstring>

#include "instruction_set.h"
#include "ops.h"
#include "parallel.h"
#include "patches.h"

namespace fastmae {

void scatter_patches(const Array& patches, const Ids& ids, const Grid& grid, const PixelScale& by, int threads,
                     const Array& images) {
  if (ids.rows == 0) return;
  const std::int64_t columns = grid.pw * grid.C, size = size_of(images.dtype);
  const NormalisationTable table = NormalisationTable::backward(by, images.dtype, columns);
  const Kernels& loops = kernels();
  const std::int64_t bytes = grid.gw * grid.P() * (size + size_of(patches.dtype));
  parallel_for(ids.rows * grid.gh, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed(patches, 2);
    std::vector<std::int64_t> patch_at(static_cast<std::size_t>(grid.L()));
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / grid.gh, gy = i % grid.gh;
      if (i == first || gy == 0) {
        patch_at.assign(patch_at.size(), -1);
        for (std::int64_t m = 0; m < ids.count; ++m) patch_at[static_cast<std::size_t>(ids.row(n)[m])] = m;
      }
      for (std::int64_t gx = 0; gx < grid.gw; ++gx) {
        char* corner = images.at(n, gy * grid.ph) + gx * columns * size;
        const std::int64_t m = patch_at[static_cast<std::size_t>(gy * grid.gw + gx)];
        const PixelRows<char> pixels = {corner, images.strides[1], grid.ph, columns};
        if (m >= 0)
          loops.denormalise(packed.of(patches.at(n, m)), patches.dtype, table.get(), pixels, images.dtype);
        else
          for (std::int64_t y = 0; y < grid.ph; ++y)
            std::memset(corner + y * pixels.stride, 0, static_cast<std::size_t>(columns * size));
      }
    }
  });
}

}  // namespace fastmae
