"""torchrun with two and three processes (gloo) against one: metrics, gradients and weights of every method."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.common.cli import System, fail
from posttrain.common.machines import distributed

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"steps": 2, "prompts_per_step": 3, "group_size": 3, "eval_problems": 5, "eval_samples": 2, "eval_every": 0}
SMALL |= {"save_every": 1, "lr": 1e-3, "warmup": 0, "micro_batch_tokens": 150}
LABELLED = {"steps": 2, "prompts_per_step": 7, "eval_problems": 20, "eval_every": 0, "save_every": 1, "lr": 1e-3}
JOBS = {
    "grpo": ("grpo", {**SMALL, "prompts_per_step": 4, "beta": 0.1, "minibatches": 2, "ent_coef": 0.01}),
    "grpo-const": ("grpo", {**SMALL, "agg": "const", "dynamic_sampling": 2, "epochs": 2}),
    "opd": ("opd", SMALL),
    "opd-k1": ("opd", {**SMALL, "est": "k1_pg", "agg": "seq"}),
    "scope": ("scope_opd", SMALL),
    "uni": ("uni_opd", SMALL),
    "sod": ("sod", {**SMALL, "minibatches": 2}),
    "skill": ("skill_sd", {**SMALL, "reward": "random", "group_size": 8, "est": "full", "teacher_sync": "ema"}),
    "pi": ("pi_distill", SMALL),
    "opsd": ("pi_distill", {**SMALL, "algorithm": "opsd", "opsd_teacher": "ema"}),
    "rltf": ("rltf", {**SMALL, "mode": "both"}),
    "sinkd": ("sinkd", LABELLED),
    "csft": ("cot2", {**LABELLED, "dropout": 0.0}),
    "discrete": ("cot2", {**LABELLED, "mode": "discrete", "dropout": 0.0}),
}
SHARDED = {  # FSDP2
    "grpo": ("grpo", {**SMALL, "prompts_per_step": 4, "beta": 0.1, "minibatches": 2, "shard": "fsdp"}),
    "grpo-lora": ("grpo", {**SMALL, "prompts_per_step": 4, "beta": 0.1, "lora_rank": 4, "shard": "fsdp"}),
    "offload": ("opd", {**SMALL, "cpu_offload": True, "checkpointing": True, "shard": "fsdp"}),
    "opd-ema": ("opd", {**SMALL, "teacher": "self", "teacher_sync": "ema", "task_coef": 1.0, "shard": "fsdp"}),
    "scope": ("scope_opd", {**SMALL, "shard": "fsdp"}),
    "uni": ("uni_opd", {**SMALL, "shard": "fsdp"}),
    "sod": ("sod", {**SMALL, "minibatches": 2, "shard": "fsdp"}),
    "skill": (
        "skill_sd",
        {**SMALL, "reward": "random", "group_size": 8, "est": "full", "teacher_sync": "ema", "shard": "fsdp"},
    ),
    "pi": ("pi_distill", {**SMALL, "shard": "fsdp"}),
    "rltf": ("rltf", {**SMALL, "mode": "both", "shard": "fsdp"}),
    "sinkd": ("sinkd", {**LABELLED, "shard": "fsdp"}),
}
ONE = ("shard", "cpu_offload", "checkpointing")


def launch(processes: int, root: Path, jobs: dict) -> Path:
    """All jobs one after another in the same processes: a start costs more than a run."""
    root.mkdir(exist_ok=True)
    given = json.dumps([[name, method, flags] for name, (method, flags) in jobs.items()])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(torchrun if processes > 1 else [sys.executable]), str(ROOT / "tests" / "ranks.py"), str(root), given]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return root


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    plain = {f"fsdp-{k}": (m, {f: v for f, v in x.items() if f not in ONE}) for k, (m, x) in SHARDED.items()}
    return launch(1, tmp_path_factory.mktemp("one") / "runs", JOBS | plain)


@pytest.fixture(scope="module", params=[2, 3])
def copies(request, tmp_path_factory):
    return launch(request.param, tmp_path_factory.mktemp("copies") / "runs", JOBS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("shards") / "runs", SHARDED)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_results(a: Path, b: Path, skip: tuple = ()) -> None:
    """Metrics to 1e-5; final weights, which move by 1e-5 to 1e-3, to 1e-7."""
    for x, y in zip(lines(a), lines(b), strict=True):
        x, y = ({key: value for key, value in line.items() if not key.startswith(skip)} for line in (x, y))
        assert x.keys() == y.keys()
        measured = {key for key in x if key.startswith(("time/", "memory/"))}
        noise = x.pop("engine/ratio_max", 1.0), y.pop("engine/ratio_max", 1.0)  # the largest rounding error
        assert noise == pytest.approx((1, 1), abs=1e-4)
        for key in x.keys() - measured:
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-5), key
    x, y = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert x.keys() == y.keys()
    for key in x:
        torch.testing.assert_close(x[key], y[key], atol=1e-7, rtol=1e-6)


def same(a: Path, b: Path) -> None:
    """And the gradients of every step before clipping."""
    same_results(a, b)
    ours, theirs = (torch.load(out / "gradients.pt") for out in (a, b))
    assert len(ours) == len(theirs) >= 2 and any(g is not None and g.any() for g in ours[0])
    for x, y in zip(ours, theirs, strict=True):
        assert [g is None for g in x] == [g is None for g in y]
        g, h = (torch.cat([torch.zeros(1), *(w.flatten() for w in grads if w is not None)]) for grads in (x, y))
        assert (g - h).norm() <= 1e-5 * h.norm()


@pytest.mark.parametrize("name", JOBS)
def test_copies_give_what_one_process_gives(name, one, copies):
    same(one / name, copies / name)


@pytest.mark.parametrize("name", SHARDED)
def test_shards_give_what_one_process_gives(name, one, shards):
    same(one / f"fsdp-{name}", shards / name)


def test_another_number_of_processes_resumes_a_run(tmp_path):
    """A step by two processes, copies and shards; the other by one, and by three with shards."""
    flags = {**SMALL, "schedule": "constant", "prompts_per_step": 4}
    names = {"copies": ("grpo", {**flags, "minibatches": 2}), "shards": ("opd", flags)}

    def jobs(shard: bool, **more) -> dict:
        return {k: (m, {**x, **more, **({"shard": "fsdp"} if shard and k == "shards" else {})})
                for k, (m, x) in names.items()}  # fmt: skip

    whole = launch(1, tmp_path / "whole", jobs(False))
    begun = launch(2, tmp_path / "begun", jobs(True, steps=1))
    shutil.copytree(begun, tmp_path / "again")
    for name, processes in (("begun", 1), ("again", 3)):
        out = launch(processes, tmp_path / name, jobs(processes > 1, resume=True))
        for job in names:
            # the shorter run evaluated at its end, step 1
            same_results(whole / job, out / job, skip=("eval/", "opd/gap_recovered"))


def torchrun(*command: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*start, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)


def test_one_process_writes_and_prints(tmp_path):
    small = [f"--{key.replace('_', '-')}={value}" for key, value in {**SMALL, "out": tmp_path / "run"}.items()]
    done = torchrun(ROOT / "methods" / "opd.py", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder") == 1 and done.stdout.count("step 0, policy") == 1
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 1, 2, 2, 2]


def test_bad_input_is_said_once(tmp_path):
    done = torchrun(ROOT / "methods" / "grpo.py", "--model", "no-such", "--out", tmp_path / "run")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(said) == 1 and "no-such" in said[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_scheduler_that_sets_ranks_alone_starts_one_process(rank, monkeypatch, capsys):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    began = time.monotonic()
    distributed.start(System())
    assert distributed.world() == 1 and not torch.distributed.is_initialized()
    with pytest.raises(SystemExit):
        fail("at once")
    assert capsys.readouterr().err == "error: at once\n" and time.monotonic() - began < 5


def test_shards_without_torchrun_are_refused():
    command = [sys.executable, ROOT / "methods" / "grpo.py", "--shard", "fsdp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --shard fsdp: start with torchrun")
