"""CoT2: continuous chain of thought (Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, arXiv 2505.23648).

A thought is not a sampled token but a point between tokens: the average of the embeddings E under the model's own
softmax, so that one chain follows many traces of a search at once. Step m is the answer, a token. With alpha_t the
softmax at step t, B problems, G rollouts of each, R = 1 for a right answer, else 0:

    (1)  z_t      = E' alpha_t                             what the model reads next: base inference
    (2)  alpha*_t = share of the best traces that is in each state at step t; at m: 1 on the answer         --budget
    (3)  L_CSFT   = mean over problems of sum_{t<m} KL(alpha*_t || alpha_t) - log alpha_m(answer)           --feed
    (4)  z_t      = mean of E over K draws from alpha_t (MTS), or E' a with a ~ Dir(gamma alpha_t)          --sampling
    (5)  log r_t  = mean over the K draws of log(alpha_t / old alpha_t), or of a's densities; at m, of the answer
    (6)  A        = (R - mean R) / std R over the G rollouts of a problem, all of it 0 where R is equal
    (7)  L_GRPO   = sum_t [-min(r_t A, clip(r_t, 1-eps, 1+eps) A) + beta k3_t] / (B G m)                    --beta

--mode csft trains (3), grpo trains (7) from a trained --model; baselines are discrete (next tokens of one trace) and
none (the answer at once). grpo --k 1 from a discrete model is GRPO on a discrete chain of thought, as in grpo.py.

Good to know
- The mean in (5) is the paper's first form and biased for K > 1; --normalise-sampling flattens alpha_t to its K-th root
  in sampling, scoring and evaluation and takes the sum: the true ratio of K independent draws, but of another policy.
- Averaging K sampled tokens can lift a discrete model without any training: compare with the same inference before.
- Left out: COCONUT, budgets of traces with totals >= 0 only, the teacher-then-self curriculum, thoughts of E's norm.

Run: python methods/cot2.py        Expected: see the results in cot2.md beside it.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import transformers
from torch import Tensor, nn

from posttrain.common.cli import System, cli, require, require_no_idle
from posttrain.common.families.traces import ARROW, EOS, Traces, make_model
from posttrain.common.machines.distributed import all_rows, part
from posttrain.common.models import autocast, prepare
from posttrain.common.rollout import seed_of
from posttrain.common.run import Run
from posttrain.common.tasks import make_task
from posttrain.common.training import Optimizer, Schedule, batch_of, pass_at_k, resources

PRESETS = {"none": {}, "grpo": {"mode": "grpo", "lr": 1e-4, "prompts_per_step": 16, "steps": 200, "eval_every": 40}}
PRESETS["paper"] = {"lr": 1e-4, "prompts_per_step": 16, "steps": 328_000, "eval_every": 3280, "max_grad_norm": 1e9}


@dataclass
class Config:
    model: str = "scratch"  # scratch: a GPT-2 of --width, --layers, --heads; a run's model/; any causal model's body
    task: str = "mnns"  # mnns, prosqa or prontoqa, with options such as mnns:digits=5
    steps: int = 4100  # batches; 82 are an epoch of the default task (paper: 1000 epochs of 328)
    prompts_per_step: int = 64  # problems a batch (paper: 16)
    group_size: int = 8  # G, in --mode grpo
    temperature: float = 1.0  # of sampled thoughts and chains, in training too
    lr: float = 1e-3  # (paper: 1e-4; GRPO: 5e-6)
    warmup: int = 0  # steps of linear warm-up
    schedule: Schedule = "constant"  # of the learning rate: linear and cosine end at 0
    max_grad_norm: float = 1.0  # clip (paper: none)
    weight_decay: float = 0.01  # AdamW's
    seed: int = 0  # feeds initialisation, data order and sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 computes under autocast, weights stay fp32
    eval_every: int = 410  # 0 = only before and after
    eval_problems: int = 1308  # held-out problems; the default task has so many
    save_every: int = 410  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: System = System()  # flags about machines and engines: common/cli.py
    # --- this method
    preset: Literal[tuple(PRESETS)] = "none"  # the paper's CSFT, or GRPO at this size; explicit flags win
    mode: Literal["csft", "grpo", "discrete", "none"] = "csft"  # Eq. 3, Eq. 7 (begin with --preset grpo), or a baseline
    width: int = 32  # d of a model from scratch (paper: 16, 24, 32)
    layers: int = 2  # of a model from scratch (paper: 1, 2, 4)
    heads: int = 2  # of a model from scratch (paper: 1, 2, 4)
    dropout: float = 0.1  # of a model from scratch; acts in all modes but grpo
    budget: int = 0  # traces in Eq. 2, best first (paper: 1, 4, 8, 16); 0 = all
    feed: Literal["teacher", "self"] = "teacher"  # thoughts in Eq. 3: E' alpha*_t, or E' alpha_t with gradient
    discrete_loss: Literal["trace", "full"] = "trace"  # discrete and none: after the prompt, or all (released code)
    keep_every: int = 1  # discrete: of the trace keep each so many-th state, and the answer
    sampling: Literal["mts", "dirichlet"] = "mts"  # Eq. 4
    k: int = 3  # K of Eq. 4 (paper: 1, 3, 6)
    gamma: float = 20.0  # of Eq. 4, Dirichlet; small is noisy (released code: 1)
    dirichlet_floor: float = 1e-3  # densities over the tokens with at least this share in either model; 0 = over all
    normalise_sampling: bool = False  # MTS with alpha^(1/K) and the true ratio (the released code's default)
    clip: float = 0.1  # eps of Eq. 7
    beta: float = 0.0  # weight of the KL to the model at the start (released code: 0 and 0.1)
    kl_answer_detached: bool = False  # no gradient through the KL at step m (released code)
    epochs: int = 1  # optimizer steps a batch of rollouts; 1 = all r are 1 and nothing is clipped
    grpo_dropout: bool = False  # dropout in the new model of Eq. 5 (released code), none in the old one
    eval_draws: int = 5  # draws over which evaluation averages where thoughts are sampled


def soft_targets(paths: Tensor, budget: int, vocab_size: int) -> Tensor:
    """Eq. 2. paths [N, P, m] int64, best first, the best one's end is the answer -> alpha* [N, m, V], rows sum to 1"""
    kept = paths[:, : budget or None].mT  # [N, m, traces]
    share = torch.full(kept.shape, 1 / kept.shape[2], device=paths.device)
    target = share.new_zeros(*kept.shape[:2], vocab_size).scatter_add_(2, kept, share)
    target[:, -1] = nn.functional.one_hot(paths[:, 0, -1], vocab_size)
    return target


