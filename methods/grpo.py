"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), with its common variants as flags.

For each prompt sample G responses, reward each with a verifier, and raise the log-probs of those above their group's
mean. No value network. With r the reward of row i, A its advantage, m the loss mask and n_i = sum_t m:

    (1)  A_i   = (r_i - mean_group) / (std_group + eps)                                              --adv
    (2)  rho   = exp(logp - old_logp)                        per token, or one per sequence          --ratio-level
    (3)  l     = -min(min(rho, delta) A, clip(rho, 1 - eps_lo, 1 + eps_hi) A)                        --loss
    (4)  w     = exp(old_logp - behaviour_logp), bounded     when sampler and trainer differ         --tis
    (5)  L     = sum_it c_i m (w l + beta k(logp, ref_logp)) - ent_coef sum_it m H / sum m           --beta --kl
    (6)  c_i   = 1 / sum_it m, 1 / (B n_i), 1 / (B L_max) or by prompt                               --agg

Good to know
- One optimizer step a batch (the default) has rho = 1: pg, cispo, gspo and every clip then have the same gradient;
  only --adv and --agg matter (and seqsum, which sums over a row). Use --minibatches 4 to see the others act.
- On-policy the loss is near 0, no progress signal. --preset sets a publication's objective; explicit flags win.

Run: python methods/grpo.py        Expected: see the results in grpo.md beside it.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, cli, require
from posttrain.common.models import load_model, load_start, load_tokenizer, prepare
from posttrain.common.rollout import Sampling, concat, make_engine, seed_of
from posttrain.common.run import Run
from posttrain.common.scoring import micro_batches, score, token_logps
from posttrain.common.tasks import grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, resources, rollout_metrics

PRESETS = {
    "none": {},
    "grpo": {"adv": "group_std", "agg": "seq", "beta": 0.04, "kl": "k3"},  # DeepSeekMath
    "dapo": {"agg": "token", "eps_hi": 0.28, "overlong": 4, "dynamic_sampling": 10},  # 2503.14476
    "dr_grpo": {"adv": "center", "agg": "const"},  # 2503.20783
    "gspo": {"ratio_level": "seq", "agg": "seq", "eps_lo": 3e-4, "eps_hi": 4e-4},  # 2507.18071
    "cispo": {"loss": "cispo", "agg": "token"},  # 2506.13585
    "rloo": {"adv": "rloo"},  # 2402.14740
    "rloo_trl": {"adv": "rloo", "ratio_level": "seqsum", "agg": "seq", "beta": 0.05, "kl": "k1_reward"},  # TRL's
    "rlite": {"adv": "batch_std", "agg": "token"},  # 2508.08221
}


