// Reading patches of an image, normalised; shared by gather_patches and masked_mse.
#pragma once

#include <vector>

#include "array.h"

namespace fastmae {

// mean and std [C] as float64.
std::vector<double> channel_values(const Array& values);

// Tables over consecutive pixels, so that the inner loops do not know about channels.
class NormalisationTable {
 public:
  // The constants of (x / unit - mean) / std, for `length` numbers that begin with channel 0. uint8 has unit 255.
  static NormalisationTable forward(const Array& mean, const Array& std, double unit, std::int64_t length);
  // The constants of x * std + mean.
  static NormalisationTable backward(const Array& mean, const Array& std, std::int64_t length);

  Normalisation get() const { return {offset_.data(), offset_rest_.data(), scale_.data()}; }

 private:
  explicit NormalisationTable(std::int64_t length);

  std::vector<float> offset_, offset_rest_, scale_;
};

// The positions of patches in images [N, H, W, C] of any strides; all threads share one object.
class PatchLayout {
 public:
  PatchLayout(const Array& images, const Grid& grid, const Array& mean, const Array& std);

 private:
  friend class PatchReader;

  const Array images_;
  const Grid grid_;
  const std::int64_t size_;  // the bytes of one number of a pixel
  const bool contiguous_rows_;  // whether the rows of a patch have no gaps
  const bool packs_;
  const NormalisationTable table_;
};

// Reads patch after patch. Each thread has its own object, which owns the memory where scattered pixels are collected.
class PatchReader {
 public:
  explicit PatchReader(const PatchLayout& layout);

  // Normalises patch `id` of image n to P numbers.
  void read(std::int64_t n, std::int32_t id, void* out, DType out_dtype);

 private:
  void pack(const char* patch);

  const PatchLayout& layout_;
  std::vector<char> packed_;
};

}  // namespace fastmae
