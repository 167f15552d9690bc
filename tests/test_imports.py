"""What importing the package loads, and what it registers: each in a process of its own."""

import subprocess
import sys

import pytest

REGISTERED = """
import sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from attnres import Qwen3AttnResConfig
assert CONFIG_MAPPING["qwen3_attnres"] is Qwen3AttnResConfig
assert MODEL_FOR_CAUSAL_LM_MAPPING[Qwen3AttnResConfig].__name__ == "Qwen3AttnResForCausalLM"
assert not any(type(finder).__module__.startswith("attnres") for finder in sys.meta_path)
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import attnres; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig; import attnres; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import attnres",
        # The registries are loaded in the middle of modules that our classes need.
        "import attnres; import transformers.modeling_utils",
        "import attnres; from transformers import Qwen3Config",
        "import attnres, importlib; importlib.reload(attnres)",
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(order):
    run(order + REGISTERED)


def test_import_of_the_package_loads_no_library_and_lists_its_names():
    run(
        "import attnres, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        "assert set(attnres.__all__) <= set(dir(attnres));"
        "assert all(getattr(attnres, name) is not None for name in attnres.__all__)"
    )
