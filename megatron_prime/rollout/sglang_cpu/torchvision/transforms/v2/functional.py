"""The second version's functions: absent but for the names of the interpolations."""

from ..._absent import absent
from .. import InterpolationMode

__all__ = ["InterpolationMode"]
__getattr__ = absent
