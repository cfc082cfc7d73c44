"""Uni-OPD: one recipe for on-policy distillation, for student and teachers (Hou, Peng et al., arXiv 2605.03677).

The student writes, the teacher of the prompt's domain scores, a verifier says which rows are correct. A teacher that
does not like a prompt's correct rows better has its token rewards moved apart there; and neither side of a group may
outnumber the other. With n_i sampled tokens in row i of B:

    (1)  r    = teacher_logp - old_logp on each sampled token,   G_i = sum_t m r / n_i
    (2)  M    = mean G+ - mean G-, or min G+ - max G-, of a group's (in)correct rows  paper, Eq. 9-11  --margin-mode
    (3)  A    = r + lambda/2 if correct, r - lambda/2 if not, lambda = max(0, delta-M)  paper, Eq. 9-11  --margin shift
    (4)       or A = r without the rows that disturb the order most, until M >= delta                --margin mask
    (5)  keep = without random rows of a group's larger side, until correct : incorrect = q : 1      --online-balance
    (6)  L    = sum_i keep_i / (B n_i) sum_t m near max(-A rho, -A clip(rho, 1 - eps_lo, 1 + eps_hi)),
              rho = exp(logp - old_logp),   near = 1 where |logp - teacher_logp| < gap_mask
    (7)  each prompt has one teacher, that of its domain              --teacher add=MODEL,mul=MODEL, or one for all

Differs from opd.py in: several teachers, Eq. 2-5, and a clipped loss on the sampled tokens (opd.py: --est k1_pg).

Good to know
- delta must suit the scale of G. Long responses have margins near 0.01 nat and the paper's delta is 0.4; the tiny
  default's are near 0.4 themselves, so that 0.4 adds little: hence 4. uni/shifted_groups and uni/lambda show it.
- (3) is an outcome reward that fades once teacher and verifier agree; --margin none --task-coef 1 is the control.
- A reward of 1 is correct, anything lower is not. A row that could not be graded (NaN) is on neither side of (2), and
  counts as incorrect in (5), as in the released code. A group of one side keeps plain OPD.
- Before training, scripts/balance_difficulty.py evens out the difficulty of the prompts, the paper's third ingredient.
- (1)-(6) see log-probs only. A vision-language student needs prompts from its processor, an engine that samples with
  images, and sampled_hidden(model, rollout, **images) for student and teachers: a test does one such step.

Run: python methods/uni_opd.py     Expected: see the results in uni_opd.md beside it.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.common.cli import Engines, cli, require
from posttrain.common.models import load_model, load_tokenizer, prepare, shared_vocabulary
from posttrain.common.rollout import Sampling, encode, make_engine, seed_of, under_prompts
from posttrain.common.run import EVAL_KEYS, Run
from posttrain.common.scoring import carry, micro_batches, score, token_logps
from posttrain.common.tasks import CORRECT, Example, grade_all, make_reward, make_task
from posttrain.common.training import Optimizer, Schedule, Stats, engine_weights, resources, rollout_metrics


@dataclass
class Config:
    model: str = "arithmetic-student"  # folder, hub name, or a built-in tiny model
    teacher: str = "add=arithmetic-add-teacher,mul=arithmetic-mul-teacher"  # domain=model pairs, or one model for all
    task: str = "arithmetic"  # arithmetic, reasoning_gym:NAME, gsm8k, file.jsonl, or a datasets name
    reward: str = "task"  # task, random, or path/to/file.py:function; 1 = correct, lower = incorrect
    prompt_column: str = "prompt"  # of a file or datasets name
    answer_column: str = "answer"  # of a file or datasets name
    steps: int = 120  # batches sampled
    prompts_per_step: int = 8  # P (paper: 64)
    group_size: int = 16  # G, responses per prompt (paper: 16)
    max_new_tokens: int = 20  # L_max
    temperature: float = 1.0  # of sampling and of every log-prob in training
    lr: float = 1e-4  # for the tiny default (paper: 1e-6); 1e-6 for a real model, 1e-4 with LoRA
    warmup: int = 10  # steps of linear warm-up (paper: 5)
    schedule: Schedule = "linear"  # of the learning rate (paper: constant)
    max_grad_norm: float = 1.0  # clip
    weight_decay: float = 0.0  # AdamW's (paper: 0.1)
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
    domain_column: str = "domain"  # data column that names each problem's domain
    domain_weights: str = ""  # of the loss, in the order of --teacher's domains: 2,1; empty = as the data has them
    routing: Literal["domain", "average"] = "domain"  # Eq. 7; average: the mean of all teachers' log-probs, a control
    online_balance: Literal["none", "group", "global"] = "group"  # Eq. 5 in each prompt's group or in the whole batch
    balance_ratio: float = 1.0  # q; 0 keeps incorrect rows only, inf correct ones only
    margin: Literal["none", "shift", "mask"] = "shift"  # Eq. 3, Eq. 4, or plain OPD
    margin_mode: Literal["mean", "minmax"] = "mean"  # Eq. 2 (minmax in the paper, Eq. 9-11, mean in its runs)
    margin_direction: Literal["both", "correct_up", "incorrect_down"] = "both"  # sides that Eq. 3 moves
    margin_scope: Literal["group", "global"] = "group"  # one margin a prompt or one for the batch
    margin_delta: float = 4.0  # nats a token; below 0 tolerates some disorder (paper: 0.4; multimodal: 0, correct_up)
    margin_stats: Literal["all", "kept"] = "all"  # Eq. 2 over all rows or only over those that Eq. 5 keeps
    mask_retain: float = 0.25  # share of each side that Eq. 4 must leave
    gap_mask: float = 10.0  # nats; 0 = off
    eps_lo: float = 0.2  # lower clip of Eq. 6; clips act with --minibatches above 1
    eps_hi: float = 0.28  # upper clip
    minibatches: int = 1  # optimizer steps a batch
    denominator: Literal["generated", "kept"] = "generated"  # B of Eq. 6: all rows, so that dropping slows; or the kept
    task_coef: float = 0.0  # weight of GRPO's advantage, added to A: a control for Eq. 3
    engine_tis: float = 0.0  # bound of exp(trainer's - engine's log-prob), a weight of the loss (TRL: 3); 0 = off


def margins(returns: Tensor, correct: Tensor, incorrect: Tensor, group: Tensor, mode: str) -> Tensor:
    """M of Eq. 2 for group 0, 1, ..., NaN where a side is empty.  [N], bool [N], bool [N], [N] -> [groups]"""
    nan = returns.new_full((int(group.max()) + 1,), math.nan)

    def of(side: Tensor, how: str) -> Tensor:
        return nan.scatter_reduce(0, group[side], returns[side], how, include_self=False)

    best, worst = ("mean", "mean") if mode == "mean" else ("amin", "amax")
    return of(correct, best) - of(incorrect, worst)


def margin_shift(margin: Tensor, correct: Tensor, incorrect: Tensor, group: Tensor, delta: float, direction: str):
    """What Eq. 3 adds to every token's reward: M becomes max(M, delta).  [groups], bool [N] x 2, [N] -> [N]"""
    lam = (delta - margin).clamp(min=0).nan_to_num(0)[group]  # of one-sided groups 0
    up, down = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}[direction]
    return lam * (up * correct - down * incorrect)


