"""--rollout http://... and --teacher http://... with real vLLM servers, faults in between and servers that are killed.

Needs an environment of its own: bash scripts/vllm_cpu.sh, then
POSTTRAIN_VLLM=1 OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -q tests/test_servers.py
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("POSTTRAIN_VLLM") != "1" or not importlib.util.find_spec("vllm"):
    pytest.skip("needs vLLM: bash scripts/vllm_cpu.sh, then POSTTRAIN_VLLM=1", allow_module_level=True)

import httpx

from posttrain.common import models
from posttrain.common.cli import Engines, UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.engines.teacher import ServerModel, served
from posttrain.common.models import TINY, load_model, load_tokenizer, shared_vocabulary
from posttrain.common.rollout import Engine, Sampling, make_engine
from posttrain.common.scoring import lm_head, sampled_hidden, score
from posttrain.common.tasks import make_task
from posttrain.kernels.logprob import linear_topk_logp

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMOLLM2 = Path(os.environ.get("POSTTRAIN_SMOLLM2", ROOT / "models" / "SmolLM2-135M-Instruct"))
PROBLEMS = make_task("addition").heldout(24)
GREEDY = Sampling(0.0, 24)
FLAGS = "--dtype float32 --enforce-eager --enable-scale-out --logprobs-mode processed_logprobs --max-num-seqs 64"
FLAGS += " --worker-extension-cls posttrain.common.engines.worker.Worker"
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": "1"}
ENV |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "methods")}
# `vllm serve` of vllm-cpu looks for a package named vllm; this is the same server.
SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A server in a session of its own, so that it can be killed with all its children."""

    def __init__(self, command: list[str], log: Path, port: int):
        self.command, self.log, self.port, self.url = command, log, port, f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        log = self.log.open("a")
        self.process = subprocess.Popen(
            self.command, env=os.environ | ENV, stdout=log, stderr=log, start_new_session=True
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health", trust_env=False)
                return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(folder: Path, log: Path) -> Process:
    port = free_port()
    return Process([*SERVE, "--model", str(folder), "--port", str(port), *FLAGS.split()], log, port)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two servers that begin with the tiny student."""
    logs = tmp_path_factory.mktemp("logs")
    both = [serve(TINY / "addition-student", logs / f"{i}.log") for i in range(2)]
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture(scope="module")
def proxy(servers, tmp_path_factory):
    """A process that spoils what the first server answers."""
    port, script = free_port(), str(ROOT / "tests" / "faulty_proxy.py")
    command = [sys.executable, script, str(port), str(servers[0].port)]
    process = Process(command, tmp_path_factory.mktemp("proxy") / "log", port)
    try:
        process.wait()
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def student():
    return load_model("addition-student", CPU), load_tokenizer("addition-student")


def engine_of(student, *urls: str, seconds: float = 100.0) -> Engine:
    models.SYSTEM = Engines(server_seconds=seconds)
    try:
        engine = make_engine(*student, SimpleNamespace(rollout=",".join(urls), out=""))
    finally:
        models.SYSTEM = Engines()
    engine.servers.patience = 2
    return engine


def perturb(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    model.weights_version += 1


def spoil(proxy, kind: str, times: int = 10**6) -> None:
    httpx.post(f"{proxy.url}/fault", json={"kind": kind, "times": times}, trust_env=False).raise_for_status()


def assert_like_local(engine: Engine, student, sampling: Sampling = GREEDY) -> None:
    """Greedy: the same tokens and log-probs as the trainer's own model; else the log-probs of what was sampled."""
    rollout = engine.generate(PROBLEMS, 1, sampling, key=(1,))
    local = HFEngine(*student).generate(PROBLEMS, 1, sampling, key=(1,))
    if sampling.temperature == 0:
        assert torch.equal(rollout.tokens, local.tokens) and torch.equal(rollout.finished, local.finished)
    logps, _ = score(student[0], rollout, 8192, sampling.temperature or 1.0)
    assert (logps - rollout.behaviour_logps).abs().max() < 2e-4


def test_servers_follow_the_weights_and_give_the_samplers_log_probs(servers, student):
    engine = engine_of(student, *(server.url for server in servers))
    for seed in range(2):
        perturb(student[0], seed)
        assert_like_local(engine, student)
    for server in servers:  # each by itself
        assert_like_local(engine_of(student, server.url), student)
    assert_like_local(engine, student, Sampling(0.7, 24))
    again = [engine.generate(PROBLEMS, 4, Sampling(0.7, 24), key=(1, 2)).tokens for _ in range(2)]
    assert torch.equal(*again)  # whichever server answered
    other = engine.generate(PROBLEMS, 4, Sampling(0.7, 24), key=(1, 3)).tokens
    assert other.shape != again[0].shape or not torch.equal(other, again[0])


def test_limits_stop_texts_and_top_p(servers, student):
    engine, contexts = engine_of(student, servers[0].url), [[2, 3, 4], [5, 6], [7]]
    engine.refresh()
    u = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    ids, logps = engine.complete(contexts, u, Sampling(1.0, 12), limits=[1, 5, 12])
    assert [len(row) for row in ids] == [len(row) for row in logps]
    assert all(1 <= len(row) <= limit for row, limit in zip(ids, (1, 5, 12), strict=True))
    whole, _ = engine.complete(contexts, u, Sampling(0.0, 12))
    stop = student[1].decode(whole[2][1:2])
    cut, _ = engine.complete(contexts, u, Sampling(0.0, 12), stops=(stop,))
    assert stop in student[1].decode(cut[2]) and cut[2] == whole[2][: len(cut[2])] and len(cut[2]) <= 2
    narrow, _ = engine.complete(contexts, u, Sampling(1.0, 12, top_p=1e-6))
    assert narrow == whole  # a nucleus of one token is the greedy choice


def test_a_server_with_old_weights_is_noticed_and_given_the_new_ones(servers, student):
    engine = engine_of(student, *(server.url for server in servers))
    assert_like_local(engine, student)
    for server in servers:  # as it is after a restart: the folder's weights, and the version that says so
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(TINY / "addition-student")}}
        for path, body in (("collective_rpc", order), ("update_weight_version", {"new_version": "default"})):
            httpx.post(f"{server.url}/{path}", json=body, timeout=60, trust_env=False).raise_for_status()
    assert_like_local(engine, student)  # no weights_version told it
    assert all("default" in server.cause for server in engine.servers.servers)


