"""The name that the documentation of version 0.1 shows for ``load_model``."""

from fastmae.checkpoint.load import load_model

__all__ = ["load_model"]