def margin_mask(returns, correct: Tensor, incorrect: Tensor, group: Tensor, delta: float, mode: str, retain: float):
    """Eq. 4: rows to use. While M < delta, drop the lowest correct or the highest incorrect row, whichever raises M
    more; stop where neither does or max(1, floor(retain n)) of a side are left.  [N], bool [N] x 2, [N] -> bool [N]
    """
    value, use = returns.tolist(), ~(correct | incorrect)

    def margin(plus: list[int], minus: list[int]) -> float:
        up, down = [value[i] for i in plus], [value[i] for i in minus]
        return sum(up) / len(up) - sum(down) / len(down) if mode == "mean" else min(up) - max(down)

    for g in group.unique():
        plus, minus = (((group == g) & side).nonzero().squeeze(1).tolist() for side in (correct, incorrect))
        sides = sorted(plus, key=lambda i: value[i]), sorted(minus, key=lambda i: -value[i])  # the worst first
        least = [max(1, math.floor(retain * len(side))) for side in sides]
        while all(sides) and margin(*sides) < delta:
            trials = [(sides[0][1:], sides[1]), (sides[0], sides[1][1:])]
            allowed = [trial for trial in trials if len(trial[0]) >= least[0] and len(trial[1]) >= least[1]]
            best = max(allowed, key=lambda trial: margin(*trial), default=sides)  # a tie: the correct side
            if margin(*best) <= margin(*sides):
                break
            sides = best
        use[[*sides[0], *sides[1]]] = True
    return use


