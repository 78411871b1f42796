"""The official recipe's way from image files to batches: worker processes, Pillow and float tensors.

A plain torch ``DataLoader``. Each worker process makes whole batches of its own: Pillow decodes, crops, resizes by
antialiased bicubic and mirrors, and the pixels become float32, normalised by ImageNet's mean and deviation. The recipe
takes these steps from torchvision; here they are written with Pillow and torch alone.

Normalising is part of what it is: it does work that fastmae leaves to the kernels which read the pixels, and it hands
over four times the bytes. Crops and flips come with the requests instead of being drawn in the workers, so that its
images can be compared with those of others; that spares it a little.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastmae.data.plan import crop_draws, is_flipped, random_box
from fastmae.errors import UserError
from fastmae.model.family import IMAGENET_MEAN, IMAGENET_STD

PREFETCH_FACTOR = 2  # batches that a worker is ahead, torch's default
Requests = Sequence[tuple[np.ndarray, np.ndarray]]
"""(indices, draw_ids), int64 [N] each, a batch; as from ``EpochPlan.batch``."""


@dataclass(frozen=True)
class _Crops(Dataset[torch.Tensor]):
    """What a worker process runs. An item is (index, its row of ``crop_draws``)."""

    paths: tuple[str, ...]
    size: int
    scale: tuple[float, float]

    def __getitem__(self, item: tuple[int, np.ndarray]) -> torch.Tensor:
        """float32 [3, size, size], normalised."""
        index, draws = item
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        box = random_box(draws, image.height, image.width, self.scale)
        region = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        resized = region.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if is_flipped(draws):
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(_a_channel(IMAGENET_MEAN)).div_(_a_channel(IMAGENET_STD))


@dataclass
class _Turn:
    """The DataLoader's batch sampler: what is asked for next."""

    seed: int
    requests: Requests = ()

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray]]]:
        for indices, draw_ids in self.requests:
            yield list(zip(indices.tolist(), crop_draws(self.seed, draw_ids), strict=True))


class OfficialPipeline:
    """Worker processes, started by the first batch and idle from the last batch of some requests to the next requests.

    They are spawned, as a process with threads must not be forked, and work with one torch thread each.

    Args:
        paths: image files.
        size: side of the crops in pixels.
        scale: smallest and largest share of the area that a crop takes.
        seed: of crops and flips.
        num_workers: processes, at least 1.
        device: where the batches go; to a GPU from page-locked memory.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        *,
        size: int,
        scale: tuple[float, float],
        seed: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self.ahead = num_workers * PREFETCH_FACTOR
        """Batches that it works on before they are asked for."""
        self._device = device
        self._turn = _Turn(seed)
        self._loader: Iterable[torch.Tensor] | None = DataLoader(
            _Crops(paths, size, scale),
            batch_sampler=self._turn,
            num_workers=num_workers,
            prefetch_factor=PREFETCH_FACTOR,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            multiprocessing_context="spawn",
        )

    def batches(self, requests: Requests) -> Generator[torch.Tensor]:
        """float32 [N, 3, size, size] on the device, one for each request.

        Raises:
            UserError: an image that Pillow cannot read, at which the official recipe ends.
        """
        assert self._loader is not None, "closed"
        self._turn.requests = requests
        try:
            for images in self._loader:
                yield images.to(self._device, non_blocking=True)
            return
        except Exception as error:  # the worker's own, with its traceback as the message
            reason = str(error).strip().splitlines()[-1]
        # Not from the error, whose frames would keep the processes alive.
        raise UserError(f"the official pipeline fails ({reason}); mend or remove the image")

    def close(self) -> None:
        """Ends the processes, once no generator of ``batches`` is left."""
        self._loader = None
        gc.collect()  # an error of a worker and its frames, which hold the iterator, hold each other


def grey_levels(batch: torch.Tensor) -> torch.Tensor:
    """Pixels float32 [N, H, W, C] from 0 to 255, of a normalised batch [N, C, H, W]."""
    mean, std = (_a_channel(values).to(batch.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (batch * std + mean).mul(255).permute(0, 2, 3, 1)


def _a_channel(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)
