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

# The library's tests know a model by the names of its classes, which its own registries hold and `register` leaves out.
_REGISTRIES = {
    "base_model_class": "MODEL",
    "causal_lm_class": "MODEL_FOR_CAUSAL_LM",
    "sequence_classification_class": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "token_classification_class": "MODEL_FOR_TOKEN_CLASSIFICATION",
    "question_answering_class": "MODEL_FOR_QUESTION_ANSWERING",
}
_CLASSES = {
    attribute: getattr(modeling_auto, f"{registry}_MAPPING").get(Qwen3AttnResConfig, None)
    for attribute, registry in _REGISTRIES.items()
}
_CLASSES |= {"base_model_class": Qwen3AttnResModel, "causal_lm_class": Qwen3AttnResForCausalLM}
for _attribute, _class in _CLASSES.items():
    if _class is not None:
        _names = getattr(modeling_auto, f"{_REGISTRIES[_attribute]}_MAPPING_NAMES")
        _names[Qwen3AttnResConfig.model_type] = _class.__name__


class _Tester(_StockTester):
    config_class = Qwen3AttnResConfig

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        self.attnres_sources, self.attnres_num_blocks = parent.convention, 2


for _attribute, _class in _CLASSES.items():
    setattr(_Tester, _attribute, _class)

# One class per column of the table.
qwen3 = type("qwen3", (_Stock,), {})
for _convention in CONVENTIONS:
    _attributes = {
        "model_tester_class": _Tester,
        "convention": _convention,
        # Read from the copyright line of the configuration's file, which ours does not have.
        "test_can_init_all_missing_weights_before_2023": True,
    }
    globals()[_convention] = type(_convention, (_Stock,), _attributes)
