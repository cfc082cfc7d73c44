"""Bad input of every kind ends in one line that names cause and mend, exit code 2, no stack trace, nothing lost."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from posttrain.common.cli import cli
from posttrain.common.models import TINY
from posttrain.methods import grpo, opd, pi_distill, rltf, scope_opd, skill_sd, sod, uni_opd

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"grpo": grpo, "opd": opd, "scope_opd": scope_opd, "uni_opd": uni_opd, "skill_sd": skill_sd, "sod": sod}
METHODS |= {"pi_distill": pi_distill, "rltf": rltf}
SMALL = {"steps": 2, "prompts-per-step": 2, "group-size": 2, "eval-problems": 2, "eval-samples": 1, "max-new-tokens": 8}
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "question": f"{i}?"} for i in range(30)]


def flags(given: dict) -> list[str]:
    return [f"--{name}={value}" if value is not True else f"--{name}" for name, value in given.items()]


def snapshot(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one_line(stderr: str, *words: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert "Traceback" not in stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 700, stderr
    for word in words:
        assert word.lower() in lines[0].lower(), f"{word!r} is not in {lines[0]!r}"
    return lines[0]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(method, flags) in this process, from an empty folder -> exit code and what stands on stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    shell = os.environ.copy()

    def start(method: str, given: dict) -> tuple[int, str]:
        module = METHODS[method]
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *flags({**SMALL, **given})])
        capfd.readouterr()
        code = 0
        try:
            cli(module.main, module.Config, getattr(module, "PRESETS", None))
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.set_num_threads(1)
            os.environ.clear()
            os.environ.update(shell)
        return code, capfd.readouterr().err

    return start


def process(method: str, given: dict, cwd: Path, seconds: float = 120, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    env.pop("WANDB_SILENT", None)
    command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), *flags({**SMALL, **given})]
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "check": False}
    return subprocess.run(command, cwd=cwd, env=env, timeout=seconds, **quiet)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    done = process("grpo", {"out": "run", "save-every": 1}, folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def held(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "held"))


# --- flags: [method, flags, words that the line must hold]
FLAGS = {
    "unknown flag": ("grpo", {"group-sise": 4}, ["--group-sise", "--group-size", "--help"]),
    "no number": ("grpo", {"lr": "fast"}, ["fast", "--lr"]),
    "no integer": ("opd", {"steps": "2.5"}, ["2.5", "--steps"]),
    "unknown choice": ("grpo", {"adv": "gropu_std"}, ["gropu_std", "group_std"]),
    "unknown preset": ("grpo", {"preset": "dappo"}, ["dappo", "dapo"]),
    "unknown model": ("grpo", {"model": "no/such-model"}, ["no/such-model", "addition-student"]),
    "unknown teacher": ("opd", {"teacher": "adition-teacher"}, ["adition-teacher", "addition-teacher"]),
    "unknown task": ("grpo", {"task": "substraction"}, ["substraction", "addition"]),
    "unknown dataset": ("grpo", {"task": "reasoning_gym:chain_sun"}, ["chain_sun", "chain_sum"]),
    "unknown option": ("grpo", {"task": "reasoning_gym:chain_sum,max_term=3"}, ["max_term", "max_terms"]),
    "refused option": ("grpo", {"task": "reasoning_gym:chain_sum,max_terms=-3"}, ["chain_sum", "max_terms"]),
    "missing file": ("grpo", {"task": "no.jsonl"}, ["no.jsonl", "no such file"]),
    "group of one": ("grpo", {"group-size": 1}, ["--group-size"]),
    "temperature 0": ("grpo", {"temperature": 0}, ["--temperature"]),
    "temperature 0, opd": ("opd", {"temperature": 0}, ["--temperature"]),
    "prompts once, layers again": ("grpo", {"share-prompts": True, "checkpointing": True}, ["--share-prompts"]),
    "temperature nan": ("grpo", {"temperature": "nan"}, ["--temperature"]),
    "temperature inf": ("grpo", {"temperature": "inf"}, ["--temperature"]),
    "off-policy k1": ("opd", {"lmbda": 0.5, "est": "k1_pg"}, ["--lmbda", "--est"]),
    "unknown teacher, scope": ("scope_opd", {"teacher": "adition-teacher"}, ["adition-teacher", "addition-teacher"]),
    "temperature 0, scope": ("scope_opd", {"temperature": 0}, ["--temperature"]),
    "unknown weights": ("scope_opd", {"student-weights": "positive"}, ["positive", "opposite"]),
    "weights without weighting": ("scope_opd", {"weighting": "none", "tau": 2}, ["--weighting", "--tau"]),
    "weights without routing": ("scope_opd", {"routing": "none", "weight-scale": "mean1"}, ["--routing"]),
    "reduction of the repo": ("scope_opd", {"objective": "repo", "reduction": "token_mean"}, ["--reduction"]),
    "KL over one token": ("scope_opd", {"kl": "topk", "top-k": 1}, ["--top-k"]),
    "KL over too many": ("scope_opd", {"kl": "topk", "top-k": 500}, ["--top-k", "98"]),
    "too few to probe": ("scope_opd", {"recovery-probe": 1, "group-size": 1}, ["--recovery-probe"]),
    "temperature 0, uni": ("uni_opd", {"temperature": 0}, ["--temperature"]),
    "unknown teacher, uni": ("uni_opd", {"teacher": "add=ad,mul=arithmetic-mul-teacher"}, ["'ad'", "arithmetic"]),
    "a domain without a teacher": ("uni_opd", {"teacher": "add=arithmetic-add-teacher"}, ["'mul'", "mul=MODEL"]),
    "a domain twice": ("uni_opd", {"teacher": "add=x,add=y"}, ["--teacher", "domain=model"]),
    "a domain without a model": ("uni_opd", {"teacher": "add=x,mul="}, ["--teacher", "domain=model"]),
    "a model without a domain": ("uni_opd", {"teacher": "add=x,y"}, ["--teacher", "domain=model"]),
    "no such column of domains": ("uni_opd", {"domain-column": "topic"}, ["--domain-column"]),
    "a weight too few": ("uni_opd", {"domain-weights": "1"}, ["--domain-weights", "2"]),
    "a weight that is no number": ("uni_opd", {"domain-weights": "1,x"}, ["--domain-weights", "'1,x'"]),
    "weights of zero": ("uni_opd", {"domain-weights": "0,0"}, ["--domain-weights"]),
    "weights of one teacher": ("uni_opd", {"teacher": "arithmetic-student", "domain-weights": "1"}, ["0 domains"]),
    "delta nan": ("uni_opd", {"margin-delta": "nan"}, ["--margin-delta"]),
    "delta inf": ("uni_opd", {"margin-delta": "inf"}, ["--margin-delta"]),
    "ratio nan": ("uni_opd", {"balance-ratio": "nan"}, ["--balance-ratio"]),
    "group of one, skill": ("skill_sd", {"group-size": 1}, ["--group-size"]),
    "temperature 0, skill": ("skill_sd", {"temperature": 0}, ["--temperature"]),
    "an average of adapters": ("skill_sd", {"lora-rank": 4}, ["--teacher-sync live or frozen", "--lora-rank"]),
    "no loss": ("skill_sd", {"adv-grpo": 0, "sdl-coef": 0}, ["--adv-grpo 0", "--sdl-coef 0"]),
    "no loss, student": ("skill_sd", {"adv-grpo": 0, "skill-to": "student"}, ["--adv-grpo 0", "--skill-to student"]),
    "a teacher that moves": ("skill_sd", {"est": "full", "teacher-sync": "live", "minibatches": 2}, ["--est"]),
    "no rules": ("skill_sd", {"task": "chain"}, ["chain", "--summarizer"]),
    "no episodes": ("skill_sd", {"task": "addition"}, ["--environment", "calculator"]),
    "unknown summarizer": ("skill_sd", {"summarizer": "rule"}, ["'rule'", "addition-student"]),
    "unknown estimator": ("skill_sd", {"est": "k2"}, ["k2", "iw_k3"]),
    "unknown option, sokoban": ("skill_sd", {"task": "sokoban:sise=4"}, ["sise", "size"]),
    "option out of range, sokoban": ("skill_sd", {"task": "sokoban:boxes=2"}, ["boxes=2", "render=text"]),
    "board too large": ("skill_sd", {"task": "sokoban:render=text", "max-new-tokens": 400}, ["--max-new-tokens"]),
    "group of one, rltf": ("rltf", {"group-size": 1}, ["--group-size"]),
    "temperature 0, rltf": ("rltf", {"temperature": 0}, ["--temperature"]),
    "unknown mode": ("rltf", {"mode": "sdl"}, ["sdl", "sd"]),
    "a ratio without Eq. 3": ("rltf", {"mode": "fm", "sd-ratio": "token"}, ["--sd-ratio", "--mode"]),
    "unknown critic": ("rltf", {"critic": "corectness"}, ["'corectness'", "near: ['correctness']"]),
    "no critic": ("rltf", {"task": "addition"}, ["addition", "--critic"]),
    "no such column of critiques": ("rltf", {"critic": "column:hint"}, ["hint", "operators"]),
    "unknown option, steps": ("rltf", {"task": "steps:know=0.5"}, ["know", "known"]),
    "option out of range, steps": ("rltf", {"task": "steps:known=2"}, ["known"]),
    "group of one, sod": ("sod", {"group-size": 1}, ["--group-size"]),
    "temperature 0, sod": ("sod", {"temperature": 0}, ["--temperature"]),
    "unknown teacher, sod": ("sod", {"teacher": "chain-techer"}, ["chain-techer", "chain-teacher"]),
    "no environment": ("sod", {"task": "addition"}, ["--environment", "calculator"]),
    "unknown environment": ("sod", {"environment": "wizard"}, ["wizard", "--environment", "calculator"]),
    "no environment file": ("sod", {"environment": "no.py:E"}, ["no.py", "--environment"]),
    "unknown weighting": ("sod", {"weighting": "uncliped"}, ["uncliped", "unclipped"]),
    "unknown format": ("sod", {"tool-format": "xml"}, ["xml", "hermes"]),
    "unknown option, chain": ("sod", {"task": "chain:falt=0.1"}, ["falt", "fault"]),
    "option out of range, chain": ("sod", {"task": "chain:fault=1.5"}, ["chain:fault=1.5"]),
    "too long, sod": ("sod", {"max-new-tokens": 5000}, ["--max-new-tokens"]),
    "eps 0": ("sod", {"eps": 0}, ["--eps"]),
    "adv-eps 0": ("sod", {"adv-eps": 0}, ["--adv-eps"]),
    "clip-low beyond 1": ("sod", {"clip-low": 1.5}, ["--clip-low"]),
    "dual-clip below 1": ("sod", {"dual-clip": 0.5}, ["--dual-clip"]),
    "group of one, pi": ("pi_distill", {"group-size": 1}, ["--group-size"]),
    "temperature 0, pi": ("pi_distill", {"temperature": 0}, ["--temperature"]),
    "alpha above 1": ("pi_distill", {"alpha": 2}, ["--alpha"]),
    "end of the jsd": ("pi_distill", {"algorithm": "opsd", "divergence": "jsd", "jsd-beta": 1}, ["--jsd-beta"]),
    "a flag of opsd": ("pi_distill", {"opsd-teacher": "frozen"}, ["--opsd-teacher", "--algorithm opsd"]),
    "a flag of pi": ("pi_distill", {"algorithm": "opsd", "alpha": 0.1}, ["--alpha", "--algorithm pi"]),
    "an average of adapters, opsd": (
        "pi_distill", {"preset": "opsd", "opsd-teacher": "ema", "lora-rank": 4}, ["--opsd-teacher", "--lora-rank"]),
    "nothing to learn from": ("pi_distill", {"preset": "opsd_zhao", "opsd-kl": "reward"}, ["--adv-coef", "--opsd-kl"]),
    "no KL and no group": ("pi_distill", {"preset": "opsd", "hint": "none", "group-size": 1}, ["--group-size"]),
    "a hint without its place": ("pi_distill", {"hint-text": "hello"}, ["--hint-text", "{hint}"]),
    "no such hint column": ("pi_distill", {"task": "addition", "hint-column": "trce"}, ["--hint-column", "trce"]),
    "a hint column of a task with hints": ("pi_distill", {"hint-column": "tip"}, ["--hint-column", "lookup"]),
    "an average that is none": ("pi_distill", {"preset": "opsd", "ema": 0.1}, ["--ema", "--opsd-teacher ema"]),
    "a mixture that is none": ("pi_distill", {"preset": "opsd", "jsd-beta": 0.1}, ["--jsd-beta", "--divergence jsd"]),
    "no hints at all": ("pi_distill", {"hint": "none", "require-hint": True}, ["--require-hint"]),
    "unknown hint": ("pi_distill", {"hint": "answer"}, ["answer", "sparse"]),
    "share out of range, lookup": ("pi_distill", {"task": "lookup:trust=2"}, ["trust=2", "shares"]),
    "no such device": ("grpo", {"device": "cuda:7"}, ["cuda:7", "--device cpu"]),
    "not a device": ("opd", {"device": "gpu"}, ["gpu", "--device cpu"]),
    "too long": ("grpo", {"max-new-tokens": 5000}, ["--max-new-tokens"]),
    "too long, opd": ("opd", {"max-new-tokens": 600}, ["--max-new-tokens"]),
    "no reward file": ("grpo", {"reward": "no.py:f"}, ["no.py", "--reward"]),
    "no reward": ("opd", {"reward": "quality"}, ["quality", "--reward"]),
    "unknown teacher field": ("opd", {"teacher-prompt": "{hint}"}, ["--teacher-prompt", "{prompt}"]),
    "broken teacher field": ("opd", {"teacher-prompt": "{prompt"}, ["--teacher-prompt"]),
    "attribute of a field": ("opd", {"teacher-prompt": "{prompt.x}"}, ["--teacher-prompt"]),
    "resume without out": ("grpo", {"resume": True}, ["--resume", "--out"]),
    "resume of nothing": ("opd", {"resume": True, "out": "nowhere"}, ["--resume", "--out"]),
    "out under a file": ("grpo", {"out": "/etc/hostname/run"}, ["/etc/hostname/run", "--out"]),
    "out in proc": ("opd", {"out": "/proc/run"}, ["/proc/run", "--out"]),
    "out too long": ("grpo", {"out": "x" * 300}, ["too long", "--out"]),
    "out too long, resume": ("grpo", {"out": "x" * 300, "resume": True}, ["--resume", "--out"]),
    "lr beyond fp32": ("opd", {"lr": 1e300}, ["--lr", "below 1000"]),
    "weight beyond fp32": ("opd", {"kl-coef": 1e300}, ["--kl-coef", "below 1e+30"]),
    "temperature too small for fp32": ("opd", {"temperature": 1e-300}, ["--temperature", "at least 1e-30"]),
    "adapters as large as a model": ("grpo", {"lora-rank": 10**8}, ["--lora-rank", "below 16384"]),
    "too many threads": ("grpo", {"threads": 10**8}, ["--threads", "below 1024"]),
    "too many prompts": ("grpo", {"prompts-per-step": 10**12}, ["--prompts-per-step", "below 1048576"]),
    "too many samples": ("grpo", {"eval-samples": 10**12}, ["--eval-samples", "below 1048576"]),
}  # fmt: skip
NEGATIVE = {
    "steps": [0, -1], "lr": [-1, "nan"], "prompts-per-step": [0, -4], "group-size": [0, -2], "eval-problems": [0, -1],
    "eval-samples": [0], "micro-batch-tokens": [0, -1], "save-every": [-1], "eval-every": [-1], "max-new-tokens": [0],
    "temperature": [-1], "seed": [-1, 2**32], "threads": [-1], "lora-rank": [-1], "warmup": [-1], "max-grad-norm": [-1],
    "weight-decay": [-1],
}  # fmt: skip
FLAGS |= {f"--{k} {v}": ("grpo", {k: v}, [f"--{k}"]) for k, values in NEGATIVE.items() for v in values}
FLAGS["--rollout sglang"] = ("grpo", {"rollout": "sglang"}, ["--rollout 'sglang'", "hf, vllm, or the addresses"])
FLAGS["--vllm-sleep"] = ("grpo", {"rollout": "vllm", "vllm-sleep": True}, ["--vllm-sleep", "on a CPU"])
if not importlib.util.find_spec("vllm"):
    words = ["vLLM is not installed", "pip install -r requirements-vllm.txt"]
    FLAGS["--rollout vllm"] = ("grpo", {"rollout": "vllm"}, words)
OWN = {
    "grpo": {"minibatches": 0, "epochs": 0, "ent-top": 0, "beta": -1, "overlong": -1, "dynamic-sampling": -1},
    "opd": {"top-k": 0, "prefix-frac": 0, "divergence-temperature": 0, "beta": 2, "lmbda": -1, "ema": 2},
    "scope_opd": {"tau": 0, "teacher-temperature": -1, "top-k": 0, "recovery-probe": -1},
    "uni_opd": {"balance-ratio": -1, "mask-retain": 2, "gap-mask": -1, "eps-lo": -1, "minibatches": 0, "task-coef": -1},
    "sod": {
        "delta": -1,
        "d-floor": -1,
        "opd-clip": -1,
        "minibatches": 0,
        "coef": -1,
        "max-turns": 0,
        "max-seconds": -1,
    },
    "skill_sd": {"ema": 2, "bank-size": 0, "minibatches": 0, "max-turns": 0, "sdl-coef": -1, "ucb": -1},
    "pi_distill": {"ema": 2, "eps": 1, "epochs": 0, "beta": -1, "kl-top": -1, "sft-steps": -1, "alpha-anneal": -1},
    "rltf": {"gamma": -1, "sd-coef": -1, "sd-floor": -5, "fm-lambda": -1, "minibatches": 0, "critique-tokens": 0},
}
TOPK = {"top-k", "divergence-temperature"}
for _method, _own in OWN.items():
    for _key, _value in _own.items():
        _given = {_key: _value} | ({"est": "topk"} if _key in TOPK and _method == "opd" else {})
        FLAGS[f"{_method} --{_key} {_value}"] = (_method, _given, [f"--{_key}"])


@pytest.mark.parametrize(("method", "given", "words"), FLAGS.values(), ids=FLAGS.keys())
def test_a_bad_flag_is_one_line(run, method, given, words):
    code, stderr = run(method, {"out": "run", **given} if "resume" not in given else given)
    one_line(stderr, *words)
    assert code == 2


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        ("grpo", {"max-new-tokens": 5000}), ("opd", {"teacher-prompt": "{hint}"}),
        ("grpo", {"device": "cuda:7"}), ("opd", {"model": "no/such-model"}),
    ],
)  # fmt: skip
def test_the_mended_command_may_use_the_same_folder(run, method, bad):
    code, stderr = run(method, {"out": "run", **bad})
    assert code == 2
    code, stderr = run(method, {"out": "run"})
    assert code == 0, stderr


# --- data
DATA = {
    "empty": ("", {}, ["rows.jsonl", "is empty", "two rows"]),
    "blank lines": ("\n\n", {}, ["rows.jsonl", "is empty", "two rows"]),
    "a row that is not UTF-8": ([*ROWS, {"prompt": "caf\u00e9", "answer": "1"}], {}, ["row 29", "0xe9", "UTF-8"]),
    "one row": (json.dumps(ROWS[0]), {}, ["rows.jsonl", "few"]),
    "no JSON": ("prompt,answer\n1,2\n", {}, ["rows.jsonl"]),
    "half a line": (json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:20], {}, ["rows.jsonl"]),
    "missing answer column": (ROWS, {"answer-column": "gold"}, ["gold", "--answer-column", "question"]),
    "missing prompt column": (ROWS, {"prompt-column": "text"}, ["text", "--prompt-column", "question"]),
    "a null prompt": ([*ROWS, {"prompt": None, "answer": "1"}], {}, ["row 30"]),
    "an empty prompt": ([*ROWS, {"prompt": "", "answer": "1"}], {}, ["row 30"]),
    "a number as prompt": ([{"prompt": i, "answer": i} for i in range(1, 30)], {}, ["prompt", "rows.jsonl"]),
    "a list of texts as prompt": ([{"prompt": [f"{i}"], "answer": i} for i in range(1, 30)], {}, ["prompt"]),
    "messages without content": ([{"prompt": [{"role": f"{i}"}], "answer": i} for i in range(30)], {}, ["prompt"]),
    "a long prompt": (
        [*ROWS, *({"prompt": "1+" * 400 + f"{i}=", "answer": "1"} for i in range(30))],
        {},
        ["positions"],
    ),
}


@pytest.mark.parametrize(("rows", "given", "words"), DATA.values(), ids=DATA.keys())
@pytest.mark.filterwarnings("ignore")
def test_bad_data_is_one_line(run, rows, given, words):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path("rows.jsonl").write_text(text, "latin-1")
    code, stderr = run("grpo", {"task": "rows.jsonl", "out": "run", **given})
    one_line(stderr, *words)
    assert code == 2


# --- rewards
REWARDS = {
    "no such function": ("def g(example, completion): return 1", ["'f'"]),
    "not a function": ("f = 3", ["'f'"]),
    "syntax": ("def f(:", ["SyntaxError", "reward.py"]),
    "import": ("import nothing_of_the_kind", ["nothing_of_the_kind"]),
    "exits": ("import sys; sys.exit(0)", ["reward.py"]),
    "raises": ("def f(example, completion): raise RuntimeError('no\\nluck')", ["RuntimeError", "no"]),
    "no number": ("def f(example, completion): return 'good'", ["good"]),
    "None": ("def f(example, completion): return None", ["NoneType"]),
    "NaN": ("def f(example, completion): return float('nan')", ["nan"]),
    "wrong arguments": ("def f(completion): return 1.0", ["argument"]),
}


@pytest.mark.parametrize(("code", "words"), REWARDS.values(), ids=REWARDS.keys())
def test_a_bad_reward_is_one_line(run, code, words):
    Path("reward.py").write_text(code)
    exit_code, stderr = run("grpo", {"reward": "reward.py:f", "out": "run"})
    one_line(stderr, *words)
    assert exit_code == 2


# --- environments
ENVIRONMENT = """class E:
    turn_tokens = 2
    def reset(self, example):
        return example.prompt
    def step(self, text):
        return "12", len(text) > 3, 1.0