def csft_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 3 in its two parts: the steps before m, and m.  logits, alpha* [N, m, V] -> scalars; 0 log 0 = 0"""
    cross = torch.where(target > 0, target * logits.log_softmax(-1), 0)
    kl = (torch.xlogy(target, target) - cross).sum(-1)
    return kl[:, :-1].sum(1).mean(), kl[:, -1].mean()


def draw_thought(logits: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Eq. 4.  logits [N, V] -> ids [N, K] (mts), or log a [N, V] float64, finite (dirichlet)"""
    if config.sampling == "mts":
        flat = config.temperature * (config.k if config.normalise_sampling else 1)
        return (logits / flat).softmax(-1).multinomial(config.k, True, generator=generator)
    c = (config.gamma * (logits.double() / config.temperature).softmax(-1)).clamp(min=1e-12)
    # log Gamma(c) = log Gamma(c + 1) + log(U) / c: for small c the variate itself is below the least float
    u = torch.rand(c.shape, generator=generator, dtype=c.dtype, device=c.device).clamp(min=1e-300)
    return (torch._standard_gamma(c + 1, generator=generator).log() + u.log() / c).log_softmax(-1)


def thought_log_ratio(logits: Tensor, old_logits: Tensor, drawn: Tensor, config: Config) -> Tensor:
    """log r_t of Eq. 5 for the steps before m.  logits [N, m-1, V], ids [N, m-1, K] or log a [N, m-1, V] -> [N, m-1]"""
    if config.sampling == "mts":
        flat = config.temperature * (config.k if config.normalise_sampling else 1)
        new, old = ((x / flat).log_softmax(-1).gather(-1, drawn) for x in (logits, old_logits))
        return (new - old).sum(-1) / (1 if config.normalise_sampling else config.k)
    new, old = ((x.double() / config.temperature).softmax(-1) for x in (logits, old_logits))
    floor = config.dirichlet_floor or 1e-12
    kept = torch.maximum(new, old) >= floor  # no need to renormalise a on them: both densities change alike
    new, old = (torch.where(kept, alpha.clamp(min=floor), 0) for alpha in (new, old))
    c, old_c = (torch.where(kept, config.gamma * alpha / alpha.sum(-1, keepdim=True), 1) for alpha in (new, old))
    return ((c - old_c) * drawn - c.lgamma() + old_c.lgamma()).sum(-1)


