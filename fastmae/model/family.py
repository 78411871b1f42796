"""What all families of masked autoencoders have in common: images, their patches, masks, and what is asked of a model.

A family is one file beside this one: mae.py (vision transformers), convnext.py, conv.py, mlp.py. Loops and commands
call what this class has and never ask which family a model is of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastmae.config.family import USUAL_RATIO, Family
from fastmae.data.reading import Reading
from fastmae.errors import UserError
from fastmae.facts import AS_STORED, PixelFacts, ReadAs, exact_ratio
from fastmae.model.flops import Product
from fastmae.model.intermediates import TokenPool
from fastmae.model.masks import order_of
from fastmae.model.pixels import (
    Pixels,
    normalised,
    pixels_of,
    range_ends,
    register_pixels,
    size_of,
    value_range_of,
)
from fastmae.model.vit import patch_grid

if TYPE_CHECKING:
    from fastmae.data.preprocess import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Returns a size as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class MaskedModel(nn.Module):
    """A masked autoencoder of any family.

    A family sets the attributes below, calls ``_take_images`` and ``_take_pixels`` when it is made, and gives
    ``loss_and_prediction``, ``predict``, ``features``, ``products`` and ``last_layer``.

    Images are pixels [N, H, W, C] of the dtype of ``pixels``, or float [N, C, H, W], normalised. Their L patches, the
    units of masks, are numbered row by row. A mask is a row of ``ids_shuffle`` int [N, L]: a permutation whose first
    K entries are visible.
    """

    family: Family
    """Which file of this folder it is from."""
    img_size: tuple[int, int]
    """(height, width) in pixels, as all sizes."""
    patch_size: tuple[int, int]
    """Of a patch, the unit that is masked."""
    grid_size: tuple[int, int]
    """(rows, columns) of patches."""
    num_patches: int
    in_chans: int
    norm_pix_loss: bool
    mean: torch.Tensor
    """[C], as a share of the value range, like ``std``."""
    std: torch.Tensor
    value_range = property(value_range_of)
    pixels: PixelFacts
    read_as: ReadAs = AS_STORED
    """How files become its images, where it is known."""

    pools: tuple[str, ...] = ("mean",)
    """The ways in which ``features`` pools: of "mean", "cls", "both" and "tokens"."""
    has_pictures = True
    """Whether its images can be looked at."""
    masks_features = False
    """Whether single numbers are masked, each with a chance of its own, in place of a number of patches. A mask is then
    a row of truth values, bool [N, L], true where masked."""
    decoder_attention: Literal["self", "cross"] = "self"
    autocast_residual = False
    overridden: tuple[str, ...] = ()
    """Which official steps of a vision transformer are replaced by somebody's own."""

    # --- what each family gives -------------------------------------------------------------------------------------

    def loss_and_prediction(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor,
        mask_ratio: float = 0.75,
        predict_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the training loss, a scalar, and the predictions [N, M, P] of the masked patches, in the order of
        ``ids_shuffle``. P is in (row, column, channel) order; with ``norm_pix_loss`` patches are without their mean
        and deviation.
        """
        raise NotImplementedError

    def predict(self, images: torch.Tensor, ids_shuffle: torch.Tensor, mask_ratio: float) -> torch.Tensor:
        """Returns the predictions [N, L, P] of all patches, in the order of the image, for pictures and errors."""
        raise NotImplementedError

    def features(self, images: torch.Tensor, pool: TokenPool = "mean") -> torch.Tensor:
        """Returns the features [N, D] of whole images, nothing masked."""
        raise NotImplementedError

    def products(
        self, mask_ratio: float, num_patches: int | None = None, predict_ratio: float | None = None
    ) -> tuple[Product, ...]:
        """Returns the matrix products of an image's forward pass that the loss depends on."""
        raise NotImplementedError

    @property
    def feature_dim(self) -> int:
        """D, the length of a feature."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Module:
        """The layer whose output is the prediction. It has a ``weight``."""
        raise NotImplementedError

    @property
    def sizes(self) -> object:
        """Its sizes, which are printed in a line."""
        raise NotImplementedError

    @property
    def own_settings(self) -> dict[str, Any]:
        """The preset and the settings by which ``build_model`` makes one like it; empty where that is not known."""
        return {}

    def about_decoder(self, mask_ratio: float, predict_ratio: float | None) -> str:
        """Returns what is to be said of the decoder; empty if it is the usual one."""
        return ""

    # --- what all of them share -------------------------------------------------------------------------------------

    def training_loss(
        self,
        images: torch.Tensor,
        ids_shuffle: torch.Tensor | None = None,
        mask_ratio: float = 0.75,
        predict_ratio: float | None = None,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the training loss, a scalar.

        Args:
            images: pixels [N, H, W, C] of the model's dtype, or float [N, C, H, W], normalised.
            ids_shuffle: int [N, L], from ``fastmae.ops.random_masking``; by default drawn from torch's generator.
            mask_ratio: K = int(L · (1 − mask_ratio)) patches are visible.
            predict_ratio: the share of patches that is predicted, for models that can leave some out.
            mask: bool [N, L] or [N, rows, columns] of patches, True where masked, as many in each row; in place of
                ``ids_shuffle`` and ``mask_ratio``.
        """
        ids_shuffle, mask_ratio = self._given_order(images, mask_ratio, ids_shuffle, mask)
        if ids_shuffle is None:
            rows, columns = self.grid_of(self._size_of(images))
            ids_shuffle = drawn(images.shape[0], rows * columns, images.device)
        return self.loss_and_prediction(images, ids_shuffle, mask_ratio, predict_ratio)[0]

    @property
    def usual_ratio(self) -> float:
        """The mask ratio of the family where none is given."""
        return USUAL_RATIO[self.family]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.mean.device

    @property
    def draws_masks(self) -> str | None:
        """The name of a step that draws the masks itself and cannot be given any: None but for official code."""
        return None

    def find_overrides(self) -> None:
        """Finds the official steps that somebody has replaced: none but in vision transformers."""

    def _take_images(self, img_size: Size, patch_size: Size, in_chans: int, norm_pix_loss: bool) -> None:
        """Sets what the images are.

        Raises:
            ValueError: an image is no whole number of patches.
        """
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.grid_size = patch_grid(self.img_size, self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss

    def _take_pixels(self, mean: Sequence[float] | None, std: Sequence[float] | None, pixels: PixelFacts) -> None:
        """Sets what normalises images: ImageNet's mean and std for 3 channels, else 0.5 and 0.25, where not given."""
        C = self.in_chans
        usual_mean, usual_std = (IMAGENET_MEAN, IMAGENET_STD) if C == 3 else ((0.5,) * C, (0.25,) * C)
        register_pixels(self, C, usual_mean if mean is None else mean, usual_std if std is None else std, pixels)

    def num_visible(self, mask_ratio: float, num_patches: int | None = None) -> int:
        """Returns K, how many patches of an image the encoder sees.

        Args:
            mask_ratio: K = int(L · (1 − mask_ratio)).
            num_patches: L; by default that of ``img_size``.

        Raises:
            ValueError: no patch would be visible, or none masked.
        """
        L = self.num_patches if num_patches is None else num_patches
        K = int(L * (1 - mask_ratio))
        if not 1 <= K < L:
            raise ValueError(
                f"mask ratio {mask_ratio} leaves {K} of {L} patches visible; "
                "at least one must be visible and one masked"
            )
        return K

    def num_predicted(self, mask_ratio: float, predict_ratio: float | None, num_patches: int | None = None) -> int:
        """Returns how many masked patches of an image the loss is computed from: all of them.

        Raises:
            ValueError: ``predict_ratio`` is not None. Masked patches depend on each other here, so that none can be
                left out; CrossMAE takes a ratio.
        """
        L = self.num_patches if num_patches is None else num_patches
        masked = L - self.num_visible(mask_ratio, L)
        if predict_ratio is not None:
            raise ValueError("a decoder with self-attention predicts all masked patches, so it takes no predict_ratio")
        return masked

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the (rows, columns) of patches of an image of a size (height, width) in pixels."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def allow_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Lets the model take images of these (height, width) too.

        Raises:
            ValueError: the family takes images of ``img_size`` alone.
        """
        if {*sizes} - {self.img_size}:
            raise ValueError(f"takes images of {self.img_size[0]}×{self.img_size[1]} pixels alone")

    def set_size(self, size: tuple[int, int]) -> None:
        """Makes this a model of images of another (height, width), which it was not trained on.

        Raises:
            ValueError: the family takes images of ``img_size`` alone, or they are no whole number of patches.
        """
        self.allow_sizes([size])
        self._take_images(size, self.patch_size, self.in_chans, self.norm_pix_loss)

    @property
    def has_fixed_positions(self) -> bool:
        """Whether positions of other sizes can be computed, which growing crops need."""
        return False

    @property
    def has_other_sizes(self) -> bool:
        """Whether ``allow_sizes`` let it take images of other sizes."""
        return bool(self.other_sizes)

    @property
    def other_sizes(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) beside ``img_size`` that ``allow_sizes`` let it take."""
        return ()

    def attention_shapes(self, mask_ratio: float) -> dict[str, tuple[int, int]]:
        """Returns (number of keys S, width Dh of a head) of each kind of attention in training; empty without any."""
        return {}

    def _size_of(self, images: torch.Tensor) -> Any:
        """Returns the (height, width) of images of either form."""
        return size_of(self, images)

    def _pixels(self, images: torch.Tensor) -> Pixels:
        """Returns images of either form with what normalises them."""
        return pixels_of(self, images)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Returns images of either form as float [N, C, H, W], normalised."""
        return normalised(self, images)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """Cuts images [N, C, H, W] into patches [N, L, P], P in (row, column, channel) order."""
        N, C, H, W = imgs.shape
        (gh, gw), (ph, pw) = patch_grid((H, W), self.patch_size), self.patch_size
        return imgs.reshape(N, C, gh, ph, gw, pw).permute(0, 2, 4, 3, 5, 1).reshape(N, -1, ph * pw * C)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Joins the patches [N, L, P] of images of ``img_size`` to images [N, C, H, W]."""
        N = x.shape[0]
        (gh, gw), (ph, pw) = self.grid_size, self.patch_size
        images = x.reshape(N, gh, gw, ph, pw, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(N, self.in_chans, gh * ph, gw * pw)

    def _given_order(
        self,
        images: torch.Tensor,
        mask_ratio: float,
        ids_shuffle: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, float]:
        """Returns the order of the patches that ``ids_shuffle`` or ``mask`` gives, if one does, and the mask ratio.

        Raises:
            ValueError: both are given, or the mask does not suit the images.
        """
        if mask is None:
            return ids_shuffle, mask_ratio
        if ids_shuffle is not None:
            raise ValueError("ids_shuffle and mask say the same, so only one of them can be given")
        grid = self.grid_of(self._size_of(images))
        ids_shuffle, K = order_of(mask, len(images), grid)
        return ids_shuffle.to(images.device, non_blocking=True), exact_ratio(K, grid[0] * grid[1])

    @property
    def preprocess(self) -> Preprocessing:
        """Prepares images for this model, as evaluation does: ``model.preprocess("a.jpg")`` is its pixels [H, W, C]."""
        from fastmae.data.preprocess import Preprocessing

        low, high = (tuple(ends.tolist()) for ends in range_ends(self))
        mean, std = tuple(self.mean.tolist()), tuple(self.std.tolist())
        return Preprocessing(self.reading, self.img_size, low, high, mean, std)

    @property
    def reading(self) -> Reading:
        """How files become the images of this model: as in its training, as far as that is known."""
        return Reading(self.in_chans, dtype=self.pixels.dtype, nodata=self.pixels.nodata, read_as=self.read_as)

    @torch.no_grad()
    def embed(self, images: Any, *, pool: TokenPool = "mean", batch_size: int = 64) -> torch.Tensor:
        """Returns the features of images, float32 [n, D], on the model's device, without gradients.

        They are those of ``fastmae.extract_features``, which is for whole data sets. In evaluation mode they are the
        same each time.

        Args:
            images: a list of paths, bytes of files, images of Pillow, arrays or tensors, mixed as you like; or a
                single one.
            pool: as for ``fastmae.extract_features``.
            batch_size: images per forward pass.

        Raises:
            UserError: there are none, or one of them is no image, or cannot be used.
        """
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise UserError("embed: the list of images is empty")
        preprocess, device = self.preprocess, self.device
        features = []
        for start in range(0, len(images), batch_size):
            batch = preprocess.batch(images[start : start + batch_size]).to(device)
            features.append(self.features(batch, pool).float())
        return torch.cat(features)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Returns the modules that are checkpointed, compiled and sharded one by one: they say ``checkpointing``."""
    return [part for part in module.modules() if hasattr(part, "checkpointing")]


def drawn(N: int, L: int, device: torch.device) -> torch.Tensor:
    """Draws the order of the patches, int64 [N, L], from torch's generator of the device, as the official code."""
    return torch.rand(N, L, device=device).argsort(dim=1)
