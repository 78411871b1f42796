// The ops on checked arguments, one file per op. fastmae/ops has their definitions. Outputs are contiguous, every
// element is written once, and the number of threads does not change the bits.
#pragma once

#include "array.h"
#include "patches.h"

namespace fastmae {

// draw_ids int64 [N] → ids_shuffle int32 [N, L].
void bernoulli_masking(const Array& draw_ids, std::uint64_t seed, std::uint64_t below, int threads,
                       const Array& masked);
void random_masking(const Array& draw_ids, std::uint64_t seed, int threads, const Array& ids_shuffle);

// images [N, H, W, C] → patches [N, K, P].
void gather_patches(const Array& images, const Ids& ids, const Grid& grid, const PixelScale& by, int threads,
                    const Array& patches);

// image uint8, uint16 or float32 [h, w, C], whose rows have no gaps → resized [h', w', C] of its type or float32. Pixels
// of the value *nodata become NaN, as does all that their filters touch, if nodata is not null.
void resize(const Array& image, bool mirrored, const float* nodata, const Array& resized);

// data uint8 [B, n], the first bytes of n numbers, then their second ones … → out uint8 [n, B].
void unshuffle(const Array& data, const Array& out);

// visible [N, K+1, D], mask_token [D], pos_embed [L+1, D] → tokens [N, L+1, D].
void assemble_tokens(const Array& visible, const Array& mask_token, const Array& pos_embed, const Ids& ids_shuffle,
                     int threads, const Array& tokens);

// grad [N, L+1, D] → grad_visible [N, K+1, D], grad_mask_token float32 [D].
void assemble_tokens_backward(const Array& grad, int threads, const Array& grad_visible, const Array& grad_mask_token);

// pred [N, M, P], images [N, H, W, C] → loss and number of targets, float32 [].
void masked_mse(const Array& pred, const Array& images, const Ids& ids, const Grid& grid, const PixelScale& by,
                bool norm_pix, double eps, int threads, const Array& loss, const Array& targets);

// grad_loss and targets float32 [], and the inputs of masked_mse → gradient [N, M, P] of pred.
void masked_mse_backward(const Array& grad_loss, const Array& targets, const Array& pred, const Array& images,
                         const Ids& ids, const Grid& grid, const PixelScale& by, bool norm_pix, double eps,
                         int threads, const Array& gradient);

// patches [N, M, P], ids [N, M] distinct in a row → images [N, gh·ph, gw·pw, C].
void scatter_patches(const Array& patches, const Ids& ids, const Grid& grid, const PixelScale& by, int threads,
                     const Array& images);

// matrix float32 [R, C] → transposed float32 [C, R], sums of the columns float32 [C].
void transpose_and_sum(const Array& matrix, int threads, const Array& transposed, const Array& sums);

// h [..., F], bias [F] or null → out [..., F] of h's type.
void gelu(const Array& h, const Array* bias, int threads, const Array& out);

// grad, h [..., F], bias [F] or null → grad_h [..., F]; with a bias, grad_bias float32 [F]; out [..., F], that of gelu once
// more, or null.
void gelu_backward(const Array& grad, const Array& h, const Array* bias, int threads, const Array& grad_h,
                   const Array* grad_bias, const Array* out);

// x, branch [..., D], branch_bias [D] or null, weight and bias [D] → stream [..., D] of x's type, normed [..., D], mean
// and rstd float32 [...].
void add_layer_norm(const Array& x, const Array& branch, const Array* branch_bias, const Array& weight,
                    const Array& bias, double eps, int threads, const Array& stream, const Array& normed, const Array& mean, const Array& rstd);

// grad_stream or null, grad_normed, stream [..., D], weight [D], mean and rstd [...] → grad_x [..., D] of the stream's
// type, the same as grad_branch in another type or null, grad_affine float32 [2 or 3, D]: of weight, of bias, and with
// three rows of the branch's bias.
void add_layer_norm_backward(const Array* grad_stream, const Array& grad_normed, const Array& stream,
                             const Array& weight, const Array& mean, const Array& rstd, int threads,
                             const Array& grad_x, const Array* grad_branch, const Array& grad_affine);

// x, other [N, P, D] → sums float32 [2, N, D] over the P rows: of x · other, and of other; or with null for other [1, N, D]
// of x².
void sums_of_products(const Array& x, const Array* other, int threads, const Array& sums);

// x, other [N, P, D], scale float32 [N, D], added float32 [N or 1, D] → out [N, P, D] of x's type, x · scale + other · added;
// or with null for other x · scale + added.
void scale_and_add(const Array& x, const Array& scale, const Array* other, const Array& added, int threads,
                   const Array& out);

// x [N, K, s·s, C], weight [C, 49], bias [C] or null → out [N, K, s·s, C] of x's type; turned: with the weights in reverse
// order, which takes the gradient of out to that of x. C is at least the lanes of a vector. Its bits depend on whether
// the instruction set has fused multiply-adds.
void depthwise_visible(const Array& x, const Slots& slots, const Array& weight, const Array* bias, bool turned,
                       int threads, const Array& out);

// x, and grad, that of out → sums float32 [50, C], the gradients of the 49 weights and of the bias.
void depthwise_visible_weights(const Array& x, const Array& grad, const Slots& slots, int threads, const Array& sums);

// packed [N, S, 3·H, D], or queries [N, T, H, D] and packed [N, S, 2·H, D] → out [N, T, H, D], lse float32 [N, H, T]. All
// others are float32, or all are bfloat16; bfloat16 may be multiplied in several ways. The one op whose bits depend on
// the instruction set.
void attention(const Array& packed, const Array* queries, Multiply by, int threads, const Array& out, const Array& lse);

// grad [N, T, H, D], and the inputs and outputs of attention → the gradients of packed and of queries.
void attention_backward(const Array& grad, const Array& packed, const Array* queries, const Array& lse, Multiply by,
                        int threads, const Array& grad_packed, const Array* grad_queries);

}  // namespace fastmae