def log_ratios(logits: Tensor, old_logits: Tensor, drawn: Tensor, answer: Tensor, config: Config) -> Tensor:
    """Eq. 5 for all steps; the answer at temperature 1.  [N, m, V], [N, m, V], drawn [N, m-1, *], [N] -> [N, m]"""
    before = thought_log_ratio(logits[:, :-1], old_logits[:, :-1], drawn, config)
    new, old = (x[:, -1].log_softmax(-1).gather(-1, answer[:, None]) for x in (logits, old_logits))
    return torch.cat([before, (new - old).to(before.dtype)], 1)


def group_advantages(reward: Tensor) -> Tensor:
    """Eq. 6, with the population's std; 0 where a group's rewards are equal.  [B, G] -> [B, G]"""
    centred = reward - reward.mean(1, keepdim=True)
    equal = (reward == reward[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0, centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12))


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Eq. 7 without its KL.  [N, m], [N] -> scalar, divided by N m whatever the advantages are"""
    ratio, a = log_ratio.clamp(max=20).exp(), advantages[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean()


def kl_penalty(log_ratio: Tensor, answer_detached: bool) -> Tensor:
    """k3 of Eq. 7 from log(ref / new) [N, m], scaled as r_t is -> scalar, divided by N m"""
    k3 = log_ratio.clamp(max=20).exp() - log_ratio - 1
    return (torch.cat([k3[:, :-1], k3[:, -1:].detach()], 1) if answer_detached else k3).mean()


def embeddings(model: nn.Module) -> Tensor:
    """E [V, d] as the model reads it, with gradient; some scale it on the way in."""
    table = model.get_input_embeddings()
    return table(torch.arange(len(table.weight), device=table.weight.device))


def read(model: nn.Module, inputs: Tensor, start: int, cache: "transformers.DynamicCache | None" = None) -> Tensor:
    """fp32 logits of what follows each position from `start` on.  [N, L, d] -> [N, L - start, V]"""
    with autocast(model):  # each process reads its own rows, and gets the others' without gradient
        options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": inputs.shape[1] - start}
        return all_rows(model(inputs_embeds=inputs[part(len(inputs))], **options).logits.float())


def as_inputs(table: Tensor, drawn: Tensor) -> Tensor:
    """z of Eq. 4 from E [V, d] and ids [..., K] or log a [..., V] -> [..., d]"""
    return drawn.exp().to(table.dtype) @ table if drawn.is_floating_point() else table[drawn].mean(-2)


def score(model: nn.Module, prompts: Tensor, drawn: Tensor) -> Tensor:
    """The logits of think in one pass with gradient, thoughts made of the model's own E.  -> [N, m, V]"""
    table = embeddings(model)
    return read(model, torch.cat([table[prompts], as_inputs(table, drawn)], 1), prompts.shape[1] - 1)


