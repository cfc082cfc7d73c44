"""A run's folder, log, progress line, checkpoints and closing table.

config.json     flags, versions, git commit        metrics.jsonl   one line a step
samples.jsonl   sampled texts with rewards         checkpoint/     all that --resume needs
model/          Hugging Face folder                summary.json, curve.png
"""

import copy
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

from posttrain.common.cli import AT_END, UserError, first_line, require, writable
from posttrain.common.machines import distributed
from posttrain.common.machines.weights import save_model
from posttrain.common.rollout import Rollout, Sampling
from posttrain.common.tasks import Task
from posttrain.common.training import evaluate

RESULTS = Path(__file__).resolve().parents[1] / "scripts" / "results"  # written by scripts/reproduce.py
EVAL_KEYS = ("eval/accuracy", "eval/accuracy_se", "eval/pass_at_k", "eval/greedy")
FREE_ON_RESUME = {"resume", "out", "wandb", "save_every", "steps", "system"}
PACKAGES = ("torch", "transformers", "datasets", "reasoning-gym", "math-verify", "peft", "wandb")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def read_json(path: Path, keys: dict[str, type], mend: str) -> list[dict]:
    """The object of a .json, or those of a .jsonl but for a last line without an end, which a kill cut short."""
    found = []
    try:
        text = path.read_bytes()
        for part in text.split(b"\n")[:-1] if path.suffix == ".jsonl" else [text]:
            each = dict(json.loads(part))
            for key, kind in keys.items():
                require(key in each and isinstance(each[key], kind), f"{key!r} is missing or wrong")
            found.append(each)
    except (OSError, ValueError, TypeError, UserError) as error:
        raise UserError(f"{path} is damaged (line {len(found) + 1}: {first_line(error)}): {mend}") from None
    return found


def versions() -> dict[str, str]:
    found = {d: importlib.metadata.version(d) for d in PACKAGES if importlib.util.find_spec(d.replace("-", "_"))}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {"python": platform.python_version(), **found, "git_commit": commit}


