"""--rollout http://... and --teacher http://... without vLLM: a process of its own answers as vLLM does, or otherwise.

What only the real server can show is in tests/test_servers.py.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from safetensors.torch import load_file

from posttrain.common.cli import System, UserError, cli
from posttrain.common.engines.client import Servers
from posttrain.common.engines.hf import HFEngine
from posttrain.common.engines.teacher import ServerModel, served
from posttrain.common.models import TINY, load_model, load_tokenizer
from posttrain.common.rollout import Sampling, make_engine
from posttrain.common.tasks import make_task
from posttrain.methods import grpo, opd, pi_distill, scope_opd, skill_sd, sod, uni_opd

ROOT, CPU = Path(__file__).resolve().parents[1], torch.device("cpu")
SMALL = {"steps": 6, "prompts-per-step": 3, "group-size": 4, "eval-problems": 4, "eval-samples": 2, "eval-every": 3}
SMALL |= {"save-every": 100, "lr": 1e-3, "warmup": 1, "max-new-tokens": 8}
PROBLEMS = make_task("addition").heldout(4)


def post(url: str, path: str, **body) -> dict:
    return httpx.post(url + path, json=body, trust_env=False).json()


@contextlib.contextmanager
def stub(folder: Path = TINY / "addition-student", kind: str = "") -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, ROOT / "tests" / "stub_server.py", str(port), str(folder), kind])
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server():
    with stub() as url:
        yield url


@pytest.fixture
def url(server):
    """Of a server that lives, whatever the test before has done to it."""
    post(server, "/dies", after=10**9)
    return server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Servers, "patience", 1)
    monkeypatch.setattr("posttrain.common.models.SYSTEM", System())
    monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)
    served.cache_clear()


def flags(given: dict) -> list[str]:
    return [f"--{name}={value}" if value is not True else f"--{name}" for name, value in given.items()]


def run(monkeypatch, method, **given) -> int:
    """The script's command line, in this process. -> its exit code"""
    monkeypatch.setattr(sys, "argv", ["x.py", *flags({**SMALL, **given})])
    try:
        cli(method.main, method.Config, getattr(method, "PRESETS", None))
    except SystemExit as stop:
        return stop.code
    return 0


def lines(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def same_run(a: Path, b: Path) -> None:
    """Bit for bit; every line once."""
    assert [row["step"] for row in lines(b)] == list(range(SMALL["steps"] + 1))
    assert json.dumps(lines(a)) == json.dumps(lines(b))
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    x, y = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    start = load_file(TINY / "addition-student" / "model.safetensors")
    assert any(not torch.equal(x[k], start[k]) for k in x)


# --- all servers die: a run has 12 rows to evaluate and 12 rows a step
DEATHS = {"as it samples for step 5": (12 + 3 * 12 + 12 + 12 + 5, 4)}
DEATHS["as it evaluates behind the update of step 3"] = (12 + 3 * 12 + 5, 2)


@pytest.fixture
def whole(url, tmp_path_factory, monkeypatch):
    """A run whose servers live, and its flags; made once."""
    folder = tmp_path_factory.getbasetemp() / "whole"
    given = {"rollout": url, "reward": f"{folder}/reward.py:short"}
    if not folder.exists():
        folder.mkdir()
        (folder / "reward.py").write_text("def short(example, text):\n    return -len(text) / 20\n")
        assert run(monkeypatch, grpo, out=folder / "run", **given) == 0
    return folder / "run", given


@pytest.mark.parametrize(("after", "saved"), DEATHS.values(), ids=DEATHS.keys())
def test_when_all_servers_die_nothing_is_lost(after, saved, url, whole, tmp_path, monkeypatch, capfd):
    expected, given = whole
    post(url, "/dies", after=after)
    capfd.readouterr()
    assert run(monkeypatch, grpo, out=tmp_path / "cut", **given) == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: --rollout: no server answers") and said.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "cut" / "checkpoint").iterdir()] == [f"step-{saved:06d}"]
    assert f"goes on from step {saved}" in said.out
    post(url, "/dies", after=10**9)
    assert run(monkeypatch, grpo, out=tmp_path / "cut", resume=True, **given) == 0
    same_run(expected, tmp_path / "cut")


def test_processes_say_once_that_all_servers_died_and_save(url, tmp_path):
    """One row a step: one of the two has none to sample, and none for the teacher to score."""
    given = {**SMALL, "prompts-per-step": 1, "group-size": 1, "eval-every": 0, "est": "k1_pg", "out": tmp_path / "run"}
    post(url, "/dies", after=12 + 12 + 3)  # the teacher is evaluated too
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, str(ROOT / "methods" / "opd.py"), *flags({**given, "rollout": url, "teacher": url})]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    post(url, "/dies", after=10**9)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(said) == 1 and "--rollout: no server answers" in said[0], done.stderr
    assert [row["step"] for row in lines(tmp_path / "run")] == [0, 1, 2, 3]
    assert (tmp_path / "run" / "checkpoint" / "step-000003").is_dir()


