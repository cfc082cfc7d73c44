"""scripts/balance_difficulty.py: bins, targets and copies of section 5.1, and a file that a method trains on."""

import collections
import json
import random
import sys

import pytest

from posttrain.common.cli import UserError, cli
from posttrain.common.tasks import make_task, text_of
from posttrain.methods import uni_opd
from posttrain.scripts import balance_difficulty
from posttrain.scripts.balance_difficulty import Config, balanced, bin_targets, main

U, J = [50, 10, 4, 0, 1, 5, 8, 12, 40], [60, 20, 12, 9, 7, 5, 4, 3, 2]
MAKE = ("upsample", "auto", 8.0, 1.0)


@pytest.mark.parametrize(("sizes", "shape"), [(U, "U"), (J, "J")])
def test_auto_sees_the_shape(sizes, shape):
    assert bin_targets(sizes, *MAKE) == bin_targets(sizes, "upsample", shape, 8.0, 1.0)
    other = "J" if shape == "U" else "U"
    assert bin_targets(sizes, *MAKE) != bin_targets(sizes, "upsample", other, 8.0, 1.0)


def test_hand_numbers_of_the_targets():
    assert bin_targets(U, "upsample", "U", 8.0, 1.0) == [50, 50, 32, 0, 8, 40, 50, 50, 40]
    assert bin_targets(U, "upsample", "U", 2.0, 0.5) == [50, 20, 8, 0, 2, 10, 16, 24, 40]
    assert bin_targets(J, "upsample", "J", 3.0, 1.0) == [60, 60, 36, 27, 21, 15, 12, 9, 6]
    assert bin_targets(J, "upsample", "J", 8.0, 0.25) == [60, 20, 15, 15, 15, 15, 15, 15, 15]
    assert bin_targets(J, "drop_easy", "auto", 8.0, 1.0) == [*J[:8], 0]
    assert bin_targets(J, "drop_hard", "auto", 8.0, 1.0) == [0, *J[1:]]
    assert bin_targets(J, "none", "auto", 8.0, 1.0) == J


@pytest.mark.parametrize("sizes", [U, J])
def test_every_problem_survives_and_bins_outside_the_shape_stay(sizes):
    correct = [c for c, size in enumerate(sizes) for _ in range(size)]
    random.Random(0).shuffle(correct)
    chosen = balanced(correct, 8, random.Random(1), *MAKE)
    assert set(chosen) == set(range(len(correct)))
    after = [sum(correct[i] == c for i in chosen) for c in range(9)]
    assert after == bin_targets(sizes, *MAKE) and after[0] == sizes[0]
    assert sizes is J or after[8] == sizes[8]
    copies = collections.Counter(chosen)
    for c in range(9):  # as even as whole copies allow
        numbers = [copies[i] for i in range(len(correct)) if correct[i] == c]
        assert not numbers or max(numbers) - min(numbers) <= 1
    assert chosen == balanced(correct, 8, random.Random(1), *MAKE) != balanced(correct, 8, random.Random(2), *MAKE)


def run(tmp_path, name, **given):
    out = tmp_path / name
    main(Config(**{"problems": 120, "samples": 4, **given}, out=str(out)))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_file_is_reproducible_balanced_by_domain_and_trains_a_method(tmp_path):
    rows = run(tmp_path, "balanced.jsonl")
    assert rows == run(tmp_path, "again.jsonl") and rows != run(tmp_path, "other.jsonl", seed=1)
    plain = run(tmp_path, "plain.jsonl", action="none")
    prompts = {row["prompt"][0]["content"] for row in plain}
    assert prompts == {row["prompt"][0]["content"] for row in rows} and len(plain) == len(prompts) < len(rows)
    assert prompts <= {text_of(example) for example in make_task("arithmetic").draw(120, 0)}
    for domain in ("add", "mul"):
        sizes = [sum(row["correct"] == c and row["domain"] == domain for row in plain) for c in range(5)]
        after = [sum(row["correct"] == c and row["domain"] == domain for row in rows) for c in range(5)]
        assert after == bin_targets(sizes, *MAKE)
    small = {"steps": 1, "prompts_per_step": 4, "group_size": 4, "eval_problems": 4, "eval_samples": 1}
    task = make_task(str(tmp_path / "balanced.jsonl"))
    assert len(task.train) > len({text_of(example) for example in task.train})  # copies count
    assert not {text_of(example) for example in task.train} & {text_of(example) for example in task.test}
    uni_opd.main(uni_opd.Config(**small, task=str(tmp_path / "balanced.jsonl"), out=str(tmp_path / "run")))


def test_dropping_removes_the_bin(tmp_path):
    plain = run(tmp_path, "plain.jsonl", action="none")
    hard = run(tmp_path, "hard.jsonl", action="drop_hard")
    assert all(row["correct"] > 0 for row in hard) and len(hard) == sum(row["correct"] > 0 for row in plain)


@pytest.mark.parametrize(
    ("given", "word"),
    [(["--temperature", "0"], "--temperature"), (["--cap", "0.5"], "--cap"), (["--samples", "1"], "--samples"),
     (["--out", "/proc/x.jsonl"], "--out"), (["--task", "no.jsonl"], "no.jsonl"), (["--action", "drop"], "drop_easy")],
)  # fmt: skip
def test_bad_input_is_one_line(given, word, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["balance_difficulty.py", "--problems", "8", *given])
    with pytest.raises(SystemExit) as stop:
        cli(main, Config)
    said = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and word in said[-1] and said[-1].startswith("error: ")


@pytest.mark.parametrize("out", ["data.jsonl", "nowhere/out.jsonl"])
def test_the_data_stays_and_a_place_that_cannot_be_written_is_told_before_the_model_answers(out, tmp_path, monkeypatch):
    monkeypatch.setattr(balance_difficulty, "load_model", None)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(20)))
    before = data.read_bytes()
    with pytest.raises(UserError, match="choose another --out"):
        main(Config(task=str(data), out=str(tmp_path / out)))
    assert data.read_bytes() == before and list(tmp_path.iterdir()) == [data]
