"""Skill-SD: skill-conditioned self-distillation for multi-turn agents (Wang, Wang, Xiao et al., arXiv 2604.10674).

The student plays with the plain prompt, in training and at test. Finished episodes are summarised into short skills,
kept by task. A teacher, the same weights reading skill and prompt, scores the student's own tokens and never writes.
With s, o, q the log-probs of a sampled token under the student, the student that sampled it, and the teacher; m the
loss mask, N = sum m, and h = 1 on the rows of tasks that have a skill:

    (1)  A      = (R - mean_group) / (std_group + eps),   R = the episode's reward
    (2)  L_GRPO = -sum_it m min(r A, clip(r, 1 - eps_lo, 1 + eps_hi) A) / N,   r = exp(s - o)
    (3)  L_SDL  = sum_it m h r (exp(-l) - 1 + l) / N,   l = s - q               paper, Eq. 10-12  --est --sdl-agg
    (4)  L      = adv_grpo L_GRPO + sdl_coef L_SDL
    (5)  the skill to read: the oldest untried one, else argmax mean + c sqrt(ln sum n / n)       --ucb
    (6)  an episode -> success_analysis, mistake_analysis, golden_workflow                        --summarizer --skill

Differs from grpo.py in (3), (5) and (6); from opd.py in that the teacher is the student with something to read.

Good to know
- d/ds of r k3(l) is r l: in expectation over sampled tokens, (3) has value and gradient of the reverse KL at each
  position. Without r, or with r detached, the gradient is the forward KL's, although r is 1 at the first step.
- A tiny student that never reads skills in training forgets how to: the paper's --teacher-sync live suffers.
- A skill helps its own task only: look at training tasks beside held-out ones. Where no task returns, this is GRPO.
- Left out: bounds on l (beyond one r's slope acts alone, the wrong way), r and loss; the largest |l| only; warm-down.

Run: python methods/skill_sd.py        Expected: see the results in skill_sd.md beside it.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, cli, require
from posttrain.common.environments.episodes import Episodes
from posttrain.common.environments.summaries import best_rows, fit_skill, room, skill_text, summarise, with_skill
from posttrain.common.environments.tools import Form, make_environment
from posttrain.common.models import load_model, load_start, load_tokenizer, prepare
from posttrain.common.rollout import Rollout, Sampling, encode, make_engine, seed_of, under_prompts
from posttrain.common.run import Run
from posttrain.common.scoring import carry, lm_head, micro_batches, sampled_hidden, score, score_within, token_logps
from posttrain.common.tasks import CORRECT, grade_all, make_reward, make_task, text_of
from posttrain.common.training import Optimizer, Schedule, Stats, engine_weights, resources, rollout_metrics
from posttrain.kernels.divergence import linear_divergence

PRESETS = {
    "none": {},
    "paper": {"teacher_sync": "live", "sdl_coef": 0.001},
    "naive": {"teacher_sync": "live", "est": "k3", "sdl_coef": 1.0},  # both losses added as they are
}


@dataclass
class Config:
    model: str = "sokoban-student"  # folder, hub name, or a built-in tiny model
    task: str = "sokoban"  # sokoban, chain, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task = the environment's, random, or path/to/file.py:function of the transcript
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 100  # batches of episodes (paper: about 160 for its Sokoban)
    prompts_per_step: int = 24  # P, tasks
    group_size: int = 4  # G, episodes of each
    max_new_tokens: int = 36  # of an episode, observations included
    temperature: float = 1.0  # of sampling and of every log-prob in training
    lr: float = 5e-4  # for the tiny default; 1e-6 for a real model, 1e-5 to 1e-4 with LoRA
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
    eval_every: int = 50  # 0 = only before and after
    eval_problems: int = 100  # held-out problems
    eval_samples: int = 4  # k of Avg@k and Pass@k
    save_every: int = 50  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: Engines = Engines()  # flags about machines and engines: common/cli.py
    # --- this method
    preset: Literal[tuple(PRESETS)] = "none"  # paper's own flags, or the naive sum of both losses; explicit flags win
    environment: str = "task"  # the task's own, calculator or python (a tool for any task), or path/to/file.py:Class
    tool_format: Form = "hermes"  # of the tool calls of a chat model: <tool_call> tags, or a bare JSON object
    max_turns: int = 12  # of an episode (paper: 40)
    max_seconds: float = 0.0  # of a batch of episodes; 0 = no limit
    adv_grpo: float = 1.0  # weight of Eq. 2; 0 = self-distillation alone
    sdl_coef: float = 0.1  # weight of Eq. 3 (paper: 0.001); 0 = GRPO
    est: Literal["iw_k3", "k3", "iw_k3_detached", "pg", "full"] = "iw_k3"  # Eq. 3; see sdl_token_loss
    sdl_agg: Literal["token", "seq_sum"] = "token"  # N of Eq. 3: all sampled tokens, or the rows
    teacher_sync: Literal["live", "frozen", "ema"] = "ema"  # live: the student (paper); frozen: its start; ema: a mean
    ema: float = 0.01  # teacher <- ema student + (1 - ema) teacher, each step
    skill: Literal["both", "workflow", "mistakes", "none"] = "both"  # which parts of a summary are kept
    skill_to: Literal["teacher", "student", "nobody"] = "teacher"  # student: without Eq. 3; nobody: a control
    sampler: Literal["student", "teacher"] = "student"  # who plays; teacher: reads the skill, o is its log-prob
    summarizer: str = "rules"  # of Eq. 6: rules (the task's), self (the policy), or a model (paper: an external one)
    summary_tokens: int = 128  # most tokens of a summary by a model
    ucb: float = 1.0  # c of Eq. 5
    bank_size: int = 6  # newest skills kept for each task
    eps_lo: float = 0.2  # lower clip
    eps_hi: float = 0.28  # upper clip
    minibatches: int = 1  # optimizer steps a batch
    engine_tis: float = 0.0  # bound of exp(trainer's - engine's log-prob), a weight of the loss (TRL: 3); 0 = off


def group_advantages(reward: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 1, ddof 1. Exactly 0 where a group's rewards are equal, 0 where not a number.  [N], [N] -> [N]"""
    scored, group = ~reward.isnan(), group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    n = zeros.index_add(0, group, scored.to(reward.dtype))[group]
    low = zeros.scatter_reduce(0, group[scored], reward[scored], "amin", include_self=False)[group]
    above = torch.where(scored, reward - low, 0)  # all 0, without rounding, where rewards are equal
    centred = torch.where(scored, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)
    return centred / ((zeros.index_add(0, group, centred**2)[group] / (n - 1).clamp(min=1)).sqrt() + eps)


