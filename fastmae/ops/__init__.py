"""The five operations of a masked autoencoder, one file each; what any transformer needs is beside them.

Shapes: N images of H×W×C pixels; patches of ph×pw pixels on a gh×gw grid; L = gh·gw patches, of which K are visible and
M = L−K masked; P = ph·pw·C numbers per patch in (row, column, channel) order; tokens of width D.
"""

from fastmae.ops.assemble_tokens import assemble_tokens
from fastmae.ops.backends import differentiable
from fastmae.ops.gather_patches import gather_patches
from fastmae.ops.masked_mse import masked_mse
from fastmae.ops.random_masking import random_masking
from fastmae.ops.scatter_patches import scatter_patches

__all__ = ["assemble_tokens", "differentiable", "gather_patches", "masked_mse", "random_masking", "scatter_patches"]
