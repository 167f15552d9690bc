"""Quantisers and adapters of other packages: they leave the reads alone."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPE
from torch import nn

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.model.routing import is_routing

# A width of one block of bitsandbytes' 4-bit format, the least that it computes with on a CPU.
WIDE = SHAPE | {"hidden_size": 64, "head_dim": 16, "attnres_num_blocks": 3}


@pytest.fixture
def model():
    """With embeddings and queries as large as trained ones get, so that a wrong read shows in the loss."""
    torch.manual_seed(0)
    made = Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**WIDE)).eval()
    with torch.no_grad():
        made.model.embed_tokens.weight.normal_(std=0.2)
        for name, parameter in made.named_parameters():
            if is_routing(name) and parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def loss(model) -> float:
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    return float(model(ids, labels=ids).loss)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantises_no_read(model, tmp_path: Path, bits: int):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import BitsAndBytesConfig

    model.save_pretrained(tmp_path)
    reads = [name for name, _ in model.named_modules() if is_routing(f"{name}.weight")]
    losses = []
    for skipped in (["lm_head"], ["lm_head", *reads]):
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=skipped)
        losses.append(
            loss(Qwen3AttnResForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu"))
        )
    assert losses[0] != loss(model)
    assert losses[0] == pytest.approx(losses[1], abs=0.01)


def test_torchao_quantises_no_read(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain, skipped = loss(model), copy.deepcopy(model)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(
        skipped, config, lambda module, name: isinstance(module, nn.Linear) and not is_routing(f"{name}.weight")
    )
    quantization.quantize_(model, config)
    assert loss(model) != plain
    assert loss(model) == pytest.approx(loss(skipped), abs=0.01)


def test_lora_on_all_linear_layers_trains_every_adapter(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(model.train(), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(20)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 7 * SHAPE["num_hidden_layers"]
    assert all(gradient is not None for gradient in adapters.values())
