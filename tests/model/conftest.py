import pytest
import torch
from tiny_models import SHAPE
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM


@pytest.fixture
def make_model():
    """A tiny AttnRes model whose routing is far from uniform."""

    def make(convention: str = "block_sum", dtype: torch.dtype = torch.float32, **changes) -> Qwen3AttnResForCausalLM:
        torch.manual_seed(0)
        fields = SHAPE | {"attnres_sources": convention, "attnres_num_blocks": 3} | changes
        model = Qwen3AttnResForCausalLM(Qwen3AttnResConfig(**fields)).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_res_" in name and parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def vanilla() -> Qwen3ForCausalLM:
    """A vanilla Qwen3 with embeddings of realistic norm, so that the residual stream is not all eps."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.2)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
