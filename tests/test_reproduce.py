"""scripts/reproduce.py and scripts/ablate.py: what is run, what is skipped, and what the statistics say."""

import json
import math
import re
import shlex
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


def test_only_brings_the_baseline_that_isolates_the_idea_and_no_other(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def run_all(arms, *_):
        raise Asked(*arms)

    monkeypatch.setattr(reproduce, "run_all", run_all)
    with pytest.raises(Asked) as asked:
        reproduce.main(reproduce.Config(study="scope", only=("scope",), out=str(tmp_path)))
    assert set(asked.value.args) == {"scope", "opd-k1"} and reproduce.AGAINST["scope"] == ["opd-k1", "grpo"]


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


# --- what cannot be run, read or written; no training


def fake_run(folder: Path, name: str, every: int = 1, accuracy: float = 0.5) -> Path:
    """The folder of a complete run of grpo.py without texts."""
    (folder / name).mkdir(parents=True)
    at_end = {"eval/accuracy": accuracy, "eval/accuracy_se": 0.1, "eval/greedy": accuracy}
    summary = {"task": "addition", "method": "grpo", "steps": 2, "seconds": 1.0, "after": at_end}
    summary |= {"accuracy_before": 0.25, "accuracy_teacher": None}
    config = {"flags": {"eval_every": every}, "versions": {"torch": "2"}}
    lines = [{"step": step, **(at_end if step % every == 0 else {})} for step in range(3)]
    (folder / name / "summary.json").write_text(json.dumps(summary))
    (folder / name / "config.json").write_text(json.dumps(config))
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def run_small(folder: Path, seeds: int = 1, every: int = 1) -> dict[str, list[dict]]:
    return reproduce.run_all({"small": ["grpo.py"]}, seeds, 1, every, str(folder), Console(quiet=True))


@pytest.fixture
def untrained(monkeypatch):
    """Any training fails the test."""
    real = subprocess.run

    def called(command, **options):
        assert command[0] == "git", "a run was started"
        return real(command, **options)

    monkeypatch.setattr(reproduce.subprocess, "run", called)


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["", '{"step"', "[]", "{}", "\udcff"])
def test_a_damaged_run_is_named_before_any_trains(name, text, tmp_path, untrained):
    out = fake_run(tmp_path, "small-1")
    assert len(run_small(fake_run(tmp_path / "whole", "small-0").parent)["small"]) == 1
    (out / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"small-1/{re.escape(name)} (is damaged|does not end).*: delete"):
        run_small(tmp_path, seeds=2)


def test_runs_with_points_elsewhere_are_refused_before_any_trains(tmp_path, untrained):
    fake_run(tmp_path, "small-1", every=2)
    with pytest.raises(UserError, match=r"small-1 was made with --eval-every 2, not 1"):
        run_small(tmp_path, seeds=2)


def test_curves_have_the_steps_that_all_seeds_have(tmp_path, untrained):
    pair = [run_small(fake_run(tmp_path / str(n), "small-0", n).parent, every=n)["small"][0] for n in (1, 2)]
    assert [len(each["curve"]) for each in pair] == [3, 2]
    reproduce.plot(tmp_path / "plot.png", "two", {"small": pair}, "eval/accuracy")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_each_record_is_kept_when_its_run_is_done(tmp_path, monkeypatch):
    """The second of two runs fails: the first one's record is there."""
    monkeypatch.setitem(reproduce.STUDIES, "addition", {"grpo": ["grpo.py"]})
    fake_run(tmp_path / "runs", "grpo-0")
    failed = subprocess.CompletedProcess([], 1, "", "error: no\n")
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: time.sleep(0.5) or failed)
    given = {"study": "addition", "seeds": 2, "jobs": 1, "eval_every": 1, "folder": str(tmp_path / "runs")}
    with pytest.raises(UserError, match="grpo with seed 1 failed: error: no"):
        reproduce.main(reproduce.Config(**given, out=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "runs" / "grpo-0.json").read_text())["after"]["eval/accuracy"] == 0.5


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"task": '])
def test_a_damaged_record_is_named(text, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.STUDIES, "addition", {"grpo": ["grpo.py"]})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "grpo-0.json").write_text(text)
    with pytest.raises(UserError, match=r"grpo-0\.json is damaged .*: delete it, and run without --stored"):
        reproduce.main(reproduce.Config("addition", seeds=1, stored=True, out=str(tmp_path)))


