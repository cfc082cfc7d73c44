"""SCOPE: signal-calibrated on-policy distillation with dual-path adaptive weighting (Zheng et al., arXiv 2604.10688).

The student writes G responses to each prompt, and a verifier routes them. A wrong one is distilled: the teacher scores
each of its tokens, as in OPD. A correct one is imitated, without the teacher. On each path the responses to one prompt
compete for a weight: among the wrong ones it goes to those that the TEACHER finds plausible, where it can still repair;
among the correct ones to those that the STUDENT found surprising, which it hardly knows yet. With C, W the correct and
wrong rows of prompt x, m the loss mask, s and q a row's mean logp under student and teacher (minus its log perplexity),
rho = exp(logp - behaviour_logp), and [.] a constant without gradient:

    (1)  w_i   = exp(-s_i / tau) / sum_C exp(-s_j / tau)   on C               paper, Eq. 4-5  --student-weights --tau
    (2)  w_i   = exp(+q_i / tau) / sum_W exp(+q_j / tau)   on W               paper, Eq. 4-5  --teacher-weights --tau
    (3)  MLE_i = -sum_t m rho                                              paper, Eq. 1-3, 6  --reduction
    (4)  OPD_i = sum_t m rho [logp - teacher_logp], or a KL with its own gradient  paper, Eq. 1-3, 6  --reduction --kl
    (5)  L     = 1/P sum_x ( sum_C w_i MLE_i + sum_W w_i OPD_i )              paper, Eq. 1-3, 6
    (6)  L     = sum_C w m (-logp) / sum_C m + sum_W w m max(-A rho, -A clip(rho, 0.8, 1.2)) / sum m  --objective repo
               with A = teacher_logp - behaviour_logp, and at most -3 A where A < 0; another --kl: over sum_W m

Differs from opd.py in: the reward routes the rows, correct ones have no teacher, and rows compete for weights.

Good to know
- Each path has a mass of 1 a prompt, whatever the success rate. Where the few rows of a subset are alike, weights are
  near uniform: watch scope/mle_ess and scope/opd_ess. The loss is no progress signal.
- The released scripts: --objective repo --temperature 0.6 --teacher-temperature 1, and, contrary to the paper,
  --student-weights opposite. In (6), whose weights average 1, imitation weighs 1 however few rows are correct.
- A trap: student at 0.6 against teacher at 1 has its optimum at a student that is flatter than the teacher.
- Loops that are cut by length are wrong and easy to predict, so (2) may favour them: --drop-truncated.
- Left out: several optimizer steps a batch. With one, as in the paper, rho is 1 up to rounding and no clip acts.

Run: python methods/scope_opd.py        Expected: see the results in scope_opd.md beside it.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, cli, require
from posttrain.common.models import load_model, load_tokenizer, prepare, shared_vocabulary
from posttrain.common.rollout import Rollout, Sampling, encode, make_engine, under_prompts
from posttrain.common.run import Run
from posttrain.common.scoring import carry, lm_head, micro_batches, sampled_hidden, scatter, score, token_logps
from posttrain.common.tasks import CORRECT, Task, grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, resources, rollout_metrics
from posttrain.kernels.divergence import linear_divergence
from posttrain.kernels.logprob import linear_topk_logp
from posttrain.kernels.topk import linear_topk_divergence

Weights = Literal["paper", "uniform", "opposite"]


@dataclass
class Config:
    model: str = "addition-student"  # folder, hub name, or a built-in tiny model
    teacher: str = "addition-teacher"  # the same, with the student's vocabulary
    task: str = "addition"  # addition, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task, random, or path/to/file.py:function; above 0 = correct
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 160  # batches sampled
    prompts_per_step: int = 32  # P (paper: 256)
    group_size: int = 8  # G, responses per prompt; with 1 every weight is 1
    max_new_tokens: int = 20  # L_max
    temperature: float = 1.0  # of sampling and of the student's log-probs (paper: 0.6)
    lr: float = 3e-4  # for the tiny default (paper: 5e-5); 1e-6 for a real model, 1e-4 with LoRA
    warmup: int = 10  # steps of linear warm-up (paper: 0)
    schedule: Schedule = "linear"  # of the learning rate: linear and cosine end at 0 (paper: constant)
    max_grad_norm: float = 1.0  # clip
    weight_decay: float = 0.0  # AdamW's (paper: 0.01)
    seed: int = 0  # feeds initialisation, data order and sampling
    rollout: str = "hf"  # sampling engine: hf, vllm in this process, or vLLM servers http://host:8000,...
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 computes under autocast, weights stay fp32
    lora_rank: int = 0  # 0 = full fine-tuning
    micro_batch_tokens: int = 8192  # padded tokens a forward and backward; changes memory, not results
    eval_every: int = 40  # 0 = only before and after
    eval_problems: int = 128  # held-out problems
    eval_samples: int = 8  # k of Avg@k and Pass@k
    save_every: int = 40  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: Engines = Engines()  # flags about machines and engines: common/cli.py
    # --- this method
    objective: Literal["paper", "repo"] = "paper"  # Eq. 3-5 or Eq. 6
    routing: Literal["correctness", "none"] = "correctness"  # none = OPD on every row with weight 1, the baseline
    weighting: Literal["perplexity", "none"] = "perplexity"  # none = uniform on both paths
    student_weights: Weights = "paper"  # Eq. 1; opposite favours correct rows that the student finds likely
    teacher_weights: Weights = "paper"  # Eq. 2; opposite favours wrong rows that the teacher finds unlikely
    tau: float = 1.0  # temperature of both weights (paper: 0.5, 1, 2)
    weight_scale: Literal["auto", "sum1", "mean1"] = "auto"  # of a subset's weights: sum1, with --objective repo mean1
    kl: Literal["k1", "k3", "topk", "full"] = "k1"  # Eq. 4: sampled token (k1, k3), teacher's K likeliest, or all
    top_k: int = 16  # K; student and teacher are renormalised over them, blind to the rest
    reduction: Literal["token_sum", "token_mean"] = "token_sum"  # of a row in Eq. 3-4; a sum favours long rows
    teacher_temperature: float = 0.0  # of the teacher's log-probs; 0 = --temperature (released code: 1)
    drop_truncated: bool = False  # rows cut by length join neither path
    mask_eos: bool = False  # no loss on the end token, for a teacher that ends otherwise
    recovery_probe: int = 0  # held-out problems on which the teacher continues wrong responses first (paper: 2000)


def mean_logps(logps: Tensor, loss_mask: Tensor) -> Tensor:
    """s or q: minus the log of each row's perplexity, 0 without tokens.  [N, T] -> [N]"""
    return (logps * loss_mask).sum(1) / loss_mask.sum(1).clamp(min=1)


