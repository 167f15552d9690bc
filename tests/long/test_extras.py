"""Every extra of pyproject.toml, installed beside the plain package, carries out its documented recipe."""

import json
import re
import shlex
from pathlib import Path

import pytest
from environments import ROOT, Environment

pytestmark = pytest.mark.long
EXPORT = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
import attnres
words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=128)
tokenizer.save_pretrained(sys.argv[1])
shape = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
config = attnres.Qwen3AttnResConfig(
    vocab_size=len(words), num_hidden_layers=2, attnres_num_blocks=2, max_position_embeddings=128, **shape
)
attnres.Qwen3AttnResForCausalLM(config).save_pretrained(sys.argv[1])
"""
# Two tasks of our own, of the kinds of the documented ones, in a local file.
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{fields}
"""
KINDS = {
    "multiple_choice": 'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
    "metric_list:\n  - metric: acc",
    "loglikelihood_rolling": 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity',
}


@pytest.fixture
def extra(request: pytest.FixtureRequest, plain: Environment, tmp_path: Path) -> Environment:
    """The plain package and the extra that the test is named after."""
    name = request.node.name.split("_")[1]
    environment = Environment.new(tmp_path / "environment", plain.sources, below=plain)
    environment.install(f"{plain.sources}[{name}]")
    return environment


def test_eval_extra_judges_an_export_with_the_documented_command(extra: Environment, tmp_path: Path) -> None:
    folder, tasks = tmp_path / "export", tmp_path / "tasks"
    tasks.mkdir()
    extra.python("-c", EXPORT, folder)
    row = {"text": "The cat sat on the mat", "choices": [" and slept", " moon"], "answer": 0}
    (tasks / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    for kind, fields in KINDS.items():
        text = TASK.format(name=f"offline_{kind}", data=tasks / "rows.jsonl", kind=kind, fields=fields)
        (tasks / f"{kind}.yaml").write_text(text)
    (documented,) = re.findall(r"^    python (-c .*cli_evaluate(?:.*\\\n)?.*)$", _docs("training.md"), re.MULTILINE)
    words = shlex.split(documented.replace("\\\n", " ").replace("FOLDER", str(folder)))
    words[words.index("--tasks") + 1] = ",".join(f"offline_{kind}" for kind in KINDS)
    local = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    printed = extra.python(*words, "--include_path", tasks, "--device", "cpu", **local)
    assert re.search(r"acc .*\d", printed) and re.search(r"word_perplexity.*\d", printed), printed


def test_bench_extra_brings_every_peer_that_the_benchmark_measures(extra: Environment, tmp_path: Path) -> None:
    benchmark = (ROOT / "benchmarks/bench_depth_mix.py").read_text()
    imports = re.findall(r"^ +from ((?:fla|liger_kernel|flash_attn_res)[\w.]*) import (?:\(\s*)?(\w+)", benchmark, re.M)
    assert {module.partition(".")[0] for module, _ in imports} == {"fla", "liger_kernel", "flash_attn_res"}
    for module, name in imports:
        extra.python("-c", f"from {module} import {name}")
    if extra.python("-c", "import torch; print(torch.cuda.is_available())").strip() == "True":
        extra.python("benchmarks/bench_depth_mix.py", "--part", "reads", "--tokens", "4096")


def test_slurm_extra_runs_a_sweep_on_this_machine(extra: Environment, tmp_path: Path) -> None:
    words = ["train.py", "-m", "hydra/launcher=submitit_local", "seed=0,1"]
    words += ["trainer.max_steps=2", "optim.warmup_steps=1"]
    extra.python(*words, f"runs_dir={tmp_path / 'runs'}", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert len(list((tmp_path / "runs").glob("attnres_tiny*/checkpoints/step_00000002"))) == 2
    shown = extra.python("train.py", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert "submitit" in shown


def test_dev_extra_lints_and_tests(extra: Environment) -> None:
    extra.python("-m", "ruff", "check", ".")
    extra.python("-m", "ruff", "format", "--check", ".")
    extra.python("-m", "mypy")
    extra.python("-m", "pytest", "tests/depth", "tests/tables", "tests/test_versions.py")


def _docs(name: str) -> str:
    return (ROOT / "docs" / name).read_text()