def test_an_out_that_is_a_file_is_refused_before_any_trains(tmp_path, untrained):
    (tmp_path / "file").write_text("mine")
    for flag in ({"seeds": 1}, {"seeds": 1, "study": "scope"}):
        with pytest.raises(UserError, match=r"cannot write the folder .*choose another --out"):
            reproduce.main(reproduce.Config(**flag, out=str(tmp_path / "file"), folder=str(tmp_path / "runs")))
    with pytest.raises(UserError, match=r"cannot write the folder .*choose another --out"):
        ablate.main(ablate.Config(str(ROOT / "methods" / "grpo.py"), out=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("numbers", [{"seeds": 0}, {"seeds": -1}, {"jobs": 0}])
def test_numbers_of_runs_are_above_0(numbers, tmp_path, untrained):
    for call in (
        lambda: reproduce.main(reproduce.Config(**numbers, out=str(tmp_path))),
        lambda: ablate.main(ablate.Config(str(ROOT / "methods" / "grpo.py"), **numbers, out=str(tmp_path))),
    ):
        with pytest.raises(UserError, match="--seeds and --jobs must be at least 1"):
            call()


def test_flags_reach_a_run_as_they_were_given(tmp_path, monkeypatch):
    given = []
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(reproduce.subprocess, "run", lambda call, **_: given.extend(call) or done)
    (tmp_path / "first-3").mkdir()
    command = ["opd.py", "--teacher-prompt", "{prompt} {} {0}", "--model", "{folder}/first-{seed}"]
    reproduce.run("braces", command, 3, 1, str(tmp_path))
    assert given[2:6] == ["--teacher-prompt", "{prompt} {} {0}", "--model", f"{tmp_path}/first-3"]


def test_a_script_elsewhere_finds_the_package(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("import sys, posttrain\nsys.exit('x' * 5000 + '\\nerror: ' + posttrain.__path__[0])\n")
    with pytest.raises(UserError, match=f"mine with seed 0 failed: error: {ROOT}$"):
        reproduce.run("mine", [str(script)], 0, 1, str(tmp_path))


def test_a_failed_runs_cause_is_whole():
    line = "error: --teacher-prompt " + "x" * 800 + ": must hold {prompt}"
    assert reproduce.cause(f"a warning\n{line}\nanother warning\n", 2) == line
    assert reproduce.cause("Traceback\nKeyError: 'x'\n", 1) == "KeyError: 'x'"
    assert reproduce.cause("", -9) == "exit code -9"
    long = reproduce.cause("error: --tau " + "x" * 9000 + ": must be above 0", 2)
    assert len(long) < 1100 and long.startswith("error: --tau") and long.endswith("must be above 0")


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


def planned(method: str | Path, *grid: str, fixed: tuple[str, ...] = ()) -> tuple[dict, dict]:
    return ablate.plan(ablate.Config(str(ROOT / method), grid, fixed))


def test_the_docstrings_commands_can_be_run(monkeypatch):
    commands = re.findall(r"python (scripts/ablate\.py .*)", ablate.__doc__)
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        config = ablate.parse(ablate.Config, {})
        assert len(planned(config.method, *config.grid, fixed=config.fixed)[0]) == 4


def test_what_the_methods_own_check_refuses_is_left_out():
    arms, left_out = planned("methods/opd.py", "est=full,k1_pg", "lmbda=1,0.5")
    assert list(arms) == ["est=full, lmbda=1", "est=full, lmbda=0.5", "est=k1_pg, lmbda=1"]
    assert arms["est=k1_pg, lmbda=1"] == ["--est", "k1_pg", "--lmbda", "1"]
    assert left_out == {"est=k1_pg, lmbda=0.5": "--lmbda below 1 needs --est full or --est topk"}
    with pytest.raises(UserError, match=r"opd\.py refuses every combination: --lmbda below 1"):
        planned("methods/opd.py", "est=k1_pg,k3", fixed=("lmbda=0.5",))
    _, left_out = planned("methods/sinkd.py", "divergence=sinkhorn,kl", "debias=true")  # its check takes a kind, too
    assert list(left_out) == ["divergence=kl, debias=true"]


def test_a_main_whose_check_comes_late_neither_trains_nor_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "methods" / "grpo.py").read_text()
    late = text.replace("    check(config)\n", "").replace("        # --- score\n", "        check(config)\n")
    assert late.count("check(config)\n") == text.count("check(config)\n") == 1
    (tmp_path / "late.py").write_text(late)
    assert planned(tmp_path / "late.py", "lr=1e-3") == ({"lr=1e-3": ["--lr", "1e-3"]}, {})
    assert {path.name for path in tmp_path.iterdir()} <= {"late.py", "__pycache__"}


@pytest.mark.parametrize(
    ("grid", "fixed", "said"),
    [
        (["seed=1,2"], [], "cannot set --seed: --seeds N runs"),
        (["out=p,q"], [], "cannot set --out"),
        (["eval_every=1,2"], [], "cannot set --eval-every"),
        ([], ["resume=true"], "cannot set --resume"),
        ([], ["no-resume=true"], "cannot set --resume"),
        ([], ["--dry_run=true"], "cannot set --dry-run"),
        (["lr=1,2"], ["lr=3"], "a flag twice: give --lr once"),
        (["top_k=1,2"], ["--top-k=3"], "a flag twice: give --top-k once"),
        ([], ["lr=3", "lr=3"], "a flag twice: give --lr once"),
        ([], ["nonsense"], "--fixed 'nonsense' is not flag=value"),
        ([], ["=3"], "--fixed '=3' is not flag=value"),
    ],
)
def test_flags_that_no_combination_may_set(grid, fixed, said):
    with pytest.raises(UserError, match=said):
        planned("methods/grpo.py", *grid, fixed=tuple(fixed))


@pytest.mark.parametrize(
    "text", [b"def f(:\n", b"x = '\xff'\n", b"import nowhere_to_be_found\n", b"1 / 0\n", b"x = 1\n"]
)
def test_a_file_that_is_no_method_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "mine.py").write_bytes(text)
    with pytest.raises(UserError, match=r"mine\.py (cannot be imported|has no Config)"):
        planned(tmp_path / "mine.py", "lr=1")


def test_folders_are_named_by_all_flags_and_never_shared():
    assert ablate.folder_name(("steps=2", "est=full", "lmbda=1")) == "steps=2,est=full,lmbda=1"
    names = [ablate.folder_name((f"prompt={value}",)) for value in ("a b", "a/b", "a_b", "{a}", "a" * 300, "a" * 301)]
    assert len(set(names)) == len(names) and all(len(name) < 150 and "/" not in name for name in names)


def test_another_files_runs_are_refused(tmp_path, untrained):
    """A copy with another default, or the same file edited, never takes over what the first has trained."""
    method, out = tmp_path / "grpo.py", tmp_path / "out"
    text = (ROOT / "methods" / "grpo.py").read_text()
    method.write_text(text)
    fake_run(out, "lr=1-0")
    config = ablate.Config(str(method), ("lr=1",), seeds=1, eval_every=1, out=str(out))
    with pytest.raises(UserError, match=r"holds runs that were not made with .*grpo\.py as it is now: choose another"):
        ablate.main(config)  # nobody knows with what
    (out / "method.py").write_text(text)
    ablate.main(config)
    assert json.loads((out / "ablation.json").read_text())["methods"]["lr=1"]["eval/accuracy"] == 0.5
    method.write_text(text.replace("lr: float = ", "lr: float = 2 * "))
    with pytest.raises(UserError, match=r"as it is now \(see .*out/method\.py\): choose another --out, or delete"):
        ablate.main(config)
    assert (out / "method.py").read_text() == text and (out / "lr=1-0" / "summary.json").exists()


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
