// Patches of images with any strides. If a row of a patch is consecutive in memory and long enough, it is read
// directly; otherwise the patch is first copied together, in the first-level cache.
#include "patches.h"

#include <cstring>

#include "instruction_set.h"

namespace fastmae {
namespace {

// For rows shorter than a vector of AVX-512, the ends of rows cost more than the copy.
constexpr std::int64_t kShortRow = 16;

bool rows_are_contiguous(const Array& images, const Grid& grid, std::int64_t size) {
  const bool channels = grid.C == 1 || images.strides[3] == size;
  const bool columns = grid.pw == 1 || images.strides[2] == grid.C * size;
  return channels && columns;
}

// Pixels [ph, pw, C] of any strides, one after the other. T is any type of their size.
template <class T>
void copy_together(const char* patch, const Grid& grid, const std::array<std::int64_t, 4>& strides, char* packed) {
  // Local copies, which the compiler may keep in registers; it must assume that stored bytes change other memory.
  const std::int64_t pw = grid.pw, C = grid.C, step = strides[2], width = C * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t y = 0; y < grid.ph; ++y, packed += pw * width)
    for (std::int64_t c = 0; c < C; ++c) {
      const char* from = patch + y * strides[1] + c * strides[3];
      char* to = packed + c * static_cast<std::int64_t>(sizeof(T));
      for (std::int64_t x = 0; x < pw; ++x) std::memcpy(to + x * width, from + x * step, sizeof(T));
    }
}

}  // namespace

std::vector<double> channel_values(const Array& values) {
  std::vector<double> result;
  for (std::int64_t c = 0; c < values.shape[0]; ++c) {
    float value;
    kernels().convert(values.at(c), values.dtype, 1, &value, DType::kFloat32);
    result.push_back(value);
  }
  return result;
}

NormalisationTable::NormalisationTable(std::int64_t length)
    : offset_(static_cast<std::size_t>(length)),
      offset_rest_(static_cast<std::size_t>(length)),
      scale_(static_cast<std::size_t>(length)) {}

// The mean is subtracted before scaling, then the rounding error of unit·mean: so x near the mean gives no error.
NormalisationTable NormalisationTable::forward(const Array& mean, const Array& std, double unit, std::int64_t length) {
  const std::vector<double> means = channel_values(mean), stds = channel_values(std);
  NormalisationTable table(length);
  for (std::size_t i = 0; i < table.scale_.size(); ++i) {
    const std::size_t c = i % means.size();
    table.offset_[i] = static_cast<float>(unit * means[c]);
    table.offset_rest_[i] = static_cast<float>(unit * means[c] - table.offset_[i]);
    table.scale_[i] = static_cast<float>(1 / (unit * stds[c]));
  }
  return table;
}

NormalisationTable NormalisationTable::backward(const Array& mean, const Array& std, std::int64_t length) {
  const std::vector<double> means = channel_values(mean), stds = channel_values(std);
  NormalisationTable table(length);
  for (std::size_t i = 0; i < table.scale_.size(); ++i) {
    table.offset_[i] = static_cast<float>(means[i % means.size()]);
    table.scale_[i] = static_cast<float>(stds[i % means.size()]);
  }
  return table;
}

PatchLayout::PatchLayout(const Array& images, const Grid& grid, const Array& mean, const Array& std)
    : images_(images),
      grid_(grid),
      size_(size_of(images.dtype)),
      contiguous_rows_(rows_are_contiguous(images, grid, size_)),
      packs_(!contiguous_rows_ || grid.pw * grid.C < kShortRow),
      table_(NormalisationTable::forward(mean, std, images.dtype == DType::kUint8 ? 255.0 : 1.0,
                                         packs_ ? grid.P() : grid.pw * grid.C)) {}

PatchReader::PatchReader(const PatchLayout& layout)
    : layout_(layout), packed_(static_cast<std::size_t>(layout.packs_ ? layout.grid_.P() * layout.size_ : 0)) {}

void PatchReader::read(std::int64_t n, std::int32_t id, void* out, DType out_dtype) {
  const Array& images = layout_.images_;
  const Grid& grid = layout_.grid_;
  const std::int64_t y = id / grid.gw * grid.ph, x = id % grid.gw * grid.pw;
  const char* patch = images.at(n, y) + x * images.strides[2];
  PixelRows<const char> pixels = {patch, images.strides[1], grid.ph, grid.pw * grid.C};
  if (layout_.packs_) {
    pack(patch);
    pixels = {packed_.data(), 0, 1, grid.P()};
  }
  kernels().normalise(pixels, images.dtype, layout_.table_.get(), out, out_dtype);
}

void PatchReader::pack(const char* patch) {
  const Grid& grid = layout_.grid_;
  const auto& strides = layout_.images_.strides;
  if (layout_.contiguous_rows_) {
    const std::size_t row = static_cast<std::size_t>(grid.pw * grid.C * layout_.size_);
    for (std::int64_t y = 0; y < grid.ph; ++y)
      std::memcpy(packed_.data() + static_cast<std::size_t>(y) * row, patch + y * strides[1], row);
  } else if (layout_.size_ == 1) {
    copy_together<std::uint8_t>(patch, grid, strides, packed_.data());
  } else if (layout_.size_ == 2) {
    copy_together<std::uint16_t>(patch, grid, strides, packed_.data());
  } else {
    copy_together<std::uint32_t>(patch, grid, strides, packed_.data());
  }
}

}  // namespace fastmae
