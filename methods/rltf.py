"""RLTF: reinforcement learning from text feedback (Song, Chen, Tajwar et al., arXiv 2602.02482).

Each prompt x0 is tried, y0; a wrong try gets a short text critique c, and the policy tries again, y1, reading x1 =
(x0, y0, c). Only the first try counts at test, where there is no critique: it must be learnt, not used. With r0, r1 the
rewards, N the number of first tries, means over a group's rows (of r1: over those with a second try):

    (1)  A0 = r0 + gamma r1 - mean(r0 + gamma r1),   A1 = r1 - mean(r1)         paper, Algorithm 1  --gamma
    (2)  L_RL = -sum rho A0 [y0 | x0] - sum rho A1 [y1 | x1],   rho = exp(logp - behaviour_logp)    --loss
    (3)  L_SD = -coef sum keep rho (r1 - mean(r0)) [y1 | x0]   --sd-coef --sd-baseline --sd-ratio --sd-floor
    (4)  L_FM = -lambda sum log p(c | f(x0, y0))                                paper, Algorithm 3  --fm-lambda
    (5)  L = (L_RL + L_SD + L_FM) / N                                                   --mode --loss-norm

RLTF-SD is (2) and (3): the second try, written with the critique, is reinforced without it. RLTF-FM is (2) and (4): the
critique is predicted. --mode none is (2) alone, single GRPO without a second try (and without std and clip, as here).
Differs from skill_sd.py in that what was read is used through samples and rewards, not through a teacher's log-probs.

Good to know
- (3) ignores that y1 came from x1 (rho starts at 1), biased by design; unbiased is --sd-ratio sequence --sd-floor 0.
- Where all first tries fail and all second ones succeed, (1) is 0 everywhere and (3) is not: the case it exists for.
- A critic that knows the answer teaches it: say who the critic is. rltf/leaked is how often its words held the answer.
- With --critic self, (4) has an expected gradient of 0 where critic and (4) read the same prompt, as on the tiny task.

Run: python methods/rltf.py        Expected: see the results in rltf.md beside it.
"""

import contextlib
import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, UserError, cli, require
from posttrain.common.environments.critics import BLANK, ask, criticise, is_model, tells
from posttrain.common.models import load_model, load_tokenizer, plain, prepare
from posttrain.common.rollout import (
    Rollout,
    Sampling,
    concat,
    encode,
    make_engine,
    seed_of,
    to_device,
    under_prompts,
    written,
)
from posttrain.common.run import Run
from posttrain.common.scoring import micro_batches, score, token_logps
from posttrain.common.tasks import CORRECT, Example, Task, grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, resources, rollout_metrics

PROMPTS = {
    "second_prompt": "{question}\n\nAn earlier attempt:\n{attempt}\n\nWhat is wrong with it: {critique}\n\nSolve the "
    "task again from the start, in an answer that stands alone: mention neither the attempt nor the critique.",
    "critic_prompt": "{question}\n\nAn attempt:\n{attempt}\n\nCritique:",
}