@dataclass
class Config:
    model: str = "addition-student"  # folder, hub name, or a built-in tiny model
    task: str = "addition"  # addition, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task, random (control: must not help), or path/to/file.py:function
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 160  # batches sampled
    prompts_per_step: int = 32  # P
    group_size: int = 8  # G, responses per prompt (DeepSeekMath: 64)
    max_new_tokens: int = 20  # L_max
    temperature: float = 1.0  # of sampling and of every log-prob in training
    lr: float = 2e-4  # for the tiny default; 1e-6 for a real model, 1e-5 to 1e-4 with LoRA
    warmup: int = 10  # steps of linear warm-up
    schedule: Schedule = "linear"  # of the learning rate: linear and cosine end at 0
    max_grad_norm: float = 1.0  # clip
    weight_decay: float = 0.0  # AdamW's
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
    share_prompts: bool = False  # read a prompt once for its group in training too: faster, other roundings
    preset: Literal[tuple(PRESETS)] = "none"  # the flags of one publication, see PRESETS; explicit flags win
    adv: Literal["group_std", "center", "batch_std", "rloo"] = "group_std"  # Eq. 1
    adv_eps: float = 1e-4  # added to the std (verl: 1e-6)
    adv_ddof: int = 1  # 1 = sample std, 0 = population std
    loss: Literal["pg", "cispo", "sapo", "reinforce"] = "pg"  # Eq. 3
    ratio_level: Literal["token", "seq", "seqsum"] = "token"  # Eq. 2; seq = the row's mean (GSPO), seqsum = TRL's RLOO
    eps_lo: float = 0.2  # lower clip (GSPO: 3e-4)
    eps_hi: float = 0.2  # upper clip (DAPO: 0.28, GSPO: 4e-4)
    delta: float = 0.0  # two-sided clip of rho where A < 0, over 1 + eps_hi (INTELLECT-2: 4); 0 = off
    cispo_cap: float = 5.0  # absolute cap of rho for --loss cispo (ScaleRL: 5)
    agg: Literal["token", "token_group", "seq", "const"] = "token"  # Eq. 6: DAPO's code, DAPO's paper, GRPO, Dr. GRPO
    beta: float = 0.0  # weight of the KL to the reference (DeepSeekMath: 0.04); 0 = off, no reference kept
    kl: Literal["k1", "k1_reward", "k2", "k3", "k3_is"] = "k3_is"  # paper, Eq. 4: k3; k1 teaches nothing
    ref_every: int = 0  # refresh the reference every so many steps (R1: 400); 0 = never
    ref_mix: float = 1.0  # reference <- mix policy + (1 - mix) reference; 1 = replace (TRL: 0.6 every 512)
    ent_coef: float = 0.0  # entropy bonus
    ent_target: float = 0.0  # keep entropy at this many nats by moving the coefficient (Skywork-OR1); 0 = off
    ent_delta: float = 0.005  # by so much a step
    ent_top: float = 1.0  # policy loss only on this fraction of highest-entropy tokens (2506.01939: 0.2)
    overlong: int = 0  # L_c: reward falls from 0 to -1 over the last L_c tokens (DAPO: 4096 of 20480); 0 = off
    mask_truncated: bool = False  # rows cut by length count in the group's mean but carry no loss
    dynamic_sampling: int = 0  # rounds of sampling to replace groups without signal (DAPO: 10); 0 = off
    minibatches: int = 1  # optimizer steps a pass over the batch (DAPO: 16)
    epochs: int = 1  # passes over the batch
    tis: Literal["off", "bypass", "token_truncate", "token_mask", "seq_truncate", "seq_mask"] = "off"  # Eq. 4
    tis_max: float = 2.0  # upper bound of w (TRL: 3)
    tis_min: float = 0.0  # lower bound of w
    opsm: float = 0.0  # drop rows with A < 0 whose mean log-ratio to the sampler exceeds this (0.5); 0 = off


def overlong_penalty(length: Tensor, max_new_tokens: int, zone: int) -> Tensor:
    """DAPO Eq. 13: 0 up to max - zone tokens, then linearly down to -1 at max.  [N] -> [N]"""
    return ((max_new_tokens - zone - length) / zone).clamp(-1, 0) if zone else torch.zeros_like(length)


