"""The discriminator of an adversarial term (--adversarial), and the losses of both sides.

It tells, region by region, whether an image is real or has patches that a masked autoencoder predicted (Goodfellow et
al. 2014; a patch discriminator as in Isola et al. 2017 and Esser et al. 2021). Here are functions of tensors and the
network; how it is trained beside a model is in train/adversary.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from fastmae.ops.masked_mse import patch_statistics

WIDTH = 32
"""The channels after the first strided convolution; the second and the third double them. With twice as many the
discriminator took longer than the step of a ViT-S that it judged."""
SLOPE = 0.2
"""Of LeakyReLU below zero."""
LARGEST_WEIGHT, EPS = 1e4, 1e-4
"""Of the adaptive weight (Esser et al. 2021, equation 7): its upper end, and what is added to its divisor."""

Regulariser = Literal["r1", "spectral", "none"]


class Discriminator(nn.Module):
    """Gives logits for the regions of images: positive where they look real, negative where they look predicted.

    Three convolutions of 4×4 with stride 2, each with LeakyReLU, and one of 3×3 with one output. There is no BatchNorm,
    so an image is judged without the others of its batch, and ranks compute what one would. A side of one pixel, as of
    time series, is left as it is.

    Args:
        size: the smallest (height, width) in pixels of the images; larger ones may be given as well.
        in_chans: channels C of an image.
        spectral: divide the weight of each convolution by its largest singular value (Miyato et al. 2018), of which
            each forward pass in training mode makes one step of the power iteration.
    """

    def __init__(self, size: tuple[int, int], in_chans: int, spectral: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (in_chans, WIDTH, 2 * WIDTH, 4 * WIDTH)
        for inputs, outputs in pairwise(widths):
            kernel, stride, padding = (tuple(numbers) for numbers in zip(*map(_halving, size), strict=True))
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.LeakyReLU(SLOPE)]
            size = max(1, size[0] // 2), max(1, size[1] // 2)
        layers.append(nn.Conv2d(widths[-1], 1, 3, padding=1))
        for layer in layers[::2]:
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_normal_(layer.weight, a=SLOPE)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            if spectral:
                parametrizations.spectral_norm(layer)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Judges images, float [N, C, H, W], normalised: logits [N, 1, h, w]; h and w are an eighth of H and W."""
        return self.layers(images)

    def judge(self, *batches: torch.Tensor) -> list[torch.Tensor]:
        """Calls ``forward`` for each batch, with the same weights: the power iteration goes one step for all of them.
        The logits are float32, or float64."""
        with parametrize.cached():
            logits = [self(images) for images in batches]
        return [one if one.dtype == torch.float64 else one.float() for one in logits]


def _halving(side: int) -> tuple[int, int, int]:
    """Returns (kernel, stride, padding) that halve a side; one pixel stays."""
    return (4, 2, 1) if side > 1 else (1, 1, 0)


def pasted(
    images: torch.Tensor,
    pred: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    norm_pix: bool,
    are_targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts predicted patches into images, as ``reconstruct`` draws them. Differentiable in ``pred``.

    Args:
        images: float [N, C, H, W], normalised.
        pred: floating [N, M, P], the predictions of the patches ``ids`` [N, M], P in (row, column, channel) order.
        ids: the patches, counted row by row.
        patch_size: (ph, pw) in pixels.
        norm_pix: predictions have neither mean nor contrast, and get those of the patch that they predict.
        are_targets: bool [N, M]; other patches, which have missing pixels and are never learnt, stay. None means all.

    Returns:
        Images [N, C, H, W] of the dtype of ``images``.
    """
    (N, C, H, W), (ph, pw) = images.shape, patch_size
    gh, gw = H // ph, W // pw
    patches = images.reshape(N, C, gh, ph, gw, pw).permute(0, 2, 4, 3, 5, 1).reshape(N, gh * gw, ph * pw * C)
    places = ids.long()[:, :, None].expand(-1, -1, patches.shape[2])
    target, new = patches.gather(1, places), pred.to(images.dtype)
    if norm_pix:
        average, deviation = patch_statistics(target)
        new = new * deviation + average
    if are_targets is not None:
        new = torch.where(are_targets[:, :, None], new, target)
    patches = patches.scatter(1, places, new)
    return patches.reshape(N, gh, gw, ph, pw, C).permute(0, 5, 1, 3, 2, 4).reshape(N, C, H, W)


def hinge_loss(of_real: torch.Tensor, of_fake: torch.Tensor) -> torch.Tensor:
    """Computes the discriminator's loss from logits of real and of reconstructed images: a scalar.

    The mean of max(0, 1 − real) plus the mean of max(0, 1 + fake), halved (Lim and Ye 2017; Esser et al. 2021). It is 1
    if nothing is told apart, and 0 if all is.
    """
    return (functional.relu(1 - of_real).mean() + functional.relu(1 + of_fake).mean()) / 2


def gradient_penalty(of_real: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Computes R1 (Mescheder et al. 2018, equation 9) without its factor: a scalar that can be differentiated.

    The squared norm of the gradient of the logits of an image by its pixels, as a mean over images, and over the logits
    of an image so that it does not grow with the size.
    """
    (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
    return gradient.square().sum() / of_real.numel()


def adaptive_weight(of_loss: torch.Tensor, of_adversarial: torch.Tensor) -> torch.Tensor:
    """Computes λ = ‖∇ loss‖ / (‖∇ adversarial‖ + 1e-4), at most 1e4 (Esser et al. 2021, equation 7): a scalar.

    Args:
        of_loss, of_adversarial: the gradients of the weight of the last layer, of the reconstruction loss and of the
            adversarial one, over all ranks. So weighted, the second is never longer than the first.
    """
    return (of_loss.norm() / (of_adversarial.norm() + EPS)).clamp(0, LARGEST_WEIGHT)
