"""Our classes under transformers' Auto classes, without importing transformers before the user does."""

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
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
    """Finds nothing itself: it lets the others find modules of transformers and ours, and notices when they are loaded.

    Our classes may be imported only when the outermost of those modules is there: a registry can be loaded in the
    middle of the very modules that they need. The finder removes itself when everything is registered.
    """

    def __init__(self) -> None:
        self._registered: set[str] = set()
        # Each thread has modules of its own under way; what two threads need, the import system makes one wait for.
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("transformers", "attnres"):
            return None
        # A copy: another thread may be removing the finder.
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            if (spec := finder.find_spec(fullname, path, target)) is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        """Has the loader say when it begins and ends. It stays what it is: much else asks loaders for things."""
        loader = spec.loader
        if loader is None:
            return
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with suppress(AttributeError):
                del loader.exec_module
            with self._loading():
                load(module)
            self.settle()

        loader.exec_module = exec_module  # type: ignore[method-assign]

    @contextmanager
    def _loading(self) -> Iterator[None]:
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._thread.depth -= 1

    def settle(self) -> None:
        """Registers what can be, unless this thread is loading a module."""
        if getattr(self._thread, "depth", 0):
            return
        with self._loading():
            # Registering the first may import the registry of the second.
            while waiting := [name for name in _REGISTRIES if name in sys.modules and name not in self._registered]:
                importlib.import_module(_REGISTRIES[waiting[0]])
                self._registered.add(waiting[0])
        if self._registered == _REGISTRIES.keys():
            with suppress(ValueError):
                sys.meta_path.remove(self)
