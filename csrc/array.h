// The arguments of the ops: views of memory with a type, a shape and strides, which checks.h has checked.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fastmae {

inline std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kUint8: return 1;
    case DType::kUint16:
    case DType::kFloat16:
    case DType::kBfloat16: return 2;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kInt64: return 8;
  }
  return 0;
}

// Up to four axes. Strides are in bytes and may be zero or negative.
struct Array {
  const char* name;
  char* data;
  DType dtype;
  int ndim;
  std::array<std::int64_t, 4> shape, strides;
  bool writeable;

  char* at(std::int64_t i) const { return data + i * strides[0]; }
  char* at(std::int64_t i, std::int64_t j) const { return at(i) + j * strides[1]; }
};

// Patch numbers [rows, count], copied while they were checked, so that nothing can change them afterwards.
struct Ids {
  std::vector<std::int32_t> values;
  std::int64_t rows, count;

  const std::int32_t* row(std::int64_t n) const { return values.data() + n * count; }
};

// Where each cell of a grid lies among the K visible ones, −1 where it is masked: [N, gh, gw], copied while they were
// checked. A cell has s×s positions.
struct Slots {
  std::vector<std::int32_t> values;
  std::int64_t N, gh, gw, K, s;
};

// L = gh·gw patches of ph×pw pixels with C channels, P numbers per patch.
struct Grid {
  std::int64_t gh, gw, ph, pw, C;

  std::int64_t L() const { return gh * gw; }
  std::int64_t P() const { return ph * pw * C; }
};

// Rows of numbers without gaps, for any stride of the last axis: a row with gaps is copied.
class PackedRow {
 public:
  PackedRow(const Array& array, int axis)
      : count_(array.shape[axis]), stride_(array.strides[axis]), size_(size_of(array.dtype)) {
    if (count_ > 1 && stride_ != size_) copy_.resize(static_cast<std::size_t>(count_ * size_));
  }

  const char* of(const char* row) {
    if (copy_.empty()) return row;
    for (std::int64_t i = 0; i < count_; ++i)
      for (std::int64_t byte = 0; byte < size_; ++byte)
        copy_[static_cast<std::size_t>(i * size_ + byte)] = row[i * stride_ + byte];
    return copy_.data();
  }

 private:
  std::int64_t count_, stride_, size_;
  std::vector<char> copy_;
};

}  // namespace fastmae
