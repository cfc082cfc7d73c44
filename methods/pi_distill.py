"""pi-Distill and OPSD: privileged information distillation (Penaloza, Vattikonda, Gontier et al., arXiv 2602.04942).

One network, two roles: the teacher T reads a hint, privileged information on the training task, the student S does not.
With t, s the log-probs of a sampled token in the two roles, t_old and s_old those at sampling time, m the loss mask,
N = sum m, sg = stop-gradient, and C(l, a) = min(e^l a, clip(e^l, 1 - eps, 1 + eps) a):

    pi-Distill: T writes and is rewarded, S learns from what T wrote                               --algorithm pi
    (1)  K_i = mean (or sum) over i's tokens of t - s, or of KL(T||S)                              --kl-est --kl-agg
    (2)  A_i = R_i - mean_group R,   R = 2 r - 1 - beta K,   r the grade in [0, 1]
    (3)  L_T = -sum m C(t - t_old, A) / N
    (4)  L_S = -sum m C(s - sg t, A_S) / N + beta sum m KL(sg T||S) / N,   A_S of (2) without K    --student-kl
    (5)  L   = alpha L_T + (1 - alpha) L_S
    OPSD: S writes and is rewarded, T only scores                                                  --algorithm opsd
    (6)  L   = -sum m C(s - s_old, A) / N + beta sum m KL(S||sg T) / N,   A of (2) without K       --opsd-kl
         (--opsd-kl reward, Algorithm 2: A with K, of s - t or of KL(S||T), and no other KL)

At test nobody reads a hint. Differs from grpo.py in T, K and KL; from skill_sd.py in that T may write, and then learns.

Good to know
- Algorithm 1 and the released code give S the A of T (--student-kl shared). In expectation S is then pushed AWAY from
  T: -E_T[(S/T) (-beta) (t - s) grad s] = -beta grad KL(S||T) in the loss. The main text's J_S, our default, pulls.
- KL(T||S) in a reward (--kl-est rb) has no gradient on the token that it measures: it depends on the prefix only.
- alpha 0 is not OPSD: T writes. alpha 1 trains T alone, which is all that beta then keeps near S.
- Left out: episodes of several turns (the sums over m hold for them), penalties on length and on leaks of the hint (a
  --reward of one's own), the relatives' top-p and top-k sampling, and SDPO's mean over hinted problems only (N is all).

Run: python methods/pi_distill.py        Expected: see the results in pi_distill.md beside it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, cli, require
from posttrain.common.environments.hints import hint_texts
from posttrain.common.machines.distributed import add_up
from posttrain.common.models import load_model, load_start, load_tokenizer, plain, prepare
from posttrain.common.rollout import Rollout, Sampling, encode, make_engine, under_prompts
from posttrain.common.run import Run
from posttrain.common.scoring import carry, lm_head, micro_batches, sampled_hidden, scatter, token_logps
from posttrain.common.tasks import CORRECT, Example, grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, engine_weights, resources, rollout_metrics
from posttrain.kernels.divergence import linear_divergence
from posttrain.kernels.logprob import linear_topk_logp
from posttrain.kernels.topk import linear_topk_divergence

RELATIVE = {"algorithm": "opsd", "adv_coef": 0.0, "beta": 1.0, "divergence": "jsd"}
PRESETS = {
    "none": {},
    "paper": {"student_kl": "shared", "kl_agg": "sum", "epochs": 3, "temperature": 0.75, "drop_flat": True},  # Table 2
    "opsd": {"algorithm": "opsd", "beta": 0.1},
    "grpo": {"algorithm": "opsd", "beta": 0.0},  # nobody reads a hint
    "opsd_zhao": {**RELATIVE, "opsd_teacher": "frozen", "divergence_temperature": 1.1},  # 2601.18734
    "sdpo": {**RELATIVE, "opsd_teacher": "ema", "kl_top": 100, "ratio_cap": 2.0},  # 2601.20802, with this hint
}


@dataclass
class Config:
    model: str = "lookup-student"  # folder, hub name, or a built-in tiny model
    task: str = "lookup"  # lookup, addition, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task, random, or path/to/file.py:function
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 120  # batches sampled
    prompts_per_step: int = 16  # P (paper: 64, 45)
    group_size: int = 8  # G, responses per prompt (paper: 5, 4)
    max_new_tokens: int = 6  # L_max
    temperature: float = 1.0  # of sampling and of every log-prob in training (paper: 0.75)
    lr: float = 5e-4  # for the tiny default; 5e-6 for a real model (paper), 1e-4 with LoRA
    warmup: int = 0  # steps of linear warm-up
    schedule: Schedule = "constant"  # of the learning rate: linear and cosine end at 0
    max_grad_norm: float = 1.0  # clip
    weight_decay: float = 0.0  # AdamW's
    seed: int = 0  # feeds initialisation, data order and sampling
    rollout: str = "hf"  # sampling engine: hf, vllm in this process, or vLLM servers http://host:8000,...
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 computes under autocast, weights stay fp32
    lora_rank: int = 0  # 0 = full fine-tuning
    micro_batch_tokens: int = 8192  # padded tokens a forward and backward; changes memory, not results
    eval_every: int = 40  # 0 = only before and after
    eval_problems: int = 256  # held-out problems
    eval_samples: int = 4  # k of Avg@k and Pass@k
    save_every: int = 40  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: Engines = Engines()  # flags about machines and engines: common/cli.py
    # --- this method
    preset: Literal[tuple(PRESETS)] = "none"  # flags of a neighbour or a publication, see PRESETS; explicit flags win
    algorithm: Literal["pi", "opsd"] = "pi"  # who writes: the teacher (Eq. 1-5) or the student (Eq. 6)
    alpha: float = 0.5  # Eq. 5: 1 = teacher alone, 0 = student alone
    alpha_anneal: int = 40  # steps in which alpha rises from 0, unless it is 0 or 1 (paper: 15 epochs); 0 = at once
    beta: float = 0.25  # weight of every KL (paper: 0.25, OPSD 0.5; --preset opsd: 0.1)
    hint: Literal["full", "sparse", "self", "none"] = "full"  # solution, less of it, written by the policy; none: T = S
    hint_column: str = "hint"  # of a file or datasets name, for full: else the task's demonstration
    hint_text: str = "For you alone, never to be mentioned: {hint}"  # the system message; tiny hints stand bare
    require_hint: bool = False  # leave problems without a hint out of the step; else T = S there
    kl_est: Literal["k1", "rb"] = "k1"  # K of Eq. 1: of the sampled token, or over the vocabulary
    kl_agg: Literal["mean", "sum"] = "mean"  # K of Eq. 1 over the tokens (paper: sum)
    reference: Literal["student", "base"] = "student"  # S in Eq. 1: as it is, or as it was at first (paper: worse)
    student_kl: Literal["direct", "shared", "none"] = "direct"  # Eq. 4; shared: A_S = A (paper's code), none: no KL
    student_denom: Literal["current", "behavior"] = "current"  # Eq. 4: sg t, or t_old
    opsd_kl: Literal["direct", "reward", "sampled"] = "direct"  # Eq. 6, in R as in Eq. 1, or s - t as token advantage
    opsd_teacher: Literal["current", "frozen", "ema"] = "current"  # weights of T in Eq. 6
    ema: float = 0.05  # teacher <- ema student + (1 - ema) teacher, each step
    adv_coef: float = 1.0  # weight of Eq. 6's first term; 0 = distillation alone
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # Eq. 6: KL(S||T), KL(T||S), jsd
    jsd_beta: float = 0.5  # b of b KL(T||M) + (1 - b) KL(S||M), M = b T + (1 - b) S
    divergence_temperature: float = 1.0  # of both in the divergence, on top of --temperature (Zhao: 1.1)
    kl_top: int = 0  # divergence over the student's so many likeliest tokens and a bucket (SDPO: 100); 0 = all
    ratio_cap: float = 0.0  # weigh the divergence by min(exp(s - s_old), cap) (SDPO: 2); 0 = off
    eps: float = 0.2  # clip
    epochs: int = 1  # optimizer steps on each batch (paper: 3, 2)
    agg: Literal["token", "seq", "const"] = "token"  # mean of tokens, of rows' means, over B L_max (verl)
    drop_flat: bool = False  # groups whose A are all 0 leave the step, KL and N included (paper)
    sft_steps: int = 0  # first steps: imitate the correct among T's responses; then as the other flags say
    engine_tis: float = 0.0  # bound of exp(trainer's - engine's log-prob), a weight of the loss (TRL: 3); 0 = off


def group_means_off(reward: Tensor, group: Tensor) -> Tensor:
    """Eq. 2: R minus its group's mean, no std. 0 where not a number or alone.  [N], [N] -> [N]"""
    scored, group = ~reward.isnan(), group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    n = zeros.index_add(0, group, scored.to(reward.dtype))[group]
    low = zeros.scatter_reduce(0, group[scored], reward[scored], "amin", include_self=False)[group]
    above = torch.where(scored, reward - low, 0)  # all 0, without rounding, where rewards are equal
    return torch.where(scored, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)


