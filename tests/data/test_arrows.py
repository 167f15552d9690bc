"""text/ -> corpus/ -> windows/, and a configuration that loads no model library."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import attnres.data

ROOM = Path(attnres.data.__file__).parent
MAY_IMPORT = {"text": {"config", "text"}, "corpus": {"config", "text", "corpus"}}
MAY_IMPORT["windows"] = MAY_IMPORT["corpus"] | {"windows"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_of_data_import_along_the_arrows(room):
    for path in (ROOM / room).glob("*.py"):
        imported = set(re.findall(r"attnres\.data\.(\w+)", path.read_text()))
        assert imported <= MAY_IMPORT[room], path


def test_data_config_loads_neither_torch_nor_lightning():
    code = "import attnres.data.config, sys; print({'torch', 'lightning', 'pyarrow'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_public_names_of_data_can_be_loaded():
    assert {getattr(attnres.data, name) for name in attnres.data.__all__ if name != "SPLITS"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = attnres.data.nothing