KINDS = ["500", "cut", "close", "short", "nan", "inf"]


@pytest.mark.parametrize("kind", [*KINDS, "slow"])
def test_a_faulty_server_is_left_out_and_the_batch_is_whole(kind, proxy, servers, student):
    engine = engine_of(student, proxy.url, servers[1].url, seconds=3.0)
    spoil(proxy, kind)
    try:
        assert_like_local(engine, student)
    finally:
        spoil(proxy, "", 0)
    faulty, sound = engine.servers.servers
    assert faulty.cause and not faulty.ready and not sound.cause


@pytest.mark.parametrize("kind", KINDS)
def test_one_fault_is_mended_by_asking_again(kind, proxy, student):
    engine = engine_of(student, proxy.url)
    engine.refresh()
    spoil(proxy, kind, 1)
    assert_like_local(engine, student)
    assert engine.servers.servers[0].cause and engine.servers.servers[0].failures == 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [("500", "spoilt.*--resume"), ("nan", "no finite numbers.*--resume"), ("short", "log-probs of .* tokens.*--resume"),
     ("raw", "processed_logprobs"), ("403", "--enable-scale-out")],
)  # fmt: skip
def test_no_server_left_is_one_line(kind, said, proxy, student):
    engine = engine_of(student, proxy.url)
    spoil(proxy, kind)
    try:
        with pytest.raises(UserError, match=said) as error:
            engine.generate(PROBLEMS, 1, GREEDY, key=(1,))
    finally:
        spoil(proxy, "", 0)
    assert proxy.url in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def teacher(servers):
    """The tiny teacher's weights on the first server, and here."""
    local = load_model("addition-teacher", CPU)
    engine_of((local, load_tokenizer("addition-teacher")), servers[0].url).refresh()
    return local.requires_grad_(False)