def clipped_loss(log_ratio: Tensor, advantages: Tensor, loss_mask: Tensor, eps: float) -> Tensor:
    """-C, one value a token, with gradient through log_ratio.  [N, T], [N], [N, T] -> [N, T]

    A token that the student finds very unlikely learns slowly even where A > 0: its gradient is its ratio times A.
    """
    ratio, a = (log_ratio * loss_mask).clamp(-20, 20).exp(), advantages[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a)


def row_weights(loss_mask: Tensor, agg: str, max_new_tokens: int) -> Tensor:
    """1/N for each row's sum over tokens, from the whole batch.  [N, T] -> [N]"""
    n = loss_mask.sum(1)
    return {
        "token": torch.ones_like(n) / n.sum().clamp(min=1),
        "seq": 1 / ((n > 0).sum().clamp(min=1) * n.clamp(min=1)),
        "const": torch.ones_like(n) / ((n > 0).sum().clamp(min=1) * max_new_tokens),
    }[agg]


def vocabulary_kl(student, hidden: Tensor, teacher, teacher_hidden: Tensor, kind, t, b=0.5, top_k=0) -> Tensor:
    """Divergence at each sampled token; the kernels stop the teacher's gradient.  [n, H], [n, H] -> [n]

    kind: forward_kl = KL(T||S), reverse_kl = KL(S||T), jsd; over the student's top_k tokens and a bucket, or over all.
    """
    ours, theirs = lm_head(student), lm_head(teacher)
    if not top_k:
        sides = {f"student_{k}": v for k, v in ours.items()} | {f"teacher_{k}": v for k, v in theirs.items()}
        return linear_divergence(hidden, teacher_hidden=teacher_hidden, kind=kind, beta=b, temperature=t, **sides)
    with torch.no_grad():
        ids, _ = linear_topk_logp(hidden, k=min(top_k, len(ours["weight"])), temperature=t, **ours)
        _, logps = linear_topk_logp(teacher_hidden, ids=ids, temperature=t, **theirs)
    return linear_topk_divergence(hidden, topk_ids=ids, topk_logprobs=logps, kind=kind, beta=b, temperature=t, **ours)