def paths(reward: Tensor, usable: Tensor, routing: str) -> dict[str, Tensor]:
    """Which rows are imitated (reward above 0), which distilled. Reward NaN: neither, but for routing none.  -> [N]"""
    if routing == "none":
        return {"mle": torch.zeros_like(usable), "opd": usable}
    return {"mle": usable & (reward > 0), "opd": usable & (reward <= 0)}  # [N] bool each


def path_weights(score: Tensor, path: Tensor, group: Tensor, how: str, tau: float, scale: str) -> Tensor:
    """Eq. 1 with score -s, Eq. 2 with score q: softmax over the rows of a group on the path, 0 elsewhere.
    score [N], path [N] bool, group [N] -> [N], no gradient. Student perplexities 1.2, 1.5, 2 give .255, .319, .426.
    """
    group = group.unique(return_inverse=True)[1]
    score = score.detach() * {"paper": 1, "uniform": 0, "opposite": -1}[how]
    zeros = score.new_zeros(int(group.max()) + 1)
    best = zeros.scatter_reduce(0, group[path], score[path], "amax", include_self=False)[group]
    mass = torch.where(path, ((score - best) / tau).exp(), 0)  # 1 for the best row, so that any sum is at least 1
    weights = mass / zeros.index_add(0, group, mass)[group].clamp(min=1)
    return weights * zeros.index_add(0, group, path.to(score))[group] if scale == "mean1" else weights


def adaptive_weights(s: Tensor, q: Tensor, on: dict[str, Tensor], group: Tensor, config: Config) -> dict[str, Tensor]:
    """Eq. 1 and 2 from the rows' mean logps under student and teacher.  [N], [N], bool [N] each, [N] -> [N] by path"""
    if config.routing == "none":
        return {path: rows.to(s) for path, rows in on.items()}
    tau = config.tau if config.weighting == "perplexity" else math.inf  # infinite = uniform
    usual = {"paper": "sum1", "repo": "mean1"}[config.objective]
    scale = usual if config.weight_scale == "auto" else config.weight_scale
    how = {"mle": (-s, config.student_weights), "opd": (q, config.teacher_weights)}
    return {path: path_weights(score, on[path], group, kind, tau, scale) for path, (score, kind) in how.items()}