# --- which engine samples

LIVE = {"pi_distill": (pi_distill, "lookup-student", {}), "opd": (opd, "addition-student", {"teacher": "self"})}
LIVE["skill_sd"] = (skill_sd, "sokoban-student", {"sampler": "teacher", "prompts-per-step": 1, "eval-samples": 1})


@pytest.mark.parametrize(("method", "model", "given"), LIVE.values(), ids=LIVE.keys())
def test_a_teacher_that_is_the_policy_samples_through_its_engine(method, model, given, tmp_path, monkeypatch):
    live = {} if method is pi_distill else {"teacher-sync": "live"}
    monkeypatch.setattr(HFEngine, "complete", None)
    with stub(TINY / model) as url:
        assert run(monkeypatch, method, rollout=url, out=tmp_path / "run", steps=1, **live, **given) == 0
        assert post(url, "/counts")["generated"] >= 4


# --- answers of another form, refused in one line

WRONG = ["empty", "list", "404"]
ROLLOUTS = {"empty": "no 'weight_version'", "list": "no 'weight_version'", "404": "if it is vLLM's, start it with"}
TEACHERS = {"empty": "no 'data'", "list": "no 'data'", "404": "without a path behind it", "no root": "no 'root'"}
TEACHERS |= {"no length": "no 'max_model_len'", "nulls": "AttributeError"}


@pytest.mark.parametrize(("kind", "said"), ROLLOUTS.items())
def test_a_foreign_server_cannot_sample(kind, said):
    student = load_model("addition-student", CPU), load_tokenizer("addition-student")
    with stub(kind=kind) as url, pytest.raises(UserError, match=f"--rollout.*{said}"):
        make_engine(*student, SimpleNamespace(rollout=url, out="")).generate(PROBLEMS, 1, Sampling(), key=(1,))


@pytest.mark.parametrize(("kind", "said"), TEACHERS.items())
def test_a_foreign_server_is_no_teacher(kind, said):
    student, tokenizer = load_model("addition-student", CPU), load_tokenizer("addition-student")
    rollout = HFEngine(student, tokenizer).generate(PROBLEMS, 1, Sampling(), key=(1,))
    with stub(kind=kind) as url, pytest.raises(UserError, match=f"--teacher.*{said}"):
        ServerModel(url, CPU).score(rollout)


def test_a_server_of_another_size_gets_no_weights():
    student = load_model("lookup-student", CPU), load_tokenizer("lookup-student")
    with stub() as url, pytest.raises(UserError, match=r"serves .*addition-student', a model of another size"):
        make_engine(*student, SimpleNamespace(rollout=url, out="")).generate(PROBLEMS, 1, Sampling(), key=(1,))


def test_a_port_that_is_none():
    with pytest.raises(UserError, match=r"--rollout 'http://127.0.0.1:99999' names no host or no port"):
        Servers("http://127.0.0.1:99999", "--rollout", 1.0, None)


HEATS = [(method, "temperature") for method in (opd, scope_opd, uni_opd, sod)] + [(opd, "divergence-temperature")]


@pytest.mark.parametrize(("method", "heat"), HEATS)
def test_a_served_teacher_at_another_temperature_is_refused_before_anything_is_loaded(method, heat, monkeypatch, capfd):
    assert run(monkeypatch, method, teacher="http://127.0.0.1:9", **{heat: 2}) == 2
    assert "let all temperatures be 1" in capfd.readouterr().err


# --- what lies on disk


def test_only_a_run_that_owns_its_folder_removes_what_a_killed_one_left(url, tmp_path):
    student = load_model("addition-student", CPU), load_tokenizer("addition-student")
    mine, killed = tmp_path / "weights-of-mine", tmp_path / "server-weights-01234567"
    for folder in (mine, killed):
        folder.mkdir()
    engine = make_engine(*student, SimpleNamespace(rollout=url, out=str(tmp_path)))
    assert mine.is_dir() and killed.is_dir()  # --out may yet be refused
    engine.generate(PROBLEMS, 1, Sampling(), key=(1,))
    assert mine.is_dir() and not killed.exists() and engine.folder.is_dir()


def test_scores_are_not_kept_beyond_the_weights_that_gave_them(tmp_path):
    student, tokenizer = load_model("addition-student", CPU), load_tokenizer("addition-student")
    rollout = HFEngine(student, tokenizer).generate(PROBLEMS, 1, Sampling(), key=(1,))
    folder = shutil.copytree(TINY / "addition-teacher", tmp_path / "teacher")
    with stub(folder) as url:
        first = ServerModel(url, CPU, str(tmp_path)).score(rollout)[0]
    again = ServerModel(url, CPU, str(tmp_path))  # the server is gone; what it is was kept in this process
    assert torch.equal(again.score(rollout)[0], first)
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(UserError, match="no server answers"):
        ServerModel(url, CPU, str(tmp_path)).score(rollout)
