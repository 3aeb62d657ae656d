"""Transformers learns the method "bitwright" as soon as it is imported, be that before or after bitwright.

Importing transformers takes seconds, and much of bitwright does without. So nothing is imported here but a finder is
put before Python's own, which does one thing: when the table of quantizers is loaded, it has `huggingface.register`
run behind it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

_TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register at once where transformers is loaded, else as soon as it is; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _TABLE in sys.modules:
        _register()


def _register() -> None:
    module = importlib.import_module("bitwright.runtime.huggingface")
    # Where that module is what asked for the table, it is not complete yet; who imports it calls `register` next.
    if hasattr(module, "register"):
        module.register()


class _Finder:
    """Finds nothing itself; lets the table of quantizers be loaded by a `_Loader`.

    Not derived from importlib's base class, which takes longer to import than the rest of the package.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, for the one module that is meant."""
        if name != _TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Loader(spec.loader))
        return spec


class _Loader:
    """Loads as `loader` does, and registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the other does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other does, which the module then names as its own; behind it, register."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of a loader."""
        return getattr(self._loader, name)
