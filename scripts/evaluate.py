"""Avg@k, Pass@k and greedy accuracy of any model on any task's held-out problems, with 95% confidence intervals.

The intervals resample problems (10,000 bootstrap draws), so that they hold for other problems of the same kind.

Run: python scripts/evaluate.py --model addition-teacher --task addition
     python scripts/evaluate.py --model chain-student --task chain --max-turns 10 --max-new-tokens 120
     python scripts/evaluate.py --model Qwen/Qwen3-1.7B --task gsm8k --problems 200 --samples 4 --max-new-tokens 1024
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from posttrain.common.cli import Engines, UserError, cli, require
from posttrain.common.environments.episodes import Episodes
from posttrain.common.environments.tools import Form, make_environment
from posttrain.common.machines import distributed
from posttrain.common.models import load_model, load_tokenizer, prepare
from posttrain.common.rollout import Sampling, make_engine
from posttrain.common.tasks import CORRECT, grade_all, make_reward, make_task
from posttrain.common.training import pass_at_k


@dataclass
class Config:
    model: str = "addition-student"  # folder, hub name, or a built-in tiny model
    task: str = "addition"  # addition, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task (an episode: its environment) or path/to/file.py:function; 1 counts as correct
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    problems: int = 256  # held-out problems, fewer if the task has fewer
    samples: int = 8  # responses to each; Pass@k is shown for k = 1, 2, 4, ... up to this
    max_new_tokens: int = 20  # longest response
    temperature: float = 1.0  # of sampling
    top_p: float = 1.0  # nucleus sampling
    environment: str = "task"  # with --max-turns: task, calculator, python, or path/to/file.py:Class
    tool_format: Form = "hermes"  # of tool calls: <tool_call> tags, or a bare JSON object
    max_turns: int = 1  # above 1: play episodes, of which --max-new-tokens bounds the whole
    seed: int = 0  # of sampling
    rollout: str = "hf"  # sampling engine: hf, vllm in this process, or vLLM servers http://host:8000,...
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    system: Engines = Engines()  # flags about machines and engines: common/cli.py
    out: str = ""  # folder for samples.jsonl and summary.json; empty = print only


def interval(per_problem: torch.Tensor, seed: int) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval over problems.  [P] -> mean, low, high"""
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(per_problem), (10_000, len(per_problem)), generator=draw)
    low, high = per_problem[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=per_problem.dtype)).tolist()
    return per_problem.mean().item(), low, high


def main(config: Config) -> None:
    require(config.temperature > 0, "--temperature must be above 0; the greedy answer is always measured as well")
    require(config.problems > 0 and config.samples > 0, "--problems and --samples must be at least 1")
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    tokenizer = load_tokenizer(config.model)
    engine = make_engine(load_model(config.model, device, config.dtype, train=False), tokenizer, config)
    if config.max_turns > 1:
        engine = Episodes(engine, make_environment(config.environment, task, config.tool_format), config.max_turns)
    in_turns = f"task {config.task!r} is played in turns: give --max-turns and a larger --max-new-tokens"
    require(config.max_turns > 1 or not hasattr(task, "environment"), in_turns)
    folder = Path(config.out) if config.out else None
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder} ({error.strerror}); choose another --out") from None
        held = any((folder / name).exists() for name in ("summary.json", "samples.jsonl", "config.json"))
        require(not held, f"{folder} already holds a run or an evaluation; choose another --out")

    start, play = time.perf_counter(), config.max_turns > 1
    problems = task.heldout(config.problems)
    sampling = Sampling(config.temperature, config.max_new_tokens, config.top_p)
    sampled = engine.generate(problems, config.samples, sampling, key=(config.seed, 0, 1))
    greedy = engine.generate(problems, 1, Sampling(0.0, config.max_new_tokens), key=(config.seed, 0, 2))
    for rollout in (sampled, greedy) if config.reward != "task" or not play else ():  # else graded already
        rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts))
    correct = (sampled.reward == CORRECT).view(len(problems), config.samples)
    figures = {f"avg@{config.samples}": correct.double().mean(1)}
    figures |= {f"pass@{2**i}": pass_at_k(correct, 2**i) for i in range(1, config.samples.bit_length())}
    figures["greedy"] = (greedy.reward == CORRECT).double()
    summary = {"model": config.model, "task": config.task, "problems": len(problems), "config": asdict(config)}
    table = Table(title=f"{config.model} on {config.task}: {len(problems)} held-out problems")
    for column in ("", "mean", "95% interval"):
        table.add_column(column, justify="right" if column else "left")
    for name, per_problem in figures.items():
        mean, low, high = interval(per_problem, config.seed)
        summary[name] = {"mean": mean, "low": low, "high": high}
        table.add_row(name, f"{mean:.3f}", f"{low:.3f} to {high:.3f}")
    summary["truncated"] = 1 - sampled.finished.double().mean().item()
    summary["seconds"] = round(time.perf_counter() - start, 1)
    console = Console()
    console.print(table)
    console.print(f"{summary['truncated']:.1%} of the samples were cut by length; {summary['seconds']:.0f} s")
    if folder and distributed.rank() == 0:
        with (folder / "samples.jsonl").open("w") as file:
            for kind, rollout in (("sampled", sampled), ("greedy", greedy)):
                for example, text, value in zip(rollout.examples, rollout.texts, rollout.reward.tolist(), strict=True):
                    row = {
                        "kind": kind,
                        "prompt": example.prompt,
                        "answer": example.answer,
                        "text": text,
                        "reward": value,
                    }
                    file.write(json.dumps(row) + "\n")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        console.print(f"samples and summary in {folder}")


if __name__ == "__main__":
    cli(main, Config)