def policy_token_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, loss_mask: Tensor, config) -> Tensor:
    """Eq. 2, one value per token.  [N, T], [N, T], [N], [N, T] -> [N, T]"""
    ratio, a = ((logps - old_logps) * loss_mask).exp(), advantages[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - config.eps_lo, 1 + config.eps_hi) * a)


def sdl_token_loss(logps: Tensor, old_logps: Tensor, teacher_logps: Tensor, loss_mask: Tensor, config) -> Tensor:
    """Eq. 3, one value per token, with gradient through r and l.  [N, T] ... -> [N, T]
    iw_k3: value and gradient of KL(student||teacher); pg, -l as an advantage: that gradient. k3, iw_k3_detached: the
    gradient of KL(teacher||student) when on-policy. All in expectation over sampled tokens.
    """
    ell = torch.where(loss_mask > 0, logps - teacher_logps, 0)
    ratio = torch.where(loss_mask > 0, logps - old_logps, 0).clamp(max=10).exp()
    if config.est == "pg":
        return ratio * ell.detach()
    k3 = (-ell).clamp(max=20).exp() - 1 + ell
    return {"iw_k3": ratio, "k3": 1, "iw_k3_detached": ratio.detach()}[config.est] * k3


def choose(bank: list[dict], c: float) -> int | None:
    """Eq. 5: index of the skill to read, None without any. bank: oldest first; ties go to the lowest index."""
    if untried := [i for i, skill in enumerate(bank) if skill["n"] == 0]:
        return untried[0]
    log_total = math.log(max(1, sum(skill["n"] for skill in bank)))
    value = [s["reward_sum"] / s["n"] + c * math.sqrt(log_total / s["n"]) for s in bank]
    return value.index(max(value)) if bank else None


def keep(bank: list[dict], text: str, reward: float, size: int) -> bool:
    """Adds a skill unless its text is empty or there already, and forgets the oldest beyond size. -> whether it did"""
    new = bool(text) and all(skill["text"] != text for skill in bank)
    if new:
        bank.append({"text": text, "reward": reward, "n": 0, "reward_sum": 0.0})
        del bank[:-size]
    return new