@dataclass
class Config:
    model: str = "steps-student"  # folder, hub name, or a built-in tiny model
    task: str = "steps"  # steps, addition, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task, random, or path/to/file.py:function; less than 1 is wrong
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 200  # batches sampled
    prompts_per_step: int = 16  # P (paper: 32)
    group_size: int = 8  # G, first tries of each
    max_new_tokens: int = 5  # of a try
    temperature: float = 1.0  # of sampling and of every log-prob in training
    lr: float = 5e-4  # for the tiny default; 1e-6 for a real model, 2e-5 with LoRA (paper)
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
    eval_problems: int = 256  # held-out problems
    eval_samples: int = 4  # k of Avg@k and Pass@k
    save_every: int = 50  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: Engines = Engines()  # flags about machines and engines: common/cli.py
    # --- this method
    mode: Literal["sd", "fm", "both", "sft", "none", "single"] = "sd"  # Eq. 5; sft: Eq. 3 on right second tries alone
    critic: str = "task"  # task (its own), correctness, column:NAME, self (the policy), or a model; also of evaluations
    critique_tokens: int = 100  # most tokens of its critique
    gamma: float = 0.1  # share of the second try's reward in the first one's return
    loss: Literal["importance_sampling", "ppo", "cispo"] = "importance_sampling"  # of Eq. 2, and 3 without token ratio
    eps_lo: float = 0.2  # lower clip of rho for ppo and cispo
    eps_hi: float = 0.2  # upper clip
    minibatches: int = 1  # optimizer steps a batch
    sd_coef: float = 0.1  # weight of Eq. 3, also in sft
    sd_ramp: int = 0  # let it grow linearly from 0 over so many steps (paper's mathematics: all); 0 = off
    sd_baseline: Literal["first", "second"] = "first"  # mean(r0); second: mean(r1), as the released code comes out
    sd_ratio: Literal["none", "token", "token_ppo", "token_cispo", "sequence"] = "none"  # rho of Eq. 3
    sd_floor: float = 5.0  # tokens of y1 with log p < -floor under x0 carry no loss (released code); 0 = off
    fm_lambda: float = 0.1  # weight of Eq. 4
    format_coef: float = 0.1  # what a try loses that has no form, or no end, and all that it earned; 0 = off
    loss_norm: Literal["batch", "sum", "token"] = "batch"  # Eq. 5: N, 1 (released code), or all tokens with a loss
    eval_rounds: int = 0  # at evaluations also let the policy criticise and correct itself so often


def centred(reward: Tensor, group: Tensor, among: Tensor) -> Tensor:
    """reward minus the mean of its group's rows in among; exactly 0 where these are equal, 0 elsewhere.  [B] -> [B]"""
    group = group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    low = zeros.scatter_reduce(0, group[among], reward[among], "amin", include_self=False)[group]
    above = torch.where(among, reward - low, 0)  # all 0, without rounding, where rewards are equal
    n = zeros.index_add(0, group, among.to(reward.dtype))[group]
    return torch.where(among, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)


def turn_advantages(r0: Tensor, r1: Tensor, group: Tensor, two: Tensor, config) -> tuple[Tensor, Tensor, Tensor]:
    """A0, A1 of Eq. 1 and r1 minus the baseline of Eq. 3, 0 where not defined.  [B] each -> [B], [B], [B]

    two: where there is a second try; r1 is anything elsewhere. NaN is a try that cannot be scored.
    """
    scored = two & ~r1.isnan()
    later = torch.where(scored, r1, 0)
    a0, a1 = centred(r0 + config.gamma * later, group, ~r0.isnan()), centred(later, group, scored)
    mean = r0 - centred(r0, group, ~r0.isnan())  # over ALL rows of the group
    return a0, a1, a1 if config.sd_baseline == "second" else torch.where(scored, later - mean, 0)


def policy_token_loss(logps: Tensor, old_logps: Tensor, weight: Tensor, loss_mask: Tensor, form: str, config) -> Tensor:
    """-rho A of Eq. 2 and 3, one value per token; nll is -A logp.  [N, T], [N, T], A = weight [N], [N, T] -> [N, T]"""
    a = weight[:, None]
    if form == "nll":
        return -a * torch.where(loss_mask > 0, logps, 0)
    ratio = torch.where(loss_mask > 0, logps - old_logps, 0).exp()
    clipped = ratio.clamp(1 - config.eps_lo, 1 + config.eps_hi)
    if form == "cispo":  # the weight is clipped, the gradient of log p is not
        return -clipped.detach() * a * torch.where(loss_mask > 0, logps, 0)
    return -(torch.minimum(ratio * a, clipped * a) if form == "ppo" else ratio * a)


@dataclass
class Term:
    """Rows that enter the loss in one way."""

    name: str  # of its loss: rl, sd, fm
    rows: Rollout  # loss_mask: the tokens with a loss; behaviour_logps: what rho starts from
    owner: Tensor  # [n], the first try that they belong to
    weight: Tensor  # [n], what stands before each token's log-prob or rho
    form: str  # see policy_token_loss


