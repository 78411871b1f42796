// gather_patches for the CPU: the chosen patches of an image, normalised and cast on the way.
// Equivalent to fastmae/ops/gather_patches.py, which has the definition.
#include "ops.h"
#include "parallel.h"
#include "patches.h"

namespace fastmae {

void gather_patches(const Array& images, const Ids& ids, const Grid& grid, const PixelScale& by, int threads,
                    const Array& patches) {
  if (ids.values.empty()) return;
  const PatchLayout layout(images, grid, by);
  const std::int64_t bytes = grid.P() * (size_of(images.dtype) + size_of(patches.dtype));
  parallel_for(ids.rows * ids.count, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PatchReader reader(layout);
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / ids.count, k = i % ids.count;
      reader.read(n, ids.row(n)[k], patches.at(n, k), patches.dtype);
    }
  });
}

}  // namespace fastmae