def full_divergence(policy, hidden: Tensor, teacher, behind: Rollout, mask: Tensor, on: Tensor, t: float) -> Tensor:
    """KL(student||teacher) over the vocabulary on the tokens of behind, which are 1 in on [N, T].  -> [N, T]"""
    with torch.no_grad():
        theirs = sampled_hidden(teacher, behind)
    heads = {f"student_{k}": v for k, v in lm_head(policy).items()}
    heads |= {f"teacher_{k}": v for k, v in lm_head(teacher).items()}
    kl = linear_divergence(hidden[on[mask > 0] > 0], teacher_hidden=theirs, kind="reverse_kl", temperature=t, **heads)
    return torch.zeros_like(mask).masked_scatter(on > 0, kl)


def check(config: Config) -> None:
    require(config.group_size > 1, "GRPO compares episodes of one task: --group-size must be at least 2")
    require(config.temperature > 0, "greedy episodes are all equal, no signal: --temperature must be above 0")
    distils = config.sdl_coef > 0 and config.skill_to != "student"
    require(config.adv_grpo > 0 or distils, "--adv-grpo 0 with --sdl-coef 0 or --skill-to student leaves no loss")
    require(config.ema <= 1, "--ema must lie in [0, 1]")
    averages = "--teacher-sync ema averages full weights: with --lora-rank take --teacher-sync live or frozen"
    require(config.teacher_sync != "ema" or config.lora_rank == 0, averages)
    moves = "--est full reads the live teacher, which moves between --minibatches: take another --teacher-sync"
    require(config.est != "full" or config.teacher_sync != "live" or config.minibatches == 1, moves)


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward, make = make_reward(config.reward, task), make_environment(config.environment, task, config.tool_format)
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    teacher = policy if config.teacher_sync == "live" else load_start(policy, config.model, device, config.dtype)
    engine = Episodes(make_engine(policy, tokenizer, config), make, config.max_turns, config.max_seconds)
    theirs = engine.engine if teacher is policy else make_engine(teacher, tokenizer)
    teacher_engine = Episodes(theirs, make, config.max_turns, config.max_seconds)
    writer = engine.engine if config.summarizer == "self" else None
    if config.summarizer not in ("rules", "self"):
        other = load_model(config.summarizer, device, config.dtype, train=False)
        writer = make_engine(other, load_tokenizer(config.summarizer))
    require(writer or hasattr(task, "summarise"), f"task {config.task!r} has no rules of its own: --summarizer self")
    optimizer, run = Optimizer(policy, config), Run(config, "skill_sd")
    state = {"bank": {}, "solved": {}, "chosen": 0}  # a task's skills, oldest first; the step that first solved it
    parts = {"policy": policy, "optimizer": optimizer, "state": state}
    parts |= {"teacher": teacher} if config.teacher_sync == "ema" else {}
    sampling, brief = (Sampling(config.temperature, n) for n in (config.max_new_tokens, config.summary_tokens))
    limit, pad = config.micro_batch_tokens, tokenizer.pad_token_id
    fixed = task.draw(min(36, config.eval_problems), 0)  # training tasks that evaluations look at
    fit, ids = partial(fit_skill, tokenizer=tokenizer, task=task), partial(encode, tokenizer)
    most = room(engine.engine, config.max_new_tokens)  # tokens of a prompt that is played
    distils = config.sdl_coef > 0 and config.skill_to != "student"
    plays = config.skill_to == "student" or (config.skill_to == "teacher" and config.sampler == "teacher")
    is_read = plays or (distils and config.skill_to == "teacher")
    moves = config.sampler == "teacher" or config.minibatches > 1 or config.engine_tis > 0  # the ratio is not 1

    def examine(step: int) -> dict[str, float]:
        """Held-out evaluation; on training tasks the student's success, and the teacher's with skills."""
        metrics = run.evaluate(step, engine, task) | {"skill/ever_solved": len(state["solved"])}
        banks = [state["bank"].get((text_of(example), example.answer), []) for example in fixed]
        texts = [bank[choose(bank, config.ucb)]["text"] if bank else "" for bank in banks]
        starts = [ids(fit(text, x, most)[1]) for text, x in zip(texts, engine.openings(fixed), strict=True)]
        for i, name, player, begin in ((3, "train", engine, ()), (4, "teacher", teacher_engine, starts)):
            rollout = player.generate(fixed, config.eval_samples, sampling, (config.seed, 0, i), begin)
            metrics[f"skill/{name}_success"] = (rollout.reward == CORRECT).double().mean().item()
        rates = f"{metrics['skill/train_success']:.3f}, its teacher with skills {metrics['skill/teacher_success']:.3f}"
        run.console.print(f"  on {len(fixed)} training tasks: policy {rates}; {len(state['solved'])} solved so far")
        return metrics

    done = run.restore(**parts)
    if not done:
        metrics = examine(0)
        if hasattr(task, "oracle"):  # can the teacher follow a skill at all?
            perfect = [(e, skill_text(task.oracle(e), "both", task)) for e in task.heldout(config.eval_problems)]
            perfect = [replace(e, prompt=fit(text, e.prompt, most)[1]) for e, text in perfect]
            goal = run.evaluate(0, teacher_engine, task, "teacher with a perfect skill", perfect)
            metrics |= {f"teacher/{key}": value for key, value in goal.items()}
        run.log(0, metrics)

    for step in run.steps(done):
        # --- sample and grade
        clock, key = [time.perf_counter()], (config.seed, step, 0)
        problems = task.draw(config.prompts_per_step, *key)
        banks = [state["bank"].setdefault((text_of(example), example.answer), []) for example in problems]
        chosen, starts = [choose(bank, config.ucb) for bank in banks], []
        texts = ["" if i is None else bank[i]["text"] for i, bank in zip(chosen, banks, strict=True)]
        if plays or hasattr(task, "shorten"):  # else (3) leaves out the tokens that exceed the context
            fits = [fit(text, x, most) for text, x in zip(texts, engine.openings(problems), strict=True)]
            texts, starts = [text for text, _ in fits], [ids(prompt) for _, prompt in fits if plays]
        player = teacher_engine if config.sampler == "teacher" else engine
        rollout = player.generate(problems, config.group_size, sampling, key, starts)
        if config.sampler == "teacher":
            rollout = under_prompts(rollout, [ids(e.prompt) for e in rollout.examples], pad)
        played = replace(rollout)  # with the environment's own reward
        if config.reward != "task":
            rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        clock.append(time.perf_counter())

        # --- score
        mask, behaviour_logps = rollout.loss_mask, rollout.behaviour_logps
        student_logps, old_logps = behaviour_logps, None  # None: the ratio is 1
        if moves:
            student_logps, _ = score(policy, rollout, limit, config.temperature)
            old_logps = behaviour_logps if config.sampler == "teacher" else student_logps
        teacher_logps, sdl_mask = torch.zeros_like(mask), torch.zeros_like(mask)
        skills = [texts[g] if is_read else "" for g in rollout.group.tolist()]  # N
        h = torch.tensor([distils and bool(text) for text in texts], device=device)[rollout.group]  # [N]
        skilled = h.nonzero().squeeze(1)
        if len(skilled):
            source = rollout[skilled]
            prompts = [with_skill(rollout.examples[i].prompt, skills[i]) for i in skilled.tolist()]
            behind = under_prompts(source, list(map(ids, prompts)), pad)
            teacher_logps[skilled], sdl_mask[skilled] = score_within(teacher, behind, source, limit, config.temperature)
            require(teacher_logps.isfinite().all(), f"step {step}: the teacher is not finite; begin with a lower --lr")
            if config.est == "full":  # the teacher goes no further than the last token that its context holds
                held = carry(sdl_mask[skilled], source, behind)
                behind = replace(behind, loss_mask=held, attention_mask=(held.flip(1).cumsum(1).flip(1) > 0).float())
        clock.append(time.perf_counter())

        # --- weigh
        advantages = group_advantages(rollout.reward, rollout.group)  # [N]
        gap, n_scored = (student_logps - teacher_logps) * sdl_mask, sdl_mask.sum().clamp(min=1)

        # --- update
        stats, metrics = Stats(), rollout_metrics(rollout, reward, task)
        start = behaviour_logps if config.sampler == "teacher" else student_logps  # of the ratio
        trusted = engine_weights(start, behaviour_logps, torch.ones_like(mask), config.engine_tis)
        learns = bool((config.adv_grpo * advantages).any()) or bool(sdl_mask.any())
        shuffle = torch.Generator().manual_seed(seed_of(config.seed, step, 2**31))
        for part in torch.randperm(len(rollout), generator=shuffle).to(device).chunk(config.minibatches):
            c = 1 / mask[part].sum().clamp(min=1)  # 1 / N
            c_sdl = c if config.sdl_agg == "token" else 1 / len(part)
            for rows in micro_batches(rollout[part], limit):
                at = part[rows]
                batch, m, on = rollout[at], mask[at], sdl_mask[at]
                hidden = sampled_hidden(policy, batch)
                logps, entropy = token_logps(policy, batch, config.temperature, hidden=hidden)
                old = logps.detach() if old_logps is None else old_logps[at]
                grpo = (policy_token_loss(logps, old, advantages[at], m, config) * trusted[at] * m * c).sum()
                loss, sdl = config.adv_grpo * grpo, torch.zeros_like(grpo)
                if len(skilled):
                    if config.est == "full":
                        theirs = behind[torch.searchsorted(skilled, at[h[at]])]
                        token_loss = full_divergence(policy, hidden, teacher, theirs, m, on, config.temperature)
                    else:
                        token_loss = sdl_token_loss(logps, old, teacher_logps[at], on, config)
                    sdl = (token_loss * trusted[at] * on * c_sdl).sum()
                    loss = loss + config.sdl_coef * sdl  # Eq. 4
                if learns:
                    loss.backward()
                for name, value in (("total", loss), ("grpo", grpo), ("sdl", sdl)):
                    stats.add(f"loss/{name}", value / config.minibatches)
                drift, ratio, a = {"policy/kl_old": old - logps}, ((logps - old) * m).exp(), advantages[at][:, None]
                if moves:
                    drift["policy/clip_low"] = ((a < 0) & (ratio < 1 - config.eps_lo)).float()
                    drift["policy/clip_high"] = ((a > 0) & (ratio > 1 + config.eps_hi)).float()
                stats.tokens(m, {"train/entropy": entropy, **drift})
                stats.engine(m, old, behaviour_logps[at])
            metrics |= optimizer.step(step)
        if config.teacher_sync == "ema":
            for slow, new in zip(teacher.parameters(), policy.parameters(), strict=True):
                slow.data.lerp_(new.data, config.ema)
        clock.append(time.perf_counter())

        # --- remember, for later steps only
        for g, (i, bank) in enumerate(zip(chosen, banks, strict=True)):
            rewards = rollout.reward[(rollout.group == g) & ~rollout.reward.isnan()]
            if i is not None and len(rewards):
                bank[i] |= {"n": bank[i]["n"] + 1, "reward_sum": bank[i]["reward_sum"] + rewards.mean().item()}
            if (played.reward[rollout.group == g] == CORRECT).any():
                state["solved"].setdefault((text_of(problems[g]), problems[g].answer), step)
        best, n_new = best_rows(played) if config.skill != "none" else [], 0
        summaries = summarise(played, best, task, writer, brief, (config.seed, step, 1))  # Eq. 6
        for i, bank, summary in zip(best, banks, summaries, strict=False):  # without --skill: no best
            text = skill_text(summary, config.skill, task) if summary else ""
            n_new += keep(bank, text, played.reward[i].item(), config.bank_size)
        state["bank"] = {name: bank for name, bank in state["bank"].items() if bank}
        state["chosen"] += sum(map(bool, texts))
        if step == 20 and not state["chosen"] and config.skill != "none":
            run.console.print("20 steps and no task with a skill has returned: this is GRPO; take fewer tasks")

        # --- log, evaluate and save
        metrics |= {"teacher/kl": (gap.sum() / n_scored).item(), "teacher/kl_abs": (gap.abs().sum() / n_scored).item()}
        metrics |= {"skill/told": sum(map(bool, texts)) / len(texts), "skill/ever_solved": len(state["solved"])}
        metrics |= {"skill/bank": sum(map(len, state["bank"].values())), "skill/new": n_new}
        metrics |= stats.metrics() | resources(clock, rollout.loss_mask)
        if run.due(step, config.eval_every):
            metrics |= examine(step)
        run.log(step, metrics, rollout, {"gap": gap, "advantage": advantages[:, None] * mask, "skill": skills})
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo-sokoban", "skill-sd"))


if __name__ == "__main__":
    cli(main, Config, PRESETS)
