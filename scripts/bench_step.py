"""A whole GRPO step, ours against TRL's: same model, prompts, rewards and numbers of tokens, side by side in one run.

Ours is methods/grpo.py's own main, TRL's is GRPOTrainer.train(). Each side runs in a fresh process, so that peaks don't
mix; the sides take turns, so that a busy machine slows all alike. Nothing ends a response before --max-new-tokens on
either side, the reward is a function of the text that differs within groups (without it ours would skip the backward
pass), and the first step of a process, which allocates, is not counted.
    sample, score, update   seconds of a step: rollout with grading; the reference's log-probs; losses to optimizer step
    peak                    growth of the process's memory over what it was when the policy had been loaded (on a GPU:
                            of torch's allocations), so gradients, moments and the reference count
    to TRL                  a row's figure over TRL's of the same turn: median (smallest-largest); below 1 is better
TRL accumulates gradients over micro-batches of --micro-rows as ours does, or takes all rows at one time, or recomputes
activations (its default). All sides: fp32, SDPA attention, key-value cache, AdamW; no logs, no saves, no evaluation.

Run: pip install -r requirements.txt -r requirements-bench.txt
     python scripts/get_smollm2.py --out models/SmolLM2-135M-Instruct
     python scripts/bench_step.py --model models/SmolLM2-135M-Instruct
     python scripts/bench_step.py --task addition --model addition-student --prompts 32 --max-new-tokens 20 --steps 11
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from posttrain.common import rollout
from posttrain.common.cli import Engines, UserError, cli, require
from posttrain.common.models import TINY, load_model, load_tokenizer
from posttrain.common.rollout import encode
from posttrain.common.run import versions, write_atomically
from posttrain.common.tasks import Example, make_task

PHASES = ("sample", "score", "update")
SIDES = {  # -> its own settings
    "ours": {},
    "ours, prompts read once": {"share_prompts": True},
    "TRL": {},
    "TRL, all rows at once": {"whole": True},
    "TRL, recomputing": {"gradient_checkpointing": True},
}


@dataclass
class Config:
    model: str = "models/SmolLM2-135M-Instruct"  # folder, hub name, or a built-in tiny model
    task: str = "reasoning_gym:chain_sum"  # whose prompts are answered
    prompts: int = 4  # P
    group_size: int = 8  # G
    max_new_tokens: int = 64  # of every response
    micro_rows: int = 8  # responses a forward and backward
    betas: tuple[float, ...] = (0.0, 0.04)  # weights of the KL to the reference; each is measured
    lr: float = 1e-6  # constant
    steps: int = 3  # of a process; the first is not counted
    repeats: int = 3  # turns, each a process a side
    threads: int = 1  # CPU threads
    device: str = "cpu"  # cpu or cuda
    sides: tuple[Literal[tuple(SIDES)], ...] = tuple(SIDES)  # TRL among them
    out: str = "scripts/results/bench_step.json"  # figures, machine, versions and flags; empty = print only
    child: str = ""  # for the script itself: a JSON file that says what to run, into which the figures go


def variety(example: Any, text: str) -> float:
    """The reward: different letters per letter. Differs between any two samples of a model, and needs no time."""
    return len(set(text)) / max(1, len(text))


# --- in a process of its own


class Meter:
    """Marks of wall and CPU time, and the memory's growth over a start."""

    def __init__(self, device: str):
        self.gpu, self.marks, self.base, self.peak = device.startswith("cuda"), [], 0, 0

    def mark(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))
        return self.marks[-1][0]

    def start(self) -> None:
        """The policy has been loaded: whatever peak that had is forgotten."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.base = resident("VmRSS")

    def look(self) -> None:
        self.peak = (torch.cuda.max_memory_allocated() if self.gpu else resident("VmHWM")) - self.base


def resident(key: str) -> int:
    """VmRSS, now, or VmHWM, the highest since the last reset; bytes."""
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def run_ours(job: SimpleNamespace, meter: Meter, **flags: Any) -> list[dict[str, list[float]]]:
    from posttrain.methods import grpo

    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = load_model(*args, **kwargs)
        if not meter.base:
            meter.start()
        return model

    def look(*args: Any) -> dict[str, float]:
        meter.look()
        return resources(*args)

    resources, rollout.stop_ids = grpo.resources, lambda *_: []
    grpo.load_model, grpo.resources, grpo.time = load, look, SimpleNamespace(perf_counter=meter.mark)
    shared = {key: getattr(job, key) for key in ("model", "group_size", "max_new_tokens", "lr", "steps")}
    grpo.main(
        grpo.Config(
            **shared, system=Engines(threads=job.threads), task=job.file, reward=f"{__file__}:variety",
            prompts_per_step=job.prompts, beta=job.beta, kl="k3",
            micro_batch_tokens=job.micro_tokens, device=job.device, schedule="constant", warmup=0, eval_every=0,
            eval_problems=1, eval_samples=1, save_every=0, out=job.folder, **flags,
        )
    )  # fmt: skip
    marks = [meter.marks[i : i + 4] for i in range(0, len(meter.marks), 4)]  # before and after each phase
    return [dict(zip(PHASES, (pair(a, b) for a, b in itertools.pairwise(m)), strict=True)) for m in marks]


def run_trl(job: SimpleNamespace, meter: Meter, whole: bool = False, gradient_checkpointing: bool = False) -> list:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job.threads)
    name = str(TINY / job.model) if (TINY / job.model).is_dir() else job.model
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(job.device)
    meter.start()
    steps: list[dict[str, list[float]]] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            begin = self.clock()
            self.scored = [0.0, 0.0]
            out = super()._generate_and_score_completions(inputs)
            steps[-1] |= {"sample": pair(self.scored, pair(begin, self.clock())), "score": self.scored}
            return out

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            begin = self.clock()
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if not torch.is_grad_enabled():
                self.scored = [a + b for a, b in zip(self.scored, pair(begin, self.clock()), strict=True)]
            return out

        def clock(self):
            meter.mark()
            return meter.marks[-1]

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            steps.append({"update": trainer.clock()})

        def on_step_end(self, *args, **kwargs):
            meter.look()
            step = steps[-1]
            whole_step = pair(step["update"], trainer.clock())
            step["update"] = [t - a - b for t, a, b in zip(whole_step, step["sample"], step["score"], strict=True)]

    rows = job.prompts * job.group_size
    size = rows if whole else min(job.micro_rows, rows)
    arguments = GRPOConfig(
        output_dir=job.folder, use_cpu=job.device == "cpu", bf16=False, gradient_checkpointing=gradient_checkpointing,
        per_device_train_batch_size=size, gradient_accumulation_steps=rows // size, num_generations=job.group_size,
        max_completion_length=job.max_new_tokens, temperature=1.0, beta=job.beta, learning_rate=job.lr,
        lr_scheduler_type="constant", max_steps=job.steps, max_grad_norm=1.0, seed=0, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": example.prompt} for example in make_task(job.file).train])
    reward = lambda completions, **_: [variety(None, c[-1]["content"]) for c in completions]  # noqa: E731
    tokenizer = load_tokenizer(job.model)
    if not tokenizer.chat_template:  # as `encode` joins messages without one
        prompts = prompts.map(lambda row: {"prompt": "\n".join(m["content"] for m in row["prompt"])})
        reward = lambda completions, **_: [variety(None, c) for c in completions]  # noqa: E731
    trainer = Timed(model, reward, args=arguments, train_dataset=prompts, processing_class=tokenizer)
    trainer.add_callback(Steps())
    trainer.eos_token_ids, trainer.generation_config.eos_token_id = [-1], None
    model.generation_config.eos_token_id = None
    trainer.train()
    return steps


def pair(a: Any, b: Any) -> list[float]:
    """Wall and CPU seconds from a to b."""
    return [y - x for x, y in zip(a, b, strict=True)]


def work(job: SimpleNamespace) -> None:
    meter = Meter(job.device)
    torch.set_num_threads(job.threads)
    steps = (run_ours if job.side.startswith("ours") else run_trl)(job, meter, **SIDES[job.side])
    figures = {"steps": steps, "peak": meter.peak, "base": meter.base}
    Path(job.record).write_text(json.dumps(figures))


# --- the process that asks


def ask(config: Config, side: str, beta: float, file: Path, micro_tokens: int) -> dict[str, Any]:
    """One process: seconds of each phase, mean over the counted steps as [wall, CPU], and the peak's growth."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        job = {**dataclasses.asdict(config), "side": side, "beta": beta, "file": str(file), "record": str(record)}
        job |= {"folder": f"{folder}/run", "micro_tokens": micro_tokens}
        record.write_text(json.dumps(job))
        quiet = {"OMP_NUM_THREADS": str(config.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        child = subprocess.run(
            [sys.executable, __file__, "--child", str(record)],
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise UserError(f"{side} failed: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
        found = json.loads(record.read_text())
    counted = found["steps"][1:]
    means = {p: [statistics.mean(step[p][i] for step in counted) for i in (0, 1)] for p in PHASES}
    means["step"] = [sum(means[p][i] for p in PHASES) for i in (0, 1)]
    return {"seconds": means, "peak": found["peak"]}


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


def prompts_file(config: Config, path: Path) -> None:
    """Problems of which our reader of files holds a tenth out and trains on --prompts."""
    n = next(n for n in range(config.prompts, 2 * config.prompts + 2) if n - -(-n // 10) == config.prompts)
    problems: dict[str, Example] = {}
    for example in make_task(config.task).draw(4 * n, 0):
        problems.setdefault(json.dumps(example.prompt), example)
    require(len(problems) >= n, f"--task {config.task!r} has too few different prompts; lower --prompts")
    rows = [{"prompt": example.prompt, "answer": example.answer or "-"} for example in problems.values()][:n]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(config: Config) -> None:
    if config.child:
        return work(SimpleNamespace(**json.loads(Path(config.child).read_text())))
    require(importlib.util.find_spec("trl"), "TRL is not installed: pip install -r requirements-bench.txt")
    require("TRL" in config.sides, "--sides must have TRL, which the others are compared with")
    require(config.steps > 1, "--steps must be at least 2: the first is not counted")
    rows = config.prompts * config.group_size
    require(rows % min(rows, config.micro_rows) == 0, "--micro-rows must divide --prompts times --group-size")
    console, results = Console(highlight=False), {}
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    machine = torch.cuda.get_device_name() if config.device != "cpu" else cpu[1] if cpu else platform.machine()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        prompts_file(config, file)
        tokenizer = load_tokenizer(config.model)
        lengths = [len(encode(tokenizer, example.prompt)) for example in make_task(str(file)).train]
        micro_tokens = config.micro_rows * (max(lengths) + config.max_new_tokens)
        title = f"{machine}, {config.threads} thread(s). {config.model}: {config.prompts} prompts of {min(lengths)}-"
        console.print(f"{title}{max(lengths)} tokens x {config.group_size} responses of {config.max_new_tokens} tokens")
        for beta in config.betas:
            turns: dict[str, list] = {side: [] for side in config.sides}
            for _ in range(config.repeats):
                for side in config.sides:
                    turns[side].append(ask(config, side, beta, file, micro_tokens))
            results[f"beta {beta:g}"] = show(console, config, beta, turns)
    if config.out:
        packages = {name: metadata.version(name) for name in ("trl", "accelerate")}
        about = {"machine": machine, "versions": versions() | packages, "flags": dataclasses.asdict(config)}
        about["prompt_tokens"] = lengths
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config.out), json.dumps(about | {"results": results}, indent=1))


def show(console: Console, config: Config, beta: float, turns: dict[str, list]) -> dict[str, Any]:
    """Prints one table; with one CPU thread seconds are CPU time, which neighbours on the machine disturb least."""
    clock = int(config.threads == 1 and config.device == "cpu")
    table = Table(title=f"beta {beta:g}: {('wall', 'CPU')[clock]} seconds a step; peak in GiB", title_justify="left")
    columns = ("", *PHASES, "step", "peak", "to TRL: time", "to TRL: peak")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    out: dict[str, Any] = {}
    for side, mine in turns.items():
        seconds = {
            unit: {p: spread([turn["seconds"][p][i] for turn in mine]) for p in (*PHASES, "step")}
            for i, unit in enumerate(("wall", "cpu"))
        }
        out[side] = {**seconds, "peak_gib": spread([turn["peak"] / 2**30 for turn in mine])}
        pairs = list(zip(mine, turns["TRL"], strict=True))  # of the same turn
        for i, unit in enumerate(("wall", "cpu")):
            ratio = [a["seconds"]["step"][i] / b["seconds"]["step"][i] for a, b in pairs]
            out[side][f"ratio_{unit}"] = spread(ratio)
        out[side]["ratio_peak"] = spread([a["peak"] / b["peak"] for a, b in pairs])
        shown = out[side][("wall", "cpu")[clock]]
        cells = [f"{shown[p]['median']:.3f}" for p in (*PHASES, "step")] + [f"{out[side]['peak_gib']['median']:.3f}"]
        for ratio in (out[side][f"ratio_{('wall', 'cpu')[clock]}"], out[side]["ratio_peak"]):
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
        table.add_row(side, *cells)
    console.print(table)
    return out


if __name__ == "__main__":
    cli(main, Config)
