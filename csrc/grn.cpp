// The two passes over memory that global response normalisation takes forward, and the two that it takes backward.
// fastmae/ops/grn.py puts them together. Sums are taken in groups of rows, as in rows.h, so the number of threads does
// not change them.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "rows.h"

namespace fastmae {

void sums_of_products(const Array& x, const Array* other, int threads, const Array& sums) {
  const std::int64_t N = x.shape[0], P = x.shape[1], D = x.shape[2], size = size_of(x.dtype);
  const Kernels& loops = kernels();
  constexpr std::int64_t kColumns = 256;  // that a task adds up, over all rows of an image
  const std::int64_t panels = (D + kColumns - 1) / kColumns, kinds = sums.shape[0];
  parallel_for_beside_torch(N * panels, P * kColumns * size, threads, [&](std::int64_t first, std::int64_t last) {
    float parts[2 * kColumns];
    double totals[2 * kColumns];
    for (std::int64_t task = first; task < last; ++task) {
      const std::int64_t n = task / panels, column = task % panels * kColumns;
      const std::int64_t columns = std::min(kColumns, D - column);
      std::fill_n(totals, 2 * kColumns, 0.0);
      for (std::int64_t row = 0; row < P; row += kRowsOfAGroup) {
        std::fill_n(parts, 2 * kColumns, 0.0f);
        for (std::int64_t i = row; i < std::min(row + kRowsOfAGroup, P); ++i) {
          const std::int64_t offset = ((n * P + i) * D + column) * size;
          loops.add_products(x.data + offset, other ? other->data + offset : nullptr, x.dtype, columns, parts,
                             parts + kColumns);
        }
        for (std::int64_t i = 0; i < 2 * kColumns; ++i) totals[i] += static_cast<double>(parts[i]);
      }
      for (std::int64_t kind = 0; kind < kinds; ++kind) {
        float* out = reinterpret_cast<float*>(sums.data) + (kind * N + n) * D + column;
        for (std::int64_t i = 0; i < columns; ++i) out[i] = static_cast<float>(totals[kind * kColumns + i]);
      }
    }
  });
}

void scale_and_add(const Array& x, const Array& scale, const Array* other, const Array& added, int threads,
                   const Array& out) {
  const std::int64_t N = x.shape[0], P = x.shape[1], D = x.shape[2], size = size_of(x.dtype);
  const Kernels& loops = kernels();
  const std::int64_t rows_of_added = added.shape[0] == 1 ? 0 : D;  // one row for all images
  parallel_for_beside_torch(N * P, (other ? 3 : 2) * D * size, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t offset = i * D * size, n = i / P;
      loops.scale_and_add(x.data + offset, other ? other->data + offset : nullptr, x.dtype,
                          reinterpret_cast<const float*>(scale.data) + n * D,
                          reinterpret_cast<const float*>(added.data) + n * rows_of_added, D, out.data + offset);
    }
  });
}

}  // namespace fastmae
