// Bias and exact GELU for the CPU, and the gradients of both, in one pass each. Equivalent to fastmae/ops/gelu.py, which
// has the definition.
#include "ops.h"
#include "rows.h"

namespace fastmae {

void gelu(const Array& h, const Array* bias, int threads, const Array& out) {
  const std::int64_t F = width_of(h), rows = rows_of(h);
  const std::vector<float> biases = bias ? floats_of(*bias) : std::vector<float>();
  const float* added = bias ? biases.data() : nullptr;
  const Kernels& loops = kernels();
  parallel_for_beside_torch(rows, 2 * F * size_of(h.dtype), threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed(h, h.ndim - 1);
    for (std::int64_t i = first; i < last; ++i)
      loops.gelu(packed.of(row_of(h, i)), h.dtype, added, F, row_of(out, i));
  });
}

void gelu_backward(const Array& grad, const Array& h, const Array* bias, int threads, const Array& grad_h,
                   const Array* grad_bias, const Array* out) {
  const std::int64_t F = width_of(h), rows = rows_of(h);
  const std::vector<float> biases = bias ? floats_of(*bias) : std::vector<float>();
  const float* added = bias ? biases.data() : nullptr;
  GroupSums sums(rows, bias ? F : 0);
  const Kernels& loops = kernels();
  const std::int64_t bytes = (out ? 4 : 3) * kRowsOfAGroup * F * size_of(h.dtype);
  parallel_for_beside_torch(sums.groups, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed_grad(grad, grad.ndim - 1), packed(h, h.ndim - 1);
    for (std::int64_t i = first * kRowsOfAGroup; i < std::min(last * kRowsOfAGroup, rows); ++i)
      loops.gelu_backward(packed_grad.of(row_of(grad, i)), packed.of(row_of(h, i)), h.dtype, added, F,
                          row_of(grad_h, i), bias ? sums.of_row(i) : nullptr, out ? row_of(*out, i) : nullptr);
  });
  if (grad_bias) sums.total(parallel_for_beside_torch, threads, reinterpret_cast<float*>(grad_bias->data));
}

}  // namespace fastmae