def balance(correct: Tensor, group: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """keep of Eq. 5; a group of one side stays whole, unless ratio is 0 or inf.  bool [N], [N] -> bool [N]"""
    keep = torch.ones_like(correct)
    for g in group.unique():
        sides = [((group == g) & side).nonzero().squeeze(1) for side in (correct, ~correct)]
        plus, minus = map(len, sides)
        if ratio in (0, math.inf):
            goals = (0, minus) if ratio == 0 else (plus, 0)
        else:
            goals = (math.floor(minus * ratio), math.floor(plus / ratio))  # 0 = leave this side alone
            goals = (goals[0], minus) if plus > goals[0] >= 1 else (plus, goals[1] or minus)
        for side, goal in zip(sides, goals, strict=True):
            order = torch.randperm(len(side), generator=generator).to(side.device)
            keep[side[order[goal:]]] = False
    return keep


def task_advantages(reward: Tensor, group: Tensor) -> Tensor:
    """GRPO's: reward minus its group's mean, over its std (ddof 1) + 1e-4; 0 without signal.  [N], [N] -> [N]"""
    scored, group = ~reward.isnan(), group.unique(return_inverse=True)[1]
    zeros = reward.new_zeros(int(group.max()) + 1)
    n = zeros.index_add(0, group, scored.to(reward.dtype))[group]
    low = zeros.scatter_reduce(0, group[scored], reward[scored], "amin", include_self=False)[group]
    above = torch.where(scored, reward - low, 0)  # all 0, without rounding, where rewards are equal
    centred = torch.where(scored, above - zeros.index_add(0, group, above)[group] / n.clamp(min=1), 0)
    return centred / ((zeros.index_add(0, group, centred**2)[group] / (n - 1).clamp(min=1)).sqrt() + 1e-4)


def row_weights(loss_mask: Tensor, keep: Tensor, denominator: str) -> Tensor:
    """keep / (B n_i) of Eq. 6, from the whole optimizer batch.  [N, T], bool [N] -> [N]"""
    rows = len(keep) if denominator == "generated" else keep.sum().clamp(min=1)
    return keep / (rows * loss_mask.sum(1).clamp(min=1))


def clipped_loss(logps: Tensor, old_logps: Tensor, teacher_logps: Tensor, advantages: Tensor, config: Config):
    """The inner term of Eq. 6, with gradient through logps, and 1 - near.  [N, T] x 4 -> [N, T], [N, T]"""
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - config.eps_lo, 1 + config.eps_hi)
    far = (logps - teacher_logps).detach().abs() >= (config.gap_mask or torch.inf)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return torch.where(far, 0, loss), far.to(logps.dtype)


def order_metrics(returns: Tensor, correct: Tensor, incorrect: Tensor, group: Tensor, when: str) -> dict[str, Tensor]:
    """Values whose means say how far the returns agree with the verifier.  [N], bool [N], bool [N], [N]"""
    worst = margins(returns, correct, incorrect, group, "minmax")
    pairs = correct[:, None] & incorrect[None] & (group[:, None] == group[None])
    found = {"violations": worst[~worst.isnan()] < 0, "inversions": (returns[:, None] < returns[None])[pairs]}
    found |= {"return_correct": returns[correct], "return_incorrect": returns[incorrect]}
    return {f"{key}_{when}": values for key, values in found.items()}


def teacher_names(teacher: str) -> dict[str, str]:
    """Eq. 7: add=x,mul=y -> {add: x, mul: y};  x -> {"": x}, which serves every domain"""
    pairs = [part.split("=", 1) for part in teacher.split(",")] if "=" in teacher else [["", teacher]]
    whole = all(len(pair) == 2 and pair[1] for pair in pairs) and len(dict(pairs)) == len(pairs)
    require(whole, f"--teacher {teacher!r}: give one model, or domain=model for each domain with commas between")
    return dict(pairs)


def domain_scales(domains: list[str], weights: dict[str, float]) -> list[float]:
    """Factors of the rows that turn Eq. 6 into sum_k w_k L_k over the domains, sum_k w_k = 1.  N names -> N"""
    rows, total = Counter(domains), sum(weights.values())
    return [weights[domain] * len(domains) / (total * rows[domain]) for domain in domains]


