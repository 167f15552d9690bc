"""Our classes under transformers' Auto classes, without importing transformers before the user does."""

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

# The library's registries, and our modules that register their class where they end: they need the registry's own
# modules, so that they can be imported only when all of those are there.
_REGISTRIES = {
    "transformers.models.auto.configuration_auto": "attnres.model.config",
    "transformers.models.auto.modeling_auto": "attnres.model.modeling",
}


def register_when_imported() -> None:
    """Registers at once where the Auto classes are already imported, else when they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        finder.settle()


class _Finder(MetaPathFinder):
    """Finds transformers' modules and ours as the import system does, and notices when the outermost is loaded.

    Only then may our classes be imported: a registry can be loaded in the middle of the very modules that they need.
    The finder removes itself when everything is registered.
    """

    def __init__(self) -> None:
        self._pending = list(_REGISTRIES)
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ("transformers", "attnres"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While one module is loaded; registers after the outermost."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self.settle()

    def settle(self) -> None:
        """Registers what can be, unless a module is being loaded."""
        while self._depth == 0 and (loaded := [name for name in self._pending if name in sys.modules]):
            # Taken first, because registering imports more of transformers.
            self._pending.remove(loaded[0])
            importlib.import_module(_REGISTRIES[loaded[0]])
        if not self._pending and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Another loader, in whose place it stands until the module is there."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        with self._finder.loading():
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> object:
        # What `python -m` and readers of source ask a loader for.
        return getattr(self._loader, name)
