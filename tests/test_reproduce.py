"""scripts/reproduce.py and scripts/ablate.py: what is run, what is skipped, and what the statistics say."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.common.cli import UserError
from posttrain.scripts import ablate, reproduce

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "scripts" / "results" / "runs"
NUMBERS = {"steps": 2, "prompts-per-step": 2, "group-size": 2, "eval-problems": 4, "eval-samples": 2}
SMALL = [part for name, value in NUMBERS.items() for part in (f"--{name}", str(value))] + ["--preset", "grpo"]
ARMS = {"slow": ["pi_distill.py", *SMALL], "fast": ["pi_distill.py", *SMALL, "--lr", "1e-2"]}


# --- statistics


def test_paired_differences_by_hand():
    found = reproduce.paired([0.1, 0.2, 0.3, -0.1, 0.0])
    assert found["difference"] == pytest.approx(0.1) and found["seeds_above"] == 3
    deviation = math.sqrt((0.0 + 0.01 + 0.04 + 0.04 + 0.01) / 4)
    assert found["t_half"] == pytest.approx(2.776445 * deviation / math.sqrt(5), rel=1e-6)  # t at 0.975, 4 degrees
    low, high = found["interval"]
    assert -0.1 <= low < 0.1 < high <= 0.3
    assert high - low < 2 * found["t_half"]  # as its docstring says: too narrow for few seeds
    assert reproduce.paired([0.1, 0.2, 0.3, -0.1, 0.0]) == found  # the resampling is seeded


def test_the_bootstrap_of_two_values_is_known():
    """Means of two draws of {0, 1} are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the 95% interval is all of [0, 1]."""
    assert reproduce.paired([0.0, 1.0])["interval"] == [0.0, 1.0]


def test_one_seed_has_no_interval():
    found = reproduce.paired([0.25])
    assert found == {"difference": 0.25, "seeds_above": 1, "interval": None, "t_half": None}


def test_every_baseline_is_an_arm():
    for arm, others in reproduce.AGAINST.items():
        assert {arm, *others} - {"before"} <= reproduce.STUDIES["methods"].keys()


def test_an_arms_name_means_one_command_in_all_studies():
    seen = {}
    for arms in reproduce.STUDIES.values():
        for arm, command in arms.items():
            assert seen.setdefault(arm, command) == command


# --- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def records(folder):
    return reproduce.run_all(ARMS, 2, 2, 1, str(folder), Console(quiet=True))


def test_a_record_holds_what_its_run_wrote(records, folder):
    for arm, seeds in records.items():
        for seed, record in enumerate(seeds):
            lines = (folder / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines()
            values = [[line["step"], line["eval/accuracy"]] for line in map(json.loads, lines)]
            assert record["curve"] == values and len(values) == 3
            assert record["after"]["eval/accuracy"] == values[-1][1] and record["before"] == values[0][1]
            command = ["python", "methods/pi_distill.py", *ARMS[arm][1:], "--seed", str(seed), "--eval-every", "1"]
            assert record["command"].split() == command
            assert record["versions"]["torch"] and record["versions"]["git_commit"]


def test_complete_runs_are_not_run_again(records, folder, monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", None)  # any training would fail
    assert reproduce.run_all(ARMS, 2, 2, 1, str(folder), Console(quiet=True)) == records


def test_a_stopped_run_goes_on(records, folder, tmp_path):
    out = tmp_path / "slow-0"
    first = [*SMALL[2:], "--steps", "1", "--save-every", "1", "--seed", "0", "--eval-every", "1", "--out", str(out)]
    subprocess.run([sys.executable, ROOT / "methods" / "pi_distill.py", *first], check=True, capture_output=True)
    (out / "summary.json").unlink()
    found = reproduce.record(reproduce.run("slow", ARMS["slow"], 0, 1, str(tmp_path)), "slow", ARMS["slow"], 0, 1)
    assert [step for step, _ in found["curve"]] == [0, 1, 2]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_failed_run_ends_the_call_in_one_line(tmp_path, monkeypatch):
    run, calls = reproduce.run, []

    def spy(arm, *rest):
        calls.append(arm)
        return run(arm, *rest) if arm == "wrong" else time.sleep(0.1)

    monkeypatch.setattr(reproduce, "run", spy)
    arms = {"wrong": ["grpo.py", "--lr", "-1"]} | {f"slow-{i}": ["grpo.py"] for i in range(20)}
    with pytest.raises(UserError, match=r"wrong with seed 0 failed: error: --lr -1\.0"):
        reproduce.run_all(arms, 1, 1, 1, str(tmp_path), Console(quiet=True))
    assert len(calls) < len(arms)  # the others are not started any more


def test_a_study_from_its_runs_and_the_same_from_the_stored_ones(records, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(reproduce.STUDIES, "methods", ARMS)
    monkeypatch.setattr(reproduce, "AGAINST", {"fast": ["slow"], "slow": ["before"]})
    given = {"seeds": 2, "eval_every": 1, "folder": str(folder), "out": str(tmp_path)}
    reproduce.main(reproduce.Config(only=("fast",), **given))  # and with it what it is compared with
    first = json.loads((tmp_path / "methods.json").read_text())
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(
        f"{arm}-{seed}.json" for arm in ARMS for seed in (0, 1)
    )
    fast, slow = ([record["after"]["eval/accuracy"] for record in records[arm]] for arm in ("fast", "slow"))
    gains = [a - b for a, b in zip(fast, slow, strict=True)]
    assert first["methods"]["fast"]["against"]["slow"]["difference"] == pytest.approx(sum(gains) / 2)
    (tmp_path / "methods.json").unlink()
    reproduce.main(reproduce.Config(stored=True, **given | {"folder": str(tmp_path / "nothing")}))
    assert json.loads((tmp_path / "methods.json").read_text())["methods"] == first["methods"]
    assert "to slow" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"lacks slow-2\.json"):
        reproduce.main(reproduce.Config(stored=True, **given | {"seeds": 3}))


def test_the_stored_table_is_what_the_stored_runs_give(tmp_path):
    stored = json.loads((RUNS.parent / "methods.json").read_text())
    shutil.copytree(RUNS, tmp_path / "runs")
    seeds = min(each["seeds"] for each in stored["methods"].values())
    reproduce.main(reproduce.Config(stored=True, seeds=seeds, out=str(tmp_path)))
    assert json.loads((tmp_path / "methods.json").read_text())["methods"] == stored["methods"]
    table = (tmp_path / "methods.txt").read_text()
    assert table.count("\n") == 2 + len(reproduce.AGAINST)
    assert table == (RUNS.parent / "methods.txt").read_text() and table in (ROOT / "README.md").read_text()


# --- ablate


def test_combinations_multiply_and_say_what_is_wrong():
    assert ablate.combinations(("tau=1,2", "kl=a,b")) == [
        ("tau=1", "kl=a"), ("tau=1", "kl=b"), ("tau=2", "kl=a"), ("tau=2", "kl=b"),
    ]  # fmt: skip
    assert ablate.combinations(()) == [()]
    for wrong, message in {"tau": "flag=value", "tau=1,,2": "flag=value", "tau=1,1": "a value twice"}.items():
        with pytest.raises(UserError, match=message):
            ablate.combinations((wrong,))
    with pytest.raises(UserError, match="a flag twice"):
        ablate.combinations(("top_k=1", "top-k=2"))


def test_a_setting_becomes_a_flag():
    assert ablate.flag("tau=0.5") == ["--tau", "0.5"]
    assert ablate.flag("share_prompts=true") == ["--share-prompts"]
    assert ablate.flag("share-prompts=False") == ["--no-share-prompts"]


def test_ablate_as_a_user_calls_it_twice_with_a_grown_grid(tmp_path):
    fixed = ["--fixed", *(f"{name}={value}" for name, value in NUMBERS.items()), "preset=grpo"]

    def call(grid: str):
        command = [
            ROOT / "scripts" / "ablate.py",
            ROOT / "methods" / "pi_distill.py",
            "--grid",
            grid,
            "--seeds",
            "2",
            *fixed,
        ]
        command += ["--eval-every", "1"]
        return subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)

    done = call("lr=1e-4,1e-2")
    out = tmp_path / "runs" / "ablate-pi_distill"
    assert done.returncode == 0, done.stderr
    assert (out / "ablation.png").stat().st_size > 10_000
    first = json.loads((out / "ablation.json").read_text())["methods"]
    assert list(first) == ["lr=1e-4", "lr=1e-2"] and all(each["seeds"] == 2 for each in first.values())
    assert "to the first" in done.stdout
    times = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert len(times) == 4
    assert call("lr=1e-4,1e-2,1e-3").returncode == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    grown = json.loads((out / "ablation.json").read_text())["methods"]
    assert list(grown) == ["lr=1e-4", "lr=1e-2", "lr=1e-3"] and grown["lr=1e-4"] == first["lr=1e-4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["methods/none.py", "--grid", "tau=1"], "is no method's file"),
        (["methods/scope_opd.py", "--grid", "tau=0.5,x"], "--tau"),
        (["methods/scope_opd.py", "--grid", "tau=0.5,-1"], "--tau -1.0: must be"),
        (["methods/scope_opd.py", "--grid", "tauu=1"], "near: --tau"),
    ],
)
def test_ablate_refuses_in_one_line_before_anything_runs(arguments, said, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "ablate.py", ROOT / arguments[0], *arguments[1:]],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and said in done.stderr
    assert not list(tmp_path.iterdir())