def group_advantages(reward: Tensor, group: Tensor, adv: str, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Eq. 1. Exactly 0 where a group's rewards are equal, where NaN (unscorable), and with < 2 scorable.  [N] -> [N]"""
    scored, group = ~reward.isnan(), group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    n = zeros.index_add(0, group, scored.to(reward.dtype))[group]  # scorable rows of the row's group
    low = zeros.scatter_reduce(0, group[scored], reward[scored], "amin", include_self=False)[group]
    above = torch.where(scored, reward - low, 0)  # all 0, without rounding, where rewards are equal
    centred = torch.where(scored, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)
    if adv == "group_std":
        std = (zeros.index_add(0, group, centred**2)[group] / (n - ddof).clamp(min=1)).sqrt()
        return centred / (std + eps)
    if adv == "batch_std":
        every = reward[scored]
        std = ((every - every.mean()) ** 2).sum() / max(1, len(every) - ddof)
        return centred / (std.sqrt() + eps)
    return centred * n / (n - 1).clamp(min=1) if adv == "rloo" else centred  # rloo: r minus the mean of the others


def importance_ratio(logps: Tensor, old_logps: Tensor, loss_mask: Tensor, level: str) -> Tensor:
    """Eq. 2, with gradient.  [N, T] -> [N, T] (token), or [N, 1]: exp of the mean (seq) or the sum (seqsum)"""
    log_ratio = (logps - old_logps) * loss_mask
    if level == "seq":
        log_ratio = log_ratio.sum(1, keepdim=True) / loss_mask.sum(1, keepdim=True).clamp(min=1)
    elif level == "seqsum":
        log_ratio = log_ratio.sum(1, keepdim=True)
    return log_ratio.exp()


def policy_token_loss(logps: Tensor, ratio: Tensor, advantages: Tensor, config: Config) -> Tensor:
    """Eq. 3, one value per token.  logps [N, T], ratio [N, T] or [N, 1], advantages [N] -> [N, T]"""
    a = advantages[:, None]
    if config.loss == "reinforce":
        return -a * logps
    if config.loss == "cispo":  # the weight is capped, the gradient of log p is not
        return -ratio.detach().clamp(max=config.cispo_cap) * a * logps
    if config.loss == "sapo":
        tau = torch.full_like(a, 1.05).masked_fill(a > 0, 1.0)
        loss = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * a
    else:
        bounded = ratio.clamp(max=config.delta) if config.delta else ratio
        loss = -torch.minimum(bounded * a, ratio.clamp(1 - config.eps_lo, 1 + config.eps_hi) * a)
    return loss.expand_as(logps)


def kl_token_penalty(logps: Tensor, ref_logps: Tensor, ratio: Tensor, kl: str) -> Tensor:
    """k(logp, ref_logp) of Eq. 5.  [N, T] -> [N, T]

    In expectation k2 has the gradient of KL(policy||ref), k3 its value but the gradient of KL(ref||policy), k3_is =
    ratio k3 (DeepSeek-V3.2, 2512.02556) both if the ratio is per token, k1 its value and no gradient.
    """
    d = (ref_logps - logps).clamp(-20, 20)
    k3 = d.exp() - d - 1
    return {"k1": -d, "k2": d**2 / 2, "k3": k3, "k3_is": ratio * k3}[kl]


def rollout_weights(old_logps, behaviour_logps, loss_mask: Tensor, tis: str, low: float, high: float) -> Tensor:
    """w of Eq. 4, no gradient; 1 where the sampler's log-prob is not finite.  [N, T] -> [N, T] or [N, 1]"""
    if tis in ("off", "bypass"):
        return torch.ones_like(old_logps)
    sampled = (loss_mask > 0) & behaviour_logps.isfinite()
    gap = torch.where(sampled, old_logps - behaviour_logps, 0).detach()
    if tis.startswith("seq"):
        gap = gap.sum(1, keepdim=True)  # a sum: explodes with length, which is what bounds are for
    w = gap.clamp(-20, 20).exp()
    if tis.endswith("mask"):
        return torch.where((w >= low) & (w <= high), w, 0)
    return w.clamp(low, high)


def stale_rows(logps: Tensor, behaviour_logps: Tensor, loss_mask: Tensor, advantages: Tensor, opsm: float) -> Tensor:
    """Rows with A < 0 that the policy has left behind (DeepSeek-V3.2): mean(behaviour - logp) > opsm.  -> bool [N]"""
    known = (loss_mask > 0) & behaviour_logps.isfinite()
    gap = torch.where(known, behaviour_logps - logps.detach(), 0).sum(1) / known.sum(1).clamp(min=1)
    return (advantages < 0) & (gap > opsm)


def row_weights(loss_mask: Tensor, group: Tensor, agg: str, max_new_tokens: int) -> Tensor:
    """c_i of Eq. 6, from the WHOLE optimizer batch, so that micro-batches may split it anyhow.  [N, T], [N] -> [N]"""
    n = loss_mask.sum(1)
    if agg == "token":
        return torch.ones_like(n) / n.sum().clamp(min=1)
    if agg == "seq":
        return 1 / (len(n) * n.clamp(min=1))
    if agg == "const":
        return torch.ones_like(n) / (len(n) * max_new_tokens)
    prompts, group = group.unique(return_inverse=True)
    return 1 / (len(prompts) * n.new_zeros(len(prompts)).index_add(0, group, n)[group].clamp(min=1))


def high_entropy(entropy: Tensor, loss_mask: Tensor, top: float) -> Tensor:
    """1 on the `top` fraction of sampled tokens with the highest entropy (2506.01939).  [N, T] -> [N, T]"""
    if top >= 1 or not loss_mask.any():
        return torch.ones_like(loss_mask)
    return (entropy >= entropy[loss_mask > 0].quantile(1 - top)).to(loss_mask.dtype)


def informative_rows(reward: Tensor, group: Tensor, prompts: int) -> Tensor:
    """Rows of the first `prompts` groups whose rewards differ (DAPO's dynamic sampling).  [N], [N] -> indices"""
    useful = group[group_advantages(reward, group, "center") != 0].unique()[:prompts]
    return torch.isin(group, useful).nonzero().squeeze(1)


def clip_fractions(ratio: Tensor, advantages: Tensor, config: Config) -> dict[str, Tensor]:
    """1 where the ratio is beyond the clip on the side that matters.  [N, T] or [N, 1], [N] -> like ratio"""
    low = (advantages[:, None] < 0) & (ratio < 1 - config.eps_lo)
    high = (advantages[:, None] > 0) & (ratio > 1 + config.eps_hi)
    return {"policy/clip_low": low.to(ratio.dtype), "policy/clip_high": high.to(ratio.dtype)}


def check(config: Config) -> None:
    require(config.group_size > 1, "GRPO compares responses to one prompt: --group-size must be at least 2")
    require(config.temperature > 0, "greedy responses are all equal, no signal: --temperature must be above 0")
    require(not config.delta or config.delta > 1 + config.eps_hi, "--delta bounds beyond the clip: above 1 + --eps-hi")
    refreshes = config.beta and not config.lora_rank
    require(refreshes or not config.ref_every, "--ref-every refreshes the reference of --beta; not with --lora-rank")
    require(0 < config.ent_top <= 1 and 0 < config.ref_mix <= 1, "--ent-top and --ref-mix must lie in (0, 1]")
    again = config.share_prompts and (config.system.checkpointing or config.system.shard == "fsdp")
    require(not again, "--share-prompts goes neither with --checkpointing nor with --shard fsdp: leave one away")
    require(config.tis_min < config.tis_max, "--tis-min must be below --tis-max")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    reference = load_start(policy, config.model, device, config.dtype) if config.beta else None
    engine = make_engine(policy, tokenizer, config)
    optimizer = Optimizer(policy, config)
    run = Run(config, "grpo")
    state = {"ent_coef": config.ent_coef, "entropy": 0.0}
    parts = {"policy": policy, "optimizer": optimizer, "state": state}
    parts |= {"reference": reference} if config.ref_every else {}
    sampling, low, high = Sampling(config.temperature, config.max_new_tokens), config.tis_min, config.tis_max
    limit, updates, share = config.micro_batch_tokens, config.minibatches * config.epochs, config.share_prompts
    in_reward = config.beta > 0 and config.kl == "k1_reward"
    done = run.restore(**parts)
    if not done:
        run.log(0, run.evaluate(0, engine, task))

    for step in run.steps(done):
        # --- sample and grade
        clock, rollout = [time.perf_counter()], None
        for round_ in range(max(1, config.dynamic_sampling)):
            key = (config.seed, step, round_)
            batch = engine.generate(task.draw(config.prompts_per_step, *key), config.group_size, sampling, key)
            batch.reward = torch.tensor(grade_all(reward, batch.examples, batch.texts), device=device)
            rollout = concat([rollout, batch], tokenizer.pad_token_id) if rollout else batch
            rows = informative_rows(rollout.reward, rollout.group, config.prompts_per_step)
            if len(rows) == len(batch):
                break
        metrics = {**rollout_metrics(rollout, reward, task), "grpo/sampled_rows": len(rollout)}
        if config.dynamic_sampling and len(rows):
            rollout = rollout[rows]
        clock.append(time.perf_counter())

        # --- score
        mask, behaviour_logps = rollout.loss_mask, rollout.behaviour_logps
        old_logps = old_entropy = ref_logps = None  # old_logps None: one optimizer step, the ratio is 1
        if updates > 1 or config.tis != "off" or config.ent_top < 1 or in_reward:
            old_logps, old_entropy = score(policy, rollout, limit, config.temperature, share=share)
        if config.beta:
            ref_logps, _ = score(reference, rollout, limit, config.temperature, share=share)
        clock.append(time.perf_counter())

        # --- weigh
        shaped = rollout.reward + overlong_penalty(mask.sum(1), config.max_new_tokens, config.overlong)
        if in_reward:
            shaped = shaped - config.beta * ((old_logps - ref_logps) * mask).sum(1)
        advantages = group_advantages(shaped, rollout.group, config.adv, config.adv_eps, config.adv_ddof)  # [N]
        if config.mask_truncated:  # after the advantages: cut rows belong to their group's statistics
            mask = mask * rollout.finished[:, None]
        weights = torch.ones_like(mask)  # [N, T] on the policy loss, not on the KL
        if config.tis != "off":
            weights = weights * rollout_weights(old_logps, behaviour_logps, mask, config.tis, low, high)
        if config.ent_top < 1:
            weights = weights * high_entropy(old_entropy, mask, config.ent_top)
        metrics["grpo/weight"] = ((weights * mask).sum() / mask.sum().clamp(min=1)).item()

        # --- update
        stats = Stats()
        ent_coef = state["ent_coef"] if not config.ent_target or state["entropy"] <= config.ent_target else 0.0
        penalised = config.beta > 0 and not in_reward
        learns = bool(advantages.any()) or penalised or ent_coef > 0  # else no step at all on this batch
        shuffle = torch.Generator().manual_seed(seed_of(config.seed, step, 2**31))
        for _ in range(config.epochs):
            for part in torch.randperm(len(rollout), generator=shuffle).to(device).chunk(config.minibatches):
                c = row_weights(mask[part], rollout.group[part], config.agg, config.max_new_tokens)[:, None]
                for rows in micro_batches(rollout[part], limit, share):
                    at, m = part[rows], mask[part[rows]]
                    logps, entropy = token_logps(policy, rollout[at], config.temperature, share=share)
                    old = logps.detach() if old_logps is None else old_logps[at]
                    # bypass: the ratio runs from the sampler itself (and w, which would count it twice, is 1)
                    start = behaviour_logps[at] if config.tis == "bypass" else old
                    ratio = importance_ratio(logps, start, m, config.ratio_level)
                    w = weights[at] * m
                    if config.opsm:
                        w = w * ~stale_rows(logps, behaviour_logps[at], m, advantages[at], config.opsm)[:, None]
                    policy_loss = (policy_token_loss(logps, ratio, advantages[at], config) * w * c[rows]).sum()
                    loss = policy_loss - ent_coef * (entropy * m).sum() / mask[part].sum().clamp(min=1)  # Eq. 5
                    if penalised:
                        kl = (kl_token_penalty(logps, ref_logps[at], ratio, config.kl) * m * c[rows]).sum()
                        loss = loss + config.beta * kl
                        stats.add("loss/kl", kl / updates)
                    if learns:
                        loss.backward()
                    stats.add("loss/total", loss / updates)
                    drift = {"policy/kl_old": old - logps, **clip_fractions(ratio, advantages[at], config)}
                    stats.tokens(m, {"train/entropy": entropy, **drift})
                    stats.engine(m, old, behaviour_logps[at])
                metrics |= optimizer.step(step)
        if config.ref_every and step % config.ref_every == 0:
            for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                old.data.lerp_(new.data, config.ref_mix)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= stats.metrics() | resources(clock, rollout.loss_mask)
        if config.ent_target and learns:  # Skywork-OR1: nudge the bonus, within [0, 1]
            state["entropy"] = metrics["train/entropy"]
            nudge = config.ent_delta if state["entropy"] <= config.ent_target else -config.ent_delta
            state["ent_coef"] = min(1.0, max(0.0, state["ent_coef"] + nudge))
        if run.due(step, config.eval_every):
            metrics |= run.evaluate(step, engine, task)
        run.log(step, metrics, rollout)
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo",))


if __name__ == "__main__":
    cli(main, Config, PRESETS)
