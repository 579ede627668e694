"""Reading images: absent."""

from ._absent import absent

__getattr__ = absent
