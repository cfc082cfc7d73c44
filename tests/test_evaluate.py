"""scripts/evaluate.py leaves two files, reads its own config back, and spoils no run's."""

import dataclasses
import json

import pytest

from posttrain.common.cli import Engines, UserError
from posttrain.scripts import evaluate

SMALL = {"problems": 4, "samples": 2, "max_new_tokens": 8}


def test_an_evaluation_in_a_folder(tmp_path, capsys):
    config = evaluate.Config(**SMALL, out=str(tmp_path / "e"))
    evaluate.main(config)
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert evaluate.Config(**{**summary["config"], "system": Engines(**summary["config"]["system"])}) == config
    assert f"{summary['avg@2']['mean']:.3f}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["sampled"] * 8 + ["greedy"] * 4


@pytest.mark.parametrize("name", ["summary.json", "samples.jsonl", "config.json"])
def test_a_folder_that_holds_something_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="already holds"):
        evaluate.main(evaluate.Config(**SMALL, out=str(tmp_path)))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_dry_run_says_that_it_knows_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(dataclasses.replace(evaluate.Config(**SMALL, out="e"), system=Engines(dry_run=True)))
    assert stop.value.code == 0 and "no estimate here" in capsys.readouterr().out and not list(tmp_path.iterdir())
