"""When a transformer's depth routing is exposed, does looking at it tell the truth?

Importing this package registers Block AttnRes Qwen3 with transformers' Auto classes, as soon as those are imported; it
imports neither torch nor transformers itself. Its public names are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from attnres.model.auto_classes import register_when_imported

if TYPE_CHECKING:
    from attnres.model.config import Qwen3AttnResConfig
    from attnres.model.loading import load_model
    from attnres.model.modeling import Qwen3AttnResForCausalLM
    from attnres.model.wraps import wrap_qwen3

__version__ = "0.1.0"
__all__ = ["Qwen3AttnResConfig", "Qwen3AttnResForCausalLM", "__version__", "load_model", "wrap_qwen3"]

_HOMES = {
    "Qwen3AttnResConfig": "attnres.model.config",
    "Qwen3AttnResForCausalLM": "attnres.model.modeling",
    "load_model": "attnres.model.loading",
    "wrap_qwen3": "attnres.model.wraps",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnres' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
