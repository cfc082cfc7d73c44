"""Offline difficulty-aware balancing (Uni-OPD, arXiv 2605.03677): a file of prompts evened out over their difficulty.

The model answers each training problem N times; c, the number of correct answers, is the problem's bin. Most models
leave few problems in the middle, where distillation learns most: those bins are filled up with copies, none is cut.

    shape U    all-wrong and all-right bins dominate: fill up c = 1 .. N-1
    shape J    the hard bins dominate: fill up c = 1 .. N          (auto: J if bin N is below the middle bins' mean)
    target     max(n_c, min(cap n_c, frac max n)) problems in bin c

A bin is filled by whole copies of all its problems and a random part for the rest. Domains are balanced one by one.
The paper gives no multiplier and no code: cap and frac are this project's. It samples with top-k 50 as well.

Run: python scripts/balance_difficulty.py --model arithmetic-student --task arithmetic --out balanced.jsonl
     python methods/uni_opd.py --model MODEL --task balanced.jsonl ...
"""

import json
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track

from posttrain.common.cli import UserError, cli, require, writable
from posttrain.common.engines.hf import HFEngine
from posttrain.common.models import load_model, load_tokenizer, prepare
from posttrain.common.rollout import Sampling, seed_of
from posttrain.common.run import write_atomically
from posttrain.common.tasks import CORRECT, grade_all, make_reward, make_task, text_of


@dataclass
class Config:
    model: str = "arithmetic-student"  # the student before training: folder, hub name, or a built-in tiny model
    task: str = "arithmetic"  # addition, arithmetic, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task or path/to/file.py:function; a reward of 1 counts as correct
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    domain_column: str = "domain"  # data column that names each problem's domain
    out: str = "balanced.jsonl"  # new file to write, a problem a line with all its columns and its bin as `correct`
    action: Literal["upsample", "drop_easy", "drop_hard", "none"] = "upsample"  # drop_*: remove bin N or bin 0 instead
    shape: Literal["auto", "U", "J"] = "auto"  # of the distribution over bins
    cap: float = 8.0  # most copies of a problem
    frac: float = 1.0  # of the largest bin, which the others are filled up to
    problems: int = 1000  # training problems to measure, fewer if the task has fewer
    samples: int = 8  # N
    max_new_tokens: int = 20  # longest answer (paper: 16384)
    temperature: float = 1.0  # of sampling
    top_p: float = 0.95  # nucleus sampling
    seed: int = 0  # of problems, sampling and copies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    threads: int = 0  # CPU threads; 0 = one for tiny models, torch's choice otherwise


def bin_targets(sizes: list[int], action: str, shape: str, cap: float, frac: float) -> list[int]:
    """Problems wanted in bin 0 .. N, from those there are. Empty bins stay empty."""
    top = len(sizes) - 1
    if action != "upsample":
        dropped = {"drop_easy": top, "drop_hard": 0}.get(action)
        return [0 if c == dropped else size for c, size in enumerate(sizes)]
    if shape == "auto":
        shape = "J" if sizes[top] < sum(sizes[1:top]) / max(1, top - 1) else "U"
    filled = range(1, top + (shape == "J"))
    goal = frac * max(sizes)
    return [round(max(size, min(cap * size, goal))) if c in filled else size for c, size in enumerate(sizes)]


def balanced(correct: list[int], top: int, rng: random.Random, *how) -> list[int]:
    """Indices of problems, copies included, from the number of correct answers of each; how: see bin_targets."""
    bins = [[i for i, c in enumerate(correct) if c == k] for k in range(top + 1)]
    out = []
    for rows, target in zip(bins, bin_targets([len(rows) for rows in bins], *how), strict=True):
        copies, rest = divmod(target, len(rows)) if rows else (0, 0)
        out += rows * copies + rng.sample(rows, rest)
    return sorted(out)


def main(config: Config) -> None:
    require(config.temperature > 0, "--temperature must be above 0: greedy answers are all equal")
    require(config.cap >= 1, "--cap is a number of copies: it must be at least 1")
    require(config.samples > 1, "--samples must be at least 2: one answer makes no middle bin")
    require(not os.path.lexists(config.out), f"{config.out} exists; choose another --out")
    writable(Path(config.out).parent, "choose another --out")
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    engine = HFEngine(load_model(config.model, device, config.dtype, train=False), load_tokenizer(config.model))
    drawn = task.draw(config.problems, config.seed)
    problems = list({text_of(example): example for example in drawn}.values())

    correct, some = [], 64  # problems at a time
    sampling = Sampling(config.temperature, config.max_new_tokens, config.top_p)
    for start in track(range(0, len(problems), some), "sampling", console=Console(stderr=True)):
        rollout = engine.generate(problems[start : start + some], config.samples, sampling, (config.seed, start))
        right = torch.tensor(grade_all(reward, rollout.examples, rollout.texts)) == CORRECT
        correct += right.view(-1, config.samples).sum(1).tolist()

    domains = defaultdict(list)
    for i, example in enumerate(problems):
        domains[str(example.fields.get(config.domain_column, "all"))].append(i)
    rng, chosen, how = random.Random(seed_of(config.seed)), [], (config.action, config.shape, config.cap, config.frac)
    for domain, rows in sorted(domains.items()):
        picks = [rows[i] for i in balanced([correct[i] for i in rows], config.samples, rng, *how)]
        for name, part in (("before", rows), ("after", picks)):
            sizes = [sum(correct[i] == c for i in part) for c in range(config.samples + 1)]
            print(f"{domain}, {name}: {len(part)} problems, by correct answers 0 to {config.samples}: {sizes}")
        chosen += picks
    require(chosen, f"--action {config.action} leaves no problem: choose another")
    rng.shuffle(chosen)
    lines = []
    for i in chosen:
        columns = {"prompt": problems[i].prompt, "answer": problems[i].fields.get("solution", problems[i].answer)}
        lines.append(json.dumps({**problems[i].fields, **columns, "correct": correct[i]}, default=str) + "\n")
    try:
        write_atomically(Path(config.out), "".join(lines))
    except OSError as error:
        raise UserError(f"cannot write {config.out} ({error.strerror}); choose another --out") from None
    print(f"{len(lines)} lines in {config.out}; train on them with --task {config.out}")


if __name__ == "__main__":
    cli(main, Config)
