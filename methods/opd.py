"""OPD: on-policy distillation (K. Lu & Thinking Machines Lab, 2025; GKD, arXiv 2306.13649; MiniLLM, 2306.08543).

The student writes, the teacher only scores: one forward pass over the student's own tokens tells at each of them how
much likelier the student found it than the teacher. Minimise KL(student || teacher) on states that the student visits.
With d = behaviour_logp - teacher_logp on a sampled token and c = kl_coef:

    (1)  L    = c sum_it D(student, teacher) m / sum m,   over the whole vocabulary                  --est full
              D = KL(q|p) (beta 0), KL(p|q) (beta 1), or beta KL(q|mix) + (1-beta) KL(p|mix),
              p student, q teacher, mix = beta q + (1-beta) p
    (2)       the same over the K likeliest tokens and one bucket for the rest                       --est topk
    (3)  A    = -c d,  or discounted  A_t = sum_k discount^k A_{t+k};  + task_coef A_task            --est k1_pg
    (4)  L    = -sum_it rho A m / sum m,   rho = exp(logp - behaviour_logp)
    (5)  L    = c sum_it k(logp, teacher_logp) m / sum m, k2 or k3 on the sampled token              --est k2, k3, k3_k2
    (6)  with probability 1 - lmbda the step uses stored or teacher-written responses (GKD)          --lmbda

Differs from grpo.py in: the advantage is a teacher's log-ratio on each token, not a group's reward.

Good to know
- (3) has the gradient of the reverse KL in expectation and is all that a log-prob server can give (the blog's form);
  (1) and (2) have it exactly, with less noise, and need the teacher's distribution: the default, a local teacher.
- A full divergence used as an advantage would not depend on the sampled token: its expected gradient is 0. And k1 as
  a direct loss has zero expected gradient too. Neither is offered.
- The advantage is never normalised or centred: that would delete the scale of the KL.
- Left out: different tokenizers (see GOLD, ULD), and MiniLLM's teacher-mixed sampling.

Run: python methods/opd.py        Expected: see the results in opd.md beside it.
"""

import random
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, UserError, cli, require
from posttrain.common.models import load_model, load_start, load_tokenizer, prepare, shared_vocabulary
from posttrain.common.rollout import Rollout, Sampling, encode, make_engine, seed_of, under_prompts, written
from posttrain.common.run import Run
from posttrain.common.scoring import carry, lm_head, micro_batches, sampled_hidden, scatter, score, token_logps
from posttrain.common.tasks import Example, Task, grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, resources, rollout_metrics
from posttrain.kernels.divergence import linear_divergence
from posttrain.kernels.logprob import linear_topk_logp
from posttrain.kernels.topk import Tail, linear_topk_divergence


