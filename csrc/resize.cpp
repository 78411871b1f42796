// resize for the CPU: one image of any of three types, antialiased bicubic in float32, one axis after the other.
// Equivalent to fastmae/data/resize.py, which has the definition. The filter is Keys' with a = -0.5, as Pillow has it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ops.h"

namespace fastmae {
namespace {

// Four numbers side by side, of any address. Every processor has them.
typedef float Four __attribute__((vector_size(16)));
constexpr std::int64_t kFour = 4;

inline Four load_four(const float* p) {
  Four x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store_four(float* p, Four x) { std::memcpy(p, &x, sizeof(x)); }

double keys(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

// For each output along an axis: the first input that its filter touches, how many, and their weights, whose sum is 1.
struct Taps {
  std::vector<std::int64_t> first, count;
  std::vector<float> weights;
  std::int64_t most;

  Taps(std::int64_t in, std::int64_t out, bool mirrored) {
    const double scale = static_cast<double>(in) / static_cast<double>(out), wide = std::max(scale, 1.0);
    const double support = 2.0 * wide;
    most = static_cast<std::int64_t>(std::ceil(support)) * 2 + 1;
    weights.resize(static_cast<std::size_t>(out * most));
    std::vector<double> exact(static_cast<std::size_t>(most));
    for (std::int64_t i = 0; i < out; ++i) {
      const double centre = (static_cast<double>(mirrored ? out - 1 - i : i) + 0.5) * scale;
      const auto low = std::max<std::int64_t>(0, static_cast<std::int64_t>(centre - support + 0.5));
      const auto high = std::min(in, static_cast<std::int64_t>(centre + support + 0.5));
      const std::int64_t n = std::min(high - low, most);
      double sum = 0.0;
      for (std::int64_t k = 0; k < n; ++k) {
        exact[k] = keys((static_cast<double>(k + low) - centre + 0.5) / wide);
        sum += exact[k];
      }
      for (std::int64_t k = 0; k < n; ++k) weights[i * most + k] = static_cast<float>(exact[k] / sum);
      first.push_back(low);
      count.push_back(n);
    }
  }
};

// A row of the image as float32. A missing pixel becomes NaN, which no sum forgets.
template <class T>
void read_row(const char* row, std::int64_t count, const float* nodata, float* out) {
  const T* numbers = reinterpret_cast<const T*>(row);
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(numbers[i]);
  if (!nodata) return;
  for (std::int64_t i = 0; i < count; ++i)
    if (out[i] == *nodata) out[i] = std::numeric_limits<float>::quiet_NaN();
}

// Whole numbers are clamped to their range and rounded to nearest even: the sum with 2^23 has no bits for a fraction.
template <class T>
void write_row(const float* row, std::int64_t count, char* out) {
  T* numbers = reinterpret_cast<T*>(out);
  constexpr float top = std::numeric_limits<T>::max(), shift = 8388608.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    float x = row[i] > 0.0f ? row[i] : 0.0f;
    x = (x < top ? x : top) + shift;
    numbers[i] = static_cast<T>(static_cast<std::int32_t>(x - shift));
  }
}

template <>
void write_row<float>(const float* row, std::int64_t count, char* out) {
  std::memcpy(out, row, static_cast<std::size_t>(count) * sizeof(float));
}

// One row of in to one of out; both have room for kFour numbers behind their end.
void resize_row(const float* in, std::int64_t C, const Taps& taps, float* out) {
  const auto outputs = static_cast<std::int64_t>(taps.first.size());
  for (std::int64_t x = 0; x < outputs; ++x) {
    const float* weights = &taps.weights[x * taps.most];
    const float* pixels = in + taps.first[x] * C;
    const std::int64_t n = taps.count[x];
    if (C < 3) {
      for (std::int64_t c = 0; c < C; ++c) {
        float sum = 0.0f;
        for (std::int64_t k = 0; k < n; ++k) sum += weights[k] * pixels[k * C + c];
        out[x * C + c] = sum;
      }
      continue;
    }
    // What the last lanes write beyond the pixel is written over by the next one.
    for (std::int64_t c = 0; c < C; c += kFour) {
      Four sum = {0.0f, 0.0f, 0.0f, 0.0f};
      for (std::int64_t k = 0; k < n; ++k) sum += weights[k] * load_four(pixels + k * C + c);
      store_four(out + x * C + c, sum);
    }
  }
}

// The weighted sum of n rows that are `stride` numbers apart.
void sum_rows(const float* rows, std::int64_t stride, const float* weights, std::int64_t n, std::int64_t count,
              float* out) {
  std::int64_t i = 0;
  for (; i + 4 * kFour <= count; i += 4 * kFour) {
    Four sums[4] = {};
    for (std::int64_t k = 0; k < n; ++k)
      for (int j = 0; j < 4; ++j) sums[j] += weights[k] * load_four(rows + k * stride + i + j * kFour);
    for (int j = 0; j < 4; ++j) store_four(out + i + j * kFour, sums[j]);
  }
  for (; i < count; ++i) {
    float sum = 0.0f;
    for (std::int64_t k = 0; k < n; ++k) sum += weights[k] * rows[k * stride + i];
    out[i] = sum;
  }
}

using ReadRow = void (*)(const char*, std::int64_t, const float*, float*);
using WriteRow = void (*)(const float*, std::int64_t, char*);

ReadRow reader_of(DType dtype) {
  if (dtype == DType::kUint8) return read_row<std::uint8_t>;
  return dtype == DType::kUint16 ? read_row<std::uint16_t> : read_row<float>;
}

WriteRow writer_of(DType dtype) {
  if (dtype == DType::kUint8) return write_row<std::uint8_t>;
  return dtype == DType::kUint16 ? write_row<std::uint16_t> : write_row<float>;
}

}  // namespace

void resize(const Array& image, bool mirrored, const float* nodata, const Array& resized) {
  const std::int64_t height = image.shape[0], width = image.shape[1], C = image.shape[2];
  const std::int64_t rows = resized.shape[0], columns = resized.shape[1], count = columns * C;
  const Taps across(width, columns, mirrored), down(height, rows, false);
  const ReadRow read = reader_of(image.dtype);
  const WriteRow write = writer_of(resized.dtype);
  std::vector<float> row(static_cast<std::size_t>(width * C + kFour)), sum(static_cast<std::size_t>(count));
  std::vector<float> narrowed(static_cast<std::size_t>(height * count + kFour));
  for (std::int64_t y = 0; y < height; ++y) {
    read(image.at(y), width * C, nodata, row.data());
    resize_row(row.data(), C, across, narrowed.data() + y * count);
  }
  for (std::int64_t y = 0; y < rows; ++y) {
    sum_rows(narrowed.data() + down.first[y] * count, count, &down.weights[y * down.most], down.count[y], count,
             sum.data());
    write(sum.data(), count, resized.at(y));
  }
}

}  // namespace fastmae
