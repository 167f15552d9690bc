"""What importing the package loads, and what it registers: each in a process of its own."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

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
OTHER_THREAD = """
import attnres, sys, threading
(finder,) = (finder for finder in sys.meta_path if type(finder).__module__.startswith("attnres"))
began, end = threading.Event(), threading.Event()
def load_slowly():
    with finder._loading():
        began.set(), end.wait(300)
thread = threading.Thread(target=load_slowly)
thread.start(), began.wait()
from transformers import AutoConfig
assert AutoConfig.for_model("qwen3_attnres", num_hidden_layers=2, attnres_num_blocks=1).attnres_num_blocks == 1
end.set(), thread.join()
"""
OTHER_FINDER = """
import sys
from importlib.machinery import PathFinder
class Instrumenting:
    seen = []
    @classmethod
    def find_spec(cls, name, path, target=None):
        if name.startswith("attnres."):
            cls.seen.append(name)
            return PathFinder.find_spec(name, path, target)
sys.meta_path.insert(0, Instrumenting)
import attnres
import attnres.model.state
assert "attnres.model.state" in Instrumenting.seen, Instrumenting.seen
sys.meta_path.remove(Instrumenting)
"""
LOOKED_FOR = "import attnres, importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto')"
LOADERS = """
import attnres, importlib.metadata, importlib.resources, inspect
from importlib.machinery import SourceFileLoader
import attnres.errors, transformers.utils
for module in (attnres.errors, transformers.utils):
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert "exec_module" not in vars(module.__loader__)
assert "class AttnResError" in inspect.getsource(attnres.errors)
assert importlib.resources.files("attnres.report").joinpath("templates").is_dir()
assert importlib.metadata.version("transformers")
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "order",
    [
        "import attnres; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import attnres",
        # The registries are loaded in the middle of modules that our classes need.
        "import attnres; import transformers.modeling_utils",
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (
                "from transformers import AutoConfig; import attnres; from transformers import AutoModelForCausalLM",
                "import attnres; from transformers import Qwen3Config",
                "import attnres, importlib; importlib.reload(attnres)",
                "import attnres, importlib; from transformers import AutoModelForCausalLM; importlib.reload(attnres)",
                # A module that is looked for and not loaded.
                LOOKED_FOR,
                # A module that fails to load.
                "import attnres, contextlib\nwith contextlib.suppress(ImportError): import transformers.no_such_module",
            )
        ),
        pytest.param(OTHER_THREAD, id="another thread in the middle of a module", marks=pytest.mark.slow),
        pytest.param(OTHER_FINDER, id="a finder that instruments", marks=pytest.mark.slow),
        pytest.param(LOADERS, id="loaders stay what they are", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(order):
    run(order + REGISTERED)


def test_a_configuration_that_was_saved_is_read_in_a_fresh_process(tmp_path):
    from attnres import Qwen3AttnResConfig

    config = Qwen3AttnResConfig(num_hidden_layers=2, attnres_num_blocks=2, attnres_sources="full")
    config.save_pretrained(tmp_path)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    read = "import pickle, sys; from pathlib import Path; folder = Path(sys.argv[1])\n"
    unpickle = "config = pickle.loads((folder / 'config.pickle').read_bytes())\n"
    auto = "import attnres; from transformers import AutoConfig; config = AutoConfig.from_pretrained(folder)\n"
    judge = "assert type(config).__name__ == 'Qwen3AttnResConfig' and config.attnres_sources == 'full'\n"
    for code in (unpickle, auto):
        run(read + code + judge + REGISTERED, str(tmp_path))


@pytest.mark.slow
def test_a_spawned_process_knows_the_model(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nimport attnres\n"
        "def child():\n"
        "    from transformers import AutoConfig\n"
        "    AutoConfig.for_model('qwen3_attnres', num_hidden_layers=2, attnres_num_blocks=1)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start(), process.join(120)\n"
        "    raise SystemExit(process.exitcode)\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=_on_path(root), timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_of_the_package_loads_no_library_and_lists_its_names():
    run(
        "import attnres, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules);"
        "assert set(attnres.__all__) <= set(dir(attnres));"
        "assert all(getattr(attnres, name) is not None for name in attnres.__all__)"
    )


def test_a_name_that_the_package_has_not_is_an_attribute_error():
    import attnres

    assert not hasattr(attnres, "no_such_name")


def _on_path(folder: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])}