def distilled(bare: Rollout, logps: Tensor, advantage: Tensor, owner: Tensor, coef: float, config) -> Term:
    """Eq. 3, or in sft the right second tries alone. bare: y1 behind x0 with the log-probs behind x1, at which it was
    sampled; logps [N2, T]: those behind x0 before the update; advantage, owner [N2]."""
    if config.mode == "sft":
        return Term("sd", bare, owner, coef * (bare.reward >= CORRECT).to(logps.dtype), "nll")
    form, start = config.sd_ratio.removeprefix("token").removeprefix("_") or "importance_sampling", bare.behaviour_logps
    if config.sd_ratio in ("none", "sequence"):
        form, start = config.loss, logps
    if config.sd_ratio == "sequence":  # pi(y1 | x0) / pi(y1 | x1), unbiased but for its bound
        advantage = advantage * ((logps - bare.behaviour_logps) * bare.loss_mask).sum(1).clamp(max=10).exp()
    kept = bare.loss_mask * (logps >= -config.sd_floor) if config.sd_floor else bare.loss_mask
    return Term("sd", replace(bare, loss_mask=kept, behaviour_logps=start), owner, coef * advantage, form)


def normaliser(terms: list[Term], part: Tensor, kind: str) -> float:
    """What Eq. 5 divides by, for the first tries in part [b] and all that belongs to them."""
    tokens = sum(term.rows.loss_mask[torch.isin(term.owner, part)].sum().item() for term in terms)
    return {"batch": float(len(part)), "sum": 1.0, "token": max(1.0, tokens)}[kind]


def prompt_of(kind: str, task: Task, example: Example, **facts: str) -> list[dict[str, str]]:
    """x1 or f(x0, y0) as fresh messages: worded by the task, or a template around the last message."""
    if hasattr(task, kind):
        return getattr(task, kind)(example, **facts)
    *before, last = example.prompt
    return [*before, {"role": "user", "content": PROMPTS[kind].format(question=last["content"], **facts)}]


