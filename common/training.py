"""Optimizer, schedule, evaluation: what every loop needs and no paper is about."""

import itertools
import math
import resource
from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.common.cli import require
from posttrain.common.machines import distributed
from posttrain.common.rollout import Engine, Rollout, Sampling, seed_of
from posttrain.common.tasks import CORRECT, Example, Task, grade_all

Schedule = Literal["linear", "cosine", "constant"]


class Optimizer:
    """AdamW over the trainable weights, a learning rate by training step, clipping, and a skip of non-finite steps."""

    def __init__(self, model: nn.Module, config: Any):
        self.model, self.config, self.skipped = model, config, 0
        self.weights = [p for p in model.parameters() if p.requires_grad]
        decay = config.weight_decay
        self.adamw = torch.optim.AdamW(self.weights, config.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)

    def rate(self, step: int) -> float:
        """Learning rate of training step 1..steps: linear warm-up, then down to 0 (linear, cosine) or constant."""
        warmup = self.config.warmup
        left = 1 - (step - 1 - warmup) / max(1, self.config.steps - warmup)
        shape = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[self.config.schedule]
        return self.config.lr * (step / warmup if step <= warmup else shape)

    def step(self, step: int) -> dict[str, float]:
        """Clip, update unless the gradient is not finite, clear the gradients; returns the optim/* metrics."""
        for group in self.adamw.param_groups:
            group["lr"] = self.rate(step)
        distributed.reshard()
        distributed.sum_gradients(self.weights)
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # of all shards
        if math.isfinite(norm):
            self.model.weights_version = getattr(self.model, "weights_version", 0) + 1  # first: Ctrl-C may cut the next
            self.adamw.step()
        else:
            self.skipped += 1
        self.adamw.zero_grad(set_to_none=True)
        return {"optim/lr": self.rate(step), "optim/grad_norm": norm, "optim/skipped": self.skipped}


