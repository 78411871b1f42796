"""How far the features of images spread: two numbers that need no labels, from which a collapse is seen."""

from __future__ import annotations

import torch

from fastmae.data.sources import Source, Subset, evenly_spaced
from fastmae.evaluate.features import extract_features
from fastmae.model.family import MaskedModel

MOST_IMAGES = 2048
"""Of more images, this many evenly spaced ones are looked at, so that measuring every epoch stays cheap."""
EPSILON = 1e-7
"""What RankMe adds to each share."""


def some_of(source: Source) -> Source:
    """Returns the source, or ``MOST_IMAGES`` evenly spaced samples of it if it has more."""
    if len(source) <= MOST_IMAGES:
        return source
    return Subset(source, evenly_spaced(source, MOST_IMAGES, 1))


def feature_spread(
    model: MaskedModel, source: Source, *, batch_size: int = 64, num_workers: int = 2
) -> dict[str, float]:
    """Returns ``rankme`` and ``feature_std`` of the mean patch tokens of whole images, as ``fastmae probe`` has them.

    Features are computed in float32, at most ``MOST_IMAGES`` of them.
    """
    features = extract_features(model, some_of(source), pool="mean", batch_size=batch_size, num_workers=num_workers)
    return {"rankme": rankme(features.values), "feature_std": feature_std(features.values)}


def rankme(features: torch.Tensor) -> float:
    """Returns RankMe, the effective rank of features [n, D]: between 1 and min(n, D), and 1 if all are the same.

    It is exp(−Σ p_k · ln p_k) with p_k = σ_k / Σ_j σ_j + 1e-7, where σ are the singular values of the features, which
    are not centred (Garrido et al. 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised
    representations by their rank", equations 1 and 2). Computed on the CPU in float64. It depends on n, so only values
    of as many images can be compared.
    """
    singular = torch.linalg.svdvals(features.detach().to("cpu", torch.float64))
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: torch.Tensor) -> float:
    """Returns how much features [n, D] differ from image to image, whatever their length: 0 if all are the same.

    Each feature is divided by its length; the standard deviation over images is taken in each dimension; their mean
    over dimensions is multiplied by √D. Directions that are spread evenly give 1 (Chen and He 2021, "Exploring simple
    Siamese representation learning", section 4.1, where it is divided by √D instead). Computed in float64.
    """
    values = torch.nn.functional.normalize(features.detach().to("cpu", torch.float64), dim=1)
    return float(values.std(dim=0, correction=0).mean() * values.shape[1] ** 0.5)
