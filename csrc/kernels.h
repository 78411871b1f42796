// The inner loops of the ops as a table of functions, so that the instruction set is chosen when the program runs.
// A loop takes plain numbers and pointers only; it knows nothing of checks, strides of tensors or threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmae {

enum class DType { kUint8, kUint16, kFloat16, kBfloat16, kFloat32, kInt32, kInt64 };

// Normalises pixel x of column i as ((x - offset[i]) - offset_rest[i]) * scale[i]. The inverse, with other constants, is
// (x * scale[i] + offset[i]) * unit.
struct Normalisation {
  const float* offset;
  const float* offset_rest;
  const float* scale;
  float unit;
};

// One patch as rows of pixels; `stride` is the distance of two rows in bytes. `columns` counts every channel.
template <class Byte>
struct PixelRows {
  Byte* data;
  std::ptrdiff_t stride;
  std::int64_t rows, columns;
};

// The mean of a row, and one over its standard deviation.
struct RowStatistics {
  float mean, rstd;
};

// What LayerNorm multiplies by and adds, a number a column.
struct Affine {
  const float* weight;
  const float* bias;
};

// The visible cells of an image, of s×s positions of C channels each, and the places of the cells around each of them:
// [K, side, side] with itself in the middle, −1 for masked ones and those outside. The side is what weights reach.
struct DepthwiseCells {
  const std::int32_t* around;
  std::int64_t K, s, C;
};

constexpr std::int64_t kDepthwiseTaps = 49;  // weights of a channel, 7×7
constexpr std::int64_t kLeastChannels = 16;  // a vector of any instruction set

// Whole vectors of every instruction set fit into it: the target of patch_error is padded to a multiple of it.
constexpr std::int64_t kLaneBlock = 32;

// All float arithmetic is separate float32 additions and multiplications in a fixed order: an instruction set changes
// the speed of a result, not its bits. Only GELU and the convolution are fused multiply-adds, where the processor has them.
struct Kernels {
  const char* name;
  std::int64_t lanes;  // float32 numbers of a vector

  // Counter-based keys of one row: keys[i] = philox word i << 32 | i, for i < 4 * blocks; `keys` has room for
  // 4 * blocks, rounded up to a multiple of kLaneBlock. The stream says what the words are for.
  void (*random_keys)(std::uint64_t seed, std::uint64_t stream, std::uint64_t id, std::int64_t blocks,
                      std::uint64_t* keys);

  // Turns rows × columns pixels into as many numbers without gaps. Pixels that are NaN or *nodata are missing and become
  // 0, unless nodata is null. Returns whether there was one.
  bool (*normalise)(PixelRows<const char> pixels, DType pixels_dtype, Normalisation by, const float* nodata, void* out,
                    DType out_dtype);

  // The inverse; whole numbers are clamped and rounded.
  void (*denormalise)(const void* patch, DType patch_dtype, Normalisation by, PixelRows<char> pixels,
                      DType pixels_dtype);

  // Returns the sum of the squared errors pred - target of a patch. The target is padded, see kLaneBlock.
  double (*patch_error)(float* target, std::int64_t count, bool norm_pix, double eps, const void* pred, DType dtype);

  // gradient = (pred - target) * slope, with the errors of patch_error.
  void (*patch_gradient)(float* target, std::int64_t count, bool norm_pix, double eps, const void* pred, DType dtype,
                         float slope, void* gradient);

  // out = one + other.
  void (*add)(const void* one, DType one_dtype, const float* other, std::int64_t count, void* out, DType out_dtype);

  // sum += row.
  void (*accumulate)(const void* row, DType row_dtype, std::int64_t count, float* sum);

  // out = GELU(in + bias), of in's type; bias may be null.
  void (*gelu)(const void* in, DType dtype, const float* bias, std::int64_t count, void* out);

  // out = the gradient of in, from grad, that of GELU(in + bias); all have the same type. Before it is rounded it is
  // added to bias_sum. again = GELU(in + bias). bias, bias_sum and again may be null.
  void (*gelu_backward)(const void* grad, const void* in, DType dtype, const float* bias, std::int64_t count, void* out,
                        float* bias_sum, void* again);