def check(config: Config) -> None:
    require(config.group_size > 1, "a group's mean is the baseline: --group-size must be at least 2")
    require(config.temperature > 0, "greedy tries are all equal, no signal: --temperature must be above 0")
    require(config.minibatches <= config.prompts_per_step * config.group_size, "--minibatches exceeds the first tries")
    uses = {"sd_baseline": "sd both", "sd_ratio": "sd both", "sd_floor": "sd both", "sd_coef": "sd both sft",
            "sd_ramp": "sd both sft", "fm_lambda": "fm both", "gamma": "none sd fm both sft"}  # fmt: skip
    for flag, modes in uses.items():
        acts = config.mode in modes.split() or getattr(config, flag) == getattr(Config, flag)
        require(acts, f"--{flag.replace('_', '-')} has nothing to act on in --mode {config.mode}, but in {modes}")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    engine = make_engine(policy, tokenizer, config)
    writer = engine if config.critic == "self" else None
    if is_model(config.critic, task):
        critic_model = load_model(config.critic, device, config.dtype, train=False)
        writer = make_engine(critic_model, load_tokenizer(config.critic))
    optimizer = Optimizer(policy, config)
    run = Run(config, "rltf")
    state = {"tokens": 0}  # sampled so far
    parts = {"policy": policy, "optimizer": optimizer, "state": state}
    sampling, limit = Sampling(config.temperature, config.max_new_tokens), config.micro_batch_tokens
    brief, pad = Sampling(config.temperature, config.critique_tokens), tokenizer.pad_token_id
    context = getattr(plain(policy).config, "max_position_embeddings", None) or math.inf
    has_form = getattr(task, "formed", lambda example, text: True)

    def grade(rollout: Rollout) -> None:
        """Fills in rewards: at most 0, minus format_coef, for a try that was cut short or lacks an answer's form."""
        rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        if config.format_coef:
            pairs = zip(rollout.examples, rollout.texts, strict=True)
            formed = rollout.finished & torch.tensor([has_form(*pair) for pair in pairs], device=device)
            rollout.reward = torch.where(formed, rollout.reward, rollout.reward.clamp(max=0) - config.format_coef)

    def retries(examples: list, attempts: list, told: list[str]) -> list[tuple[int, str, list]]:
        """For each attempt whose second prompt the context holds: its index, its critique, that prompt."""
        facts = zip(itertools.count(), examples, attempts, told, strict=False)
        every = [(i, c, prompt_of("second_prompt", task, e, attempt=y, critique=c or BLANK)) for i, e, y, c in facts]
        return [each for each in every if len(encode(tokenizer, each[2])) + config.max_new_tokens <= context]

    def about(examples: list, attempts: list) -> list[Example]:
        """f(x0, y0): what asks for a critique."""
        facts = zip(examples, attempts, strict=True)
        return [replace(e, prompt=prompt_of("critic_prompt", task, e, attempt=y)) for e, y in facts]

    def examine(step: int) -> dict[str, float]:
        """Held-out evaluation of first tries; of second ones behind a critique, where the greedy first one is wrong."""
        metrics, problems = run.evaluate(step, engine, task), task.heldout(config.eval_problems)
        greedy = Sampling(0.0, config.max_new_tokens)
        texts = engine.generate(problems, 1, greedy, (config.seed, 0, 2)).texts
        wrong = [(e, text) for e, text in zip(problems, texts, strict=True) if task.grade(e, text) != CORRECT]
        examples, attempts = [e for e, _ in wrong], [text for _, text in wrong]
        told = criticise(config.critic, writer, task, examples, attempts, brief, (config.seed, 0, 3))
        again = [replace(examples[i], prompt=x1) for i, _, x1 in retries(examples, attempts, told)]
        if again:
            goal = run.evaluate(step, engine, task, "its second try", again)
            metrics["rltf/second_heldout"] = goal["eval/accuracy"]
            metrics |= {f"teacher/{key}": value for key, value in goal.items() if step == 0}
        for k in range(1, config.eval_rounds + 1):  # its own critic, on all problems
            told = ask(engine, about(problems, texts), brief, (config.seed, 0, 3 + k))
            asked = {i: replace(problems[i], prompt=x1) for i, _, x1 in retries(problems, texts, told)}
            tries = engine.generate([*asked.values()], 1, greedy, (config.seed, 0, 2)).texts if asked else []
            texts = [dict(zip(asked, tries, strict=True)).get(i, text) for i, text in enumerate(texts)]
            right = [task.grade(e, text) == CORRECT for e, text in zip(problems, texts, strict=True)]
            metrics[f"rltf/round_{k}"] = sum(right) / len(right)
        return metrics

    done = run.restore(**parts)
    if not done:
        run.log(0, examine(0))

    for step in run.steps(done):
        # --- sample and grade
        clock, key = [time.perf_counter()], (config.seed, step, 0)
        first = engine.generate(task.draw(config.prompts_per_step, *key), config.group_size, sampling, key)
        grade(first)
        wrong = (first.reward < CORRECT).nonzero().squeeze(1)  # not where it is not a number
        tried = first[wrong] if config.mode != "single" else first[wrong[:0]]
        told = criticise(config.critic, writer, task, tried.examples, tried.texts, brief, (config.seed, step, 1))
        retry = retries(tried.examples, tried.texts, told)
        again = wrong[[i for i, _, _ in retry]]  # [N2], the first tries that have a second one
        second = tried[again[:0]]
        if retry:
            starts = [encode(tokenizer, x1) for _, _, x1 in retry]
            second = engine.generate([tried.examples[i] for i, _, _ in retry], 1, sampling, (*key[:2], 2), starts)
            with contextlib.suppress(UserError):  # none of a few can be scored: not a number, all of them
                grade(second)
        clock.append(time.perf_counter())

        # --- score
        bare, bare_logps, floored = second, second.behaviour_logps, 0.0
        distils = bool(retry) and config.mode in ("sd", "both", "sft")
        if distils:  # y1 behind x0
            bare = under_prompts(second, [encode(tokenizer, e.prompt) for e in second.examples], pad)
            bare_logps, _ = score(policy, bare, limit, config.temperature)
        clock.append(time.perf_counter())

        # --- weigh
        two, r1 = torch.zeros_like(first.finished), torch.zeros_like(first.reward)
        two[again], r1[again] = True, second.reward
        a0, a1, a_sd = turn_advantages(first.reward, r1, first.group, two, config)
        sampled = concat([first, second], pad) if retry else first
        owner = torch.cat([torch.arange(len(first), device=device), again])
        terms = [Term("rl", sampled, owner, torch.cat([a0, a1[again]]), config.loss)]
        grown = min(1.0, (step - 1) / max(1, config.sd_ramp - 1)) if config.sd_ramp else 1.0
        if distils and grown * config.sd_coef:
            terms.append(distilled(bare, bare_logps, a_sd[again], again, grown * config.sd_coef, config))
            floored = 1 - (terms[-1].rows.loss_mask.sum() / bare.loss_mask.sum()).item()
        heard = [(i, critique) for i, critique, _ in retry if critique and config.mode in ("fm", "both")]
        if heard and config.fm_lambda:  # Eq. 4
            asked = about([tried.examples[i] for i, _ in heard], [tried.texts[i] for i, _ in heard])
            rows = to_device(written(tokenizer, asked, [critique for _, critique in heard]), device)
            every = torch.full((len(heard),), config.fm_lambda, device=device)
            terms.append(Term("fm", rows, wrong[[i for i, _ in heard]], every, "nll"))

        # --- update
        stats, metrics = Stats(), rollout_metrics(first, reward if not config.format_coef else None, task)
        learns = any(bool(term.weight.any()) for term in terms)
        shuffle = torch.Generator().manual_seed(seed_of(config.seed, step, 2**31))
        order = torch.randperm(len(first), generator=shuffle).to(device)
        for k, part in enumerate(order.tensor_split(config.minibatches)):
            c = 1 / normaliser(terms, part, config.loss_norm)
            for term in terms:
                mine = torch.isin(term.owner, part).nonzero().squeeze(1)
                for rows in micro_batches(term.rows[mine], limit) if len(mine) else ():
                    batch, weight = term.rows[mine[rows]], term.weight[mine[rows]]
                    m, old = batch.loss_mask, batch.behaviour_logps
                    logps, entropy = token_logps(policy, batch, config.temperature)
                    loss = (policy_token_loss(logps, old, weight, m, term.form, config) * m * c).sum()  # Eq. 5
                    if learns:
                        loss.backward()
                    for name in ("total", term.name):
                        stats.add(f"loss/{name}", loss / config.minibatches)
                    if term.name == "rl":
                        stats.tokens(m, {"train/entropy": entropy, "policy/kl_old": old - logps})
                        if k == 0:  # nothing has moved since they were sampled
                            stats.engine(m, logps, old)
            metrics |= optimizer.step(step)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        state["tokens"] += int(sampled.loss_mask.sum())
        n2, leaked = max(1, len(retry)), sum(tells(tried.examples[i], critique) for i, critique, _ in retry)
        metrics |= {"loss/sd": 0.0, "loss/fm": 0.0, "rltf/tokens": state["tokens"], "rltf/leaked": leaked / n2}
        metrics |= {"rltf/second_share": len(retry) / len(first), "rltf/dropped": len(tried) - len(retry)}
        metrics |= {"rltf/second_accuracy": (second.reward >= CORRECT).sum().item() / n2}
        metrics |= {"rltf/sd_advantage": a_sd.sum().item() / n2, "rltf/floored": floored}
        metrics |= stats.metrics() | resources(clock, sampled.loss_mask)
        if run.due(step, config.eval_every):
            metrics |= examine(step)
        run.log(step, metrics, first, {"advantage": a0[:, None] * first.loss_mask})
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("rltf-single", "rltf-sd", "rltf-fm"))


if __name__ == "__main__":
    cli(main, Config)
