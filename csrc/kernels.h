// The inner loops of the ops as a table of functions, so that the instruction set is chosen when the program runs.
// Everything a loop is told is a plain number or pointer; checks, strides of tensors and threads are not its business.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmae {

enum class DType { kUint8, kFloat16, kBfloat16, kFloat32, kInt32, kInt64 };

// Normalises pixel x of column i as ((x - offset[i]) - offset_rest[i]) * scale[i].
struct Normalisation {
  const float* offset;
  const float* offset_rest;
  const float* scale;
};

// One patch as rows of pixels; `stride` is the distance of two rows in bytes. `columns` counts every channel.
template <class Byte>
struct PixelRows {
  Byte* data;
  std::ptrdiff_t stride;
  std::int64_t rows, columns;
};

// Room for whole vectors of every instruction set: the target buffer of patch_error is padded to a multiple of this.
constexpr std::int64_t kLaneBlock = 32;

// All float arithmetic is separate float32 additions and multiplications in a fixed order: an instruction set changes
// the speed of a result, not its bits.
struct Kernels {
  const char* name;

  // Counter-based keys of one row: keys[i] = philox word i << 32 | i, for i < 4 * blocks; `keys` has room for
  // 4 * blocks, rounded up to a multiple of kLaneBlock.
  void (*random_keys)(std::uint64_t seed, std::uint64_t id, std::int64_t blocks, std::uint64_t* keys);

  // rows × columns pixels → as many numbers without gaps.
  void (*normalise)(PixelRows<const char> pixels, DType pixels_dtype, Normalisation by, void* out, DType out_dtype);

  // The opposite way, x * scale[i] + offset[i] (and * 255, rounded, for uint8); offset_rest is not looked at.
  void (*denormalise)(const void* patch, DType patch_dtype, Normalisation by, PixelRows<char> pixels,
                      DType pixels_dtype);

  // The squared error of a patch, summed. The target is overwritten. gradient = (pred - target) * gradient_scale.
  double (*patch_error)(float* target, std::int64_t count, bool norm_pix, double eps, const void* pred, DType dtype,
                        float gradient_scale, void* gradient);

  // out = one + other.
  void (*add)(const void* one, DType one_dtype, const float* other, std::int64_t count, void* out, DType out_dtype);

  // sum += row.
  void (*accumulate)(const void* row, DType row_dtype, std::int64_t count, float* sum);

  // out = in, rounded to nearest even.
  void (*convert)(const void* in, DType in_dtype, std::int64_t count, void* out, DType out_dtype);
};

// Queries [T, D], keys and values [S, D] of one head of one image, or their gradients. Rows are so many numbers apart,
// the numbers of a row none.
template <class Number>
struct AttentionHead {
  Number *q, *k, *v;
  std::int64_t q_row, k_row, v_row;
};

// D is a multiple of 16; scores are multiplied by the scale.
struct AttentionShape {
  std::int64_t T, S, D;
  float scale;
};

// Attention of one head, in fused multiply-adds where the instruction set has them: here it does change the bits.
struct AttentionKernels {
  // Numbers that the others want for their own use, from an address that a vector of any instruction set may have.
  std::int64_t (*room)(AttentionShape shape, bool backward);

  // out [T, D], and the logarithms of the sums of the exponentials of its scores, lse [T].
  void (*forward)(AttentionHead<const float> head, AttentionShape shape, float* out, std::int64_t out_row, float* lse,
                  float* room);

  // grad [T, D] of out, and lse as forward has left it.
  void (*backward)(AttentionHead<const float> head, AttentionShape shape, const float* grad, std::int64_t grad_row,
                   const float* lse, AttentionHead<float> gradients, float* room);
};

}  // namespace fastmae
