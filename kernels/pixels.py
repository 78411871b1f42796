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
def normalise(b_x, p, p_mean, p_std, p_range, C: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr):
    """Computes ((x − low) / (high − low) − mean) / std in float32 for pixels [BM, BP]; without a range x / UNIT."""
    b_mean = tl.load(p_mean + p % C).to(tl.float32)  # [BP]
    b_std = tl.load(p_std + p % C).to(tl.float32)  # [BP]
    b_x = b_x.to(tl.float32)
    if HAS_RANGE:
        b_low = tl.load(p_range + p % C).to(tl.float32)  # [BP]
        b_high = tl.load(p_range + C + p % C).to(tl.float32)  # [BP]
        b_x = (b_x - b_low[None, :]) * (1.0 / (b_high - b_low))[None, :]
    elif UNIT != 1:
        b_x = b_x * (1.0 / UNIT)
    return (b_x - b_mean[None, :]) / b_std[None, :]


@triton.jit
def is_missing(b_x, nodata):
    """Tells which pixels are NaN or ``nodata``, which is compared in float32."""
    b_x = b_x.to(tl.float32)
    return (b_x == nodata) | (b_x != b_x)


@triton.jit
def denormalise(b_x, p, p_mean, p_std, p_range, C: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr):
    """Computes the inverse; for whole numbers, which go to UNIT, it is clamped (NaN to 0) and rounded half to even."""
    b_mean = tl.load(p_mean + p % C).to(tl.float32)  # [BP]
    b_std = tl.load(p_std + p % C).to(tl.float32)  # [BP]
    b_x = b_x.to(tl.float32) * b_std[None, :] + b_mean[None, :]
    if HAS_RANGE:
        b_low = tl.load(p_range + p % C).to(tl.float32)  # [BP]
        b_high = tl.load(p_range + C + p % C).to(tl.float32)  # [BP]
        b_x = b_x * (b_high - b_low)[None, :] + b_low[None, :]
    elif UNIT != 1:
        b_x = b_x * UNIT
    if UNIT != 1:
        b_x = tl.minimum(tl.maximum(b_x, 0.0), UNIT)
        b_x = (b_x + 12582912.0) - 12582912.0  # 1.5 · 2^23: its neighbours are whole numbers
    return b_x


def image_arguments(
    images: torch.Tensor, patch_size: tuple[int, int], value_range: torch.Tensor | None, mean: torch.Tensor
) -> tuple[dict[str, object], dict[str, object]]:
    """Returns the (arguments, constants) for images [N, H, W, C]; ``mean`` stands for a range that is not there."""
    C = images.shape[3]
    stride_n, stride_h, stride_w, stride_c = images.stride()
    arguments = {"stride_n": stride_n, "stride_h": stride_h, "stride_w": stride_w, "stride_c": stride_c}
    constants = {
        "GW": images.shape[2] // patch_size[1],
        "PH": patch_size[0],
        "PW": patch_size[1],
        "C": C,
        "PACKED": stride_w == C and stride_c == 1,
        "UNIT": {torch.uint8: 255, torch.uint16: 65535}.get(images.dtype, 1),
        "HAS_RANGE": value_range is not None,
    }
    return {"p_range": mean if value_range is None else value_range.contiguous(), **arguments}, constants
