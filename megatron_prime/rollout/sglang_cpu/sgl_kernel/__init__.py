"""Stands in for SGLang's wheel of CUDA kernels, which has no build for CPUs.

SGLang imports names from it while it loads, but on a CPU calls none of them: torch's own operators
do the work. So every name and every submodule exists, and whoever calls one is told which.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.0.0+cpu"
# SGLang has fallbacks for these where the import fails; a stand-in would keep it from taking them.
ABSENT = ("sgl_kernel.scalar_type",)


def refusals_of(module: str) -> Callable[[str], Callable[..., Any]]:
    """A module's `__getattr__` that makes up a kernel of any name that refuses to run."""

    def kernel(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_args: Any, **_kwargs: Any) -> Any:
            raise NotImplementedError(f"{module}.{name} is a CUDA kernel; this server is on a CPU")

        refuse.__name__ = refuse.__qualname__ = name
        return refuse

    return kernel


class Submodules(MetaPathFinder, Loader):
    """Finds a module of refusing kernels for whatever is imported from below this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where `fullname` comes from: here, if it is below this package."""
        if not fullname.startswith(f"{__name__}.") or fullname in ABSENT:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Give a new module its kernels."""
        module.__getattr__ = refusals_of(module.__name__)  # type: ignore[method-assign]


sys.meta_path.append(Submodules())
__getattr__ = refusals_of(__name__)
