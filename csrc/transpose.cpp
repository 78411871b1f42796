// A transposed copy of a matrix, and the sums of its columns, in one pass on all threads. The gradients of a linear
// map's weight and bias are computed from these two.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "turn.h"

namespace fastmae {
namespace {

// A thread takes so many columns at a time, and reads so many of their rows into the first-level cache, for any
// distance between rows. kRows rows are added up in float32, and these sums in float64.
constexpr std::int64_t kColumns = 64, kRows = 64;

inline Float4 load(const float* p) {
  Float4 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Copies rows × columns numbers of the matrix into the block; the rest of the block is 0.
void copy_block(const Array& matrix, std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns,
                float (&block)[kRows][kColumns]) {
  const std::int64_t size = sizeof(float);
  for (std::int64_t r = 0; r < kRows; ++r) {
    float* to = block[r];
    std::int64_t done = 0;
    if (r < rows) {
      const char* from = matrix.at(row + r, column);
      if (matrix.strides[1] == size)
        std::memcpy(to, from, static_cast<std::size_t>(columns * size));
      else
        for (std::int64_t c = 0; c < columns; ++c) std::memcpy(to + c, from + c * matrix.strides[1], sizeof(float));
      done = columns;
    }
    std::fill(to + done, to + kColumns, 0.0f);
  }
}

// Writes the block's numbers from [r][c] on, four by four, to the columns of `out`, which lie `stride` numbers apart.
inline void transpose4(const float (&block)[kRows][kColumns], std::int64_t r, std::int64_t c, std::int64_t rows,
                       std::int64_t columns, float* out, std::int64_t stride) {
  const Float4 lines[4] = {load(&block[r][c]), load(&block[r + 1][c]), load(&block[r + 2][c]), load(&block[r + 3][c])};
  Float4 turned[4];
  turn(lines, turned);
  if (rows - r >= 4 && columns - c >= 4) {
    for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &turned[i], sizeof(Float4));
  } else {
    const std::size_t size = static_cast<std::size_t>(std::min<std::int64_t>(4, rows - r)) * sizeof(float);
    for (std::int64_t i = 0; i < std::min<std::int64_t>(4, columns - c); ++i)
      std::memcpy(out + i * stride, &turned[i], size);
  }
}

}  // namespace

void transpose_and_sum(const Array& matrix, int threads, const Array& transposed, const Array& sums) {
  const std::int64_t R = matrix.shape[0], C = matrix.shape[1], panels = (C + kColumns - 1) / kColumns;
  const std::int64_t bytes = 2 * R * std::min(C, kColumns) * size_of(DType::kFloat32);
  float* out = reinterpret_cast<float*>(transposed.data);
  float* totals_out = reinterpret_cast<float*>(sums.data);
  parallel_for_beside_torch(panels, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    alignas(64) float block[kRows][kColumns];
    for (std::int64_t panel = first; panel < last; ++panel) {
      const std::int64_t column = panel * kColumns, columns = std::min(kColumns, C - column);
      double totals[kColumns] = {};
      for (std::int64_t row = 0; row < R; row += kRows) {
        const std::int64_t rows = std::min(kRows, R - row);
        copy_block(matrix, row, rows, column, columns, block);
        float sum[kColumns] = {};
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t c = 0; c < kColumns; ++c) sum[c] += block[r][c];
        for (std::int64_t c = 0; c < kColumns; ++c) totals[c] += static_cast<double>(sum[c]);
        for (std::int64_t c = 0; c < columns; c += 4)
          for (std::int64_t r = 0; r < rows; r += 4)
            transpose4(block, r, c, rows, columns, out + (column + c) * R + row + r, R);
      }
      for (std::int64_t c = 0; c < columns; ++c) totals_out[column + c] = static_cast<float>(totals[c]);
    }
  });
}

}  // namespace fastmae
