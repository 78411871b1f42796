// The rows of an array and sums over them: what LayerNorm, GELU and mask tokens have in common.
#pragma once

#include <algorithm>
#include <vector>

#include "array.h"
#include "instruction_set.h"
#include "parallel.h"

namespace fastmae {

// Rows lie along the last axis; all other axes count them, in order.
inline std::int64_t width_of(const Array& array) { return array.shape[array.ndim - 1]; }

inline std::int64_t rows_of(const Array& array) {
  std::int64_t rows = 1;
  for (int axis = 0; axis + 1 < array.ndim; ++axis) rows *= array.shape[axis];
  return rows;
}

inline char* row_of(const Array& array, std::int64_t i) {
  char* row = array.data;
  for (int axis = array.ndim - 2; axis > 0; --axis) {
    row += i % array.shape[axis] * array.strides[axis];
    i /= array.shape[axis];
  }
  return array.ndim > 1 ? row + i * array.strides[0] : row;
}

// The numbers of an array with one axis as float32.
inline std::vector<float> floats_of(const Array& array) {
  std::vector<float> numbers(static_cast<std::size_t>(array.shape[0]));
  PackedRow packed(array, 0);
  kernels().convert(packed.of(array.data), array.dtype, array.shape[0], numbers.data(), DType::kFloat32);
  return numbers;
}

// Sums over rows are taken in groups: so many rows are added up in float32, and then the sums of the groups in float64.
// The number is fixed and threads take whole groups, so the result does not depend on the number of threads.
constexpr std::int64_t kRowsOfAGroup = 32;

class GroupSums {
 public:
  // Columns that a thread adds up at a time.
  static constexpr std::int64_t kColumns = 64;

  GroupSums(std::int64_t rows, std::int64_t width)
      : groups((rows + kRowsOfAGroup - 1) / kRowsOfAGroup),
        width_(width),
        sums_(static_cast<std::size_t>(groups * width)) {}

  const std::int64_t groups;

  float* of_row(std::int64_t row) { return sums_.data() + row / kRowsOfAGroup * width_; }

  // Writes the sums over all rows. ``run`` is the loop over threads.
  template <class Run>
  void total(Run run, int threads, float* out) const {
    const std::int64_t panels = (width_ + kColumns - 1) / kColumns;
    run(panels, groups * kColumns * std::int64_t{sizeof(float)}, threads, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t panel = first; panel < last; ++panel) {
        const std::int64_t column = panel * kColumns, columns = std::min(kColumns, width_ - column);
        double totals[kColumns] = {};
        for (std::int64_t group = 0; group < groups; ++group)
          for (std::int64_t c = 0; c < columns; ++c)
            totals[c] += static_cast<double>(sums_[static_cast<std::size_t>(group * width_ + column + c)]);
        for (std::int64_t c = 0; c < columns; ++c) out[column + c] = static_cast<float>(totals[c]);
      }
    });
  }

 private:
  const std::int64_t width_;
  std::vector<float> sums_;
};

}  // namespace fastmae