def imitation_loss(logps: Tensor, behaviour_logps: Tensor, objective: str) -> Tensor:
    """Eq. 3 or the first part of Eq. 6; on-policy their gradients are equal.  [N, T] -> [N, T]"""
    return -logps if objective == "repo" else -(logps - behaviour_logps).exp()


def distillation_loss(logps: Tensor, behaviour_logps: Tensor, teacher_logps: Tensor, objective: str, kl: str) -> Tensor:
    """Eq. 4 or the second part of Eq. 6 on the sampled token.  [N, T] -> [N, T]

    k1 is a policy gradient, the reverse KL's in expectation; k3 has that KL's value but the forward KL's gradient.
    """
    if kl == "k3":
        d = (teacher_logps - logps).clamp(-10, 10)
        return d.exp() - d - 1
    ratio = (logps - behaviour_logps).exp()
    if objective == "paper":
        return ratio * (logps - teacher_logps).detach()
    advantages = teacher_logps - behaviour_logps
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return torch.where(advantages < 0, torch.minimum(-3 * advantages, loss), loss)  # dual clip


def teacher_divergence(policy, hidden: Tensor, teacher, teacher_hidden: Tensor, vocab_size: int, config: Config):
    """KL(student || teacher) at each sampled token over K or all tokens, in place of k1.  [n, Hs], [n, Ht] -> [n]"""
    heat = config.teacher_temperature or config.temperature
    shared = {"kind": "reverse_kl", "temperature": config.temperature, "vocab_size": vocab_size}
    ours, theirs = lm_head(policy), lm_head(teacher)
    if config.kl == "topk":
        ids, logps = linear_topk_logp(teacher_hidden, k=config.top_k, temperature=heat, vocab_size=vocab_size, **theirs)
        return linear_topk_divergence(hidden, topk_ids=ids, topk_logprobs=logps, tail="renorm", **ours, **shared)
    scale = config.temperature / heat  # of the teacher's logits, since the kernel has one temperature for both sides
    theirs = {key: value if key == "weight" or value is None else value * scale for key, value in theirs.items()}
    sides = {f"student_{k}": v for k, v in ours.items()} | {f"teacher_{k}": v for k, v in theirs.items()}
    return linear_divergence(hidden, teacher_hidden=teacher_hidden * scale, **sides, **shared)


def row_weights(weights: dict[str, Tensor], loss_mask: Tensor, config: Config) -> dict[str, Tensor]:
    """What multiplies each row's sum over tokens in Eq. 5 or 6, from the whole optimizer batch.  [N] -> [N], by path"""
    n = loss_mask.sum(1)
    if config.objective == "paper":
        size = config.prompts_per_step * (n.clamp(min=1) if config.reduction == "token_mean" else 1)
        return {path: w / size for path, w in weights.items()}
    size = {path: n[w > 0].sum() for path, w in weights.items()}
    if config.kl == "k1":  # a policy gradient: mean over all tokens; the others: over those of wrong rows
        size["opd"] = n.sum()
    return {path: w / size[path].clamp(min=1) for path, w in weights.items()}


def signal_metrics(on: dict[str, Tensor], weights: dict[str, Tensor], group: Tensor) -> dict[str, float]:
    """How prompts split into paths and how far weights are from uniform.  bool [N] each, [N] each, [N]
    ess: effective sample size (sum w)^2 / (n sum w^2), mean over subsets of n > 1 rows; max: largest over mean weight.
    """
    group = group.unique(return_inverse=True)[1]
    zeros = weights["mle"].new_zeros(int(group.max()) + 1)
    size = {path: zeros.index_add(0, group, rows.to(zeros)) for path, rows in on.items()}
    right, bad = size["mle"] > 0, size["opd"] > 0
    shares = {"mixed": right & bad, "all_correct": right & ~bad, "all_wrong": bad & ~right}
    metrics = {key: share.to(zeros).mean() for key, share in shares.items()}
    for path, w in weights.items():
        mean = zeros.index_add(0, group, w) / size[path].clamp(min=1)
        relative = torch.where(on[path], w / mean[group], 0)
        ess = (size[path] / zeros.index_add(0, group, relative**2))[size[path] > 1]
        metrics |= {f"{path}_ess": ess.mean() if len(ess) else torch.ones(()), f"{path}_max": relative.max()}
    return {f"scope/{key}": value.item() for key, value in metrics.items()}