@dataclass
class Config:
    model: str = "addition-student"  # folder, hub name, or a built-in tiny model
    teacher: str = "addition-teacher"  # the same, or `self`: the student's own weights, see --teacher-sync
    task: str = "addition"  # addition, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task, random, or path/to/file.py:function; trains only with --task-coef
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 160  # batches sampled
    prompts_per_step: int = 32  # P
    group_size: int = 8  # G, responses per prompt; only averaged over (blog: 4)
    max_new_tokens: int = 20  # L_max
    temperature: float = 1.0  # of sampling and of every log-prob in training
    lr: float = 5e-4  # for the tiny default (3e-4 with k1_pg); 1e-6 for a real model, 1e-4 with LoRA
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
    est: Literal["full", "topk", "k1_pg", "k2", "k3", "k3_k2"] = "full"  # Eq. 1-5 (blog: k1_pg); k3_k2: see sampled_kl
    kl_coef: float = 1.0  # c
    adv_clamp: float = 10.0  # bound of |d| in nats (verl: 10); 0 = off
    discount: float = 0.0  # of later tokens' d in Eq. 3 (MiniLLM: 0.95; the blog found no gain)
    discount_mean: bool = False  # divide the discounted sum by the number of remaining tokens (MiniLLM)
    agg: Literal["token", "seq", "const", "sum"] = "token"  # mean of tokens, of rows' means, over B L_max; Tinker: sum
    beta: float = 1.0  # Eq. 1: 0 = forward KL, 1 = reverse KL, between = generalised JSD (GKD: 0.1, 0.5, 0.9)
    divergence_temperature: float = 1.0  # of both models in Eq. 1-2
    top_k: int = 16  # K of Eq. 2
    support: Literal["teacher", "student", "union"] = "teacher"  # whose likeliest tokens
    tail: Tail = "bucket"  # the rest as one bucket, renormalised away, or dropped (not a divergence)
    lmbda: float = 1.0  # fraction of steps on the student's own samples (GKD: 0, 0.5, 1); below 1 needs full or topk
    off_policy: Literal["data", "teacher"] = "teacher"  # responses of the other steps: the task's own or the teacher's
    cold_start_steps: int = 0  # first steps: plain SFT on --off-policy responses; = steps for the SFT baseline
    task_coef: float = 0.0  # weight of the group-normalised task reward (slime: 1)
    position_weight: float = 0.0  # extra weight of early tokens in Eq. 3 (IW-OPD, 2606.22600: 0.5)
    prefix_frac: float = 1.0  # loss only on this first part of each response
    mask_eos: bool = False  # no loss on the end token, for a teacher that ends otherwise
    teacher_prompt: str = "{prompt}"  # last message as the teacher sees it; {answer} and data columns may be used
    teacher_sync: Literal["frozen", "live", "ema"] = "frozen"  # of --teacher self
    ema: float = 0.05  # teacher <- ema student + (1 - ema) teacher, each step


def distillation_advantages(d: Tensor, loss_mask: Tensor, discount: float = 0.0, mean: bool = False) -> Tensor:
    """-d of Eq. 3, or its discounted sum over the tokens that follow, over their number if mean.  [N, T] -> [N, T]"""
    advantages, reach = -d * loss_mask, 1
    while discount and reach < d.shape[1]:  # A holds the sum over `reach` tokens; double it: log2(T) steps
        later = torch.nn.functional.pad(advantages[:, reach:], (0, min(reach, d.shape[1])))
        advantages, reach = advantages + discount**reach * later, 2 * reach
    if mean:
        advantages = advantages / loss_mask.flip(1).cumsum(1).flip(1).clamp(min=1)
    return advantages * loss_mask


def task_advantages(reward: Tensor, group: Tensor) -> Tensor:
    """GRPO's: reward minus its group's mean, over its std (ddof 1) + 1e-4; 0 without signal.  [N], [N] -> [N]"""
    scored, group = ~reward.isnan(), group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    n = zeros.index_add(0, group, scored.to(reward.dtype))[group]
    low = zeros.scatter_reduce(0, group[scored], reward[scored], "amin", include_self=False)[group]
    above = torch.where(scored, reward - low, 0)  # all 0, without rounding, where rewards are equal
    centred = torch.where(scored, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)
    return centred / ((zeros.index_add(0, group, centred**2)[group] / (n - 1).clamp(min=1)).sqrt() + 1e-4)


def early_token_weights(d: Tensor, loss_mask: Tensor, extra: float) -> Tensor:
    """IW-OPD: 1 + extra (1 - share of the row's |d| spent before t).  [N, T] -> [N, T]"""
    size = d.abs() * loss_mask
    spent = size.cumsum(1) - size
    return 1 + extra * (1 - spent / size.sum(1, keepdim=True).clamp(min=1e-8))


def prefix_mask(loss_mask: Tensor, fraction: float) -> Tensor:
    """1 on the first ceil(fraction n) sampled tokens of each row.  [N, T] -> [N, T]"""
    last = (fraction * loss_mask.sum(1, keepdim=True)).ceil()
    return loss_mask * (loss_mask.cumsum(1) <= last)


def sampled_kl(logps: Tensor, teacher_logps: Tensor, est: str) -> Tensor:
    """Eq. 5 with gradient through logps.  [N, T] -> [N, T]

    k2: the reverse KL's gradient in expectation. k3: the reverse KL's value, but the forward KL's gradient.
    k3_k2: value of k3, gradient of k2 (straight-through).
    """
    d = (teacher_logps - logps).clamp(-50, 50)
    k2, k3 = d**2 / 2, d.exp() - d - 1
    return {"k2": k2, "k3": k3, "k3_k2": k2 + (k3 - k2).detach()}[est]


