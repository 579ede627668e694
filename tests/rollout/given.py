"""Weights for an engine, as a list of named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


class Given:
    """The WeightSource role, whole tensors only."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = tensors

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors

    def stretch(self, hf: str) -> Tensor:
        return dict(self.tensors)[hf]

    def forget(self) -> None:
        pass