def any_token(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """[N, V] -> [N, 1]"""
    return (logits / temperature).softmax(-1).multinomial(1, generator=generator)


@torch.no_grad()
def think(model: nn.Module, prompts: Tensor, steps: int, thought: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Decodes with a cache of keys and values.  prompts [N, n] -> logits [N, steps, V], thoughts [N, steps - 1, *]

    thought: from logits [N, V] to what is read next, ids [N, K] or log a [N, V]; log_softmax is Eq. 1.
    """
    table, cache, logits, thoughts = embeddings(model), transformers.DynamicCache(config=model.config), [], []
    inputs = table[prompts]
    for t in range(steps):
        logits.append(read(model, inputs, inputs.shape[1] - 1, cache)[:, 0])
        if t < steps - 1:
            thoughts.append(thought(logits[-1]))
            inputs = as_inputs(table, thoughts[-1])[:, None]
    return torch.stack(logits, 1), torch.stack(thoughts, 1) if thoughts else prompts.new_zeros(len(prompts), 0, 1)


def check(config: Config) -> None:
    require(config.system == System(config.system.threads), "models this small take no other such flag than --threads")
    trained = "--mode grpo goes on from a trained model: run --mode csft or discrete --out F, then give --model F/model"
    require(config.mode != "grpo" or config.model != "scratch", trained)
    require(config.group_size > 1, "a group's mean is the baseline: --group-size must be at least 2")
    bounded = config.temperature >= 1e-4 and config.clip < 1 and config.dropout < 1
    require(bounded, "--temperature must be at least 0.0001, --clip and --dropout below 1")
    grpo, scratch, mts = config.mode == "grpo", config.model == "scratch", config.sampling == "mts"
    acts = {
        "feed budget": (config.mode == "csft", "--mode csft"),
        "keep_every": (config.mode == "discrete", "--mode discrete"),
        "discrete_loss": (config.mode in ("discrete", "none"), "--mode discrete or none"),
        "temperature eval_draws": (config.mode in ("discrete", "grpo"), "--mode discrete or grpo"),
        "sampling group_size beta epochs grpo_dropout": (grpo, "--mode grpo"),
        "k normalise_sampling": (grpo and mts, "--mode grpo and --sampling mts"),
        "gamma dirichlet_floor": (grpo and not mts, "--mode grpo and --sampling dirichlet"),
        "kl_answer_detached": (grpo and config.beta, "--mode grpo and --beta"),
        "clip": (grpo and (config.epochs > 1 or config.grpo_dropout), "--mode grpo and --epochs or --grpo-dropout"),
        "width layers heads dropout": (scratch, "--model scratch"),
    }
    require_no_idle(config, acts)


def main(config: Config) -> None:
    device, task, mode = prepare(config, tiny=True), make_task(config.task), config.mode
    check(config)
    require(isinstance(task, Traces), f"--task {config.task!r} has no traces; choose mnns, prosqa or prontoqa")
    model, m = make_model(config, task, device, mode != "grpo"), task.paths.shape[2]
    # Arrows stand before a trace or, as fillers, before a bare answer; grpo asks in the way that the model was taught.
    model.config.arrows = arrows = {"csft": 0, "discrete": 1, "none": m}.get(mode, getattr(model.config, "arrows", 0))
    kept = [t for t in range(m) if t == m - 1 or (mode != "none" and (t + 1) % config.keep_every == 0)]
    taught = getattr(model.config, "taught_steps", m)
    require(mode != "grpo" or taught == m, f"{config.model!r} was taught {taught} of {m} steps; give a model of all")
    model.config.taught_steps, n_held = len(kept), min(config.eval_problems, len(task.prompts) - task.n_train)
    prompts, chains = nn.functional.pad(task.prompts, (0, arrows), value=ARROW).to(device), task.chains.to(device)
    paths, chains, answers, n = task.paths.to(device), chains[:, kept], chains[:, -1], prompts.shape[1]
    held_out, config.eval_problems = slice(task.n_train, task.n_train + n_held), n_held
    reference = copy.deepcopy(model).eval().requires_grad_(False) if config.beta else None
    optimizer = Optimizer(model, config)
    run, parts = Run(config, "cot2"), {"model": model, "optimizer": optimizer}

    def examine(step: int) -> dict[str, float]:
        """Held-out accuracy under the mode's own inference; where chains can be drawn, Pass@k of such chains."""
        model.eval()
        base, likeliest = partial(torch.log_softmax, dim=-1), partial(torch.argmax, dim=-1, keepdim=True)
        asked, truth, metrics = prompts[held_out], answers[held_out], {}
        logits, _ = think(model, asked, len(kept), base if mode == "csft" else likeliest)
        right = likeliest(logits[:, -1]) == truth[:, None]
        if mode in ("grpo", "discrete"):
            generator = torch.Generator(device).manual_seed(seed_of(config.seed, 0))
            token = partial(any_token, temperature=config.temperature, generator=generator)
            thought = partial(draw_thought, config=config, generator=generator) if mode == "grpo" else token
            draws = [think(model, asked, len(kept), thought)[0] for _ in range(config.eval_draws)]
            said = torch.cat([(likeliest if mode == "grpo" else token)(drawn[:, -1]) for drawn in draws], 1)
            for k in {1, 2, 4, 8, 16, config.eval_draws} & set(range(1, config.eval_draws + 1)):
                metrics[f"eval/pass_at/{k}"] = pass_at_k(said == truth[:, None], k).mean().item()
            right, logits = (said == truth[:, None], draws[-1]) if mode == "grpo" else (right, logits)
        right = right.double().mean(1)  # [P]
        metrics["eval/accuracy"] = right.mean().item()
        metrics["eval/accuracy_se"] = right.std(correction=int(len(right) > 1)).item() / len(right) ** 0.5
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean(0).tolist()
        run.console.print(f"step {step}: accuracy {right.mean():.3f}, nats a step", *(f"{x:.2f}" for x in entropy))
        run.sample(step, task.show(run.console, step, asked, logits.softmax(-1), truth))
        return metrics | {f"cot2/entropy/{t + 1}": value for t, value in enumerate(entropy)}

    done = run.restore(**parts)
    if not done:
        run.log(0, examine(0))

    for step in run.steps(done):
        # --- sample and grade
        clock, metrics = [time.perf_counter()], {}
        rows = batch_of(task.n_train, config.prompts_per_step, config.seed, step).to(device)
        model.eval()
        if mode == "grpo":
            rows = rows.repeat_interleave(config.group_size)
            generator = torch.Generator(device).manual_seed(seed_of(config.seed, step, 1))
            thought = partial(draw_thought, config=config, generator=generator)
            old_logits, drawn = think(model, prompts[rows], m, thought)
            said = any_token(old_logits[:, -1], 1.0, generator)[:, 0]
            reward = (said == answers[rows]).float().view(-1, config.group_size)  # [B, G]
        clock.append(time.perf_counter())

        # --- weigh
        if mode == "grpo":
            advantages = group_advantages(reward)
            metrics |= {"train/reward": reward.mean().item()}
            metrics |= {"train/zero_signal": (advantages == 0).all(1).double().mean().item()}
            if config.beta:
                ref_logits = score(reference, prompts[rows], drawn)
        clock.append(time.perf_counter())

        # --- update
        model.train(mode != "grpo" or config.grpo_dropout)
        torch.manual_seed(seed_of(config.seed, step))  # dropout's
        for _ in range(config.epochs):
            table = embeddings(model)
            if mode == "csft":
                target = soft_targets(paths[rows], config.budget, len(task.vocabulary))  # [B, m, V]
                inputs = table[prompts[rows]]  # [B, n, d], and a thought more after each step
                for t in range(m - 1):
                    alpha = read(model, inputs, n - 1 + t)[:, 0].softmax(-1) if config.feed == "self" else target[:, t]
                    inputs = torch.cat([inputs, (alpha @ table)[:, None]], 1)
                logits = read(model, inputs, n - 1)
                losses = dict(zip(("loss/kl", "loss/answer"), csft_loss(logits, target), strict=True))
            elif mode == "grpo":
                logits = score(model, prompts[rows], drawn)
                log_ratio = log_ratios(logits, old_logits, drawn, said, config)
                losses = {"loss/policy": policy_loss(log_ratio, advantages.flatten(), config.clip)}
                clipped = ((log_ratio.exp() - 1) * advantages.view(-1, 1).sign() > config.clip).double().mean().item()
                metrics |= {"policy/kl_old": -log_ratio.mean().item(), "policy/clipped": clipped}
                if config.beta:
                    to_reference = log_ratios(ref_logits, logits, drawn, said, config)
                    losses["loss/kl"] = config.beta * kl_penalty(to_reference, config.kl_answer_detached)
            else:
                ids = nn.functional.pad(torch.cat([prompts[rows], chains[rows]], 1), (0, 1), value=EOS)
                first = n - 1 if config.discrete_loss == "trace" else 0
                logits = read(model, table[ids], first)[:, :-1]
                losses = {"loss/nll": nn.functional.cross_entropy(logits.mT, ids[:, first + 1 :])}
                logits = logits[:, -len(kept) - 1 : -1]
            loss = sum(losses.values())
            if mode != "grpo" or config.beta or advantages.any():
                loss.backward()
            metrics |= optimizer.step(step)
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        metrics |= {"loss/total": loss.item(), **{name: part.item() for name, part in losses.items()}}
        metrics |= {"train/accuracy": (logits[:, -1].argmax(-1) == answers[rows]).double().mean().item()}
        metrics |= {"train/entropy": torch.special.entr(logits.detach().softmax(-1)).sum(-1).mean().item()}
        metrics |= resources(clock, logits.new_ones(logits.shape[:2]))
        if run.due(step, config.eval_every):
            metrics |= examine(step)
        run.log(step, metrics)
        if run.due(step, config.save_every):
            run.save(step, **parts)
    run.finish(model, task.tokenizer(), compare=("cot2", "discrete", "no-cot"))


if __name__ == "__main__":
    cli(main, Config, PRESETS)