def row_weights(loss_mask: Tensor, agg: str, max_new_tokens: int) -> Tensor:
    """What divides each row's sum over tokens, from the whole optimizer batch.  [N, T] -> [N]"""
    n = loss_mask.sum(1)
    return {
        "token": torch.ones_like(n) / n.sum().clamp(min=1),
        "seq": 1 / (len(n) * n.clamp(min=1)),
        "const": torch.ones_like(n) / (len(n) * max_new_tokens),
        "sum": torch.ones_like(n),
    }[agg]


def teacher_divergence(policy, hidden: Tensor, teacher, teacher_hidden: Tensor, vocab_size: int, config: Config):
    """Eq. 1 or 2 at each sampled token, with gradient for the student.  [n, Hs], [n, Ht] -> D [n], diagnostics [n]"""
    form = {"kind": {0.0: "forward_kl", 1.0: "reverse_kl"}.get(config.beta, "jsd"), "beta": config.beta}
    shared = {"temperature": config.divergence_temperature, "vocab_size": vocab_size}
    ours, theirs = lm_head(policy), {} if isinstance(teacher_hidden, tuple) else lm_head(teacher)
    if config.est == "full":
        sides = {f"student_{k}": v for k, v in ours.items()} | {f"teacher_{k}": v for k, v in theirs.items()}
        return linear_divergence(hidden, teacher_hidden=teacher_hidden, **form, **sides, **shared), {}
    with torch.no_grad():
        ids, logps = linear_topk_logp(teacher_hidden, k=config.top_k, **theirs, **shared) if theirs else teacher_hidden
        student_ids, student_logps = linear_topk_logp(hidden, k=config.top_k, **ours, **shared)
        known = (student_ids[:, :, None] == ids[:, None, :]).any(-1)
        measured = {"overlap": known.to(logps).mean(-1), "teacher_mass": logps.exp().sum(-1),
                    "student_mass": student_logps.exp().sum(-1)}  # fmt: skip
        if config.support != "teacher":
            new = student_ids.masked_fill(known, -1)
            ids = student_ids if config.support == "student" else torch.cat([ids, new], -1)
            _, logps = linear_topk_logp(teacher_hidden, ids=ids, **theirs, **shared)
    divergence = linear_topk_divergence(
        hidden, topk_ids=ids, topk_logprobs=logps, tail=config.tail, **form, **ours, **shared
    )
    return divergence, {f"opd/{key}": value for key, value in measured.items()}


def teacher_messages(example: Example, template: str) -> list[dict[str, str]]:
    """The prompt as the teacher sees it: its last message through --teacher-prompt."""
    *earlier, last = example.prompt
    known = {**example.fields, "prompt": last["content"], "answer": example.answer}
    try:
        return [*earlier, {**last, "content": template.format(**known)}]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise UserError(f"--teacher-prompt {template!r} may use only {{{'}, {'.join(known)}}}") from None


def others_responses(problems: list[Example], task: Task, engine, teacher_engine, sampling, key, config) -> Rollout:
    """Eq. 6: G responses to each problem that the student did not write, under the student's prompts."""
    if config.off_policy == "teacher":
        hinted = [replace(example, prompt=teacher_messages(example, config.teacher_prompt)) for example in problems]
        rollout = teacher_engine.generate(hinted, config.group_size, sampling, key)
        rollout.examples = [example for example in problems for _ in range(config.group_size)]
        prompts = [encode(engine.tokenizer, example.prompt) for example in rollout.examples]
        return under_prompts(rollout, prompts, engine.tokenizer.pad_token_id)
    rows = [example for example in problems for _ in range(config.group_size)]
    rng = random.Random(seed_of(*key, 2))
    return written(engine.tokenizer, rows, [task.demonstrate(example, rng) for example in rows], config.group_size)


