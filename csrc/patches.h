// Reading patches of an image, normalised; shared by gather_patches and masked_mse.
#pragma once

#include <optional>
#include <vector>

#include "array.h"

namespace fastmae {

// A row of numbers, one a channel, as float64.
std::vector<double> channel_values(const Array& values);

// What the numbers of pixels are: mean and std [C] in units of value_range [2, C], low and high of each channel, or null
// for 0 and the largest number of the type. Pixels that are NaN or nodata are missing, if there is a nodata.
struct PixelScale {
  const Array& mean;
  const Array& std;
  const Array* value_range;
  std::optional<float> nodata;
};

// Row i of a matrix.
Array row(const Array& matrix, std::int64_t i);

// Tables over consecutive pixels, so that the inner loops do not know about channels.
class NormalisationTable {
 public:
  // The constants of ((x - low) / (high - low) - mean) / std, for `length` numbers that begin with channel 0.
  static NormalisationTable forward(const PixelScale& by, DType pixels, std::int64_t length);
  // The constants of (x * std + mean) * (high - low) + low.
  static NormalisationTable backward(const PixelScale& by, DType pixels, std::int64_t length);

  Normalisation get() const { return {offset_.data(), offset_rest_.data(), scale_.data(), unit_}; }

 private:
  explicit NormalisationTable(std::int64_t length);

  std::vector<float> offset_, offset_rest_, scale_;
  float unit_ = 1;
};

// The positions of patches in images [N, H, W, C] of any strides; all threads share one object.
class PatchLayout {
 public:
  PatchLayout(const Array& images, const Grid& grid, const PixelScale& by);

 private:
  friend class PatchReader;

  const Array images_;
  const Grid grid_;
  const std::int64_t size_;  // the bytes of one number of a pixel
  const bool contiguous_rows_;  // whether the rows of a patch have no gaps
  const bool packs_;
  const NormalisationTable table_;
  const std::optional<float> nodata_;
};

// Reads patch after patch. Each thread has its own object, which owns the memory where scattered pixels are collected.
class PatchReader {
 public:
  explicit PatchReader(const PatchLayout& layout);

  // Normalises patch `id` of image n to P numbers. Returns whether a pixel is missing.
  bool read(std::int64_t n, std::int32_t id, void* out, DType out_dtype);

 private:
  void pack(const char* patch);

  const PatchLayout& layout_;
  std::vector<char> packed_;
};

}  // namespace fastmae
