// masked_mse for the CPU: the loss, and its gradient. A target patch exists only in the first-level cache, in which either
// makes it: reading the pixels again costs less than a stored gradient, which would have to be multiplied afterwards.
// Equivalent to fastmae/ops/masked_mse.py, which has the definition.
#include <cstring>

#include "instruction_set.h"
#include "ops.h"
#include "parallel.h"

namespace fastmae {
namespace {

// Calls body(i, pred, target) for the patches i that are targets, and missing(i) for those with a missing pixel.
template <class Body, class Missing>
void for_each_patch(const Array& pred, const Array& images, const Ids& ids, const Grid& grid, const PixelScale& by,
                    int threads, std::int64_t bytes, Body body, Missing missing) {
  const PatchLayout layout(images, grid, by);
  const std::int64_t P = grid.P();
  parallel_for(ids.rows * ids.count, P * size_of(images.dtype) + bytes, threads,
               [&](std::int64_t first, std::int64_t last) {
                 PatchReader reader(layout);
                 PackedRow row(pred, 2);
                 std::vector<float> target(static_cast<std::size_t>((P + kLaneBlock - 1) / kLaneBlock * kLaneBlock));
                 for (std::int64_t i = first; i < last; ++i) {
                   const std::int64_t n = i / ids.count, m = i % ids.count;
                   if (reader.read(n, ids.row(n)[m], target.data(), DType::kFloat32))
                     missing(i);
                   else
                     body(i, row.of(pred.at(n, m)), target.data());
                 }
               });
}

}  // namespace

void masked_mse(const Array& pred, const Array& images, const Ids& ids, const Grid& grid, const PixelScale& by,
                bool norm_pix, double eps, int threads, const Array& loss, const Array& targets) {
  const Kernels& loops = kernels();
  const std::int64_t P = grid.P();
  std::vector<double> errors(static_cast<std::size_t>(ids.rows * ids.count));
  std::vector<char> is_target(errors.size(), 1);
  for_each_patch(
      pred, images, ids, grid, by, threads, P * size_of(pred.dtype),
      [&](std::int64_t i, const char* numbers, float* target) {
        errors[static_cast<std::size_t>(i)] = loops.patch_error(target, P, norm_pix, eps, numbers, pred.dtype);
      },
      [&](std::int64_t i) { is_target[static_cast<std::size_t>(i)] = 0; });
  double sum = 0, count = 0;
  for (std::size_t i = 0; i < errors.size(); ++i)
    if (is_target[i]) sum += errors[i], ++count;
  *reinterpret_cast<float*>(loss.data) = count > 0 ? static_cast<float>(sum / (count * static_cast<double>(P))) : 0;
  *reinterpret_cast<float*>(targets.data) = static_cast<float>(count);
}

void masked_mse_backward(const Array& grad_loss, const Array& targets, const Array& pred, const Array& images,
                         const Ids& ids, const Grid& grid, const PixelScale& by, bool norm_pix, double eps,
                         int threads, const Array& gradient) {
  const Kernels& loops = kernels();
  const std::int64_t P = grid.P(), size = size_of(pred.dtype);
  const double numbers = static_cast<double>(*reinterpret_cast<const float*>(targets.data)) * static_cast<double>(P);
  const float slope =
      static_cast<float>(static_cast<double>(*reinterpret_cast<const float*>(grad_loss.data)) * (2 / numbers));
  for_each_patch(
      pred, images, ids, grid, by, threads, 2 * P * size,
      [&](std::int64_t i, const char* row, float* target) {
        loops.patch_gradient(target, P, norm_pix, eps, row, pred.dtype, slope, gradient.data + i * P * size);
      },
      [&](std::int64_t i) { std::memset(gradient.data + i * P * size, 0, static_cast<std::size_t>(P * size)); });
}

}  // namespace fastmae