def path_batches(rollout: Rollout, on: dict[str, Tensor], max_tokens: int) -> list[tuple[str, Tensor]]:
    """Micro-batches of each path by itself, so that only distilled rows reach the teacher."""
    chosen = {path: rows.nonzero().squeeze(1) for path, rows in on.items() if rows.any()}
    return [(path, at[rows]) for path, at in chosen.items() for rows in micro_batches(rollout[at], max_tokens)]


def recovery_probe(engine, teacher_engine, task: Task, sampling, vocab_size: int, config: Config) -> dict[str, float]:
    """Why (2): how often the teacher, going on from the first 20 to 80% of a wrong response, ends at a correct one,
    by quartile of its perplexity of the whole response, lowest first. On held-out problems; prints the table.
    """
    key, tokenizer = (config.seed, 0, 3), engine.tokenizer
    rollout = engine.generate(task.heldout(config.recovery_probe), config.group_size, sampling, key)
    grades = torch.tensor(grade_all(task.grade, rollout.examples, rollout.texts))
    wrong = rollout[(grades <= 0).nonzero().squeeze(1)]
    require(len(wrong) >= 4, "--recovery-probe found fewer than 4 wrong responses, too few for quartiles: raise it")
    prompts = [encode(teacher_engine.tokenizer, example.prompt) for example in wrong.examples]
    seen = under_prompts(wrong, prompts, tokenizer.pad_token_id)
    heat = config.teacher_temperature or config.temperature
    logps, _ = score(teacher_engine.model, seen, config.micro_batch_tokens, heat, vocab_size)
    perplexity, order = (-mean_logps(logps, seen.loss_mask)).exp().sort()
    seen, prompts = seen[order], [prompts[i] for i in order.tolist()]
    quartiles = [{"perplexity": part.mean().item()} for part in perplexity.tensor_split(4)]
    for kept in (20, 40, 60, 80):
        n = (seen.loss_mask.sum(1) * kept / 100).long().tolist()
        starts = [row[: len(p) + k].tolist() for row, p, k in zip(seen.tokens, prompts, n, strict=True)]
        ended = teacher_engine.generate(seen.examples, 1, sampling, key, starts)
        responses = [row[len(p) :] for row, p in zip(ended.tokens, prompts, strict=True)]  # kept and continued
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        grades = torch.tensor(grade_all(task.grade, seen.examples, texts))
        for quartile, part in zip(quartiles, (grades == CORRECT).double().tensor_split(4), strict=True):
            quartile[f"recovered_{kept}"] = part.mean().item()
    for quartile in quartiles:
        print("wrong responses, means of a quartile: " + "  ".join(f"{k} {v:.3f}" for k, v in quartile.items()))
    return {f"scope/{k}_q{i}": v for i, quartile in enumerate(quartiles, 1) for k, v in quartile.items()}