  // stream = x + (branch + branch_bias, which may be null), of x's type, and normed = (stream - mean) * rstd * weight + bias. Returns the mean and
  // rstd = 1 / sqrt(variance + eps) of the rounded stream. `room` has room for count numbers, rounded up to a multiple
  // of kLaneBlock.
  RowStatistics (*add_layer_norm)(const void* x, DType x_dtype, const void* branch, DType branch_dtype,
                                  const float* branch_bias, Affine affine, double eps, std::int64_t count,
                                  void* stream, void* normed, DType normed_dtype, float* room);

  // grad_x = grad_stream, which may be null, plus the gradient that comes through the norm; it has the stream's type.
  // Adds the gradients of weight and bias to the sums, and leaves grad_x in `room`, before it is rounded. `room` has
  // twice as much room as above.
  void (*add_layer_norm_backward)(const void* grad_stream, const void* grad_normed, DType normed_dtype,
                                  const void* stream, DType stream_dtype, const float* weight,
                                  RowStatistics statistics, std::int64_t count, void* grad_x, float* weight_sum,
                                  float* bias_sum, float* room);

  // products += x · other, sums += other; with null for other, products += x².
  void (*add_products)(const void* x, const void* other, DType dtype, std::int64_t count, float* products, float* sums);

  // out = x · scale + other · added; with null for other, x · scale + added.
  void (*scale_and_add)(const void* x, const void* other, DType dtype, const float* scale, const float* added,
                        std::int64_t count, void* out);

  // How many channels a call of depthwise takes, of C ≥ lanes.
  std::int64_t (*depthwise_width)(std::int64_t s, std::int64_t C);

  // Convolves so many channels from x on, which points to the first channel of the first cell, as out does. weights are
  // [kDepthwiseTaps, depthwise_width]; bias may be null.
  void (*depthwise)(const DepthwiseCells& cells, DType dtype, const void* x, const float* weights, const float* bias,
                    void* out);

  // Adds the gradients of the weights of as many channels as a vector has, and of their bias, to sums
  // [kDepthwiseTaps + 1, lanes].
  void (*depthwise_weights)(const DepthwiseCells& cells, DType dtype, const void* x, const void* grad, float* sums);

  // out = in, rounded to nearest even.
  void (*convert)(const void* in, DType in_dtype, std::int64_t count, void* out, DType out_dtype);
};

// Queries [T, D], keys and values [S, D] of one head of one image, or their gradients. Rows lie so many numbers apart;
// the numbers of a row have no gaps. Their type is that of the loops that take it.
template <class Void>
struct AttentionHead {
  Void *q, *k, *v;
  std::int64_t q_row, k_row, v_row;
};

// D is a multiple of 16; scores are multiplied by the scale.
struct AttentionShape {
  std::int64_t T, S, D;
  float scale;
};

// Attention of one head of one type of numbers, with fused multiply-adds if the instruction set has them, so here it
// does change the bits.
struct AttentionKernels {
  // How many float32 numbers of memory the other two need, aligned for vectors of any instruction set.
  std::int64_t (*room)(AttentionShape shape, bool backward);

  // out [T, D], and the logarithms of the sums of the exponentials of its scores, lse [T], in a unit of its own.
  void (*forward)(AttentionHead<const void> head, AttentionShape shape, void* out, std::int64_t out_row, float* lse,
                  float* room);

  // grad [T, D] is the gradient of out; lse is the one that forward wrote.
  void (*backward)(AttentionHead<const void> head, AttentionShape shape, const void* grad, std::int64_t grad_row,
                   const float* lse, AttentionHead<void> gradients, float* room);
};

// What multiplies in attention of bfloat16: float32 arithmetic, the processor's dot products (AVX512-BF16), its tiles
// (AMX), or emulated tiles, with which those are tested on any processor.
enum class Multiply { kFloat32, kDots, kTiles, kEmulatedTiles };
constexpr const char* kMultiplyNames[] = {"float32", "dot", "amx", "amx-emulated"};

// Throws std::logic_error for emulated tiles that a processor would not take; see tiles.h.
[[noreturn]] void tile_fault(const char* what);

// What an instruction set has for each type of numbers.
struct AttentionLoops {
  AttentionKernels float32, bfloat16;
};

}  // namespace fastmae
