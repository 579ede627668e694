"""What the modules of this stand-in are made of: classes that refuse to be made."""

from __future__ import annotations

from typing import Any


def absent(name: str) -> type:
    """A module's `__getattr__`: a class of any name, for annotations and `isinstance`."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(_self: object, *_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError(f"torchvision is not installed here, so there is no {name}")

    return type(name, (), {"__init__": refuse, "__module__": "torchvision"})
