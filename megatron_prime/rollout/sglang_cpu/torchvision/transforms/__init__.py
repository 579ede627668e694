"""Transforms of images: absent but for the names of the interpolations, which are defaults."""

from enum import Enum

from .._absent import absent

__getattr__ = absent


class InterpolationMode(Enum):
    """How to resize an image."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
