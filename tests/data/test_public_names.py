"""The public names of the room, and a configuration that loads no model library."""

import subprocess
import sys

import pytest

import attnres.data


def test_data_config_loads_neither_torch_nor_lightning():
    code = "import attnres.data.config, sys; print({'torch', 'lightning', 'pyarrow'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_public_names_of_data_can_be_loaded():
    assert {getattr(attnres.data, name) for name in attnres.data.__all__ if name != "SPLITS"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = attnres.data.nothing
