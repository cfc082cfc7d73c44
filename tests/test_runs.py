"""Whole runs of the methods: what they leave behind, kill and resume, seeds, accumulation, every flag's value.

Runs that are killed are processes of their own; the others share this one, which saves some seconds of imports each.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.common.cli import AT_END, Engines, System, UserError, cli
from posttrain.common.machines import checkpoint
from posttrain.common.models import TINY
from posttrain.common.training import Optimizer
from posttrain.methods import grpo, opd, pi_distill, rltf, scope_opd, skill_sd, sod, uni_opd

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"grpo": grpo, "opd": opd, "scope_opd": scope_opd, "uni_opd": uni_opd, "skill_sd": skill_sd, "sod": sod}
METHODS |= {"pi_distill": pi_distill, "rltf": rltf}
EPISODES = {"skill_sd", "sod"}  # methods whose default plays episodes
SMALL = {
    "steps": 4, "prompts-per-step": 4, "group-size": 4, "eval-problems": 8, "eval-samples": 2, "eval-every": 2,
    "save-every": 2, "lr": 1e-3, "warmup": 0, "schedule": "linear",
}  # fmt: skip
LONG = {"steps": 14, "save-every": 6, "eval-every": 5}  # to be killed between 7 and 12
KINDS = {
    "grpo": ("grpo", {}),
    "grpo, all state": ("grpo", {"minibatches": 2, "beta": 0.1, "ref-every": 2, "ref-mix": 0.5, "ent-target": 0.3}),
    "opd": ("opd", {}),
    "opd, ema": ("opd", {"teacher": "self", "teacher-sync": "ema", "est": "full", "beta": 0.5}),
    "scope_opd": ("scope_opd", {}),
    "uni_opd": ("uni_opd", {}),
    "skill_sd": ("skill_sd", {}),
    "rltf": ("rltf", {}),
    "sod": ("sod", {}),
    "pi_distill": ("pi_distill", {}),
    "pi_distill, ema": ("pi_distill", {"algorithm": "opsd", "opsd-teacher": "ema", "epochs": 2}),
}
TABLE = {  # style.md, Metrics
    "train/reward", "train/accuracy", "train/zero_signal", "train/length", "train/truncated", "train/entropy",
    "loss/total", "engine/logp_gap", "engine/ratio_max", "optim/lr", "optim/grad_norm", "optim/skipped",
    "time/sample", "time/score", "time/update", "time/tokens_per_second",
}  # fmt: skip
OWN = {
    "grpo": {"policy/kl_old", "policy/clip_low", "policy/clip_high"},
    "opd": {"teacher/kl"},
    "scope_opd": {"teacher/kl", "loss/mle", "loss/opd", "scope/mixed", "scope/mle_ess", "scope/opd_ess"},
    "uni_opd": {"teacher/kl", "uni/lambda", "uni/shifted_groups", "uni/violations_before", "uni/violations_after"},
    "skill_sd": {
        "teacher/kl",
        "teacher/kl_abs",
        "loss/grpo",
        "loss/sdl",
        "skill/told",
        "skill/bank",
        "skill/ever_solved",
    },
    "rltf": {
        f"rltf/{key}"
        for key in ("tokens", "leaked", "second_share", "second_accuracy", "sd_advantage", "floored", "dropped")
    }
    | {"loss/rl", "loss/sd", "loss/fm", "policy/kl_old"},
    "sod": {"teacher/kl", "policy/kl_old", "sod/tool_calls", "sod/failed_calls", "sod/w_failed", "sod/d_clean_4"},
    "pi_distill": {"loss/student", "loss/kl", "pi/alpha", "pi/kl", "pi/penalty", "pi/hinted", "pi/live"},
}
EVAL = {"eval/accuracy", "eval/pass_at_k"}


def flags(given: dict) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def environment(**more: str) -> dict[str, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
    return {key: value for key, value in env.items() if key != "WANDB_MODE"}


def start(method: str, out: Path, given: dict, **env: str) -> subprocess.Popen:
    """A process in a folder of its own, which is not the checkout."""
    cwd = out.parent / "elsewhere"
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), *flags({**SMALL, **given, "out": out})]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(**env), **pipes)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def here(method: str, out: Path, **given) -> Path:
    """The same in this process, by main itself."""
    module = METHODS[method]
    values = {name.replace("-", "_"): value for name, value in {**SMALL, **given}.items()}
    module.main(module.Config(**values, out=str(out)))
    return out


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def results(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics, samples and weights, bit for bit."""
    assert [line["step"] for line in results(a)] == [line["step"] for line in results(b)]
    for x, y in zip(results(a), results(b), strict=True):
        assert x == y
    assert lines(a, "samples.jsonl") == lines(b, "samples.jsonl")
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    one, other = (json.loads((out / "summary.json").read_text()) for out in (a, b))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    """kind -> the folder of its uninterrupted run, a process run once."""

    @functools.cache
    def get(kind: str) -> Path:
        method, given = KINDS[kind]
        out = folder / kind.replace(", ", "-").replace(" ", "-")
        said = finish(start(method, out, {**LONG, **given}))
        (folder / f"{out.name}.txt").write_text(said)
        return out

    return get


