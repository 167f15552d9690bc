"""Transformers' own model tests, for stock Qwen3 and for Block AttnRes Qwen3 in every source convention.

`python -m tests.upstream` collects this file with the library's sources in front of the path, so that `tests` is the
library's package. It is no test file of this repository: its name keeps it out of the suite.
"""

from typing import Any

from tests.models.qwen3.test_modeling_qwen3 import Qwen3ModelTest as _Stock
from tests.models.qwen3.test_modeling_qwen3 import Qwen3ModelTester as _StockTester
from transformers.models.auto import modeling_auto

from attnres.depth.plan import CONVENTIONS
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.modeling import Qwen3AttnResForCausalLM, Qwen3AttnResModel
from tests import test_fsdp_mixin, test_tensor_parallel_mixin

# The library runs its tests of several processes for few models only, which it names here.
for _models in (
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES,
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES,
):
    if _models is not None:
        _models.add(Qwen3AttnResConfig.model_type)

_HEADS = {
    "sequence_classification_class": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token_classification_class": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "question_answering_class": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}


class _Tester(_StockTester):
    config_class = Qwen3AttnResConfig
    base_model_class = Qwen3AttnResModel
    causal_lm_class = Qwen3AttnResForCausalLM

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        self.attnres_sources, self.attnres_num_blocks = parent.convention, 2


for _attribute, _mapping in _HEADS.items():
    setattr(_Tester, _attribute, _mapping.get(Qwen3AttnResConfig, None))

# One class per column of the table.
qwen3 = type("qwen3", (_Stock,), {})
for _convention in CONVENTIONS:
    _attributes = {"model_tester_class": _Tester, "convention": _convention}
    globals()[_convention] = type(_convention, (_Stock,), _attributes)
