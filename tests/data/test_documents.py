"""Which documents were in a step, asked by command."""

import dataclasses
import json

import pytest
import yaml

from attnres.commands import documents
from attnres.data import TextDataModule
from attnres.errors import ConfigError
from attnres.files.whole_files import MOST_DEPTH


@pytest.fixture
def run(config, corpus, tmp_path):
    folder = tmp_path / "runs" / "tiny-0123abcd"
    folder.mkdir(parents=True)
    plain = {"data": dataclasses.asdict(config), "trainer": {"global_batch_size": 6}}
    plain["data"] |= {"paths": list(config.paths), "weights": []}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    (folder / "provenance.json").write_text(json.dumps({"hashes": {"data": corpus.fingerprint}}))
    return folder


def test_documents_of_a_step_are_the_pieces_of_its_batch(run, corpus, config, capsys):
    assert documents.main(["--run", str(run), "--step", "4"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (batch,) = TextDataModule(corpus, config, 6, 6, steps=range(3, 4)).train_dataloader()
    for sample, (ids, window) in enumerate(zip(batch["input_ids"].tolist(), batch["sample_ids"].tolist(), strict=True)):
        pieces = [piece for piece in printed if piece["sample"] == sample]
        assert {piece["window"] for piece in pieces} == {window}
        rebuilt: list[int] = []
        for piece in pieces:
            assert piece["at"] == len(rebuilt)
            assert piece["name"] == corpus.names[piece["document"]]
            tokens = corpus.document_tokens(piece["document"])[piece["offset"] :]
            rebuilt += tokens[: piece["tokens"]].tolist()
        assert rebuilt == ids


def test_documents_takes_a_run_without_its_hash_and_names_mistakes(run, capsys):
    assert documents.main(["--run", str(run.with_name("tiny")), "--step", "1"]) == 0
    for words, code, message in (
        (["--run", str(run), "--step", "0"], 2, "--step: expected at least 1"),
        (["--run", "runs/nothing", "--step", "1"], 2, "0 runs match runs/nothing"),
        (["--run", str(run.parent), "--step", "1"], 2, "is not a run folder"),
    ):
        assert documents.main(words) == code
        assert message in capsys.readouterr().err
    (run / "provenance.json").write_text(json.dumps({"hashes": {"data": "0" * 64}}))
    assert documents.main(["--run", str(run), "--step", "1"]) == 3
    assert "was trained on other text" in capsys.readouterr().err


def test_read_run_refuses_an_ambiguous_name(run):
    other = run.with_name("tiny-ffff")
    other.mkdir()
    (other / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="2 runs match"):
        documents.read_run(run.with_name("tiny"))


@pytest.mark.parametrize("name", ["provenance.json", "config.yaml"])
def test_documents_refuses_a_deeply_nested_file_in_one_line(run, capsys, name):
    levels = MOST_DEPTH + 1
    (run / name).write_text("[" * levels + "]" * levels)
    assert documents.main(["--run", str(run), "--step", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "is not a run folder" in errors


def test_documents_refuses_a_configuration_that_is_nested_too_deeply_to_be_read(run, monkeypatch):
    def too_deep(text):
        raise RecursionError

    monkeypatch.setattr(documents.yaml, "safe_load", too_deep)
    with pytest.raises(ConfigError, match="is not a run folder"):
        documents.read_run(run)
