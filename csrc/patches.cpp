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

Array row(const Array& matrix, std::int64_t i) {
  Array result = matrix;
  result.data = matrix.at(i);
  result.ndim = 1;
  result.shape[0] = matrix.shape[1];
  result.strides[0] = matrix.strides[1];
  return result;
}

namespace {

// low and high - low of each channel.
struct Ranges {
  std::vector<double> low, size;
};

double largest(DType pixels) {
  return pixels == DType::kUint8 ? 255.0 : pixels == DType::kUint16 ? 65535.0 : 1.0;
}

Ranges ranges_of(const PixelScale& by, DType pixels) {
  const std::size_t channels = static_cast<std::size_t>(by.mean.shape[0]);
  if (!by.value_range) return {std::vector<double>(channels, 0), std::vector<double>(channels, largest(pixels))};
  Ranges ranges = {channel_values(row(*by.value_range, 0)), channel_values(row(*by.value_range, 1))};
  for (std::size_t c = 0; c < channels; ++c) ranges.size[c] -= ranges.low[c];
  return ranges;
}

}  // namespace

NormalisationTable::NormalisationTable(std::int64_t length)
    : offset_(static_cast<std::size_t>(length)),
      offset_rest_(static_cast<std::size_t>(length)),
      scale_(static_cast<std::size_t>(length)) {}

// What is taken off is subtracted before scaling, then its rounding error: so x near the mean gives no error.
NormalisationTable NormalisationTable::forward(const PixelScale& by, DType pixels, std::int64_t length) {
  const std::vector<double> means = channel_values(by.mean), stds = channel_values(by.std);
  const Ranges ranges = ranges_of(by, pixels);
  NormalisationTable table(length);
  for (std::size_t i = 0; i < table.scale_.size(); ++i) {
    const std::size_t c = i % means.size();
    const double offset = ranges.low[c] + ranges.size[c] * means[c];
    table.offset_[i] = static_cast<float>(offset);
    table.offset_rest_[i] = static_cast<float>(offset - table.offset_[i]);
    table.scale_[i] = static_cast<float>(1 / (ranges.size[c] * stds[c]));
  }
  return table;
}

NormalisationTable NormalisationTable::backward(const PixelScale& by, DType pixels, std::int64_t length) {
  const std::vector<double> means = channel_values(by.mean), stds = channel_values(by.std);
  const Ranges ranges = ranges_of(by, by.value_range ? pixels : DType::kFloat32);
  NormalisationTable table(length);
  for (std::size_t i = 0; i < table.scale_.size(); ++i) {
    const std::size_t c = i % means.size();
    table.offset_[i] = static_cast<float>(ranges.low[c] + ranges.size[c] * means[c]);
    table.scale_[i] = static_cast<float>(ranges.size[c] * stds[c]);
  }
  if (!by.value_range) table.unit_ = static_cast<float>(largest(pixels));
  return table;
}

PatchLayout::PatchLayout(const Array& images, const Grid& grid, const PixelScale& by)
    : images_(images),
      grid_(grid),
      size_(size_of(images.dtype)),
      contiguous_rows_(rows_are_contiguous(images, grid, size_)),
      packs_(!contiguous_rows_ || grid.pw * grid.C < kShortRow),
      table_(NormalisationTable::forward(by, images.dtype, packs_ ? grid.P() : grid.pw * grid.C)),
      nodata_(by.nodata) {}

PatchReader::PatchReader(const PatchLayout& layout)
    : layout_(layout), packed_(static_cast<std::size_t>(layout.packs_ ? layout.grid_.P() * layout.size_ : 0)) {}

bool PatchReader::read(std::int64_t n, std::int32_t id, void* out, DType out_dtype) {
  const Array& images = layout_.images_;
  const Grid& grid = layout_.grid_;
  const std::int64_t y = id / grid.gw * grid.ph, x = id % grid.gw * grid.pw;
  const char* patch = images.at(n, y) + x * images.strides[2];
  PixelRows<const char> pixels = {patch, images.strides[1], grid.ph, grid.pw * grid.C};
  if (layout_.packs_) {
    pack(patch);
    pixels = {packed_.data(), 0, 1, grid.P()};
  }
  const float* nodata = layout_.nodata_ ? &*layout_.nodata_ : nullptr;
  return kernels().normalise(pixels, images.dtype, layout_.table_.get(), nodata, out, out_dtype);
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
