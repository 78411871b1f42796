// All checks of the arguments of an op, before a pointer is followed. A wrong one raises std::invalid_argument, which
// is ValueError in Python, with one line that names the argument, what it is and what it may be.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "array.h"
#include "patches.h"

namespace fastmae {

using Pair = std::array<std::int64_t, 2>;

[[noreturn]] void refuse(const std::string& message);

const char* name_of(DType dtype);

int check_threads(std::int64_t threads);

Multiply check_products(const std::string& name);

// One function per op, with the arguments of ops.h as they came. Ids and the grid are returned if the op needs them.
struct Checked {
  Ids ids;
  Grid grid;
};

void check_bernoulli_masking(const Array& draw_ids, const Array& masked);
void check_random_masking(const Array& draw_ids, const Array& ids_shuffle);
Checked check_gather_patches(const Array& images, const Array& ids, Pair patch_size, const PixelScale& by,
                             const Array& patches);
void check_resize(const Array& image, const Array& resized);
void check_unshuffle(const Array& data, const Array& out);
Ids check_assemble_tokens(const Array& visible, const Array& mask_token, const Array& pos_embed,
                          const Array& ids_shuffle, const Array& tokens);
void check_assemble_tokens_backward(const Array& grad, const Array& grad_visible, const Array& grad_mask_token);
Checked check_masked_mse(const Array& pred, const Array& images, const Array& ids, Pair patch_size,
                         const PixelScale& by, double eps, const Array& loss, const Array& targets);
Checked check_masked_mse_backward(const Array& grad_loss, const Array& targets, const Array& pred, const Array& images,
                                  const Array& ids, Pair patch_size, const PixelScale& by, double eps,
                                  const Array& gradient);
Checked check_scatter_patches(const Array& patches, const Array& ids, Pair grid_size, Pair patch_size,
                              const PixelScale& by, const Array& images);
void check_transpose_and_sum(const Array& matrix, const Array& transposed, const Array& sums);
void check_gelu(const Array& h, const Array* bias, const Array& out);
void check_gelu_backward(const Array& grad, const Array& h, const Array* bias, const Array& grad_h,
                         const Array* grad_bias, const Array* out);
void check_add_layer_norm(const Array& x, const Array& branch, const Array* branch_bias, const Array& weight,
                          const Array& bias, double eps, const Array& stream, const Array& normed, const Array& mean, const Array& rstd);
void check_add_layer_norm_backward(const Array* grad_stream, const Array& grad_normed, const Array& stream,
                                   const Array& weight, const Array& mean, const Array& rstd, const Array& grad_x,
                                   const Array* grad_branch, const Array& grad_affine);
void check_sums_of_products(const Array& x, const Array* other, const Array& sums);
void check_scale_and_add(const Array& x, const Array& scale, const Array* other, const Array& added, const Array& out);
Slots check_depthwise_visible(const Array& x, const Array& slots, const Array& weight, const Array* bias,
                              const Array& out);
Slots check_depthwise_visible_weights(const Array& x, const Array& grad, const Array& slots, const Array& sums);
void check_attention(const Array& packed, const Array* queries, Multiply by, const Array& out, const Array& lse);
void check_attention_backward(const Array& grad, const Array& packed, const Array* queries, const Array& lse,
                              Multiply by, const Array& grad_packed, const Array* grad_queries);

}  // namespace fastmae
