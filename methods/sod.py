"""SOD: step-wise on-policy distillation for small agents that use tools (Zhong et al., arXiv 2605.07725).

A student acts in turns: it reasons, calls a tool, reads the result. A teacher scores the same tokens, observations
included. After a bad call the two drift apart, and what the teacher says there is noise. SOD measures the gap of each
turn and multiplies that turn's distillation signal by the gap of the first turn over the gap of this one. With d the
log-ratio old_logp - teacher_logp of a sampled token, k a turn, I_k its tokens, R the episode's reward:

    (1)  A    = (R - mean of the group) / (std of the group + eps)
    (2)  d_k  = 1/|I_k| sum_{t in I_k} | old_logp_t - teacher_logp_t |                               paper, Eq. 6
    (3)  w_1  = 1,   w_k = min( (d_1 + eps) / (d_k + eps), 1 + delta ),  the telescoped product     paper, Eq. 7
    (4)  Adv  = m (A + coef w_k (teacher_logp - old_logp))                                           paper, Eq. 8-10
    (5)  L    = sum_it m l / sum m,   l = max(-Adv r, -Adv clip(r, 0.8, 1.28)), where Adv < 0 at most -3 Adv,
         r    = exp(logp - old_logp)

Differs from opd.py in: episodes of several turns, a weight for each, the reward's advantage added, a clipped ratio.

Good to know
- w_k d_k <= d_1 + eps: no turn speaks louder than the first. Where both models agree on the first turn (d_1 near 0),
  all later ones fall silent: watch sod/first_small, and see --d-floor.
- The cap acts on the result only: a product that is capped on its way gives other weights.
- The paper writes the distillation as a loss, sum of w (logp - teacher_logp). Its derivative on sampled tokens is 0 in
  expectation; the log-ratio must be an advantage, as in (4) and in the released code.
- Whatever the teacher still knows after a failure is lost with its noise: --weighting mask_after_error is the limit.
- Left out: the released code's stop of the teacher after a failed call, which it never uses.

Run: python methods/sod.py        Expected: see the results in sod.md beside it.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, cli, require
from posttrain.common.environments.episodes import Episodes
from posttrain.common.environments.tools import Form, make_environment
from posttrain.common.models import load_model, load_tokenizer, prepare, shared_vocabulary
from posttrain.common.rollout import Rollout, Sampling, encode, make_engine, seed_of, under_prompts
from posttrain.common.run import Run
from posttrain.common.scoring import carry, micro_batches, score, token_logps
from posttrain.common.tasks import CORRECT, grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, engine_weights, resources, rollout_metrics


@dataclass
class Config:
    model: str = "chain-student"  # folder, hub name, or a built-in tiny model
    teacher: str = "chain-teacher"  # the same, with the student's vocabulary
    task: str = "chain"  # chain, sokoban, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task = the environment's, random, or path/to/file.py:function of the transcript
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 100  # batches sampled
    prompts_per_step: int = 16  # P (paper: 64)
    group_size: int = 8  # G, episodes per prompt (paper: 16)
    max_new_tokens: int = 120  # of a whole episode, observations included (paper: 20480)
    temperature: float = 1.0  # of sampling and of every log-prob in training
    lr: float = 2e-4  # for the tiny default (paper: 1e-6)
    warmup: int = 0  # steps of linear warm-up
    schedule: Schedule = "constant"  # of the learning rate: linear and cosine end at 0
    max_grad_norm: float = 1.0  # clip
    weight_decay: float = 0.0  # AdamW's (paper: 0.01)
    seed: int = 0  # feeds initialisation, data order and sampling
    rollout: str = "hf"  # sampling engine: hf, vllm in this process, or vLLM servers http://host:8000,...
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 computes under autocast, weights stay fp32
    lora_rank: int = 0  # 0 = full fine-tuning
    micro_batch_tokens: int = 8192  # padded tokens a forward and backward; changes memory, not results
    eval_every: int = 25  # 0 = only before and after
    eval_problems: int = 128  # held-out problems
    eval_samples: int = 4  # k of Avg@k and Pass@k
    save_every: int = 25  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: Engines = Engines()  # flags about machines and engines: common/cli.py
    # --- this method
    environment: str = "task"  # the task's own, calculator or python (a tool for any task), or path/to/file.py:Class
    tool_format: Form = "hermes"  # of the tool calls of a chat model: <tool_call> tags, or a bare JSON object
    max_turns: int = 10  # of an episode (paper: 16)
    max_seconds: float = 0.0  # of a batch of episodes; 0 = no limit
    weighting: Literal["sod", "unclipped", "uniform", "heuristic", "mask_after_error", "gated"] = "sod"  # step_weights
    coef: float = 1.0  # of the distillation term in Eq. 4; 0 = GRPO
    adv_grpo: float = 1.0  # of A in Eq. 4; 0 = distillation alone
    eps: float = 1e-6  # Eq. 3
    delta: float = 0.2  # cap of Eq. 3 above 1 (released dataclass: 0.5)
    d_floor: float = 0.0  # in place of eps in Eq. 3 (0.05 keeps later turns alive where d_1 is near 0)
    ref_step: Literal["first", "mean"] = "first"  # numerator of Eq. 3: d_1, or the mean d of all earlier turns
    opd_clip: float = 0.0  # bound of |d| in Eq. 4, nats; 0 = off
    gate_gamma: float = 1.0  # gamma of --weighting gated, w = beta_min + (beta_max - beta_min) sigmoid(-gamma A)
    beta_min: float = 0.0  # the same
    beta_max: float = 0.1  # the same
    adv_eps: float = 1e-6  # Eq. 1
    adv_ddof: int = 1  # of the std in Eq. 1
    tool_bonus: bool = False  # the released reward: wrong episodes get at most -0.6, rising from -1 with their turns
    clip_low: float = 0.2  # Eq. 5
    clip_high: float = 0.28  # Eq. 5
    dual_clip: float = 3.0  # Eq. 5: bound of the loss where Adv < 0, in units of -Adv; 0 = off
    loss_agg: Literal["token", "seq"] = "token"  # Eq. 5, or (paper's text) mean of rows' means
    minibatches: int = 2  # optimizer steps a batch (released script: 4)
    engine_tis: float = 0.0  # bound of exp(trainer's - engine's log-prob), a weight of the loss (TRL: 3); 0 = off


def shaped_reward(reward: Tensor, turns: Tensor) -> Tensor:
    """The released code's: 1 if correct, else min(-0.6, -1 + 0.05 (n - 2)), n = turns of model and tool, plus 1."""
    wrong = (-1 + 0.05 * (2 * turns - 2)).clamp(max=-0.6)  # the last turn has no answer: n = 2 turns
    return torch.where((reward == CORRECT) | reward.isnan(), reward, wrong.to(reward))