@torch.no_grad()
def score_both(student, teacher, rollout: Rollout, seen: Rollout, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """s, t and the k of Eq. 1, writer minus reader, on the tokens of rollout.  -> [N, T] each"""
    s, t, k = (torch.zeros_like(rollout.behaviour_logps) for _ in range(3))
    for rows in micro_batches(seen, config.micro_batch_tokens):
        batch, view = rollout[rows], seen[rows]
        ours, theirs = sampled_hidden(student, batch), sampled_hidden(teacher, view)
        s[rows], _ = token_logps(student, batch, config.temperature, hidden=ours)
        t[rows] = carry(token_logps(teacher, view, config.temperature, hidden=theirs)[0], view, batch)
        if config.kl_est == "rb":
            kind = "forward_kl" if config.algorithm == "pi" else "reverse_kl"
            k[rows] = scatter(vocabulary_kl(student, ours, teacher, theirs, kind, config.temperature), batch)
    s, t, k = add_up(s, t, k)
    return s, t, k if config.kl_est == "rb" else t - s if config.algorithm == "pi" else s - t


def with_hint(prompt: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The teacher's prompt: the hint at the end of the system message, or as one."""
    system, *rest = prompt if prompt[0].get("role") == "system" else [{"role": "system", "content": ""}, *prompt]
    return [{**system, "content": f"{system['content']}\n\n{text}".lstrip()}, *rest] if text else prompt


def check(config: Config) -> None:
    pi, direct = config.algorithm == "pi", config.opsd_kl == "direct"
    pulls = config.student_kl == "direct" and config.alpha == 0 if pi else config.opsd_kl != "reward"
    pulls = pulls and config.beta > 0 and config.hint != "none"  # a KL outside of R, which needs no group
    require(config.group_size > 1 or pulls, "A needs --group-size of at least 2")
    require(pi or pulls or config.adv_coef > 0, "--adv-coef 0 needs --beta, a --hint and no --opsd-kl reward")
    require(config.temperature * config.divergence_temperature > 0, "--temperature, --divergence-temperature: above 0")
    shares = max(config.alpha, config.ema) <= 1 and 0 < config.jsd_beta < 1 and config.eps < 1
    require(shares, "--alpha and --ema must lie in [0, 1], --jsd-beta in (0, 1), --eps below 1")
    require("{hint}" in config.hint_text, "--hint-text lacks {hint}, the place of the hint")
    require(config.hint != "none" or not config.require_hint, "--require-hint leaves out everything with --hint none")
    average = config.opsd_teacher == "ema" and config.lora_rank > 0
    require(not average, "--opsd-teacher ema averages full weights: it needs --lora-rank 0")
    needs = {
        "--algorithm pi": (pi, "alpha alpha_anneal reference student_kl student_denom"),
        "--algorithm opsd": (not pi, "opsd_kl opsd_teacher adv_coef divergence jsd_beta kl_top ratio_cap ema"),
        "--opsd-kl direct": (pi or direct, "divergence kl_top divergence_temperature"),
        "--opsd-kl direct or sampled": (config.opsd_kl != "reward", "ratio_cap"),
        "--divergence jsd": (config.divergence == "jsd", "jsd_beta"),
        "--opsd-teacher ema": (config.opsd_teacher == "ema", "ema"),
    }
    for need, (given, names) in needs.items():
        idle = [name for name in names.split() if getattr(config, name) != getattr(Config, name)]
        require(given or not idle, f"--{' --'.join(idle).replace('_', '-')}: acts with {need} only")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    pi, own = config.algorithm == "pi", (config.opsd_teacher != "current", config.reference == "base")
    teacher, base = (load_start(policy, config.model, device, config.dtype) if x else policy for x in own)
    engine = make_engine(policy, tokenizer, config)
    teacher_engine = engine if teacher is policy else make_engine(teacher, tokenizer)
    optimizer = Optimizer(policy, config)
    run = Run(config, "pi_distill")
    parts = {"policy": policy, "optimizer": optimizer} | ({"teacher": teacher} if config.opsd_teacher == "ema" else {})
    tau, hot, pad = config.temperature, config.temperature * config.divergence_temperature, tokenizer.pad_token_id
    sampling, brief = Sampling(tau, config.max_new_tokens), Sampling(tau, 64)  # of a response, of a hint
    room = (getattr(plain(policy).config, "max_position_embeddings", None) or math.inf) - config.max_new_tokens

    def tell(problems: list[Example], *key: int) -> tuple[list[Example], list[bool]]:
        """The problems as T reads them, and whether with a hint: one that leaves no room to answer is none."""
        texts = hint_texts(problems, task, config, engine, brief, key)
        told = [replace(e, prompt=with_hint(e.prompt, text)) for e, text in zip(problems, texts, strict=True)]
        hinted = [bool(text) and len(encode(tokenizer, e.prompt)) <= room for e, text in zip(told, texts, strict=True)]
        return [b if there else a for a, b, there in zip(problems, told, hinted, strict=True)], hinted

    def examine(step: int) -> dict[str, float]:
        """Held-out accuracy without a hint, which is the result, and the teacher's with."""
        metrics, told = run.evaluate(step, engine, task), tell(task.heldout(config.eval_problems), config.seed, 0, 3)[0]
        hinted = run.evaluate(step, teacher_engine, task, "teacher, which reads hints", told)
        metrics["pi/utility"] = hinted["eval/accuracy"] - metrics["eval/accuracy"]
        return metrics | {f"teacher/{key}": value for key, value in hinted.items()}

    done = run.restore(**parts)
    if not done:
        run.log(0, examine(0))

    for step in run.steps(done):
        # --- sample and grade
        clock, key, sft = [time.perf_counter()], (config.seed, step, 0), step <= config.sft_steps
        problems = task.draw(config.prompts_per_step, *key)
        told, hinted = tell(problems, config.seed, step, 1)
        kept = [i for i, there in enumerate(hinted) if there or not config.require_hint]
        require(kept, f"no problem of step {step} has a hint: raise --prompts-per-step or leave out --require-hint")
        problems, told, hinted = ([each[i] for i in kept] for each in (problems, told, hinted))
        read = [encode(tokenizer, example.prompt) for example in told]
        writer, starts = (teacher_engine, read) if pi or sft else (engine, ())
        rollout = writer.generate(problems, config.group_size, sampling, key, starts)
        prompts = [encode(tokenizer, example.prompt) for example in rollout.examples]
        rollout = under_prompts(rollout, prompts, pad)  # as the student reads it
        seen = under_prompts(rollout, [read[g] for g in rollout.group.tolist()], pad)  # as the teacher does
        rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        clock.append(time.perf_counter())

        # --- score
        s, t, k = score_both(base, teacher, rollout, seen, config)
        old_logps = t if pi or sft else s  # of who wrote
        clock.append(time.perf_counter())

        # --- weigh
        mask, group, rewards = rollout.loss_mask, rollout.group, 2 * rollout.reward - 1
        reads = torch.tensor(hinted, device=device)[group, None]  # [N, 1]; elsewhere T = S: no K, nothing to distil
        kl = (k * reads).sum(1) / (mask.sum(1).clamp(min=1) if config.kl_agg == "mean" else 1)  # [N], K of Eq. 1
        shaped = rewards - config.beta * kl if pi or config.opsd_kl == "reward" else rewards
        advantages = group_means_off(shaped, group)  # [N]
        shared = not pi or config.student_kl == "shared"
        student_advantages = advantages if shared else group_means_off(rewards, group)
        live = torch.isin(group, group[advantages.abs() >= 1e-8])
        mask = mask * live[:, None] if config.drop_flat and not sft else mask
        mask = mask * (rollout.reward >= CORRECT)[:, None] if sft else mask
        w = mask * row_weights(mask, config.agg, config.max_new_tokens)[:, None]  # [N, T], m / N
        w = engine_weights(old_logps, rollout.behaviour_logps, w, config.engine_tis)

        # --- update
        stats, metrics = Stats(), rollout_metrics(rollout, reward, task)
        rising = 0 < config.alpha < 1 and config.alpha_anneal > 0
        alpha = config.alpha * (min(1.0, max(0, step - 1 - config.sft_steps) / config.alpha_anneal) if rising else 1)
        teaches, studies = pi and alpha > 0 and not sft, not pi or alpha < 1 or sft
        share = 1.0 if sft else 1 - alpha if pi else config.adv_coef
        distils = config.beta > 0 and (studies and config.student_kl == "direct" if pi else config.opsd_kl != "reward")
        signal = (teaches * advantages).any() or (studies * share * student_advantages).any()
        learns = bool((sft or distils or signal) and mask.any())  # else no step at all on this batch
        for _ in range(config.epochs):
            for rows in micro_batches(seen, config.micro_batch_tokens):
                batch, view, m, old, losses = rollout[rows], seen[rows], mask[rows], old_logps[rows], {}
                if pi or sft or distils:  # else nobody asks what T says
                    with torch.set_grad_enabled(teaches):
                        theirs = sampled_hidden(teacher, view)
                        t, entropy = (carry(x, view, batch) for x in token_logps(teacher, view, tau, hidden=theirs))
                if teaches:  # Eq. 3
                    token_loss = clipped_loss(t - old, advantages[rows], m, config.eps)
                    losses["teacher"] = alpha * (token_loss * w[rows]).sum()  # Eq. 5
                if studies:  # Eq. 4 or 6
                    hidden = sampled_hidden(policy, batch)
                    s, entropy = token_logps(policy, batch, tau, hidden=hidden)
                    start = t.detach() if pi and config.student_denom == "current" else old
                    token_loss = clipped_loss(s - start, student_advantages[rows], m, config.eps)
                    losses["student"] = share * ((-s if sft else token_loss) * w[rows]).sum()  # Eq. 5
                if distils and not sft:  # the KL of Eq. 4 or 6
                    how = ("forward_kl" if pi else config.divergence, hot, config.jsd_beta, config.kl_top)
                    if config.opsd_kl == "sampled":
                        token_kl = (s - t).detach() * s  # of the reverse KL the gradient in expectation
                    else:
                        token_kl = scatter(vocabulary_kl(policy, hidden, teacher, theirs, *how), batch)
                    if config.ratio_cap:
                        token_kl = token_kl * (s - old).detach().exp().clamp(max=config.ratio_cap)
                    losses["kl"] = config.beta * (share if pi else 1) * (token_kl * (reads * w)[rows]).sum()
                losses["total"] = sum(losses.values())
                if learns:
                    losses["total"].backward()
                for name, value in losses.items():
                    stats.add(f"loss/{name}", value / config.epochs)
                stats.tokens(m, {"train/entropy": entropy, "policy/kl_old": old - (t if pi or sft else s)})
                stats.engine(m, old, rollout.behaviour_logps[rows])
            metrics |= optimizer.step(step)
        if config.opsd_teacher == "ema":
            for slow, new in zip(teacher.parameters(), policy.parameters(), strict=True):
                slow.data.lerp_(new.data, config.ema)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= {"pi/alpha": alpha if pi else 0.0}
        metrics |= {"pi/kl": kl.mean().item(), "pi/penalty": config.beta * kl.abs().mean().item()}
        metrics |= {"pi/hinted": sum(hinted) / config.prompts_per_step, "pi/live": live.double().mean().item()}
        metrics |= stats.metrics() | resources(clock, rollout.loss_mask)
        if run.due(step, config.eval_every):
            metrics |= examine(step)
        run.log(step, metrics, rollout, {"k": k, "advantage": advantages[:, None] * mask})
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo-lookup", "pi-distill", "opsd"))


if __name__ == "__main__":
    cli(main, Config, PRESETS)
