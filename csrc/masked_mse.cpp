// masked_mse for the CPU: the loss and its gradient in one pass. A target patch exists only in the first-level cache.
// Equivalent to fastmae/ops/masked_mse.py, which has the definition.
#include "instruction_set.h"
#include "ops.h"
#include "parallel.h"
#include "patches.h"

namespace fastmae {

void masked_mse(const Array& pred, const Array& images, const Ids& ids, const Grid& grid, const Array& mean,
                const Array& std, bool norm_pix, double eps, int threads, const Array& loss, const Array& gradient) {
  const PatchLayout layout(images, grid, mean, std);
  const Kernels& loops = kernels();
  const std::int64_t P = grid.P(), patches = ids.rows * ids.count;
  const double elements = static_cast<double>(patches) * static_cast<double>(P);
  const float gradient_scale = static_cast<float>(2 / elements);
  std::vector<double> errors(static_cast<std::size_t>(patches));
  const std::int64_t bytes = P * (size_of(images.dtype) + 2 * size_of(pred.dtype));
  parallel_for(patches, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PatchReader reader(layout);
    PackedRow row(pred, 2);
    std::vector<float> target(static_cast<std::size_t>((P + kLaneBlock - 1) / kLaneBlock * kLaneBlock));
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / ids.count, m = i % ids.count;
      reader.read(n, ids.row(n)[m], target.data(), DType::kFloat32);
      errors[static_cast<std::size_t>(i)] = loops.patch_error(target.data(), P, norm_pix, eps, row.of(pred.at(n, m)),
                                                              pred.dtype, gradient_scale, gradient.at(n, m));
    }
  });
  double sum = 0;
  for (const double error : errors) sum += error;
  *reinterpret_cast<float*>(loss.data) = static_cast<float>(sum / elements);
}

}  // namespace fastmae
