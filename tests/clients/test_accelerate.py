"""Models that accelerate offloads, dispatches or loads for transformers' own sharding: they compute the same."""

from pathlib import Path

import pytest
import torch
from parallel_models import child_with_the_librarys_plan, save
from tiny_models import SHAPE
from training_runs import two_ranks

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.depth.plan import CONVENTIONS

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def make(convention: str = "block_sum", **changes) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    fields = SHAPE | {"attnres_sources": convention, "attnres_num_blocks": 2} | changes
    model = Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_res_" in name and parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("biases", ["newest", "sources"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_offloaded_model_gives_the_same_logits(tmp_path: Path, convention: str, biases: str) -> None:
    expected = make(convention, attnres_bias=biases)(IDS).logits
    on_disk = accelerate.disk_offload(make(convention, attnres_bias=biases), tmp_path, execution_device="cpu")
    in_memory = accelerate.cpu_offload(make(convention, attnres_bias=biases), execution_device="cpu")
    for model in (on_disk, in_memory):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=5e-6)


@torch.no_grad()
def test_from_pretrained_with_a_device_map_that_names_the_disk(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    kept = ("embed_tokens", "rotary_emb", "final_res_norm", "final_res_bias")
    places = {f"model.{name}": "cpu" for name in kept} | {"lm_head": "cpu"}
    places |= {f"model.{name}": "disk" for name in ("norm", "final_res_proj")}
    places |= {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(6)}
    loaded = Qwen3AttnResForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[1].attn_res_bias.is_meta
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=5e-6)
    # A prefix with a cache, then a token at a time.
    generated = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(IDS[:1], max_new_tokens=4, do_sample=False))


def test_state_and_context_move_with_the_arguments_of_a_layer() -> None:
    decoder = make().model
    embeddings = decoder.embed_tokens(IDS)
    context = decoder.context(embeddings)
    state = decoder.step(decoder.embed(embeddings), 0, context)
    state, context = accelerate.utils.send_to_device((state, context), "meta")
    moved = [*state.finished, state.update, *state.prepared.mixed, state.prepared.logits, state.prepared.lse]
    assert {tensor.device.type for tensor in [*moved, *context.position_embeddings, context.position_ids]} == {"meta"}
    # The reads are not arguments: they stay where their layer is.
    assert all(not parameter.is_meta for parameter in decoder.parameters())


def test_model_that_transformers_shards_gives_the_same_logits_and_gradients(tmp_path: Path) -> None:
    save(make(), tmp_path)
    assert two_ranks(child_with_the_librarys_plan, tmp_path, {"fsdp_size": 2}) == [0, 0]


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_parallel_model_gives_the_same_logits_and_gradients(tmp_path: Path, tied: bool) -> None:
    save(make(tie_word_embeddings=tied), tmp_path)
    assert two_ranks(child_with_the_librarys_plan, tmp_path, {"tp_size": 2}) == [0, 0]