def test_a_teacher_on_a_server_scores_as_a_local_one(teacher, servers, tmp_path):
    student, tokenizer = load_model("addition-student", CPU), load_tokenizer(servers[0].url)
    remote = ServerModel(servers[0].url, CPU, str(tmp_path))
    assert shared_vocabulary(student, tokenizer, remote, tokenizer) == 98
    rollout = HFEngine(student, tokenizer).generate(PROBLEMS, 2, Sampling(1.0, 24), key=(1,))
    rollout.loss_mask[3] = 0  # a row without sampled tokens
    logps, entropy = score(remote, rollout, 8192)
    expected, _ = score(teacher, rollout, 8192)
    assert (logps - expected).abs().max() < 2e-4
    assert torch.equal(entropy.isnan(), rollout.loss_mask > 0)
    ids, listed = remote.topk(rollout, 8)
    expected_ids, expected_logps = linear_topk_logp(sampled_hidden(teacher, rollout), k=8, **lm_head(teacher))
    assert (ids == expected_ids).float().mean() > 0.99 and (listed - expected_logps).abs().max() < 2e-3
    assert torch.equal(make_engine(remote, tokenizer).generate(PROBLEMS, 1, GREEDY, (1,)).tokens,
                       HFEngine(teacher, tokenizer).generate(PROBLEMS, 1, GREEDY, (1,)).tokens)  # fmt: skip
    for refused in (lambda: sampled_hidden(remote, rollout), lambda: lm_head(remote)):
        with pytest.raises(UserError, match="on a server"):
            refused()
    with pytest.raises(UserError, match="temperature 1"):
        score(remote, rollout, 8192, 0.5)
    with pytest.raises(UserError, match="--max-logprobs"):
        remote.topk(rollout, 30)


def test_a_teachers_scores_are_kept_and_damaged_ones_made_again(teacher, proxy, tmp_path):
    student, tokenizer = load_model("addition-student", CPU), load_tokenizer("addition-student")
    rollout = HFEngine(student, tokenizer).generate(PROBLEMS, 1, Sampling(1.0, 24), key=(1,))
    first, _ = score(ServerModel(proxy.url, CPU, str(tmp_path)), rollout, 8192)
    spoil(proxy, "500")
    try:
        kept = ServerModel(proxy.url, CPU, str(tmp_path))
        kept.servers.patience = 1
        assert torch.equal(score(kept, rollout, 8192)[0], first)  # without the server
        kept.cache.table.execute("UPDATE scores SET value = zeroblob(length(value)) WHERE rowid % 2")
        kept.cache.table.commit()
        with pytest.raises(UserError, match="spoilt"):
            score(kept, rollout, 8192)
    finally:
        spoil(proxy, "", 0)
    assert torch.equal(score(ServerModel(proxy.url, CPU, str(tmp_path)), rollout, 8192)[0], first)
    del kept
    (tmp_path / "scores.sqlite").write_bytes(b"no database" * 1000)
    assert torch.equal(score(ServerModel(proxy.url, CPU, str(tmp_path)), rollout, 8192)[0], first)


@pytest.mark.parametrize("kind", ["short", "nan", "inf", "cut"])
def test_wrong_scores_of_a_teacher_are_never_used(kind, teacher, proxy):
    student, tokenizer = load_model("addition-student", CPU), load_tokenizer("addition-student")
    rollout = HFEngine(student, tokenizer).generate(PROBLEMS, 1, Sampling(1.0, 24), key=(1,))
    remote = ServerModel(proxy.url, CPU)
    remote.servers.patience = 1
    spoil(proxy, kind)
    try:
        with pytest.raises(UserError, match=f"--teacher.*{proxy.url}"):
            score(remote, rollout, 8192)
    finally:
        spoil(proxy, "", 0)