class Run:
    """Opens or creates the folder. Raises UserError on a folder that holds another run or can't be written."""

    def __init__(self, config: Any, method: str):
        self.config, self.method, self.start, self.seconds = config, method, time.monotonic(), 0.0
        self.console = Console(highlight=False)
        fresh = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        self.folder, self.first = Path(config.out or distributed.from_first(fresh)), distributed.rank() == 0
        flags = {"method": method, **dataclasses.asdict(config)}
        recorded = self.folder / "config.json"
        if config.resume:
            found = bool(config.out) and os.path.isfile(recorded)
            require(found, "--resume continues the run in --out: name a folder that holds a run's config.json")
            was = read_json(recorded, {"flags": dict}, "choose another --out")[0]["flags"]
            changed = [k for k in flags if k not in FREE_ON_RESUME and was.get(k) != flags[k]]
            said = ", ".join(f"{k} was {was.get(k)!r}, now {flags[k]!r}" for k in changed[:3])
            require(not changed, f"--resume with other flags than the run in {self.folder} had ({said}); give the same")
        held = f"{self.folder} already holds a run; add --resume to continue it, or choose another --out"
        metrics = self.folder / "metrics.jsonl"  # empty: a start that failed at once, such as by a wrong flag
        logged = metrics.read_bytes() if os.path.exists(metrics) else None
        require(config.resume or not os.path.exists(recorded) or logged == b"", held)
        if config.resume and not any(self.folder.glob("checkpoint/step-*")):  # it would start over
            steps = (logged or b"").count(b"\n") - 1
            had = steps > was.get("save_every", 0) > 0 or (self.folder / "summary.json").exists()
            mend = f"choose another --out, or delete {self.folder} to start over"
            require(not had, f"the run in {self.folder} has lost its checkpoint, which --resume needs; {mend}")
        self.checkpoint = writable(self.folder / "checkpoint", "choose another --out", make=True)
        self.record = {"flags": flags, "versions": versions(), "command": sys.argv}
        online = config.wandb != "off" and self.first  # the first process alone writes and prints
        self.wandb = start_wandb(config.wandb, self.folder, flags) if online else None
        self.before, self.saved = (0, 0, {}), 0  # the state in which the present step began; the last step saved
        distributed.barrier()  # all have looked into the folder
        if self.first:
            print(f"{method} writes to {self.folder}", flush=True)

    def due(self, step: int, every: int) -> bool:
        """At every `every`-th step (0 = never) and at the last."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def save(self, step: int, **parts: Any) -> None:
        """Everything that --resume needs."""
        from posttrain.common.machines import checkpoint

        plain = {name: part for name, part in parts.items() if isinstance(part, dict)}
        plain |= {"step": step, "seconds": self.seconds + time.monotonic() - self.start}
        plain["skipped"] = next(part.skipped for part in parts.values() if hasattr(part, "skipped"))
        checkpoint.save(self.checkpoint, step, plain, {k: part for k, part in parts.items() if k not in plain})
        self.saved = step

    def rescue(self, together: bool) -> str:
        """Save the state in which the present step began, unless its update has begun too. -> how to go on
        together: every process calls this; at Ctrl-C they are in different places, and several save nothing."""
        if hasattr(self, "progress"):
            self.progress.stop()  # while it is shown it wraps what is printed, and this is to be copied
        step, updates, state = self.before
        if step > self.saved and updates == self.updates() and (together or distributed.world() == 1):
            distributed.reshard()
            self.save(step, **self.parts | state)
        return f"--resume --out {self.folder} goes on from step {self.saved}\n" * self.first

    def updates(self) -> int:
        optimizer = next(part for part in self.parts.values() if hasattr(part, "skipped"))
        return optimizer.skipped + getattr(optimizer.model, "weights_version", 0)

    def restore(self, **parts: Any) -> int:
        """Load the checkpoint, if any, into the given parts; drop what was logged after it. -> steps already done"""
        state = {"step": -1, "seconds": 0.0}
        found = self.config.resume and max(self.checkpoint.glob("step-*"), default=None)
        if found:
            from posttrain.common.machines import checkpoint

            try:
                state = checkpoint.load(found, {k: part for k, part in parts.items() if not isinstance(part, dict)})
                for name, part in parts.items():
                    if isinstance(part, dict):
                        part.update(state[name])
                    elif hasattr(part, "skipped"):
                        part.skipped = state["skipped"]
                        part.model.weights_version = getattr(part.model, "weights_version", 0) + 1
            except Exception as error:
                mend = f"choose another --out, or delete {self.folder} to start over"
                raise UserError(f"{found} is damaged or of another model ({first_line(error)}); {mend}") from None
            require(state["step"] <= self.config.steps, f"the run has {state['step']} steps already: raise --steps")
        self.seconds, self.parts, self.saved = state["seconds"], parts, max(0, state["step"])
        if self.first:
            logs = {self.folder / "metrics.jsonl": [], self.folder / "samples.jsonl": []}
            logs |= {path: read_json(path, {"step": int}, "mend or delete that line") for path in logs if path.exists()}
            write_atomically(self.folder / "config.json", json.dumps(self.record, indent=1))
            for path, lines in logs.items():
                kept = (json.dumps(line) + "\n" for line in lines if line["step"] <= state["step"])
                write_atomically(path, "".join(kept))
        AT_END[:] = [self.rescue]
        return self.saved

    def steps(self, done: int) -> Iterator[int]:
        """The remaining steps, 1-based, under a progress bar with a live line."""
        remote = "://" in getattr(self.config, "rollout", "")
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[live]}"))
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.progress:
            self.bar = self.progress.add_task(self.method, total=self.config.steps, completed=done, live="")
            for step in range(done + 1, self.config.steps + 1):
                state = {name: copy.deepcopy(part) for name, part in self.parts.items() if isinstance(part, dict)}
                self.before = (step - 1, self.updates(), state)
                if remote and step - 1 > self.saved and self.due(step, self.config.eval_every):
                    self.save(step - 1, **self.parts)  # servers may fail after the update and before its line
                yield step
                self.progress.advance(self.bar)

    def log(self, step: int, metrics: dict, rollout: Rollout | None = None, signals: dict | None = None) -> None:
        """One line of metrics.jsonl, the live line, wandb; the best, the worst and one more sample of the batch, with
        signals by name: [N, T] on each of its tokens, or N values (scripts/explain.py shows them)."""
        if not self.first:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if step == 0:
            return
        self.sample(step, sampled(rollout, step, signals) if rollout else [])
        keys = ("reward", "accuracy", "entropy", "length")
        live = "  ".join(f"{key} {metrics[f'train/{key}']:.3g}" for key in keys if f"train/{key}" in metrics)
        live += f"  {metrics['time/tokens_per_second']:.0f} tokens/s"
        self.progress.update(self.bar, live=live)
        if not self.console.is_terminal and (step == 1 or step % max(1, self.config.steps // 10) == 0):
            print(f"step {step}/{self.config.steps}  {live}", flush=True)

    def sample(self, step: int, rows: Iterable[dict]) -> None:
        """Lines of samples.jsonl."""
        if not self.first:
            return
        with (self.folder / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)

    def evaluate(self, step: int, engine, task: Task, name: str = "policy", problems: list | None = None) -> dict:
        """Held-out eval/* metrics, always of the same problems; prints one best, one worst and one other sample."""
        config, problems = self.config, problems or task.heldout(self.config.eval_problems)
        sampling = Sampling(config.temperature, config.max_new_tokens)
        by = getattr(config, "domain_column", "domain")
        metrics, rollout = evaluate(engine, task, problems, config.eval_samples, sampling, config.seed, by)
        accuracy, error, passed, greedy = (f"{metrics[key]:.3f}" for key in EVAL_KEYS)
        passed = f"pass@{config.eval_samples} {passed}"
        self.console.print(f"step {step}, {name}: accuracy {accuracy} ± {error}, greedy {greedy}, {passed}")
        whole_line = {"markup": False, "no_wrap": True, "overflow": "ellipsis"}
        for kind, i in sample_rows(rollout.reward, step).items():
            text = (rollout.examples[i].prompt[-1]["content"] + " >> " + rollout.texts[i]).replace("\n", " ")
            self.console.print(f"  {kind:5} {rollout.reward[i]:4.1f}  {text}", **whole_line)
        return metrics

    def finish(self, policy: nn.Module, tokenizer: Any, compare: tuple[str, ...]) -> None:
        """Save model/, summary.json and curve.png; print before, after, teacher and stored results to compare with."""
        config, k = self.config, getattr(self.config, "eval_samples", 0)
        save_model(policy, tokenizer, self.folder / "model")
        if not self.first:
            return
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        rows = {"before": lines[0], "after": lines[-1]}
        rows["teacher"] = {key.removeprefix("teacher/"): value for key, value in lines[0].items() if "teacher" in key}
        rows = {name: {key: row[key] for key in EVAL_KEYS if key in row} for name, row in rows.items()}
        summary = {f"accuracy_{name}": row.get("eval/accuracy") for name, row in rows.items()} | rows
        summary |= {key: getattr(config, key) for key in ("steps", "seed", "model", "task")}
        seconds = round(self.seconds + time.monotonic() - self.start, 1)
        summary |= {"method": self.method, "seconds": seconds}
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=1))
        plot(self.folder, f"{self.method} on {config.task}", lines)
        studies = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
        same = ("model", "steps", "prompts_per_step", "group_size", "eval_problems", "eval_samples")
        studies *= all(getattr(config, k, 0) == getattr(type(config), k, 0) for k in same)  # else none compares
        stored = {k: v for each in studies if each.get("task") == config.task for k, v in each["methods"].items()}
        rows |= {f"{m}, stored mean of {stored[m]['seeds']} seeds": stored[m] for m in compare if m in stored}
        columns = dict(zip(EVAL_KEYS, (f"Avg@{k}" if k else "accuracy", "", f"Pass@{k}", "greedy"), strict=True))
        columns = {key: label for key, label in columns.items() if label and any(key in row for row in rows.values())}
        title = f"{self.method} on {config.task}: {config.eval_problems} held-out problems"
        table = Table("", *columns.values(), title=title)
        for name, row in ((name, row) for name, row in rows.items() if row):
            cells = {key: f"{row[key]:.3f}" for key in EVAL_KEYS if key in row}
            cells["eval/accuracy"] += f" ± {cells['eval/accuracy_se']}"
            table.add_row(name, *(cells.get(key, "") for key in columns))
        self.console.print(table)
        print(f"{seconds:.0f} s. Run folder: {self.folder}  Plot: {self.folder / 'curve.png'}")
        if self.wandb:
            self.wandb.finish()


def sample_rows(reward: Tensor, step: int) -> dict[str, int]:
    """One best, one worst and one arbitrary row by reward."""
    order = reward.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    return {"best": order[0], "worst": order[-1], "other": order[step * 7919 % len(order)]}


def sampled(rollout: Rollout, step: int, signals: dict | None) -> Iterator[dict]:
    for kind, i in sample_rows(rollout.reward, step).items():
        row = {"kind": kind, "prompt": rollout.examples[i].prompt, "text": rollout.texts[i]}
        row |= {"reward": rollout.reward[i].item()}
        length = int(rollout.attention_mask[i].sum()) if signals else 0
        for name, x in ({"ids": rollout.tokens, "turn": rollout.turn, **signals} if signals else {}).items():
            row[name] = [round(v, 4) for v in x[i, :length].tolist()] if torch.is_tensor(x) else x[i]
        yield row | ({"episode": dataclasses.asdict(rollout.episodes[i])} if signals and rollout.episodes[i] else {})


def start_wandb(mode: str, folder: Path, flags: dict) -> Any:
    import wandb

    name = folder.resolve().name
    os.environ |= {"WANDB_CACHE_DIR": str(folder / "wandb"), "WANDB_SILENT": "true"}
    where = {"id": name, "name": name, "mode": mode, "dir": folder, "resume": "allow"}
    try:
        settings = wandb.Settings(init_timeout=30)
        return wandb.init(project="posttrain", config=flags, settings=settings, **where)
    except Exception as error:
        mend = "log in first, or use --wandb offline or --wandb off"
        raise UserError(f"wandb did not start ({first_line(error)}); {mend}") from None


def plot(folder: Path, title: str, lines: list[dict]) -> None:
    """curve.png: reward of the training batches and held-out accuracy over the steps."""
    import pandas
    from matplotlib.figure import Figure

    columns = [key for key in ("train/reward", "eval/accuracy", "eval/pass_at_k") if any(key in line for line in lines)]
    frame = pandas.DataFrame(lines).set_index("step")[columns].interpolate(limit_area="inside")
    figure = Figure(figsize=(7, 4), layout="constrained")
    frame.plot(ax=figure.subplots(), title=title, grid=True)
    figure.savefig(folder / "curve.png", dpi=120)