def group_advantages(reward: Tensor, group: Tensor, eps: float = 1e-6, ddof: int = 1) -> Tensor:
    """Eq. 1. Exactly 0 where a group's rewards are equal, and where NaN (unscorable).  [N], [N] -> [N]"""
    scored, group = ~reward.isnan(), group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    n = zeros.index_add(0, group, scored.to(reward.dtype))[group]
    low = zeros.scatter_reduce(0, group[scored], reward[scored], "amin", include_self=False)[group]
    above = torch.where(scored, reward - low, 0)  # all 0, without rounding, where rewards are equal
    centred = torch.where(scored, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)
    return centred / ((zeros.index_add(0, group, centred**2)[group] / (n - ddof).clamp(min=1)).sqrt() + eps)


def per_turn(values: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of each turn, and their number.  [N, T], turn [N, T] -> [N, K], [N, K]"""
    spare = int(turn.max().clamp(min=0)) + 1  # one more column takes what no turn wrote
    index = torch.where(turn >= 0, turn, spare)
    zeros = values.new_zeros(len(values), spare + 1)
    sums = zeros.scatter_add(1, index, torch.where(turn >= 0, values, 0))
    return sums[:, :spare], zeros.scatter_add(1, index, torch.ones_like(values))[:, :spare]


def step_divergence(old_logps: Tensor, teacher_logps: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2: d [N, K], 0 for a turn without tokens, and which turns have some, bool [N, K].  From [N, T] each"""
    sums, n = per_turn((old_logps - teacher_logps).abs(), turn)
    return sums / n.clamp(min=1), n > 0


def step_weights(d: Tensor, there: Tensor, failed: Tensor, config: Config) -> Tensor:
    """Eq. 3 and its ablations.  d [N, K], which turns exist and which failed, bool [N, K] -> w [N, K], no gradient

    d = [1, 0.2, 0.5, 2] gives [1, 1.2, 1.2, 0.5] at delta 0.2. heuristic: 0.9^(turns since the first failure);
    mask_after_error: 0 on all turns after it.
    """
    order = there.cumsum(1)  # 1 for a row's first turn that has tokens
    if config.weighting in ("sod", "unclipped"):
        floor, d = config.d_floor or config.eps, torch.where(there, d.detach(), 0)
        reference = (d * (order == 1)).sum(1, keepdim=True)
        if config.ref_step == "mean":
            reference = torch.where(order > 1, (d.cumsum(1) - d) / (order - 1).clamp(min=1), reference)
        weights = torch.where(order > 1, (reference + floor) / (d + floor), 1)
        return weights if config.weighting == "unclipped" else weights.clamp(max=1 + config.delta)
    since = (there & (failed.cumsum(1) > 0)).to(d).cumsum(1)  # 1 at the first failure, 2 at the turn behind it, ...
    if config.weighting == "heuristic":
        return 0.9 ** (since - 1).clamp(min=0)
    return (since <= 1).to(d) if config.weighting == "mask_after_error" else torch.ones_like(d)


def gate(advantages: Tensor, config: Config) -> Tensor:
    """One weight a row, larger for rows that did worse than their group (released code).  [N] -> [N, 1]"""
    width = config.beta_max - config.beta_min
    return (config.beta_min + width * torch.sigmoid(-config.gate_gamma * advantages))[:, None]


def token_advantages(
    advantages: Tensor, weights: Tensor, old_logps: Tensor, teacher_logps: Tensor, loss_mask: Tensor, config: Config
) -> Tensor:
    """Eq. 4, no gradient.  [N], then [N, T] each (weights may be [N, 1]) -> [N, T]"""
    signal = torch.where(loss_mask > 0, teacher_logps - old_logps, 0)
    if config.opd_clip:
        signal = signal.clamp(-config.opd_clip, config.opd_clip)
    return loss_mask * (config.adv_grpo * advantages[:, None] + config.coef * weights * signal).detach()


def policy_token_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Eq. 5, one value per token, and the ratio.  [N, T] each -> [N, T], [N, T]"""
    ratio = (logps - old_logps).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if config.dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -config.dual_clip * advantages), loss)
    return loss, ratio


def row_weights(loss_mask: Tensor, agg: str) -> Tensor:
    """What divides each row's sum over tokens, from the whole optimizer batch.  [N, T] -> [N]"""
    n = loss_mask.sum(1)
    return torch.ones_like(n) / (n.sum() + 1e-8) if agg == "token" else 1 / (len(n) * n.clamp(min=1))


def calls(rollout: Rollout, turns: int) -> tuple[Tensor, Tensor]:
    """Which turns the environment answered, and which of those calls failed.  -> bool [N, turns] each"""
    answered, failed = torch.zeros(2, len(rollout), turns, dtype=torch.bool)
    for i, episode in enumerate(rollout.episodes):
        failed[i, : len(episode.turns)] = torch.tensor([turn.failed for turn in episode.turns])
        answered[i, : len(episode.turns)] = torch.tensor([turn.observation != "" for turn in episode.turns])
    return (answered | failed).to(rollout.tokens.device), failed.to(rollout.tokens.device)


def step_metrics(d: Tensor, weights: Tensor, there: Tensor, called: Tensor, failed: Tensor) -> dict[str, float]:
    """sod/*: calls, and d and w of turns 1 to 4 and of all, in episodes with a failed call and without; 0 if none."""
    bad, n_calls = failed.any(1, keepdim=True), called.sum()
    found = {"tool_calls": n_calls / len(d), "failed_calls": failed.sum() / n_calls.clamp(min=1)}
    found["first_small"] = (d[:, 0] < 0.02).to(d).mean()
    for name, rows in (("failed", bad), ("clean", ~bad)):
        for k in range(4):
            here, at = there[:, k : k + 1] & rows, slice(k, k + 1)  # no column where no row has so many turns
            found[f"d_{name}_{k + 1}"] = (d[:, at] * here).sum() / here.sum().clamp(min=1)
            found[f"w_{name}_{k + 1}"] = (weights[:, at] * here).sum() / here.sum().clamp(min=1)
        found[f"w_{name}"] = (weights * (there & rows)).sum() / (there & rows).sum().clamp(min=1)
    return {f"sod/{key}": value.item() for key, value in found.items()}


def check(config: Config) -> None:
    require(config.group_size > 1, "A compares episodes of one prompt: --group-size must be at least 2")
    require(config.temperature > 0, "greedy episodes are all equal, no signal: --temperature must be above 0")
    require(min(config.eps, config.adv_eps) > 0, "--eps and --adv-eps keep divisions finite: above 0")
    require(config.clip_low <= 1, "--clip-low must lie in [0, 1]")
    require(not config.dual_clip or config.dual_clip > 1, "--dual-clip must be above 1, or 0 for none")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    teacher, teacher_tokenizer = (
        load_model(config.teacher, device, config.dtype, train=False),
        load_tokenizer(config.teacher),
    )
    vocab_size = shared_vocabulary(policy, tokenizer, teacher, teacher_tokenizer)
    environment = make_environment(config.environment, task, config.tool_format)
    engine = Episodes(make_engine(policy, tokenizer, config), environment, config.max_turns, config.max_seconds)
    optimizer = Optimizer(policy, config)
    run = Run(config, "sod")
    parts = {"policy": policy, "optimizer": optimizer}
    sampling, limit = Sampling(config.temperature, config.max_new_tokens), config.micro_batch_tokens
    done = run.restore(**parts)
    if not done:
        teacher_engine = Episodes(
            make_engine(teacher, teacher_tokenizer), environment, config.max_turns, config.max_seconds
        )
        goal, start = run.evaluate(0, teacher_engine, task, "teacher"), run.evaluate(0, engine, task)
        run.log(0, start | {f"teacher/{key}": value for key, value in goal.items()})

    for step in run.steps(done):
        # --- sample and grade
        clock, key = [time.perf_counter()], (config.seed, step, 0)
        rollout = engine.generate(task.draw(config.prompts_per_step, *key), config.group_size, sampling, key)
        if config.reward != "task":
            rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        clock.append(time.perf_counter())

        # --- score
        mask = rollout.loss_mask
        old_logps, _ = score(policy, rollout, limit, config.temperature, vocab_size)
        prompts = [encode(teacher_tokenizer, example.prompt) for example in rollout.examples]
        seen = under_prompts(
            rollout, prompts, tokenizer.pad_token_id
        )  # the same episodes behind the teacher's template
        teacher_logps = carry(score(teacher, seen, limit, config.temperature, vocab_size)[0], seen, rollout)
        finite = (old_logps.isfinite() & teacher_logps.isfinite()).all()
        require(finite, f"step {step}: log-probs are not finite; choose another teacher, or --dtype float32")
        clock.append(time.perf_counter())

        # --- weigh
        turns = (rollout.turn.amax(1) + 1).to(rollout.reward)
        outcome = shaped_reward(rollout.reward, turns) if config.tool_bonus else rollout.reward
        advantages = group_advantages(outcome, rollout.group, config.adv_eps, config.adv_ddof)  # [N]
        d, there = step_divergence(old_logps, teacher_logps, rollout.turn)  # [N, K]
        called, failed = calls(rollout, d.shape[1])
        by_turn = step_weights(d, there, failed, config)  # [N, K]
        weights = mask * (
            gate(advantages, config) if config.weighting == "gated" else by_turn.gather(1, rollout.turn.clamp(min=0))
        )
        signal = token_advantages(
            advantages, weights, old_logps, teacher_logps, mask, config
        )  # [N, T], fixed from here

        # --- update
        stats, trusted = Stats(), engine_weights(old_logps, rollout.behaviour_logps, mask, config.engine_tis)
        shuffle = torch.Generator().manual_seed(seed_of(config.seed, step, 2**31))
        metrics = rollout_metrics(rollout, reward, task) | step_metrics(d, by_turn, there, called, failed)
        for part in torch.randperm(len(rollout), generator=shuffle).to(device).chunk(config.minibatches):
            c = row_weights(mask[part], config.loss_agg)[:, None]
            for rows in micro_batches(rollout[part], limit):
                at = part[rows]
                logps, entropy = token_logps(policy, rollout[at], config.temperature, vocab_size)
                token_loss, ratio = policy_token_loss(logps, old_logps[at], signal[at], config)
                loss = (token_loss * trusted[at] * c[rows]).sum()
                loss.backward()
                stats.add("loss/total", loss / config.minibatches)
                gap = old_logps[at] - teacher_logps[at]
                low, high = (
                    (signal[at] < 0) & (ratio < 1 - config.clip_low),
                    (signal[at] > 0) & (ratio > 1 + config.clip_high),
                )
                drift = {
                    "policy/kl_old": old_logps[at] - logps,
                    "policy/clip_low": low.float(),
                    "policy/clip_high": high.float(),
                }
                stats.tokens(
                    mask[at], {"train/entropy": entropy, "teacher/kl": gap, "teacher/kl_abs": gap.abs(), **drift}
                )
                stats.engine(mask[at], old_logps[at], rollout.behaviour_logps[at])
            metrics |= optimizer.step(step)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= stats.metrics() | resources(clock, rollout.loss_mask)
        if run.due(step, config.eval_every):
            metrics |= run.evaluate(step, engine, task)
        run.log(step, metrics, rollout, {"weight": weights, "advantage": signal})
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo-chain", "opd-chain", "sod"))


if __name__ == "__main__":
    cli(main, Config)
