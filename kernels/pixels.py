"""Parts of the kernels that read or write images: offsets of a patch's pixels, normalising and denormalising."""

import torch
import triton
import triton.language as tl


@triton.jit
def patch_offsets(b_id, p, GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
                  stride_h, stride_w, stride_c, PACKED: tl.constexpr):  # fmt: skip
    """Returns the offsets int64 [BM, BP] in an image of the numbers ``p`` [BP] of patches ``b_id`` [BM].

    Numbers are in (row, column, channel) order. PACKED says that the pixels of a row lie one after another
    (stride_w = C, stride_c = 1); the compiler then sees runs of PW·C neighbouring elements and loads them at once.
    """
    ROW: tl.constexpr = PW * C
    o_patch = (b_id // GW).to(tl.int64) * PH * stride_h  # [BM]
    o_row = (p // ROW).to(tl.int64) * stride_h  # [BP]
    if PACKED:
        o_patch += (b_id % GW) * ROW
        o_pixel = o_row + p % ROW
    else:
        o_patch += (b_id % GW).to(tl.int64) * PW * stride_w
        o_pixel = o_row + (p % ROW // C).to(tl.int64) * stride_w + (p % C).to(tl.int64) * stride_c
    return o_patch[:, None] + o_pixel[None, :]


@triton.jit
def normalise(b_x, p, p_mean, p_std, C: tl.constexpr, UINT8: tl.constexpr):
    """Computes (x − mean) / std in float32 for pixels [BM, BP]; uint8 is divided by 255 first."""
    b_mean = tl.load(p_mean + p % C).to(tl.float32)  # [BP]
    b_std = tl.load(p_std + p % C).to(tl.float32)  # [BP]
    b_x = b_x.to(tl.float32)
    if UINT8:
        b_x = b_x * (1.0 / 255.0)
    return (b_x - b_mean[None, :]) / b_std[None, :]


@triton.jit
def denormalise(b_x, p, p_mean, p_std, C: tl.constexpr, UINT8: tl.constexpr):
    """Computes x · std + mean in float32; for uint8 times 255, clamped (NaN to 0), rounded half to even."""
    b_mean = tl.load(p_mean + p % C).to(tl.float32)  # [BP]
    b_std = tl.load(p_std + p % C).to(tl.float32)  # [BP]
    b_x = b_x.to(tl.float32) * b_std[None, :] + b_mean[None, :]
    if UINT8:
        b_x = tl.minimum(tl.maximum(b_x * 255.0, 0.0), 255.0)
        b_x = (b_x + 12582912.0) - 12582912.0  # 1.5 · 2^23: its neighbours are whole numbers
    return b_x


def image_arguments(images: torch.Tensor, patch_size: tuple[int, int]) -> tuple[dict[str, int], dict[str, object]]:
    """Returns the (strides, constants) of ``patch_offsets`` for images [N, H, W, C]."""
    C = images.shape[3]
    stride_n, stride_h, stride_w, stride_c = images.stride()
    strides = {"stride_n": stride_n, "stride_h": stride_h, "stride_w": stride_w, "stride_c": stride_c}
    constants = {
        "GW": images.shape[2] // patch_size[1],
        "PH": patch_size[0],
        "PW": patch_size[1],
        "C": C,
        "PACKED": stride_w == C and stride_c == 1,
        "UINT8": images.dtype == torch.uint8,
    }
    return strides, constants
