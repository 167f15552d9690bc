"""The examples of docs/judge.md as they stand there, on tables that the real libraries make of tiny models."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from attnres.commands.judge import main

ROOT = Path(__file__).parents[2]
WORDS = [f"w{number}" for number in range(62)]
VOCABULARY = {word: number for number, word in enumerate(["<unk>", "<end>", *WORDS])}
LAYERS, HEADS, WIDTH, PROMPTS = 2, 4, 32, 16
HEAD = WIDTH // HEADS
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        find_spec(library) is None, reason=f"{library} is not installed: the extra `bench` has it"
    )


def example(title: str) -> tuple[str, list[str]]:
    """The code of a section of docs/judge.md, and the words of its command behind `judge`."""
    section = (ROOT / "docs" / "judge.md").read_text(encoding="utf-8").split(f"## {title}")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"^    python -m attnres\.commands\.judge (.*)$", section, re.MULTILINE)
    return code, shlex.split(command)


@pytest.fixture(scope="module")
def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 64, "vocab_size": len(VOCABULARY)}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that ablations cost something
    return model


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A folder with the model `tiny` and prompts, to run a command in; the environment has no network."""
    monkeypatch.chdir(tmp_path)
    save(base, "tiny")
    rng = np.random.default_rng(0)
    (tmp_path / "prompts.txt").write_text("".join(" ".join(rng.choice(WORDS, 12)) + "\n" for _ in range(PROMPTS)))
    return tmp_path


def save(model: GPT2LMHeadModel, name: str) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(name)
    model.save_pretrained(name)


def run(*words: str) -> None:
    done = subprocess.run(words, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def run_example(code: str) -> None:
    assert code.count('"gpt2"') <= 1
    Path("example.py").write_text(code.replace('"gpt2"', '"tiny"'))
    run(sys.executable, "example.py")


def judged(words: list[str]) -> pd.DataFrame:
    assert main(words) == 0
    return pd.read_csv(Path(words[0]).with_suffix("").name + "-judged/cells.csv")


def without(base: GPT2LMHeadModel, layer: int, head: int | None = None) -> GPT2LMHeadModel:
    """The model whose weights leave out a head, or a layer's whole MLP."""
    model = GPT2LMHeadModel(base.config).eval()
    model.load_state_dict(base.state_dict())
    block = model.transformer.h[layer]
    with torch.no_grad():
        if head is None:
            block.mlp.c_proj.weight.zero_(), block.mlp.c_proj.bias.zero_()
        else:
            block.attn.c_proj.weight[head * HEAD : (head + 1) * HEAD] = 0
    return model


@torch.no_grad()
def likelihoods(model: GPT2LMHeadModel, words: str, start: bool) -> torch.Tensor:
    ids = torch.tensor([[VOCABULARY["<end>"]] * start + [VOCABULARY[word] for word in words.split()]])
    return model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def costs(base: GPT2LMHeadModel, edited: GPT2LMHeadModel, start: bool) -> list[float]:
    prompts = Path("prompts.txt").read_text().splitlines()
    return [(likelihoods(base, p, start) - likelihoods(edited, p, start)).mean().item() for p in prompts]


@pytest.mark.slow
@needs("transformer_lens")
def test_heads_of_transformer_lens(base, place):
    code, words = example("TransformerLens")
    run_example(code)
    table = pd.read_csv("heads.csv")
    assert len(table) == LAYERS * HEADS * PROMPTS
    for (layer, head), rows in table.groupby(["layer", "head"]):
        expected = costs(base, without(base, layer, head), start=True)
        assert rows.sort_values("prompt")["delta"].tolist() == pytest.approx(expected, abs=2e-5)
    cells = judged(words)
    assert cells["component"].tolist() == [f"layer {k} head {h}" for k in range(LAYERS) for h in range(HEADS)]
    assert set(cells["documents"]) == {PROMPTS} and set(cells["family_size"]) == {LAYERS * HEADS}
    assert cells["effect"].tolist() == pytest.approx(table.groupby(["layer", "head"])["delta"].mean().tolist())


@pytest.mark.slow
@needs("nnsight")
def test_modules_of_nnsight(base, place):
    code, words = example("nnsight")
    run_example(code)
    table = pd.read_csv("modules.csv")
    for layer in range(LAYERS):
        rows = table[table["module"] == f"mlp {layer}"].sort_values("prompt")
        assert rows["dnll"].tolist() == pytest.approx(costs(base, without(base, layer), start=False), abs=2e-5)
    cells = judged(words)
    assert cells["component"].tolist() == ["mlp 0", "mlp 1"]
    assert (cells["second"] > 0).all() and cells["second"].tolist() == pytest.approx(
        table.groupby("module")["kl"].mean().tolist()
    )


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@needs("lm_eval")
def test_samples_of_lm_eval(base, place):
    edited = without(base, 0)
    save(edited, "EDITED")
    rng = np.random.default_rng(1)
    documents = {
        name: [
            {"question": " ".join(rng.choice(WORDS, 6)), "choices": list(rng.choice(WORDS, 3)), "label": k % 3}
            for k in range(size)
        ]
        for name, size in (("first_task", 14), ("second", 20))
    }
    for name, lines in documents.items():
        data = place / "tasks" / f"{name}.jsonl"
        data.parent.mkdir(exist_ok=True)
        data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (place / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    for model, out in (("tiny", "clean"), ("EDITED", "edited")):
        command = (
            f"run --model hf --model_args pretrained={model},dtype=float32 --tasks first_task,second --log_samples"
        )
        run(
            sys.executable, "-m", "lm_eval", *f"{command} --output_path {out} --include_path tasks --device cpu".split()
        )
    code, words = example("lm-eval")
    run_example(code)
    cells = judged(words).set_index("group")
    assert cells["documents"].to_dict() == {"first_task": 14, "second": 20}
    for name, lines in documents.items():
        answers = [f"{line['question']} {line['choices'][line['label']]}" for line in lines]
        cost = [(likelihoods(base, a, False) - likelihoods(edited, a, False))[-1].item() for a in answers]
        assert cells.loc[name, "effect"] == pytest.approx(np.mean(cost), abs=2e-5)


@pytest.mark.parametrize("title", ["TransformerLens", "nnsight", "lm-eval"])
def test_every_example_has_code_and_a_command_that_the_parser_takes(title, tmp_path, monkeypatch, capsys):
    """Also where the library is not installed: the command fails for want of the table alone."""
    monkeypatch.chdir(tmp_path)
    code, words = example(title)
    compile(code, title, "exec")
    assert main(words) == 3
    assert f"{words[0]} is missing" in capsys.readouterr().err
    assert words[0] in code
