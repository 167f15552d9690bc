"""A preregistration that says the same stays; another one amends it and keeps it."""

import errno
import json
import os

import pytest

from attnres.errors import ConfigError, StorageError
from attnres.files.whole_files import MOST_DEPTH
from attnres.probe import preregistration
from attnres.probe.preregistration import write_preregistration


def test_preregistration_keeps_the_first_and_tells_of_an_amendment(tmp_path):
    path = tmp_path / "preregistration.json"
    assert write_preregistration(path, {"written": "first", "cells": ["a"]})["written"] == "first"
    before = path.read_bytes()
    assert write_preregistration(path, {"written": "later", "cells": ["a"]})["written"] == "first"
    assert path.read_bytes() == before
    amended = write_preregistration(path, {"written": "later", "cells": ["a", "b"]})
    assert amended["amends"]["written"] == "first" and amended["written"] == "later"
    (kept,) = tmp_path.glob("preregistration-*.json")
    assert kept.read_bytes() == before and kept.stem.endswith(amended["amends"]["sha256"][:8])
    assert write_preregistration(path, {"written": "last", "cells": ["a", "b"]}) == amended


def test_preregistration_without_a_format_is_of_the_first_and_another_is_refused(tmp_path):
    path = tmp_path / "preregistration.json"
    path.write_text(json.dumps({"written": "before formats", "cells": ["a"]}))
    before = path.read_bytes()
    assert write_preregistration(path, {"written": "later", "cells": ["a"]})["written"] == "before formats"
    assert path.read_bytes() == before
    assert write_preregistration(tmp_path / "new.json", {"cells": ["a"]})["format"] == 1
    path.write_text(json.dumps({"format": 2, "cells": ["a"]}))
    with pytest.raises(ConfigError, match="format 2, this version reads format 1"):
        write_preregistration(path, {"written": "later", "cells": ["a"]})


def test_preregistration_that_cannot_be_read_is_written_anew(tmp_path, caplog):
    path = tmp_path / "preregistration.json"
    path.write_text((MOST_DEPTH + 1) * "[")
    assert write_preregistration(path, {"written": "now", "cells": ["a"]})["written"] == "now"
    assert "cannot be read" in caplog.text and json.loads(path.read_text())["cells"] == ["a"]


def test_register_names_a_full_disk_before_other_processes_wait(tmp_path, monkeypatch):
    def full(path, registered):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preregistration, "preregistration", lambda fixed: {"cells": [], "hashes": {}})
    monkeypatch.setattr(preregistration, "write_preregistration", full)
    with pytest.raises(StorageError, match="No space left on device; free space or choose another runs_dir"):
        preregistration.register(tmp_path, None)