def check(config: Config) -> None:
    blind = config.support == "teacher" and config.tail != "bucket" and config.beta == 1
    require(config.lmbda == 1 or config.est in ("full", "topk"), "--lmbda below 1 needs --est full or --est topk")
    shares = (config.beta, config.lmbda, config.ema, config.prefix_frac)
    inside = min(shares) >= 0 and max(shares) <= 1 and config.prefix_frac > 0
    require(inside, "--beta, --lmbda, --ema must lie in [0, 1] and --prefix-frac in (0, 1]")
    hot = config.temperature > 0 and config.divergence_temperature > 0
    require(hot, "--temperature and --divergence-temperature must be above 0")
    require(config.est != "topk" or not blind, "reverse KL on the teacher's list falls by leaving it: --tail bucket")
    ema = config.teacher == "self" and config.teacher_sync == "ema"
    require(not ema or not config.lora_rank, "--teacher-sync ema averages full weights: it needs --lora-rank 0")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    teacher_messages(task.heldout(1)[0], config.teacher_prompt)  # a wrong template is told now
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    itself = config.teacher == "self"
    teacher_tokenizer = load_tokenizer(config.model if itself else config.teacher)
    if itself:
        teacher = policy if config.teacher_sync == "live" else load_start(policy, config.model, device, config.dtype)
    else:
        teacher = load_model(config.teacher, device, config.dtype, train=False)
    vocab_size = shared_vocabulary(policy, tokenizer, teacher, teacher_tokenizer)
    direct = config.est in ("full", "topk")  # these read the teacher's whole distribution, or a server's lists of K
    lists = getattr(teacher, "topk", None) if (config.est, config.support) == ("topk", "teacher") else None
    require(lists or not direct or lm_head(teacher), "")  # a teacher on a server that is to give more is refused now
    engine = make_engine(policy, tokenizer, config)
    teacher_engine = engine if teacher is policy else make_engine(teacher, teacher_tokenizer)
    require(config.top_k <= vocab_size, f"--top-k {config.top_k} exceeds the vocabulary of {vocab_size} tokens")
    same_end = engine.stop_ids == teacher_engine.stop_ids
    require(same_end or config.mask_eos, "student and teacher end with different tokens: --mask-eos leaves them out")
    optimizer, run = Optimizer(policy, config), Run(config, "opd")
    state = {"start": 0.0, "teacher": 0.0}  # held-out accuracies, for the share of the gap that is closed
    parts = {"policy": policy, "optimizer": optimizer, "state": state}
    if itself and config.teacher_sync == "ema":
        parts["teacher"] = teacher
    done = run.restore(**parts)
    sampling = Sampling(config.temperature, config.max_new_tokens)
    if not done:
        problems, template = task.heldout(config.eval_problems), config.teacher_prompt
        hinted = [replace(example, prompt=teacher_messages(example, template)) for example in problems]
        goal, start = run.evaluate(0, teacher_engine, task, "teacher", hinted), run.evaluate(0, engine, task)
        state |= {"start": start["eval/accuracy"], "teacher": goal["eval/accuracy"]}
        run.log(0, start | {f"teacher/{key}": value for key, value in goal.items()})

    for step in run.steps(done):
        # --- sample and grade
        clock, key = [time.perf_counter()], (config.seed, step, 0)
        problems = task.draw(config.prompts_per_step, *key)
        sft = step <= config.cold_start_steps
        on_policy = not sft and random.Random(seed_of(*key, 1)).random() < config.lmbda
        if on_policy:
            rollout = engine.generate(problems, config.group_size, sampling, key)
        else:
            rollout = others_responses(problems, task, engine, teacher_engine, sampling, key, config)
        rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        clock.append(time.perf_counter())

        # --- score
        mask, behaviour_logps = rollout.loss_mask, rollout.behaviour_logps
        prompts = [encode(teacher_tokenizer, teacher_messages(e, config.teacher_prompt)) for e in rollout.examples]
        seen = under_prompts(rollout, prompts, tokenizer.pad_token_id)  # the same responses as the teacher reads them
        if config.mask_eos:
            mask = mask * ~torch.isin(rollout.tokens, torch.tensor(engine.stop_ids, device=device))
        mask = prefix_mask(mask, config.prefix_frac)
        teacher_logps, teacher_entropy = torch.zeros_like(behaviour_logps), torch.zeros_like(behaviour_logps)
        if sft or lists or not direct:
            scores = score(teacher, seen, config.micro_batch_tokens, config.temperature, vocab_size)
            teacher_logps, teacher_entropy = (carry(x, seen, rollout) for x in scores)
            teacher_logps = teacher_logps.clamp(min=-50)  # -inf is a token that the teacher masks
        clock.append(time.perf_counter())

        # --- weigh
        advantages = torch.zeros_like(behaviour_logps)  # [N, T], never normalised
        if on_policy and config.est == "k1_pg":
            d = (behaviour_logps - teacher_logps) * mask  # nats
            bounded = d.clamp(-config.adv_clamp, config.adv_clamp) if config.adv_clamp else d
            advantages = config.kl_coef * distillation_advantages(bounded, mask, config.discount, config.discount_mean)
            advantages = advantages * early_token_weights(d, mask, config.position_weight)
        if on_policy and config.task_coef:
            advantages = advantages + config.task_coef * task_advantages(rollout.reward, rollout.group)[:, None]

        # --- update
        stats = Stats()
        c = row_weights(mask, config.agg, config.max_new_tokens)[:, None]
        for rows in micro_batches(rollout, config.micro_batch_tokens):
            batch, m = rollout[rows], mask[rows]
            hidden = sampled_hidden(policy, batch)
            logps, entropy = token_logps(policy, batch, config.temperature, vocab_size, hidden)
            token_loss = torch.zeros_like(logps)  # [rows, T]
            if sft:
                token_loss = -logps
            elif direct:
                with torch.no_grad():
                    heat = config.divergence_temperature
                    teacher_hidden = (
                        lists(seen[rows], config.top_k, heat) if lists else sampled_hidden(teacher, seen[rows])
                    )
                    if not lists:  # [n, Ht], row for row with hidden
                        scores = token_logps(teacher, seen[rows], config.temperature, vocab_size, teacher_hidden)
                        teacher_logps[rows], teacher_entropy[rows] = (carry(x, seen[rows], batch) for x in scores)
                divergence, measured = teacher_divergence(policy, hidden, teacher, teacher_hidden, vocab_size, config)
                token_loss = config.kl_coef * scatter(divergence, batch)
                stats.tokens(m, {key: scatter(value, batch) for key, value in measured.items()}, count=False)
            elif config.est != "k1_pg":
                token_loss = config.kl_coef * sampled_kl(logps, teacher_logps[rows], config.est)
            if on_policy:  # Eq. 4
                token_loss = token_loss - (logps - behaviour_logps[rows]).exp() * advantages[rows]
            loss = (token_loss * m * c[rows]).sum()
            loss.backward()
            stats.add("loss/total", loss)
            gap, entropy_gap = logps - teacher_logps[rows], (entropy - teacher_entropy[rows]).abs()
            stats.tokens(m, {"train/entropy": entropy, "teacher/entropy_gap": entropy_gap})
            clamped = (gap.abs() > (config.adv_clamp or torch.inf)).to(gap.dtype)  # acts with k1_pg only
            stats.tokens(m, {"teacher/kl": gap, "teacher/kl_abs": gap.abs(), "opd/clamped": clamped}, count=False)
            if on_policy:
                stats.engine(m, logps, behaviour_logps[rows])
        metrics = rollout_metrics(rollout, reward, task) | optimizer.step(step)
        if "teacher" in parts:
            for old, new in zip(teacher.parameters(), policy.parameters(), strict=True):
                old.data.lerp_(new.data, config.ema)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= {**stats.metrics(), **resources(clock, rollout.loss_mask), "opd/on_policy": float(on_policy)}
        if run.due(step, config.eval_every):
            metrics |= run.evaluate(step, engine, task)
            gained, whole = metrics["eval/accuracy"] - state["start"], state["teacher"] - state["start"]
            metrics |= {"opd/gap_recovered": gained / whole} if whole else {}
        run.log(step, metrics, rollout)
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo", "opd"))


if __name__ == "__main__":
    cli(main, Config)
