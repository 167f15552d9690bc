"""`python -m attnres.commands.judge`: its files, its lines, its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from attnres import __version__
from attnres.commands.judge import main
from attnres.tables import columns
from attnres.tables.folder import read_table
from tests.tables.test_default_readers import READERS, unlike

FLAGS = ["--margin", "0.02", "--bootstrap", "200", "--sign-flips", "999"]


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        {
            "prompt": f"p{unit}",
            "layer": layer,
            "head": head,
            "model": "NA",
            "delta": mean + 0.02 * rng.normal(),
            "kl": 0.001,
        }
        for layer, head, mean in ((0, 0, 0.1), (0, 1, 0.0))
        for unit in range(24)
    ]
    path = tmp_path / "heads.csv"
    pd.DataFrame(lines).to_csv(path, index=False)
    return path


NAMED = ["--unit", "prompt", "--component", "layer", "head", "--effect", "delta", "--group", "model"]


def test_judge_writes_cells_and_a_report_that_loads_nothing(table, capsys):
    assert main([str(table), *NAMED, *FLAGS]) == 0
    out = table.with_name("heads-judged")
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    cells = read_table(out, columns.COMPONENTS).set_index("component")
    assert cells["verdict"].to_dict() == {"layer 0 head 0": "causal", "layer 0 head 1": "negligible"}
    page, text = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page
    for shown in (page, text):
        assert "layer 0 head 0" in shown and "model NA: 2 components, 1 causal, 1 negligible" in shown
        assert f"attnres {__version__}" in shown and "Holm" in shown
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(table), *NAMED, *FLAGS]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("reader", READERS)
def test_cells_are_read_at_the_defaults_as_they_were_written(table, reader):
    main([str(table), *NAMED, *FLAGS])
    out = table.with_name("heads-judged")
    described = {column.name: column for column in columns.COMPONENTS.columns}
    assert unlike(READERS[reader](out / "cells.csv"), read_table(out, columns.COMPONENTS), described) == []


@pytest.mark.parametrize(
    ("flag", "value", "said", "code"),
    [
        ("--margin", "-1", "--margin=-1.0: expected a positive number", 2),
        ("--sign-flips", "10", "--sign-flips=10: expected at least 999", 2),
        ("--family-size", "0", "--family-size=0: expected a positive number", 2),
        ("--family-size", "100", "--sign-flips=999 cannot reach alpha=0.05 after Holm over 100", 2),
        ("--second-margin", "nan", "--second-margin=nan: expected a positive number", 2),
        ("--effect", "dleta", "no column 'dleta' (--effect); did you mean 'delta'?", 2),
        ("--effect", "model", "row 1 (unit p0, component layer 0 head 0, group model NA): effect is 'NA'", 3),
        ("--out", "{}", "its files would be overwritten", 2),
    ],
)
def test_judge_says_in_one_line_what_is_wrong(table, capsys, flag, value, said, code):
    (table.parent / "preregistration.json").write_text("{}")
    assert main([str(table), *NAMED, *FLAGS, flag, value.format(table.parent)]) == code
    shown = capsys.readouterr().err
    assert said in shown and shown.startswith("error: ") and shown.count("\n") == 1
    assert not table.with_name("heads-judged").exists()


def test_judge_does_not_overwrite_the_table_it_reads(tmp_path, capsys):
    path = tmp_path / "cells.csv"
    path.write_text("unit,component,effect\nd1,a,1\nd2,a,2\n")
    assert main([str(path), *FLAGS, "--out", str(tmp_path)]) == 2
    assert path.read_text().startswith("unit,") and "overwritten" in capsys.readouterr().err


def test_report_says_first_that_the_units_are_too_few(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("unit,component,effect\n" + "".join(f"d{k},a,{1 + k / 100}\n" for k in range(5)))
    assert main([str(path), *FLAGS]) == 0
    text = (tmp_path / "few-judged" / "report.md").read_text()
    assert text.index("1 of 1 components have too few units") < text.index("## Methods")


def test_methods_follow_the_flags_and_the_table(table):
    def paragraph(*flags: str) -> str:
        main([str(table), *NAMED, *FLAGS, *flags])
        return (table.with_name("heads-judged") / "report.md").read_text().split("## Methods, to paste")[1]

    changed = {
        ("--margin", "0.0375"): "±0.0375",
        ("--second-margin", "0.625"): "below 0.625",
        ("--alpha", "0.125"): "87.5% BCa",
        ("--sign-flips", "1234"): "1,234 flips",
        ("--bootstrap", "321"): "321 resamples",
        ("--seed", "17"): "17 (statistics)",
        ("--power", "0.75"): "power of 0.75",
        ("--family-size", "7"): "families of 7 tests",
    }
    plain = paragraph()
    for flags, said in changed.items():
        assert said not in plain and said in paragraph(*flags)
    assert "24 units (prompt)" in plain and "delta of 2 components" in plain


def test_judge_loads_no_model_library(table):
    code = (
        "import sys; from attnres.commands.judge import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'lightning', 'hydra'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(table), *NAMED, *FLAGS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((table.with_name("heads-judged") / "summary.json").read_text())["columns"]["effect"] == ["delta"]
