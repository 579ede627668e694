"""The second version of the transforms: absent but for the names of the interpolations."""

from ..._absent import absent
from .. import InterpolationMode
from . import functional

__all__ = ["InterpolationMode", "functional"]
__getattr__ = absent
