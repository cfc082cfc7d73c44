"""A run's folder, log, progress line, checkpoints and closing table.

config.json     flags, versions, git commit        metrics.jsonl   one line a step
samples.jsonl   sampled texts with rewards         checkpoint/     all that --resume needs
model/          Hugging Face folder                summary.json, curve.png
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from posttrain.common.cli import UserError
from posttrain.common.models import save_model
from posttrain.common.rollout import HFEngine, Rollout, Sampling
from posttrain.common.tasks import Task
from posttrain.common.training import evaluate

RESULTS = Path(__file__).resolve().parents[1] / "scripts" / "results"  # written by scripts/reproduce.py
FREE_ON_RESUME = {"resume", "out", "wandb", "save_every", "steps"}
PACKAGES = ("torch", "transformers", "datasets", "reasoning-gym", "math-verify", "peft", "wandb")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def versions() -> dict[str, str]:
    found = {d: importlib.metadata.version(d) for d in PACKAGES if importlib.util.find_spec(d.replace("-", "_"))}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"python": platform.python_version(), **found, "git_commit": commit or "unknown"}


class Run:
    """Opens or creates the folder. Raises UserError on a folder that holds another run or can't be written."""

    def __init__(self, config: Any, method: str):
        self.config, self.method, self.start, self.seconds = config, method, time.monotonic(), 0.0
        self.console = Console(highlight=False)
        name = f"{method}-{Path(config.task).name.split(',')[0].replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(config.out or Path("runs") / name)
        flags = json.loads(json.dumps(dataclasses.asdict(config)))
        recorded = self.folder / "config.json"
        if config.resume:
            if not config.out or not recorded.is_file():
                raise UserError("--resume continues the run in --out: name a folder that holds a run's config.json")
            earlier = json.loads(recorded.read_text())
            was = {"method": earlier["method"], **earlier["config"]}
            now = {"method": method, **flags}
            changed = [k for k in now if k not in FREE_ON_RESUME and was.get(k) != now[k]]
            if changed:
                said = ", ".join(f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in changed[:3])
                raise UserError(f"--resume with other flags than the run in {self.folder} had ({said}); give the same")
        elif recorded.exists():
            raise UserError(f"{self.folder} already holds a run; add --resume to continue it, or choose another --out")
        try:
            (self.folder / "checkpoint").mkdir(parents=True, exist_ok=True)
            record = {"method": method, "config": flags, "versions": versions(), "command": sys.argv}
            write_atomically(recorded, json.dumps(record, indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.folder} ({error.strerror}); choose another --out"
            ) from None
        self.wandb = None
        if config.wandb != "off":
            self.wandb = start_wandb(config.wandb, self.folder, flags)

    # --- checkpoints

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint" / "state.pt"

    def save(self, step: int, **parts: Any) -> None:
        """Everything that --resume needs in one file, replaced in one rename: a kill leaves the old or the new one."""
        state = {"step": step, "seconds": self.seconds + time.monotonic() - self.start}
        state |= {name: state_of(part) for name, part in parts.items()}
        partial = self.checkpoint.with_name("state.pt.partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def restore(self, **parts: Any) -> int:
        """Load the checkpoint, if any, into the given parts; drop what was logged after it. -> steps already done"""
        step = 0
        if self.config.resume and self.checkpoint.is_file():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            step, self.seconds = state["step"], state["seconds"]
            for name, part in parts.items():
                if isinstance(part, dict):
                    part.update(state[name])
                elif isinstance(part, nn.Module):
                    part.load_state_dict(state[name], strict=False)
                else:
                    part.load_state_dict(state[name])
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step and self.checkpoint.is_file()]
            write_atomically(path, "".join(line + "\n" for line in kept))
        return step

    # --- logging

    def steps(self, done: int) -> Iterator[int]:
        """The remaining steps, 1-based, under a progress bar."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(30),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[live]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.progress:
            self.bar = self.progress.add_task(self.method, total=self.config.steps, completed=done, live="")
            for step in range(done + 1, self.config.steps + 1):
                yield step
                self.progress.advance(self.bar)

    def log(self, step: int, metrics: dict[str, float], rollout: Rollout | None = None) -> None:
        """One line of metrics.jsonl, the live line, wandb; the best, the worst and one more sample of the batch."""
        line = json.dumps({"step": step, **metrics})
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if rollout is not None:
            with (self.folder / "samples.jsonl").open("a") as file:
                for kind, i in sample_rows(rollout, step).items():
                    prompt, reward = rollout.examples[i].prompt[-1]["content"], rollout.reward[i].item()
                    sample = {"step": step, "kind": kind, "prompt": prompt, "text": rollout.texts[i], "reward": reward}
                    file.write(json.dumps(sample) + "\n")
        if "train/reward" in metrics:
            keys = {"reward": "train/reward", "accuracy": "train/accuracy", "entropy": "train/entropy"}
            keys |= {"length": "train/length", "tokens/s": "time/tokens_per_second"}
            live = "  ".join(f"{name} {metrics[key]:.3g}" for name, key in keys.items() if key in metrics)
            self.progress.update(self.bar, live=live)
            if not self.console.is_terminal and (step % max(1, self.config.steps // 10) == 0 or step == 1):
                self.console.print(f"step {step}/{self.config.steps}  {live}")

    def due(self, step: int, every: int) -> bool:
        """At every `every`-th step (0 = never) and at the last."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def evaluate(self, step: int, engine: HFEngine, task: Task, name: str = "policy") -> dict[str, float]:
        """Held-out eval/* metrics, always of the same problems; prints one best, one worst and one other sample."""
        config = self.config
        sampling = Sampling(config.temperature, config.max_new_tokens)
        problems = task.heldout(config.eval_problems)
        metrics, rollout = evaluate(engine, problems, task.grade, config.eval_samples, sampling, config.seed)
        self.console.print(
            f"step {step}, {name}: accuracy {metrics['eval/accuracy']:.3f} ± {metrics['eval/accuracy_se']:.3f}, "
            f"greedy {metrics['eval/greedy']:.3f}, pass@{config.eval_samples} {metrics['eval/pass_at_k']:.3f}"
        )
        for kind, i in sample_rows(rollout, step).items():
            text = (rollout.examples[i].prompt[-1]["content"] + " >> " + rollout.texts[i]).replace("\n", " ")
            self.console.print(f"  {kind:5} {rollout.reward[i]:4.1f}  {text[:150]}", markup=False)
        return metrics

    def finish(self, policy: nn.Module, tokenizer: Any, compare: tuple[str, ...]) -> None:
        """Save model/, summary.json and curve.png; print before, after, teacher and stored results to compare with."""
        config, k = self.config, self.config.eval_samples
        save_model(policy, tokenizer, self.folder / "model")
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        starts = {"before": (lines[0], "eval/"), "after": (lines[-1], "eval/"), "teacher": (lines[0], "teacher/eval/")}
        rows = {
            name: {key.replace("teacher/", ""): value for key, value in line.items() if key.startswith(start)}
            for name, (line, start) in starts.items()
        }
        seconds = self.seconds + time.monotonic() - self.start
        summary = {
            "method": self.method,
            **{f"accuracy_{name}": row.get("eval/accuracy") for name, row in rows.items()},
        }
        summary |= {"seconds": round(seconds, 1), "steps": config.steps, "seed": config.seed}
        summary |= {"model": config.model, "task": config.task, **rows}
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=1))
        plot(self.folder, f"{self.method} on {config.task}", lines)
        table = Table(title=f"{self.method} on {config.task}: {config.eval_problems} held-out problems")
        for column in ("", f"Avg@{k}", f"Pass@{k}", "greedy"):
            table.add_column(column, justify="right" if column else "left")
        for method in compare:
            if stored := stored_result(method, config):
                rows[f"{method}, stored mean of {stored['seeds']} seeds"] = stored
        for name, row in rows.items():
            if row:
                accuracy = f"{row['eval/accuracy']:.3f} ± {row['eval/accuracy_se']:.3f}"
                table.add_row(name, accuracy, f"{row['eval/pass_at_k']:.3f}", f"{row['eval/greedy']:.3f}")
        self.console.print(table)
        self.console.print(f"{seconds:.0f} s. Run folder: {self.folder}. Plot: {self.folder / 'curve.png'}")
        if self.wandb:
            self.wandb.finish()


