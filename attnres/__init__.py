"""When a transformer's depth routing is exposed, does looking at it tell the truth?

Importing this package registers Block AttnRes Qwen3 with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from attnres.model.config import Qwen3AttnResConfig
from attnres.model.loading import load_model, wrap_qwen3
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.version import __version__

__all__ = ["Qwen3AttnResConfig", "Qwen3AttnResForCausalLM", "__version__", "load_model", "wrap_qwen3"]


AutoConfig.register(Qwen3AttnResConfig.model_type, Qwen3AttnResConfig, exist_ok=True)
AutoModelForCausalLM.register(Qwen3AttnResConfig, Qwen3AttnResForCausalLM, exist_ok=True)