def batch_of(n: int, size: int, seed: int, step: int, stream: int = 2) -> Tensor:
    """Rows of a table of n for training step 1, 2, ...: a permutation an epoch, end to end, so that no batch is short.

    -> [size] int64, a pure function of its arguments: a resumed run needs no replay"""
    at = torch.arange((step - 1) * size, step * size)
    orders = {e: torch.Generator().manual_seed(seed_of(seed, e, stream)) for e in (at // n).unique().tolist()}
    return torch.cat([torch.randperm(n, generator=g)[at[at // n == e] % n] for e, g in orders.items()])


def pass_at_k(correct: Tensor, k: int) -> Tensor:
    """Unbiased chance that one of k samples is right, from n >= k samples (Chen et al. 2021).  bool [P, n] -> [P]"""
    n, c = correct.shape[1], correct.sum(1).double()
    i = torch.arange(k, dtype=torch.float64)
    return 1 - ((n - c[:, None] - i).clamp(min=0) / (n - i)).prod(1)


def evaluate(
    engine: Engine, task: Task, problems: list[Example], samples: int, sampling: Sampling, seed: int, by: str = ""
) -> tuple[dict[str, float], Rollout]:
    """Avg@samples, Pass@samples (both also for each value of column `by`), greedy; same problems and noise always."""
    alone = not hasattr(task, "environment") or hasattr(engine, "make_environment")
    require(alone, "this task is played in turns: choose a method that has --max-turns")
    rollout = engine.generate(problems, samples, sampling, key=(seed, 0, 1))
    greedy = engine.generate(problems, 1, Sampling(0.0, sampling.max_new_tokens), key=(seed, 0, 2))
    for part in (rollout, greedy):
        if part.episodes[0] is None:  # else the environment has graded
            mine = distributed.part(len(part))
            pairs = zip(part.examples[mine], part.texts[mine], strict=True)
            part.reward = torch.tensor(distributed.gather([task.grade(*pair) for pair in pairs]))
    correct = (rollout.reward == CORRECT).view(-1, samples)
    average, passed = correct.double().mean(1), pass_at_k(correct, samples)
    metrics = {
        "eval/accuracy": average.mean().item(),
        "eval/accuracy_se": average.std().item() / math.sqrt(len(problems)) if len(problems) > 1 else 0.0,
        "eval/pass_at_k": passed.mean().item(),
        "eval/greedy": (greedy.reward == CORRECT).double().mean().item(),
    }
    if rollout.episodes[0]:
        failed = torch.tensor([any(turn.failed for turn in episode.turns) for episode in rollout.episodes])
        metrics["eval/failed_share"] = failed.double().mean().item()  # of episodes with a failed call or action
        for name, rows in (("with_failure", failed), ("without_failure", ~failed)):
            metrics[f"eval/accuracy/{name}"] = correct.flatten()[rows].double().sum().item() / max(1, int(rows.sum()))
    kinds = [example.fields.get(by) for example in problems]
    for kind in sorted({kind for kind in kinds if isinstance(kind, str)}):
        rows = torch.tensor([k == kind for k in kinds])
        metrics[f"eval/accuracy/{kind}"] = average[rows].mean().item()
        metrics[f"eval/pass_at_k/{kind}"] = passed[rows].mean().item()
    return metrics, rollout


def engine_weights(logps: Tensor, behaviour_logps: Tensor, mask: Tensor, most: float) -> Tensor:
    """mask times min(p / q, most), p the trainer's and q the engine's probability of the token: truncated
    importance sampling for an engine that rounds otherwise. No gradient; mask itself where it is off, or q unknown.
    [N, T] -> [N, T]"""
    known = (mask > 0) & behaviour_logps.isfinite() & logps.isfinite()
    ratio = torch.where(known, logps - behaviour_logps, 0).detach().exp().clamp(max=most) if most else 1.0
    return mask * ratio


class Stats:
    """Sums over micro-batches, fetched from the device once a step."""

    def __init__(self):
        self.sums: dict[str, Any] = defaultdict(float)
        self.per_token, self.n_tokens, self.gaps = set(), 0.0, []

    @torch.no_grad()
    def tokens(self, mask: Tensor, values: dict[str, Tensor], count: bool = True) -> None:
        """Values [N, T] to average over tokens where mask is 1; count=False if these tokens are counted already."""
        self.n_tokens = self.n_tokens + (mask.sum() if count else 0)
        for key, value in values.items():
            self.per_token.add(key)
            self.sums[key] = self.sums[key] + torch.where(mask > 0, value, 0).sum()

    @torch.no_grad()
    def engine(self, mask: Tensor, logps: Tensor, behaviour_logps: Tensor) -> None:
        """engine/*: how far the trainer's log-probs of the fresh batch are from the sampler's."""
        gap = torch.where(mask > 0, logps - behaviour_logps, 0)
        self.tokens(mask, {"engine/logp_gap": gap.abs()}, count=False)
        if len(gap):
            self.gaps.append(gap.max())

    def add(self, key: str, value: Tensor) -> None:
        """A scalar that is summed, such as a micro-batch's share of the loss."""
        self.sums[key] = self.sums[key] + value.detach()

    def metrics(self) -> dict[str, float]:
        keys = list(self.sums)  # the same in all processes, which have equally many micro-batches
        sums = torch.stack([torch.as_tensor(x).double().cpu() for x in (self.n_tokens, *self.sums.values())])
        distributed.add_up(sums)
        n_tokens, *sums = sums.tolist()
        gaps = distributed.gather([float(torch.stack(self.gaps).max())] if self.gaps else [])
        largest = {"engine/ratio_max": torch.tensor(max(gaps)).exp().item()} if gaps else {}
        over = {k: max(1.0, n_tokens) if k in self.per_token else 1 for k in keys}
        return {k: v / over[k] for k, v in zip(keys, sums, strict=True)} | largest


def rollout_metrics(rollout: Rollout, reward_function: Any, task: Task) -> dict[str, float]:
    """train/* of the batch just sampled and graded (common/README.md); accuracy is the task's own grade."""
    reward, n = rollout.reward.nan_to_num(0).double().cpu(), rollout.loss_mask.sum(1)
    same = reward_function == task.grade
    grades = reward if same else torch.tensor(grade_all(task.grade, rollout.examples, rollout.texts))
    groups = [reward[rollout.group.cpu() == g] for g in rollout.group.unique().tolist()]
    return {
        "train/reward": reward.mean().item(),
        "train/accuracy": (grades == CORRECT).double().mean().item(),
        "train/zero_signal": sum(bool((g == g[0]).all()) for g in groups) / len(groups),
        "train/length": n.mean().item(),
        "train/truncated": 1 - rollout.finished.double().mean().item(),
    }


def resources(clock: list[float], mask: Tensor) -> dict[str, float]:
    """time/* in seconds, from the moments before sampling and after sampling, scoring and updating; peak memory.
    mask: 1 on what tokens_per_second counts."""
    sample, score, update = (b - a for a, b in itertools.pairwise(clock))
    speed = mask.sum().item() / (clock[-1] - clock[0])
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(mask.device) if mask.is_cuda else rss
    total = {"time/sample": sample, "time/score": score, "time/update": update, "time/tokens_per_second": speed}
    return total | {"memory/peak_gib": peak / 2**30}