# --- the folder


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_folder(whole, method):
    out = whole(method)
    names = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model", "summary.json", "curve.png"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-000014"]
    assert not list((out.parent / "elsewhere").iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["method"] == method and config["flags"]["steps"] == LONG["steps"]
    fields = {field.name for field in dataclasses.fields(METHODS[method].Config)}
    assert fields <= config["flags"].keys()
    assert config["versions"]["torch"] == torch.__version__ and len(config["versions"]["git_commit"]) == 40


@pytest.mark.parametrize("method", METHODS)
def test_summary_has_the_keys_of_the_design(whole, method):
    summary, rows = json.loads((whole(method) / "summary.json").read_text()), lines(whole(method))
    assert summary["method"] == method and summary["steps"] == LONG["steps"] and summary["seed"] == 0
    default = METHODS[method].Config()
    assert summary["model"] == default.model and summary["task"] == default.task and summary["seconds"] > 0
    assert summary["accuracy_before"] == rows[0]["eval/accuracy"]
    assert summary["accuracy_after"] == rows[-1]["eval/accuracy"]
    assert "accuracy_teacher" in summary and (method == "grpo" or 0 <= summary["accuracy_teacher"] <= 1)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_one_line_a_step_with_the_same_keys(whole, method):
    rows = lines(whole(method))
    assert [row["step"] for row in rows] == list(range(LONG["steps"] + 1))
    assert rows[0].keys() >= EVAL and rows[-1].keys() >= EVAL
    for row in rows[1:]:
        assert row.keys() >= TABLE | OWN[method], f"step {row['step']} lacks {(TABLE | OWN[method]) - row.keys()}"
        known = {"step", *TABLE, *OWN[method]}
        levels = {key.split("/")[0] for key in row.keys() - known}
        assert levels <= {"loss", "policy", "teacher", "memory", "eval", method.split("_")[0]}
        assert (row.keys() >= EVAL) == (row["step"] in (5, 10, 14)) and all(map(math.isfinite, row.values()))
        assert row["engine/logp_gap"] < 1e-4 and abs(row["engine/ratio_max"] - 1) < 1e-3
        assert row["optim/skipped"] == 0 and 0 <= row["train/accuracy"] <= 1
    assert rows[1]["optim/lr"] == SMALL["lr"] and rows[-1]["optim/lr"] < 0.1 * SMALL["lr"]


def test_metrics_of_the_methods_differ_only_in_their_own(whole):
    keys = [lines(whole(method))[1].keys() for method in METHODS]
    own = {method.split("_")[0] for method in METHODS} | {"loss", "policy", "teacher"}
    assert {key.split("/")[0] for key in set.union(*map(set, keys)) - set.intersection(*map(set, keys))} <= own


@pytest.mark.parametrize("method", METHODS)
def test_samples_name_step_kind_prompt_text_and_reward(whole, method):
    rows = lines(whole(method), "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(1, 15) for _ in range(3)]
    for best, worst, other in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert (best["kind"], worst["kind"], other["kind"]) == ("best", "worst", "other")
        assert best["reward"] >= other["reward"] >= worst["reward"]
        assert best["prompt"][0]["content"][-1] == "=" or method in EPISODES
        assert isinstance(best["text"], str)


@pytest.mark.parametrize("method", METHODS)
def test_curve_is_a_real_png(whole, method):
    from matplotlib.image import imread

    data = (whole(method) / "curve.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    picture = imread(whole(method) / "curve.png")
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and picture.shape[:2] == (height, width)
    assert width >= 400 and height >= 250 and picture.std() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_model_loads_plainly_with_the_trained_weights(whole, method):
    out = whole(method)
    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    trained = checkpoint.read(out / "checkpoint")["policy"]
    start = AutoModelForCausalLM.from_pretrained(TINY / METHODS[method].Config().model).state_dict()
    state = model.state_dict()
    assert state.keys() == trained.keys() and all(torch.equal(state[key], trained[key]) for key in state)
    assert any(not torch.equal(state[key], start[key]) for key in state)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TINY / "addition-student").get_vocab()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False)
    assert model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    files = {path.name for path in (out / "model").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_terminal_shows_before_after_and_the_folder(whole):
    for method in METHODS:
        said = (whole(method).parent / f"{method}.txt").read_text()
        for word in ("before", "after", "Avg@2", "Pass@2", "greedy", str(whole(method)), "curve.png", "best", "worst"):
            assert word in said
        assert ("teacher" in said) == (method != "grpo") and "Warning" not in said


def test_stored_results_of_the_same_settings_stand_beside(tmp_path, capsys, monkeypatch):
    """As at the end of a default run, which is too long for a test: here the defaults themselves are small."""
    for name in ("steps", "prompts_per_step", "group_size", "eval_problems", "eval_samples"):
        monkeypatch.setattr(grpo.Config, name, SMALL[name.replace("_", "-")])
    here("grpo", tmp_path / "run")
    assert "grpo, stored" in capsys.readouterr().out
    here("grpo", tmp_path / "other", **{"group-size": 2})
    assert "grpo, stored" not in capsys.readouterr().out


def test_a_teacher_of_the_same_size_is_measured_before_training(whole):
    row = lines(whole("opd"))[0]
    assert {f"teacher/{key}" for key in EVAL} <= row.keys()


def test_without_out_a_fresh_folder_under_runs_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *args: "20260101-120000")
    for _ in range(2):  # started within one second: neither may refuse
        grpo.main(grpo.Config(steps=1, prompts_per_step=2, group_size=2, eval_problems=2, eval_samples=1))
    assert len(list((tmp_path / "runs").glob("grpo-*/summary.json"))) == 2


# --- kill and resume


KILLED = ["grpo, all state", "opd, ema", "skill_sd", "pi_distill, ema"]  # each kind of state; RESUMED has all methods


@pytest.mark.parametrize("kind", KILLED)
def test_kill_and_resume_give_the_uninterrupted_run(whole, folder, kind):
    method, given = KINDS[kind]
    expected, out = whole(kind), folder / f"killed {kind}"
    process = start(method, out, {**LONG, **given})
    until = time.monotonic() + 240
    while not ((out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 9):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = checkpoint.read(out / "checkpoint")
    written = (out / "metrics.jsonl").read_text().splitlines()
    assert saved["step"] == 6 and 8 <= len(written) - 1 < 12 and not (out / "model").exists()
    if given:  # some state beyond weights and optimizer must be there to lose
        assert saved.keys() & {"reference", "teacher"}
    # what a kill can leave besides: half a line, half a checkpoint, half a model
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (out / name).read_text()
        (out / name).write_text(text + text.splitlines()[-1][: -len(text.splitlines()[-1]) // 3])
    (out / "checkpoint" / "partial").mkdir()
    (out / "checkpoint" / "partial" / "__0_0.distcp").write_bytes(b"half")
    (out / "model.partial").mkdir()
    (out / "model.partial" / "model.safetensors").write_bytes(b"half")
    finish(start(method, out, {**LONG, **given, "resume": True}))
    assert_same_run(expected, out)
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (expected, out)]
    assert files[0] == files[1]


@pytest.mark.parametrize("cut", ['"}', "}", '": 1', ""])
def test_a_last_line_cut_anywhere_is_dropped(whole, tmp_path, cut):
    """The text of a sample may itself hold what looks like the end of a line."""
    out = shutil.copytree(whole("opd"), tmp_path / "run")
    for name, line in (("metrics.jsonl", '{"step": 15, "eval'), ("samples.jsonl", '{"step": 15, "prompt": [{"a": "b')):
        with (out / name).open("a") as file:
            file.write(line + cut)
    here("opd", out, **LONG, resume=True)
    assert_same_run(whole("opd"), out)


@pytest.mark.parametrize("method", ["grpo", "sod"])
def test_killed_before_the_first_checkpoint(whole, folder, method):
    out = folder / f"early {method}"
    process = start(method, out, LONG)
    while not ((out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 3):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not any((out / "checkpoint").iterdir())
    here(method, out, **LONG, resume=True)
    assert_same_run(whole(method), out)


@pytest.mark.parametrize("method", METHODS)
def test_resume_of_a_finished_run_reports_and_changes_nothing(whole, tmp_path, method, capsys):
    out = shutil.copytree(whole(method), tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    here(method, out, **LONG, resume=True)
    assert "after" in capsys.readouterr().out and (out / "metrics.jsonl").read_bytes() == before
    assert_same_run(whole(method), out)


def test_killed_after_the_last_step_but_before_the_model(whole, tmp_path):
    out = shutil.copytree(whole("grpo, all state"), tmp_path / "run")
    shutil.rmtree(out / "model")
    (out / "summary.json").unlink()
    (out / "curve.png").unlink()
    here("grpo", out, **LONG, **KINDS["grpo, all state"][1], resume=True)
    assert_same_run(whole("grpo, all state"), out)


def test_resume_twice_and_from_another_folder_with_a_relative_out(whole, tmp_path, monkeypatch):
    """Stopped by Ctrl-C in the middle of steps 4, 9 and 11."""
    expected, out = whole("opd"), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    for resume, stop in ((False, 4), (True, 5), (True, 3)):
        interrupt(monkeypatch, "opd", stop)
        with pytest.raises(KeyboardInterrupt):
            here("opd", Path("run"), **LONG, resume=resume)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    here("opd", Path("run"), **LONG, resume=True)
    assert_same_run(expected, out)


def interrupt(monkeypatch, method: str, at: int) -> None:
    """Ctrl-C at the at-th grading from now; of episodes, which come graded, at the at-th look at them."""
    name = "rollout_metrics" if method in EPISODES else "grade_all"
    calls, graded_before = iter(range(1, 1000)), getattr(METHODS[method], name)

    def graded(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        return graded_before(*args)

    monkeypatch.setattr(METHODS[method], name, graded)


MANY = {"prompts-per-step": 36, "group-size": 2}  # enough for skills to come up at once
RESUMED = {
    "grpo lora": ("grpo", {"lora-rank": 4}),
    "grpo bfloat16": ("grpo", {"dtype": "bfloat16", "beta": 0.1}),
    "grpo dynamic sampling": ("grpo", {"dynamic-sampling": 3, "epochs": 2, "tis": "token_truncate"}),
    "grpo warm-up, cosine": ("grpo", {"warmup": 2, "schedule": "cosine", "weight-decay": 0.1, "ent-coef": 0.01}),
    "opd lora": ("opd", {"lora-rank": 4}),
    "opd self, live, lora": ("opd", {"lora-rank": 4, "teacher": "self", "teacher-sync": "live", "task-coef": 1.0}),
    "opd off-policy": ("opd", {"lmbda": 0.5, "est": "topk", "support": "union"}),
    "scope_opd lora": ("scope_opd", {"lora-rank": 4, "kl": "full"}),
    "scope_opd repo": ("scope_opd", {"objective": "repo", "weight-scale": "mean1"}),
    "uni_opd lora": ("uni_opd", {"lora-rank": 4}),
    "uni_opd minibatches, mask": ("uni_opd", {"minibatches": 2, "margin": "mask", "online-balance": "global"}),
    "skill_sd live, minibatches": ("skill_sd", {**MANY, "teacher-sync": "live", "minibatches": 2, "est": "pg"}),
    "skill_sd ema, full": ("skill_sd", {**MANY, "ema": 0.5, "est": "full", "ucb": 0.0}),
    "rltf minibatches, ratio": ("rltf", {"minibatches": 2, "sd-ratio": "token_ppo", "sd-ramp": 3, "loss": "ppo"}),
    "rltf both, self, lora": ("rltf", {"lora-rank": 4, "mode": "both", "critic": "self", "critique-tokens": 4}),
    "sod lora": ("sod", {"lora-rank": 4, "minibatches": 3}),
    "sod heuristic, bonus": ("sod", {"weighting": "heuristic", "tool-bonus": True, "loss-agg": "seq"}),
    "pi_distill lora, base, sft": ("pi_distill", {"lora-rank": 4, "reference": "base", "sft-steps": 2, "epochs": 2}),
    "pi_distill own hints": ("pi_distill", {"hint": "self", "alpha-anneal": 2, "kl-est": "rb"}),
    "opd data, cold start": ("opd", {"lmbda": 0.5, "est": "full", "off-policy": "data", "cold-start-steps": 2}),
}


@pytest.mark.parametrize(("method", "given"), RESUMED.values(), ids=RESUMED.keys())
def test_interrupt_and_resume_with_other_flags(method, given, tmp_path, monkeypatch):
    a = here(method, tmp_path / "a", **given)
    rounds = 1 if "dynamic-sampling" not in given else 3
    interrupt(monkeypatch, method, 3 * rounds)
    with pytest.raises(KeyboardInterrupt):
        here(method, tmp_path / "b", **given)
    monkeypatch.undo()
    assert 1 <= len(lines(tmp_path / "b")) < 6 and not (tmp_path / "b" / "model").exists()
    assert_same_run(a, here(method, tmp_path / "b", **given, resume=True))


def cut_update(monkeypatch, at: int) -> None:
    """Ctrl-C in the middle of the at-th update: some weights are new, the others old."""
    calls = iter(range(1, 1000))

    def half(self):
        if next(calls) == at:
            self.param_groups[0]["params"][0].data.add_(1.0)
            raise KeyboardInterrupt
        return whole(self)

    whole = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", half)


CUTS = {"in a step": (lambda patch: interrupt(patch, "opd", 4), 3)}
CUTS["in the first step"] = (lambda patch: interrupt(patch, "opd", 1), 0)
CUTS["in an update"] = (lambda patch: cut_update(patch, 4), 2)  # the state before it is gone: the last saved one


@pytest.mark.parametrize(("cut", "saved"), CUTS.values(), ids=CUTS.keys())
def test_ctrl_c_saves_what_it_can_and_says_how_to_go_on(cut, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["opd.py", *flags(SMALL)])
    with pytest.raises(SystemExit) as stop:
        cli(opd.main, opd.Config)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    said, out = capsys.readouterr(), next(Path("runs").iterdir())
    assert f"opd writes to {out}\n" in said.out
    assert said.err == f"error: interrupted; --resume --out {out} goes on from step {saved}\n" and stop.value.code == 2
    assert [path.name for path in (out / "checkpoint").iterdir()] == [f"step-{saved:06d}"] * (saved > 0)
    assert_same_run(here("opd", tmp_path / "whole"), here("opd", out, resume=True))


def test_ctrl_c_before_there_is_a_run(tmp_path, monkeypatch, capsys):
    AT_END.clear()  # another test's
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setattr(sys, "argv", ["opd.py", f"--reward={tmp_path}/mine.py:f"])
    with pytest.raises(SystemExit) as stop:
        cli(opd.main, opd.Config)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: interrupted\n"


def test_a_longer_run_may_be_asked_for_on_resume(tmp_path):
    short = here("grpo", tmp_path / "run", schedule="constant")
    whole = here("grpo", tmp_path / "whole", schedule="constant", steps=6)
    here("grpo", short, schedule="constant", steps=6, resume=True)
    assert json.loads((short / "summary.json").read_text())["steps"] == 6
    x, y = weights(short), weights(whole)
    assert all(torch.equal(x[key], y[key]) for key in x)


# --- seeds and accumulation


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_run_other_seed_another(whole, tmp_path, method):
    assert_same_run(whole(method), here(method, tmp_path / "again", **LONG))
    a, b = (results(here(method, tmp_path / f"{seed}", seed=seed, steps=2)) for seed in (0, 1))
    alike = method in EPISODES or method in ("pi_distill", "rltf")  # responses of one length
    for key in ("train/entropy",) if alike else ("train/length", "loss/total", "train/entropy"):
        assert a[1][key] != b[1][key]
    if method != "sod":  # whose calculator fails by the seed
        assert a[0]["eval/greedy"] == b[0]["eval/greedy"]  # the same held-out problems for every seed


ACCUMULATED = [
    ("grpo", {}), ("grpo", {"agg": "seq", "beta": 0.1, "ent-coef": 0.01, "minibatches": 2, "tis": "seq_truncate"}),
    ("opd", {}), ("opd", {"est": "full", "beta": 0.3, "agg": "seq"}), ("opd", {"est": "topk", "agg": "const"}),
    ("opd", {"est": "k3_k2", "agg": "sum", "prefix-frac": 0.5}), ("opd", {"cold-start-steps": 4}),
    ("scope_opd", {}), ("scope_opd", {"objective": "repo"}), ("scope_opd", {"kl": "topk", "reduction": "token_mean"}),
    ("skill_sd", MANY), ("skill_sd", {**MANY, "est": "full", "teacher-sync": "live"}),
    ("skill_sd", {**MANY, "est": "k3", "sdl-agg": "seq_sum", "minibatches": 2}),
    ("rltf", {}), ("rltf", {"mode": "both", "loss-norm": "token", "minibatches": 2}), ("rltf", {"mode": "sft"}),
    ("sod", {}), ("sod", {"loss-agg": "seq", "ref-step": "mean", "minibatches": 3}), ("sod", {"weighting": "gated"}),
    ("pi_distill", {"alpha-anneal": 0}), ("pi_distill", {"alpha": 0.0, "agg": "seq", "kl-est": "rb", "epochs": 2}),
    ("pi_distill", {"algorithm": "opsd", "divergence": "jsd", "kl-top": 9, "opsd-teacher": "frozen", "agg": "const"}),
    ("uni_opd", {}), ("uni_opd", {"denominator": "kept", "domain-weights": "2,1", "minibatches": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "given"), ACCUMULATED)
def test_micro_batches_change_nothing(method, given, tmp_path, monkeypatch):
    """With a large eps: Adam divides by the gradient's own size, and so turns rounding near 0 into whole steps."""

    class Linear(Optimizer):
        def __init__(self, *args):
            super().__init__(*args)
            self.adamw.param_groups[0]["eps"] = 1e-2

    monkeypatch.setattr(METHODS[method], "Optimizer", Linear)
    given = {**given, "steps": 2, "lr": 1e-3, "eval-every": 0}
    small, large = (here(method, tmp_path / f"{n}", **given, **{"micro-batch-tokens": n}) for n in (60, 100_000))
    for a, b in zip(results(small), results(large), strict=True):
        noise = a.pop("engine/ratio_max", 1.0), b.pop("engine/ratio_max", 1.0)  # the largest rounding error
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5) and noise == pytest.approx((1, 1), abs=1e-4)
    x, y = weights(small), weights(large)
    for key in x:
        torch.testing.assert_close(x[key], y[key], atol=1e-5, rtol=1e-5)


# --- learning

LEARNS = {"scope_opd": 0.04}  # least gain of Avg@8 in 50 steps of the default; seeds 0 to 4 gained 0.080 to 0.116


@pytest.mark.parametrize("method", LEARNS)
def test_the_default_learns_by_far_more_than_seeds_differ(method, tmp_path):
    METHODS[method].main(METHODS[method].Config(steps=50, eval_every=0, out=str(tmp_path / "run")))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_after"] - summary["accuracy_before"] > LEARNS[method]


# --- options


def test_wandb_offline_stays_inside_the_run_folder(folder):
    home = folder / "home"
    home.mkdir()
    out = folder / "with wandb"
    said = finish(start("opd", out, {"wandb": "offline"}, HOME=str(home), WANDB_SILENT="true"))
    assert list((out / "wandb").glob("offline-run-*/*.wandb")) and "accuracy" in said
    assert not list((folder / "elsewhere").iterdir())
    outside = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and "wandb" in str(path)]
    assert not outside
    assert len(lines(out)) == SMALL["steps"] + 1


@pytest.mark.parametrize("method", METHODS)
def test_lora_saves_a_merged_model(method, tmp_path):
    more = {"skill_sd": {**MANY, "teacher-sync": "live"}, "pi_distill": {"alpha-anneal": 0}}.get(method, {})
    out = here(method, tmp_path / "run", **{"lora-rank": 4, "lr": 1e-2, **more})
    saved = checkpoint.read(out / "checkpoint")["policy"]
    assert saved and all(".lora_" in key for key in saved)
    model, info = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    start = AutoModelForCausalLM.from_pretrained(TINY / METHODS[method].Config().model)
    assert model.state_dict().keys() == start.state_dict().keys()
    assert not (out / "model" / "adapter_config.json").exists()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        gap = (model(ids).logits - start(ids).logits).abs().max()
    assert gap > 1e-3
    # the merged model is the policy itself: W + (alpha / r) B A = W + 2 B A
    for key, b in saved.items():
        if ".lora_B." in key:
            name = key.removeprefix("base_model.model.").split(".lora_B.")[0] + ".weight"
            moved = start.state_dict()[name] + 2 * b @ saved[key.replace("lora_B", "lora_A")]
            torch.testing.assert_close(model.state_dict()[name], moved, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_trains_fp32_weights(method, tmp_path):
    out = here(method, tmp_path / "run", dtype="bfloat16")
    saved = checkpoint.read(out / "checkpoint")["policy"]
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert all(math.isfinite(row["train/entropy"]) for row in lines(out)[1:] if "train/entropy" in row)
    assert lines(out)[1]["engine/logp_gap"] < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_result(method, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.common.models.SYSTEM", System())  # the runs set it
    again, times = torch.utils.checkpoint.checkpoint, []
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **kw: times.append(1) or again(*args, **kw))
    plain, lean = (here(method, tmp_path / f"{x}", system=Engines(checkpointing=x)) for x in (False, True))
    assert len(times) >= 4 and results(plain) == results(lean)
    assert all(torch.equal(value, weights(lean)[key]) for key, value in weights(plain).items())


def test_an_averaged_teacher_moves_in_bfloat16_too(tmp_path):
    """Steps of ema times a weight's change are far below bf16's resolution: the average needs fp32."""
    given = {"teacher": "self", "teacher-sync": "ema", "ema": 0.05, "lr": 1e-4, "est": "k2", "task-coef": 1.0}
    out = here("opd", tmp_path / "run", dtype="bfloat16", **given)
    saved = checkpoint.read(out / "checkpoint")
    start = load_file(TINY / "addition-student" / "model.safetensors")
    assert {weight.dtype for weight in saved["teacher"].values()} == {torch.float32}
    assert all(not torch.equal(saved["teacher"][key], value) for key, value in start.items())


def test_random_reward_is_a_coin(tmp_path):
    rows = lines(here("grpo", tmp_path / "run", reward="random", **{"prompts-per-step": 32, "eval-every": 0}))[1:]
    assert all(0.3 < row["train/reward"] < 0.7 for row in rows)


def test_a_reward_file_of_the_user_runs(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(example, completion):\n    return -len(completion) / 10 + (example.answer in completion)\n"
    )
    out = here("grpo", tmp_path / "run", reward=f"{tmp_path}/mine.py:short")
    assert all(row["train/reward"] < 0 for row in lines(out)[1:]) and lines(out)[1]["optim/grad_norm"] > 0


def test_a_reward_that_fails_now_and_then_leaves_those_rows_out(tmp_path):
    code = "def f(example, completion):\n    return {}[0] if completion[-1:] == '7' else float(completion[:1] > '4')\n"
    (tmp_path / "mine.py").write_text(code)
    given = {"reward": f"{tmp_path}/mine.py:f", "prompts-per-step": 16}
    rows = lines(here("grpo", tmp_path / "run", **given))[1:]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert any(row.get("optim/grad_norm", 0) > 0 for row in rows)


def test_without_signal_nothing_moves_and_the_keys_stay(tmp_path):
    (tmp_path / "mine.py").write_text("def same(example, completion):\n    return 0.5\n")
    out = here("grpo", tmp_path / "run", reward=f"{tmp_path}/mine.py:same")
    start = load_file(TINY / "addition-student" / "model.safetensors")
    assert all(torch.equal(start[key], value) for key, value in weights(out).items())
    for row in lines(out)[1:]:
        assert row["train/zero_signal"] == 1 and row["train/reward"] == 0.5
        assert row.keys() >= TABLE | OWN["grpo"], f"lacks {sorted((TABLE | OWN['grpo']) - row.keys())}"


def test_a_data_file_and_a_reasoning_gym_task_run(tmp_path):
    rows = "".join(json.dumps({"q": f"{i}+{i + 1}=", "a": 2 * i + 1}) + "\n" for i in range(100, 140))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = {"task": f"{tmp_path}/rows.jsonl", "prompt_column": "q", "answer_column": "a", "steps": 1}
    here("grpo", tmp_path / "file", **data)
    here("opd", tmp_path / "gym", task="reasoning_gym:chain_sum,max_terms=2", steps=1)
    assert json.loads((tmp_path / "file" / "summary.json").read_text())["task"].endswith("rows.jsonl")


# --- every value of every choice

# engines in test_rollout.py, wandb above and in test_bad_input.py, formats of tool calls in test_calls.py
TESTED_ELSEWHERE = {"rollout", "wandb", "tool_format", "skill"}
WITH = {  # flags under which a choice has anything to choose
    "grpo": {"adv": {"minibatches": 2}, "loss": {"minibatches": 4, "lr": 0.05},
             "ratio_level": {"minibatches": 4, "lr": 0.05}, "kl": {"beta": 0.5, "minibatches": 4, "lr": 0.05},
             "tis": {"dtype": "bfloat16", "tis_max": 1.05, "tis_min": 0.99, "minibatches": 2, "lr": 0.01},
             "preset": {"overlong": 4, "minibatches": 4, "lr": 0.05}},
    "opd": {"support": {"est": "topk", "top_k": 2, "beta": 0.5}, "tail": {"est": "topk", "top_k": 2, "beta": 0.5},
            "off_policy": {"est": "full", "lmbda": 0.0},
            "teacher_sync": {"teacher": "self", "est": "full", "beta": 0.5, "lr": 0.01, "ema": 0.3}},
    "scope_opd": {"kl": {"top_k": 2}, "student_weights": {"group_size": 16}},
    "uni_opd": {"margin_stats": {"group_size": 8}, "online_balance": {"group_size": 8}},
    "sod": {},
    "skill_sd": {name: {"prompts_per_step": 36, "group_size": 2, "lr": 0.01, "sdl_coef": 1.0}
                 for name in ("sdl_agg", "teacher_sync", "skill", "skill_to", "sampler", "dtype", "preset")}
    | {"est": {"prompts_per_step": 36, "group_size": 2, "lr": 0.01, "sdl_coef": 1.0, "minibatches": 2}},
    "pi_distill": {"opsd_kl": {"algorithm": "opsd"}, "divergence": {"algorithm": "opsd"}, "agg": {"temperature": 3.0},
                   "opsd_teacher": {"algorithm": "opsd", "lr": 0.01}, "student_denom": {"epochs": 2, "alpha_anneal": 0},
                   "reference": {"lr": 0.01, "alpha_anneal": 0}, "student_kl": {"alpha_anneal": 0}},
    "rltf": {"loss": {"minibatches": 4, "lr": 0.02}, "mode": {"prompts_per_step": 16}},
}  # fmt: skip


def choices() -> list[tuple[str, str, str]]:
    found = []
    for method, module in METHODS.items():
        for name, hint in typing.get_type_hints(module.Config).items():
            if typing.get_origin(hint) is typing.Literal and name not in TESTED_ELSEWHERE:
                found += [(method, name, value) for value in typing.get_args(hint)]
    return found


@pytest.fixture(scope="module")
def outcome(folder):
    """(method, flag, value) -> metrics of a run of three short steps, or the sentence in which check refuses it."""

    @functools.cache
    def get(method: str, name: str, value: str) -> str | list[dict]:
        module = METHODS[method]
        small = {"steps": 3, "prompts_per_step": 8, "group_size": 4, "eval_problems": 2, "eval_samples": 1}
        given = {**small, "lr": 5e-4, "warmup": 0, "eval_every": 0, **WITH[method].get(name, {}), name: value}
        if name == "preset":
            given = {**given, **module.PRESETS[value], "preset": value}
        out = folder / "choices" / f"{method}-{name}-{value}"
        try:
            module.check(module.Config(**given))
        except UserError as refused:
            return str(refused)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("posttrain.common.run.plot", lambda *args: None, raising=False)  # half of a short run's time
            module.main(module.Config(**given, out=str(out)))
        return results(out)

    return get


@pytest.mark.parametrize(("method", "name", "value"), choices())
def test_every_value_of_every_choice_runs(outcome, method, name, value):
    """With no other flag than those that give the choice something to choose."""
    found = outcome(method, name, value)
    assert not isinstance(found, str), f"refused: {found}"
    assert len(found) == 4 and all(math.isfinite(number) for row in found for number in row.values())


@pytest.mark.parametrize(("method", "name"), sorted({(method, name) for method, name, _ in choices()}))
def test_no_choice_is_ignored(outcome, method, name):
    """Any two values lead to different losses, gradients or samples within three steps."""
    values = [value for m, n, value in choices() if (m, n) == (method, name) and value != "auto"]  # one of the others
    seen: dict[str, str] = {}
    for value in values:
        found = outcome(method, name, value)
        assert not isinstance(found, str), found
        mark = json.dumps([{k: v for k, v in row.items() if k.startswith(("loss", "optim", "train"))} for row in found])
        assert mark not in seen, f"--{name} {value} does the same as {seen[mark]}"
        seen[mark] = value


@pytest.mark.parametrize("preset", typing.get_args(typing.get_type_hints(grpo.Config)["preset"]))
def test_every_preset_is_parsed_and_explicit_flags_win(preset, tmp_path, monkeypatch):
    given = {"preset": preset, "agg": "token_group", "eps-hi": 0.5}
    monkeypatch.setattr(sys, "argv", ["grpo.py", *flags({**SMALL, **given, "steps": 1, "out": tmp_path / "run"})])
    cli(grpo.main, grpo.Config, grpo.PRESETS)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    expected = {**grpo.PRESETS[preset], "agg": "token_group", "eps_hi": 0.5}
    assert {key: recorded[key] for key in expected} == expected


TOGETHER = [  # each either runs or is refused in a sentence
    ("grpo", {"lora_rank": 4, "beta": 0.1, "ref_every": 1}), ("grpo", {"lora_rank": 4, "dtype": "bfloat16"}),
    ("grpo", {"dtype": "bfloat16", "beta": 0.1, "ref_every": 1, "ref_mix": 0.5}),
    ("grpo", {"mask_truncated": True, "max_new_tokens": 3}), ("grpo", {"ent_top": 0.2, "opsm": 0.1, "delta": 3.0}),
    ("grpo", {"dynamic_sampling": 2, "minibatches": 4, "epochs": 2}), ("grpo", {"prompts_per_step": 1}),
    ("grpo", {"kl": "k1_reward", "beta": 0.1, "ref_every": 1}), ("grpo", {"eval_samples": 1, "eval_problems": 1}),
    ("grpo", {"max_new_tokens": 1}), ("grpo", {"save_every": 0, "eval_every": 0}),
    ("opd", {"teacher": "self", "teacher_sync": "live", "est": "full", "beta": 0.0}), ("opd", {"group_size": 1}),
    ("opd", {"teacher_prompt": "{answer} {prompt}", "est": "topk", "tail": "renorm", "beta": 0.0}),
    ("opd", {"teacher_prompt": "{a} {b} {prompt}", "est": "k3"}), ("opd", {"mask_eos": True, "max_new_tokens": 1}),
    ("opd", {"est": "topk", "top_k": 98}), ("opd", {"est": "topk", "top_k": 500, "support": "union"}),
    ("opd", {"lora_rank": 4, "est": "full", "dtype": "bfloat16"}), ("opd", {"lmbda": 0.0, "est": "full"}),
    ("opd", {"discount": 0.95, "discount_mean": True, "position_weight": 0.5, "prefix_frac": 0.3}),
    ("scope_opd", {"group_size": 1, "objective": "repo"}), ("scope_opd", {"drop_truncated": True, "max_new_tokens": 3}),
    ("scope_opd", {"mask_eos": True, "max_new_tokens": 1}), ("scope_opd", {"kl": "topk", "top_k": 98, "tau": 1e-6}),
    ("scope_opd", {"lora_rank": 4, "kl": "full", "dtype": "bfloat16"}), ("scope_opd", {"kl": "topk", "top_k": 500}),
    ("scope_opd", {"temperature": 0.6, "teacher_temperature": 1.0, "kl": "k3", "objective": "repo"}),
    ("skill_sd", {"skill": "none", "minibatches": 5}), ("skill_sd", {"bank_size": 1}),
    ("skill_sd", {"lora_rank": 4, "teacher_sync": "live", "dtype": "bfloat16"}), ("skill_sd", {"max_turns": 1}),
    ("skill_sd", {"task": "sokoban:render=text", "max_new_tokens": 100}), ("skill_sd", {"max_new_tokens": 5}),
    ("skill_sd", {"summarizer": "self", "summary_tokens": 40}), ("skill_sd", {"summarizer": "addition-student"}),
    ("skill_sd", {"task": "chain", "summarizer": "self", "summary_tokens": 8}),
    ("skill_sd", {"reward": "random", "prompts_per_step": 1}), ("skill_sd", {"adv_grpo": 0.0, "sampler": "teacher"}),
    ("rltf", {"lora_rank": 4, "dtype": "bfloat16", "mode": "both"}), ("rltf", {"max_new_tokens": 1, "sd_floor": 1e-6}),
    ("rltf", {"task": "reasoning_gym:chain_sum", "critic": "self", "critique_tokens": 9, "mode": "fm"}),
    ("rltf", {"task": "addition", "critic": "correctness", "eval_rounds": 1}), ("rltf", {"reward": "random"}),
    ("rltf", {"prompts_per_step": 1, "group_size": 2, "minibatches": 2}), ("rltf", {"task": "addition"}),
    ("rltf", {"mode": "both", "critic": "correctness", "sd_ratio": "sequence", "loss": "cispo", "format_coef": 0.0}),
    ("sod", {"coef": 0.0}), ("sod", {"max_turns": 1}), ("sod", {"max_new_tokens": 5}), ("sod", {"max_seconds": 1e-3}),
    ("sod", {"lora_rank": 4, "dtype": "bfloat16"}), ("sod", {"reward": "random", "weighting": "gated"}),
    ("sod", {"task": "chain:fault=0.5", "tool_bonus": True, "minibatches": 7}), ("sod", {"task": "addition"}),
    ("sod", {"delta": 0.0, "d_floor": 0.05, "opd_clip": 0.1, "dual_clip": 0.0}), ("sod", {"prompts_per_step": 1}),
    ("sod", {"task": "sokoban", "model": "sokoban-student", "teacher": "sokoban-student"}),
    ("sod", {"environment": "calculator", "task": "addition", "tool_format": "json", "max_new_tokens": 8}),
    ("pi_distill", {"alpha": 1.0, "beta": 0.0}), ("pi_distill", {"alpha": 0.0, "student_kl": "none"}),
    ("pi_distill", {"max_new_tokens": 1}), ("pi_distill", {"task": "addition", "max_new_tokens": 20, "hint": "sparse"}),
    ("pi_distill", {"algorithm": "opsd", "group_size": 1}), ("pi_distill", {"group_size": 1}),
    ("pi_distill", {"lora_rank": 4, "dtype": "bfloat16", "reference": "base"}), ("pi_distill", {"drop_flat": True}),
    ("pi_distill", {"algorithm": "opsd", "opsd_teacher": "ema", "dtype": "bfloat16"}), ("pi_distill", {"hint": "none"}),
    ("pi_distill", {"task": "reasoning_gym:chain_sum,max_terms=2", "hint": "self"}), ("pi_distill", {"sft_steps": 2}),
    ("uni_opd", {"group_size": 1}), ("uni_opd", {"balance_ratio": 0.0}), ("uni_opd", {"margin_delta": -math.inf}),
    ("uni_opd", {"balance_ratio": math.inf, "denominator": "kept"}), ("uni_opd", {"max_new_tokens": 1}),
    ("uni_opd", {"teacher": "arithmetic-add-teacher", "routing": "average"}), ("uni_opd", {"task_coef": 1.0}),
    ("uni_opd", {"minibatches": 3, "lora_rank": 4, "dtype": "bfloat16"}), ("uni_opd", {"prompts_per_step": 1}),
    ("uni_opd", {"margin": "mask", "mask_retain": 0.0, "margin_scope": "global", "margin_mode": "minmax"}),
    ("uni_opd", {"task": "addition", "model": "addition-student", "teacher": "addition-teacher", "gap_mask": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "given"), TOGETHER, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_flags_together_run_or_are_refused(method, given, tmp_path):
    small = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "eval_problems": 2, "eval_samples": 1}
    try:
        METHODS[method].main(METHODS[method].Config(**{**small, **given, "out": str(tmp_path / "run")}))
    except UserError as refused:
        assert "--" in str(refused)
        return
    rows = lines(tmp_path / "run")
    assert len(rows) == 3 and all(math.isfinite(value) for row in rows for value in row.values())


# --- the optimizer alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    names = {"lr": 0.1, "warmup": 0, "steps": 10, "schedule": "constant", "max_grad_norm": 1.0, "weight_decay": 0.1}
    optimizer = Optimizer(model, SimpleNamespace(**names))

    def step(n: int, value: float) -> dict[str, float]:
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        model.weight.grad[1, 2] = value
        return optimizer.step(n)

    step(1, 1.0)
    before, moments = [p.clone() for p in model.parameters()], json.dumps(str(optimizer.adamw.state_dict()["state"]))
    metrics = step(2, bad)
    assert metrics["optim/skipped"] == optimizer.skipped == 1 and not math.isfinite(metrics["optim/grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert json.dumps(str(optimizer.adamw.state_dict()["state"])) == moments
    assert all(weight.grad is None for weight in model.parameters())
    metrics = step(3, 1.0)
    assert metrics["optim/skipped"] == 1 and not torch.equal(before[0], model.weight)


def test_learning_rates_by_step():
    names = {"lr": 1.0, "warmup": 2, "steps": 6, "max_grad_norm": 1.0, "weight_decay": 0.0}
    rates = {
        kind: [Optimizer(nn.Linear(1, 1), SimpleNamespace(**names, schedule=kind)).rate(n) for n in range(1, 7)]
        for kind in ("linear", "cosine", "constant")
    }
    assert rates["linear"] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    cosine = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates["cosine"] == pytest.approx([0.5, 1, *cosine]) and rates["constant"] == [0.5, 1, 1, 1, 1, 1]
