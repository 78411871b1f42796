// assemble_tokens for the CPU: visible tokens and mask tokens with their positions, and the gradient of both.
// Equivalent to fastmae/ops/assemble_tokens.py, which has the definition.
#include "ops.h"
#include "rows.h"

namespace fastmae {
namespace {

// Rows [rows, D] as float32 without gaps: in their own memory if they have this form, otherwise copied.
class FloatRows {
 public:
  FloatRows(const Array& array, int threads) : D_(array.shape[array.ndim - 1]) {
    const std::int64_t rows = array.ndim == 2 ? array.shape[0] : 1, size = sizeof(float);
    const bool contiguous = D_ <= 1 || array.strides[array.ndim - 1] == size;
    if (array.dtype == DType::kFloat32 && contiguous) {
      data_ = array.data;
      stride_ = array.ndim == 2 ? array.strides[0] : 0;
      return;
    }
    copy_.resize(static_cast<std::size_t>(rows * D_));
    data_ = reinterpret_cast<const char*>(copy_.data());
    stride_ = D_ * size;
    const Kernels& loops = kernels();
    parallel_for(rows, stride_, threads, [&](std::int64_t first, std::int64_t last) {
      PackedRow packed(array, array.ndim - 1);
      for (std::int64_t i = first; i < last; ++i)
        loops.convert(packed.of(array.at(i)), array.dtype, D_, copy_.data() + i * D_, DType::kFloat32);
    });
  }

  const float* row(std::int64_t i) const { return reinterpret_cast<const float*>(data_ + i * stride_); }

 private:
  std::int64_t D_, stride_;
  const char* data_;
  std::vector<float> copy_;
};

}  // namespace

void assemble_tokens(const Array& visible, const Array& mask_token, const Array& pos_embed, const Ids& ids_shuffle,
                     int threads, const Array& tokens) {
  const std::int64_t D = visible.shape[2], visible_tokens = visible.shape[1], all_tokens = tokens.shape[1];
  const FloatRows mask(mask_token, 1), positions(pos_embed, threads);
  const Kernels& loops = kernels();
  const std::int64_t bytes = D * (size_of(visible.dtype) + size_of(tokens.dtype));
  parallel_for(tokens.shape[0] * all_tokens, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed(visible, 2);
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / all_tokens, token = i % all_tokens;
      const float* position = positions.row(token == 0 ? 0 : 1 + ids_shuffle.row(n)[token - 1]);
      if (token < visible_tokens)
        loops.add(packed.of(visible.at(n, token)), visible.dtype, position, D, tokens.at(n, token), tokens.dtype);
      else
        loops.add(mask.row(0), DType::kFloat32, position, D, tokens.at(n, token), tokens.dtype);
    }
  });
}

void assemble_tokens_backward(const Array& grad, int threads, const Array& grad_visible, const Array& grad_mask_token) {
  const std::int64_t N = grad.shape[0], D = grad.shape[2], visible_tokens = grad_visible.shape[1];
  const Kernels& loops = kernels();
  const std::int64_t bytes = D * (size_of(grad.dtype) + size_of(grad_visible.dtype));
  parallel_for(N * visible_tokens, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed(grad, 2);
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / visible_tokens, token = i % visible_tokens;
      loops.convert(packed.of(grad.at(n, token)), grad.dtype, D, grad_visible.at(n, token), grad_visible.dtype);
    }
  });

  const std::int64_t masked = grad.shape[1] - visible_tokens, rows = N * masked;
  GroupSums sums(rows, D);
  parallel_for(sums.groups, kRowsOfAGroup * D * size_of(grad.dtype), threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed(grad, 2);
    for (std::int64_t i = first * kRowsOfAGroup; i < std::min(last * kRowsOfAGroup, rows); ++i) {
      const char* row = grad.at(i / masked, visible_tokens + i % masked);
      loops.accumulate(packed.of(row), grad.dtype, D, sums.of_row(i));
    }
  });
  sums.total(parallel_for, threads, reinterpret_cast<float*>(grad_mask_token.data));
}

}  // namespace fastmae