def sample_rows(rollout: Rollout, step: int) -> dict[str, int]:
    """One best, one worst and one arbitrary row by reward."""
    order = rollout.reward.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    return {"best": order[0], "worst": order[-1], "other": order[step * 7919 % len(order)]}


def state_of(part: Any) -> Any:
    """What to store of a model (only adapters when it has them), an optimizer or a dict of scalars."""
    if isinstance(part, dict):
        return part
    state = part.state_dict()
    adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return adapters or state


def start_wandb(mode: str, folder: Path, flags: dict) -> Any:
    try:
        import wandb

        name = folder.resolve().name
        settings = wandb.Settings(init_timeout=60)
        return wandb.init(
            project="posttrain",
            id=name,
            name=name,
            config=flags,
            mode=mode,
            dir=folder,
            resume="allow",
            settings=settings,
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"wandb did not start ({reason}); log in first, or use --wandb offline or --wandb off"
        ) from None


def stored_result(method: str, config: Any) -> dict | None:
    """Mean, spread and seeds of a method's stored runs on the embedded default of this task, if there are any."""
    path = RESULTS / f"{config.task}.json"
    if not path.is_file() or config.model != f"{config.task}-student":
        return None
    return json.loads(path.read_text())["methods"].get(method)


def plot(folder: Path, title: str, lines: list[dict]) -> None:
    """curve.png: reward of the training batches and held-out accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("train/reward", "-"), ("eval/accuracy", "o-"), ("eval/pass_at_k", "s--")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True), style, label=key, markersize=4) if points else None
    axis.set(xlabel="step", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)