"""
ENVIRONMENTS = {
    "no such class": (ENVIRONMENT.replace("class E", "class F"), ["'E'", "--environment"]),
    "no step": (ENVIRONMENT.replace("def step", "def answer"), ["step", "--environment"]),
    "import": ("import nothing_of_the_kind", ["nothing_of_the_kind"]),
    "raises": (ENVIRONMENT.replace('"12"', "1 / 0"), ["E.step", "ZeroDivisionError"]),
    "constructor raises": (
        ENVIRONMENT + "    def __init__(self): raise RuntimeError('no\\nluck')",
        ["RuntimeError", "no"],
    ),
    "no text": (ENVIRONMENT.replace('"12"', "None"), ["step", "None"]),
    "no prompt": (ENVIRONMENT.replace("return example.prompt", "pass"), ["reset", "None"]),
}


@pytest.mark.parametrize(("code", "words"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_a_bad_environment_is_one_line(run, code, words):
    Path("mine.py").write_text(code)
    exit_code, stderr = run("sod", {"environment": "mine.py:E", "out": "run"})
    one_line(stderr, *words)
    assert exit_code == 2


def test_an_environment_of_ones_own_runs(run):
    Path("mine.py").write_text(ENVIRONMENT)
    exit_code, stderr = run("sod", {"environment": "mine.py:E", "out": "run"})
    assert exit_code == 0, stderr


@pytest.mark.parametrize(("value", "words"), [("2.5", ["1 must mean correct"]), ("100", ["--reward"])])
def test_a_reward_above_one_is_one_line_where_correctness_matters(run, value, words):
    Path("reward.py").write_text(f"def f(example, completion): return {value} * (len(completion) > 0)")
    exit_code, stderr = run("uni_opd", {"reward": "reward.py:f", "out": "run"})
    one_line(stderr, *words)
    assert exit_code == 2


def test_rewards_of_minus_one_to_one_are_correct_at_one_only(run):
    Path("reward.py").write_text("def f(example, completion): return {0: -1, 1: 0.5, 2: 1}[ord(completion[-1]) % 3]")
    exit_code, stderr = run("uni_opd", {"reward": "reward.py:f", "out": "run", "prompts-per-step": 8, "group-size": 4})
    assert exit_code == 0, stderr
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][1:]
    assert all(0 < row["uni/correct_share"] < 1 for row in rows)


# --- models


def broken_model(folder: Path, how: str) -> Path:
    shutil.copytree(TINY / "addition-student", folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "weights cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "weights of noise":
        weights.write_bytes(b"\xff" * 5000)
    elif how == "weights empty":
        weights.write_bytes(b"")
    elif how == "weights a text":  # what a clone without Git LFS leaves
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1371816\n")
    elif how == "weights of another shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 64}))
    elif how == "config no JSON":
        config.write_text("{")
    elif how == "config of nothing":
        config.write_text("{}")
    elif how == "tokenizer no JSON":
        (folder / "tokenizer.json").write_text("{")
    else:
        (folder / how).unlink()
    return folder


@pytest.mark.parametrize(
    "how",
    ["config.json", "model.safetensors", "tokenizer.json", "config no JSON", "config of nothing", "tokenizer no JSON",
     "weights cut", "weights of noise", "weights empty", "weights a text", "weights of another shape"],
)  # fmt: skip
def test_a_broken_model_folder_is_one_line(run, tmp_path, how):
    folder = broken_model(tmp_path / "broken", how)
    before = snapshot(folder)
    code, stderr = run("grpo", {"model": folder, "out": "run"})
    assert "not one of" not in one_line(stderr, "broken", "; mend it" if "." not in how else "")
    assert code == 2 and snapshot(folder) == before


def test_a_file_as_model_is_one_line(run):
    code, stderr = run("grpo", {"model": TINY / "addition-student" / "model.safetensors", "out": "run"})
    one_line(stderr, "model.safetensors")
    assert code == 2


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The student under a tokenizer of which two tokens have changed places."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(TINY / "addition-student", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("method", "teacher"),
    [
        ("opd", "{}"),
        ("sod", "{}"),
        ("scope_opd", "{}"),
        ("uni_opd", "{}"),
        ("uni_opd", "add=arithmetic-add-teacher,mul={}"),
    ],
)
def test_different_vocabularies_are_one_line(run, foreign, method, teacher):
    code, stderr = run(method, {"teacher": teacher.format(foreign), "out": "run"})
    one_line(stderr, "vocabular", "'3'")
    assert code == 2


def test_a_teacher_that_ends_otherwise_is_one_line_and_mended_by_mask_eos(run, tmp_path):
    folder = shutil.copytree(TINY / "addition-teacher", tmp_path / "teacher")
    ends = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**ends, "eos_token_id": [5, ends["eos_token_id"]]}))
    code, stderr = run("scope_opd", {"teacher": folder, "out": "run"})
    one_line(stderr, "end", "--mask-eos")
    assert code == 2
    code, stderr = run("scope_opd", {"teacher": folder, "out": "run", "mask-eos": True})
    assert code == 0, stderr


# --- run folders


@pytest.mark.parametrize("method", ["grpo", "opd"])
def test_out_that_holds_a_run_is_left_alone(run, held, method):
    before = snapshot(held)
    code, stderr = run(method, {"out": held})
    one_line(stderr, str(held), "--resume", "--out")
    assert code == 2 and snapshot(held) == before


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("grpo", {"lr": 1e-5}, ["lr", "1e-05"]), ("grpo", {"seed": 1, "beta": 0.1}, ["seed", "beta"]),
        ("opd", {}, ["method", "grpo"]), ("grpo", {"preset": "dapo"}, ["preset"]),
    ],
)  # fmt: skip
def test_resume_with_other_flags_leaves_the_run_alone(run, held, method, given, words):
    before = snapshot(held)
    code, stderr = run(method, {"out": held, "resume": True, "save-every": 1, **given})
    one_line(stderr, "--resume", *words)
    assert code == 2 and snapshot(held) == before


def test_resume_with_fewer_steps_than_are_done_leaves_the_run_alone(run, held):
    before = snapshot(held)
    code, stderr = run("grpo", {"out": held, "resume": True, "steps": 1})
    one_line(stderr, "--steps")
    assert code == 2 and snapshot(held) == before


def another_model(folder):
    state = {"policy": {"model.embed_tokens.weight": torch.zeros(3, 3)}, "optimizer": {}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


CORRUPT = {
    "tensors cut": lambda folder: (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:3000]),
    "tensors empty": lambda folder: (folder / "__0_0.distcp").write_bytes(b""),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "index of noise": lambda folder: (folder / ".metadata").write_bytes(b"\x80\x02noise" * 500),
    "numbers of another program": lambda folder: torch.save({"epoch": 3}, folder / "plain.pt"),
    "numbers empty": lambda folder: (folder / "plain.pt").write_bytes(b""),
    "another model's": another_model,
}


@pytest.mark.parametrize("how", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_checkpoint_is_one_line_and_loses_nothing(run, held, how):
    how(max((held / "checkpoint").iterdir()))
    before = snapshot(held)
    code, stderr = run("grpo", {"out": held, "resume": True, "save-every": 1})
    one_line(stderr, "checkpoint/step-", "choose another --out", "start over")
    after = snapshot(held)
    before.pop("config.json"), after.pop("config.json")
    assert code == 2 and after == before


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("line", ["{broken}", '{"step": 1, "half', "[]", "{}", '{"step": "\xff"}'])
def test_a_broken_line_of_a_log_is_one_line_and_loses_nothing(run, held, log, line):
    first, *others = (held / log).read_text().splitlines(True)
    (held / log).write_text("".join([first, line + "\n", *others]), "latin-1")
    before = snapshot(held)
    code, stderr = run("grpo", {"out": held, "resume": True, "save-every": 1})
    one_line(stderr, f"{log} is damaged (line 2: ", "mend or delete")
    assert code == 2 and snapshot(held) == before


@pytest.mark.parametrize("left", [["summary.json"], ["metrics.jsonl"]])
def test_resume_of_a_run_that_lost_its_checkpoint_leaves_the_rest_alone(run, held, left):
    """Known by the results of its end, or by more steps than a run takes until it first saves."""
    shutil.rmtree(held / "checkpoint")
    for name in {"summary.json", "metrics.jsonl"}.difference(left):
        (held / name).unlink()
    before = snapshot(held)
    code, stderr = run("grpo", {"out": held, "resume": True, "save-every": 1})
    one_line(stderr, str(held), "lost its checkpoint", "choose another --out", "start over")
    assert code == 2 and snapshot(held) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "other"}', '{"flags": 3}'])
def test_a_foreign_config_json_is_one_line(run, tmp_path, text):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    for given in ({"resume": True}, {}):
        code, stderr = run("grpo", {"out": folder, **given})
        one_line(stderr, "--out")
        assert code == 2 and snapshot(folder) == {"config.json": hashlib.sha256(text.encode()).hexdigest()}


def test_out_may_be_an_empty_folder_or_one_with_other_files(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    code, stderr = run("grpo", {"out": tmp_path / "there"})
    assert code == 0, stderr
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"


# --- whole processes: nothing else may write to stderr


def test_processes_say_one_line_and_nothing_else(held, foreign, tmp_path):
    before = snapshot(held)
    cases = [
        ("grpo", {"model": "no/such-model"}, ["no/such-model"]),
        ("opd", {"teacher": foreign}, ["vocabular"]),
        ("grpo", {"max-new-tokens": 5000, "out": tmp_path / "new"}, ["--max-new-tokens"]),
        ("opd", {"out": held}, ["already holds a run"]),
    ]
    for method, given, words in cases:
        done = process(method, given, tmp_path)
        one_line(done.stderr, *words)
        assert done.returncode == 2
    assert snapshot(held) == before


def test_wandb_online_without_a_login_is_one_line(tmp_path):
    clean = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    done = process("grpo", {"wandb": "online", "out": tmp_path / "run"}, tmp_path, **clean)
    one_line(done.stderr, "wandb", "--wandb offline")
    assert done.returncode == 2


def test_wandb_online_with_a_dead_server_is_one_line(tmp_path):
    dead = {"HOME": str(tmp_path), "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    dead["WANDB_INIT_TIMEOUT"] = "8"  # its own waiting time, in seconds
    done = process("grpo", {"wandb": "online", "out": tmp_path / "run"}, tmp_path, **dead)
    one_line(done.stderr, "wandb", "--wandb offline")
    assert done.returncode == 2