def check(config: Config) -> None:
    require(config.temperature > 0 and config.tau > 0, "--temperature and --tau must be above 0")
    chosen = (config.student_weights, config.teacher_weights, config.tau) != ("paper", "paper", 1.0)
    flat = "--weighting none makes both paths uniform: leave out --student-weights, --teacher-weights and --tau"
    require(config.weighting == "perplexity" or not chosen, flat)
    weighed = chosen or config.weighting == "none" or config.weight_scale == "mean1"
    plain = "--routing none gives each row weight 1: leave out --weighting, --weight-scale, --tau and the --...-weights"
    require(config.routing == "correctness" or not weighed, plain)
    averaged = config.objective == "repo" and config.reduction == "token_mean"
    require(not averaged, "--reduction belongs to --objective paper: the repo's is a mean over the batch's tokens")
    require(config.kl != "topk" or config.top_k > 1, "--top-k 1: the KL over one renormalised token is always 0")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    teacher_tokenizer = load_tokenizer(config.teacher)
    teacher = load_model(config.teacher, device, config.dtype, train=False)
    vocab_size = shared_vocabulary(policy, tokenizer, teacher, teacher_tokenizer)
    engine = make_engine(policy, tokenizer, config)
    teacher_engine = make_engine(teacher, teacher_tokenizer)
    require(config.top_k <= vocab_size, f"--top-k {config.top_k} exceeds the vocabulary of {vocab_size} tokens")
    same_end = engine.stop_ids == teacher_engine.stop_ids
    require(same_end or config.mask_eos, "student and teacher end with different tokens: --mask-eos leaves them out")
    optimizer = Optimizer(policy, config)
    run = Run(config, "scope_opd")
    parts = {"policy": policy, "optimizer": optimizer}
    done = run.restore(**parts)
    sampling = Sampling(config.temperature, config.max_new_tokens)
    if not done:
        goal, start = run.evaluate(0, teacher_engine, task, "teacher"), run.evaluate(0, engine, task)
        if config.recovery_probe:
            start |= recovery_probe(engine, teacher_engine, task, sampling, vocab_size, config)
        run.log(0, start | {f"teacher/{key}": value for key, value in goal.items()})

    for step in run.steps(done):
        # --- sample and grade
        clock = [time.perf_counter()]
        key = (config.seed, step, 0)
        problems = task.draw(config.prompts_per_step, *key)
        rollout = engine.generate(problems, config.group_size, sampling, key)
        rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        clock.append(time.perf_counter())

        # --- score
        mask, behaviour_logps = rollout.loss_mask, rollout.behaviour_logps
        prompts = [encode(teacher_tokenizer, example.prompt) for example in rollout.examples]
        seen = under_prompts(rollout, prompts, tokenizer.pad_token_id)  # the same responses as the teacher reads them
        if config.mask_eos:
            mask = mask * ~torch.isin(rollout.tokens, torch.tensor(engine.stop_ids, device=device))
        usable = (mask.sum(1) > 0) & (rollout.finished | (not config.drop_truncated))
        on = paths(rollout.reward, usable, config.routing)
        teacher_logps, rows = torch.zeros_like(behaviour_logps), on["opd"].nonzero().squeeze(1)
        if len(rows):  # correct rows need no teacher
            heat = config.teacher_temperature or config.temperature
            logps, _ = score(teacher, seen[rows], config.micro_batch_tokens, heat, vocab_size)
            teacher_logps[rows] = carry(logps, seen[rows], rollout[rows])
        failed = f"step {step}: the teacher's log-probs are not finite; choose another, or --dtype float32"
        require(teacher_logps.isfinite().all(), failed)  # 0 would pass for certainty
        clock.append(time.perf_counter())

        # --- weigh
        s, q = mean_logps(behaviour_logps, mask), mean_logps(teacher_logps, mask)  # [N], minus the log perplexities
        weights = adaptive_weights(s, q, on, rollout.group, config)  # [N] by path

        # --- update
        stats = Stats()
        c = row_weights(weights, mask, config)
        n_distilled = mask[on["opd"]].sum().clamp(min=1)
        for path, rows in path_batches(rollout, on, config.micro_batch_tokens):
            batch, m = rollout[rows], mask[rows]
            hidden = sampled_hidden(policy, batch)
            logps, entropy = token_logps(policy, batch, config.temperature, vocab_size, hidden)
            if path == "mle":
                token_loss = imitation_loss(logps, behaviour_logps[rows], config.objective)  # [rows, T]
            elif config.kl in ("k1", "k3"):
                old = behaviour_logps[rows]
                token_loss = distillation_loss(logps, old, teacher_logps[rows], config.objective, config.kl)
            else:
                with torch.no_grad():
                    teacher_hidden = sampled_hidden(teacher, seen[rows])  # [n, Ht], row for row with hidden
                divergence = teacher_divergence(policy, hidden, teacher, teacher_hidden, vocab_size, config)
                token_loss = scatter(divergence, batch)
            loss = (token_loss * m * c[path][rows, None]).sum()
            loss.backward()
            stats.add("loss/total", loss)
            stats.add(f"loss/{path}", loss)
            if path == "opd":
                stats.add("teacher/kl", ((logps - teacher_logps[rows]) * m).sum() / n_distilled)
            stats.tokens(m, {"train/entropy": entropy})
            stats.engine(m, logps, behaviour_logps[rows])
        metrics = rollout_metrics(rollout, reward, task) | optimizer.step(step)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= {"loss/total": 0.0, "loss/mle": 0.0, "loss/opd": 0.0, "teacher/kl": 0.0}  # for a path without rows
        metrics |= stats.metrics() | signal_metrics(on, weights, rollout.group) | resources(clock, rollout.loss_mask)
        if run.due(step, config.eval_every):
            metrics |= run.evaluate(step, engine, task)
        run.log(step, metrics, rollout)
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo", "opd", "scope"))


if __name__ == "__main__":
    cli(main, Config)
