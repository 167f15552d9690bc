"""Reads as modules: what libraries and plain hooks meet where a block reads, and the norm behind a read."""

import pytest
import torch
from torch import nn

from attnres.model.routing import is_routing


def test_no_linear_layer_and_no_norm_belongs_to_a_read(make_model):
    model = make_model()
    modules = {name: module for name, module in model.named_modules() if is_routing(f"{name}.weight")}
    assert len(modules) == 26
    for name, module in modules.items():
        assert not isinstance(module, nn.Linear) and "Norm" not in type(module).__name__, name


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*quantized tensor creation")
@torch.no_grad()
def test_dynamic_quantisation_leaves_the_reads_alone(make_model, ids):
    model = make_model()
    loss = float(model(ids, labels=ids).loss)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert 0 < abs(float(quantised(ids, labels=ids).loss) - loss) < 0.01
