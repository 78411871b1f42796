// Residual addition and LayerNorm for the CPU, and the gradients of both, in one pass each. Equivalent to
// fastmae/ops/add_layer_norm.py, which has the definition.
#include "ops.h"
#include "rows.h"

namespace fastmae {
namespace {

// Memory of a thread for one row, and another one, in float32.
std::vector<float> room_for(std::int64_t width, int rows) {
  const std::int64_t padded = (width + kLaneBlock - 1) / kLaneBlock * kLaneBlock;
  return std::vector<float>(static_cast<std::size_t>(rows * padded));
}

}  // namespace

void add_layer_norm(const Array& x, const Array& branch, const Array* branch_bias, const Array& weight,
                    const Array& bias, double eps, int threads, const Array& stream, const Array& normed, const Array& mean, const Array& rstd) {
  const std::int64_t D = width_of(x), rows = rows_of(x);
  const std::vector<float> weights = floats_of(weight), biases = floats_of(bias);
  const std::vector<float> branch_biases = branch_bias ? floats_of(*branch_bias) : std::vector<float>();
  const float* added = branch_bias ? branch_biases.data() : nullptr;
  const Affine affine = {weights.data(), biases.data()};
  float* means = reinterpret_cast<float*>(mean.data);
  float* rstds = reinterpret_cast<float*>(rstd.data);
  const Kernels& loops = kernels();
  const std::int64_t bytes = D * (2 * size_of(x.dtype) + size_of(branch.dtype) + size_of(normed.dtype));
  parallel_for_beside_torch(rows, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed_x(x, x.ndim - 1), packed_branch(branch, branch.ndim - 1);
    std::vector<float> room = room_for(D, 1);
    for (std::int64_t i = first; i < last; ++i) {
      const RowStatistics found = loops.add_layer_norm(
          packed_x.of(row_of(x, i)), x.dtype, packed_branch.of(row_of(branch, i)), branch.dtype, added, affine, eps, D,
          row_of(stream, i), row_of(normed, i), normed.dtype, room.data());
      means[i] = found.mean;
      rstds[i] = found.rstd;
    }
  });
}

void add_layer_norm_backward(const Array* grad_stream, const Array& grad_normed, const Array& stream,
                             const Array& weight, const Array& mean, const Array& rstd, int threads,
                             const Array& grad_x, const Array* grad_branch, const Array& grad_affine) {
  const std::int64_t D = width_of(stream), rows = rows_of(stream);
  const std::vector<float> weights = floats_of(weight);
  const float* means = reinterpret_cast<const float*>(mean.data);
  const float* rstds = reinterpret_cast<const float*>(rstd.data);
  const std::int64_t of_a_row = grad_affine.shape[0];
  GroupSums sums(rows, of_a_row * D);
  const Kernels& loops = kernels();
  const std::int64_t bytes = kRowsOfAGroup * D * (3 * size_of(stream.dtype) + size_of(grad_normed.dtype));
  parallel_for_beside_torch(sums.groups, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    PackedRow packed_past(grad_stream ? *grad_stream : stream, stream.ndim - 1);
    PackedRow packed_grad(grad_normed, grad_normed.ndim - 1), packed_stream(stream, stream.ndim - 1);
    std::vector<float> room = room_for(D, 2);
    for (std::int64_t i = first * kRowsOfAGroup; i < std::min(last * kRowsOfAGroup, rows); ++i) {
      float* of_weight = sums.of_row(i);
      loops.add_layer_norm_backward(grad_stream ? packed_past.of(row_of(*grad_stream, i)) : nullptr,
                                    packed_grad.of(row_of(grad_normed, i)), grad_normed.dtype,
                                    packed_stream.of(row_of(stream, i)), stream.dtype, weights.data(),
                                    {means[i], rstds[i]}, D, row_of(grad_x, i), of_weight, of_weight + D, room.data());
      if (of_a_row == 3) loops.accumulate(room.data(), DType::kFloat32, D, of_weight + 2 * D);
      if (grad_branch)
        loops.convert(room.data(), DType::kFloat32, D, row_of(*grad_branch, i), grad_branch->dtype);
    }
  });
  sums.total(parallel_for_beside_torch, threads, reinterpret_cast<float*>(grad_affine.data));
}

}  // namespace fastmae
