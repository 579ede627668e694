"""Stands in for torchvision, which SGLang imports for its image models; text needs none of it."""

from . import io, transforms

__all__ = ["io", "transforms"]
__version__ = "0.0.0+cpu"