def check(config: Config) -> None:
    require(config.temperature > 0, "--temperature must be above 0")
    inside = config.balance_ratio >= 0 and config.margin_delta < math.inf and config.mask_retain <= 1
    require(inside, "--balance-ratio must be at least 0, --margin-delta below inf, --mask-retain at most 1")
    weights, n = config.domain_weights.split(","), sum(map(bool, teacher_names(config.teacher)))
    numbers = len(weights) == n and all(weight.replace(".", "", 1).isdecimal() for weight in weights)
    fits = not config.domain_weights or (numbers and any(map(float, weights)))
    require(fits, f"--domain-weights {config.domain_weights!r}: give a number for each of --teacher's {n} domains")


def main(config: Config) -> None:
    check(config)
    device = prepare(config)
    task = make_task(config.task, config.prompt_column, config.answer_column)
    reward = make_reward(config.reward, task)
    names = teacher_names(config.teacher)
    weights = dict(zip(names, map(float, filter(None, config.domain_weights.split(","))), strict=False))

    def teacher_of(example: Example) -> str:
        domain = str(example.fields.get(config.domain_column, ""))
        name = names.get(domain, names.get(""))
        require(name, f"no teacher for domain {domain!r}: add {domain}=MODEL to --teacher, or see --domain-column")
        return name

    problems = task.heldout(config.eval_problems)
    for example in [*problems, *(getattr(task, "train", None) or task.draw(256, config.seed))]:
        require(config.routing == "average" or teacher_of(example), "")  # a domain without a teacher is told now
    tokenizer = load_tokenizer(config.model)
    policy = load_model(config.model, device, config.dtype, config.lora_rank)
    teachers = {name: make_engine(load_model(name, device, config.dtype, train=False), load_tokenizer(name))
                for name in dict.fromkeys(names.values())}  # fmt: skip
    vocab_size = min(shared_vocabulary(policy, tokenizer, t.model, t.tokenizer) for t in teachers.values())
    engine = make_engine(policy, tokenizer, config)
    same_end = all(engine.stop_ids == teacher.stop_ids for teacher in teachers.values())
    require(same_end, "student and teacher end with different tokens: choose models of one family and kind")
    optimizer = Optimizer(policy, config)
    run = Run(config, "uni_opd")
    parts = {"policy": policy, "optimizer": optimizer}
    done = run.restore(**parts)
    sampling, limit = Sampling(config.temperature, config.max_new_tokens), config.micro_batch_tokens
    if not done:
        goal = dict.fromkeys(EVAL_KEYS, 0.0)  # every teacher on its own domains
        for name, teacher in teachers.items():
            own = [example for example in problems if teacher_of(example) == name]
            measured = run.evaluate(0, teacher, task, f"teacher {name}", own) if own else {}
            for key, value in measured.items():
                part = value * len(own) / len(problems)  # standard errors of different problems add in squares
                whole = math.hypot(goal.get(key, 0), part) if key.endswith("_se") else goal.get(key, 0) + part
                goal[key] = whole if key in EVAL_KEYS else value
        run.log(0, run.evaluate(0, engine, task) | {f"teacher/{key}": value for key, value in goal.items()})

    for step in run.steps(done):
        # --- sample and grade
        clock, key = [time.perf_counter()], (config.seed, step, 0)
        rollout = engine.generate(task.draw(config.prompts_per_step, *key), config.group_size, sampling, key)
        rollout.reward = torch.tensor(grade_all(reward, rollout.examples, rollout.texts), device=device)
        require(not (rollout.reward > CORRECT).any(), "--reward gave more than 1: 1 must mean correct, less incorrect")
        clock.append(time.perf_counter())

        # --- score
        mask, group = rollout.loss_mask, rollout.group  # [N, T], [N]
        old_logps, _ = score(policy, rollout, limit, config.temperature, vocab_size)
        teacher_logps = torch.zeros_like(old_logps)
        average = config.routing == "average"
        for name, teacher in teachers.items():
            own = [i for i, example in enumerate(rollout.examples) if average or teacher_of(example) == name]
            if own:
                rows, share = torch.tensor(own, device=device), 1 / len(teachers) if average else 1
                prompts = [encode(teacher.tokenizer, rollout.examples[i].prompt) for i in own]
                seen = under_prompts(rollout[rows], prompts, tokenizer.pad_token_id)  # in this teacher's template
                logps, _ = score(teacher.model, seen, limit, config.temperature, vocab_size)
                require(logps.isfinite().all(1).any(), f"step {step}: {name!r} scores nothing; choose another teacher")
                teacher_logps[rows] += share * carry(logps, seen, rollout[rows])
        clock.append(time.perf_counter())

        # --- weigh
        known = torch.where(mask > 0, teacher_logps, 0).isfinite().all(1) & (mask.sum(1) > 0)  # others: no loss
        teacher_logps = torch.where(known[:, None], teacher_logps, old_logps)
        token_reward = (teacher_logps - old_logps) * mask  # r of Eq. 1 [N, T]
        returns = token_reward.sum(1) / mask.sum(1).clamp(min=1)  # G of Eq. 1 [N]
        right, keep = rollout.reward == CORRECT, known
        scopes = {"group": group, "global": group * 0}
        if config.online_balance != "none":
            noise = torch.Generator().manual_seed(seed_of(config.seed, step, 1))
            scope = scopes[config.online_balance][known]  # rows that carry no loss anyhow must not tip the balance
            keep = known.masked_scatter(known, balance(right[known], scope, config.balance_ratio, noise))
        counted = keep if config.margin_stats == "kept" else known
        correct, incorrect = right & counted, (rollout.reward < CORRECT) & counted  # NaN is in neither
        before = order_metrics(returns, correct, incorrect, group, "before")
        sides = (correct, incorrect, scopes[config.margin_scope])
        margin, delta = margins(returns, *sides, config.margin_mode), config.margin_delta  # M
        advantages = token_reward  # A [N, T]
        if config.margin == "shift":
            shift = margin_shift(margin, *sides, delta, config.margin_direction)
            advantages = (token_reward + shift[:, None]) * mask
        elif config.margin == "mask":
            use = margin_mask(returns, *sides, delta, config.margin_mode, config.mask_retain)
            advantages, correct, incorrect = token_reward * use[:, None], correct & use, incorrect & use
        after = order_metrics(advantages.sum(1) / mask.sum(1).clamp(min=1), correct, incorrect, group, "after")
        lam = (delta - margin[~margin.isnan()]).clamp(min=0)  # of two-sided groups
        domains = [str(example.fields.get(config.domain_column, "all")) for example in rollout.examples]
        measured = {f"accuracy/{name}": right[[domain == name for domain in domains]] for name in sorted(set(domains))}
        measured |= {"correct_share": right, "correct_share_kept": right[keep], "unscored": ~known, **before, **after}
        measured |= {"mixed_groups": ~margin.isnan(), "shifted_groups": lam > 0, "lambda": lam}
        metrics = {f"uni/{key}": x.double().mean().nan_to_num(0).item() for key, x in measured.items()}  # of nothing: 0
        scales = torch.tensor(domain_scales(domains, weights or Counter(domains)), device=device)  # [N]
        if config.task_coef:
            advantages = advantages + config.task_coef * task_advantages(rollout.reward, group)[:, None]

        # --- update
        stats, trusted = Stats(), engine_weights(old_logps, rollout.behaviour_logps, mask, config.engine_tis)
        shuffle = torch.Generator().manual_seed(seed_of(config.seed, step, 2))
        for part in torch.randperm(len(rollout), generator=shuffle).to(device).chunk(config.minibatches):
            c = (row_weights(mask[part], keep[part], config.denominator) * scales[part])[:, None]
            for rows in micro_batches(rollout[part], limit):
                at, m = part[rows], mask[part[rows]]
                logps, entropy = token_logps(policy, rollout[at], config.temperature, vocab_size)
                token_loss, far = clipped_loss(logps, old_logps[at], teacher_logps[at], advantages[at], config)
                loss = (token_loss * trusted[at] * c[rows]).sum()
                loss.backward()
                stats.add("loss/total", loss / config.minibatches)
                stats.tokens(m, {"train/entropy": entropy, "teacher/kl": logps - teacher_logps[at]})
                stats.tokens(m, {"policy/kl_old": old_logps[at] - logps, "uni/gap_masked": far}, count=False)
                stats.engine(m, old_logps[at], rollout.behaviour_logps[at])
            metrics |= optimizer.step(step)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= rollout_metrics(rollout, reward, task) | stats.metrics() | resources(clock, rollout.loss_mask)
        if run.due(step, config.eval_every):
            metrics |= run.evaluate(step, engine, task)
        run.log(step, metrics, rollout)
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(policy, tokenizer, compare=("grpo-arithmetic", "multi-opd", "uni-opd"))


if __name__ == "__main__":
    cli(main, Config)