def launch(method: str, out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), "--out", str(out), "--eval-every", "0", *flags]
    env = {k: v for k, v in os.environ.items() if k != "POSTTRAIN_VLLM"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


SMALL = ["--steps", "10", "--prompts-per-step", "8", "--group-size", "8", "--lr", "1e-3", "--warmup", "1"]
SMALL += ["--schedule", "constant", "--eval-problems", "8", "--eval-samples", "2", "--save-every", "1"]


def until(out: Path, step: int, run: subprocess.Popen) -> None:
    while run.poll() is None and len(metrics_of(out)) <= step:
        time.sleep(0.05)
    assert run.poll() is None, run.communicate()


def test_a_run_learns_outlives_a_killed_server_and_resumes_when_all_are_back(servers, tmp_path):
    (tmp_path / "reward.py").write_text("def short(example, text):\n    return -len(text) / 20\n")
    flags = [*SMALL, "--reward", f"{tmp_path}/reward.py:short"]  # learnt within ten steps
    rollout = [*flags, "--rollout", ",".join(server.url for server in servers)]
    whole, local, cut = tmp_path / "whole", tmp_path / "local", tmp_path / "cut"
    for out, given in ((whole, rollout), (local, flags)):
        run = launch("grpo", out, *given)
        _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, errors
        lengths = [row["train/length"] for row in metrics_of(out)[1:]]
        assert lengths[0] > 12 and lengths[-1] < 0.5 * lengths[0], lengths
    assert all(row["engine/logp_gap"] < 1e-3 for row in metrics_of(whole)[1:])

    run = launch("grpo", cut, *rollout)
    until(cut, 2, run)
    servers[1].kill()
    until(cut, 5, run)  # on the other
    servers[0].kill()
    _, errors = run.communicate(timeout=600)
    last = errors.strip().splitlines()[-1]  # torch may have warned before
    assert run.returncode == 2 and last.startswith("error: ") and "Traceback" not in errors, errors
    assert all(server.url in last for server in servers) and "--resume" in last
    assert any((cut / "checkpoint").glob("step-*"))
    for server in servers:
        server.start()
    for server in servers:
        server.wait()
    run = launch("grpo", cut, *rollout, "--resume")
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    exact = ("train/reward", "train/length", "train/accuracy", "eval/accuracy")
    for a, b in zip(metrics_of(whole), metrics_of(cut), strict=True):
        assert {k: a[k] for k in exact if k in a} == {k: b[k] for k in exact if k in b}
        assert a.get("optim/grad_norm", 0) == pytest.approx(b.get("optim/grad_norm", 0), rel=1e-3)


@pytest.mark.parametrize("est", ["k1_pg", "topk"])
def test_opd_with_its_teacher_on_a_server(est, servers, tmp_path):
    served.cache_clear()
    tokenizer, local = load_tokenizer("addition-teacher"), load_model("addition-teacher", CPU)
    engine_of((local, tokenizer), servers[0].url).refresh()  # servers were started again meanwhile
    small = ["--steps", "3", "--prompts-per-step", "8", "--group-size", "2", "--eval-problems", "32", "--est", est]
    for name, teacher in (("remote", servers[0].url), ("local", "addition-teacher")):
        run = launch("opd", tmp_path / name, *small, "--eval-samples", "2", "--teacher", teacher)
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    remote, local = metrics_of(tmp_path / "remote"), metrics_of(tmp_path / "local")
    for a, b in zip(remote[1:], local[1:], strict=True):
        assert a["teacher/kl"] == pytest.approx(b["teacher/kl"], rel=1e-3)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-3)


def test_a_pretrained_model_on_a_server_follows_the_weights(tmp_path):
    assert SMOLLM2.is_dir(), f"python scripts/get_smollm2.py --out {SMOLLM2} makes it"
    server = serve(SMOLLM2, tmp_path / "log")
    try:
        model, tokenizer = load_model(str(SMOLLM2), CPU), load_tokenizer(str(SMOLLM2))
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1.01
        model.weights_version += 1
        server.wait()
        prompts, short = PROBLEMS[:4], Sampling(0.0, 16)
        remote = engine_of((model, tokenizer), server.url).generate(prompts, 1, short, key=(1,))
        local = HFEngine(model, tokenizer).generate(prompts, 1, short, key=(1,))
        assert torch.equal(remote.tokens, local.tokens)
        assert (remote.behaviour_logps - local.behaviour_logps).abs().max() < 1e-3
    finally:
        server.kill()
