"""SinKD: distillation with a Sinkhorn distance (Cui, Qin, Gao et al., arXiv 2402.17110), and two relatives as modes.

A student learns from labels y, a teacher's softened outputs, and the transport between the batch's student outputs and
its teacher outputs: N points each in the simplex of V classes (or tokens), zs and zt their logits.

    (1)  L_CE = mean_i -log softmax(zs_i)[y_i]
    (2)  L_KD = mean_i -sum_v softmax(zt_i/T)_v log softmax(zs_i/T)_v         no factor T^2          --kd-temperature
    (3)  T_e  = T + (1 - T) e/(E - 1)                    in epoch e of E, so that it ends at 1       --anneal
    (4)  C_ij = sum_v |softmax(zs_i/tau)_v - softmax(zt_j/tau)_v|                                    --tau --cost
    (5)  P    = plan of cost C, rows and columns sum to 1: K = exp(-C/eps), rows, then columns over their sums, 20 times
    (6)  S    = sum_ij P_ij C_ij                    a sum over the batch, not a mean                 --sink-reduction
    (7)  L    = (1 - alpha) L_CE + alpha L_KD + 0.0008 S                                             --alpha --combine
    (8)  L    = L_CE + 1.5 mean_b mean_k sum_v |sorted softmax(zs)_v - sorted softmax(zt)_v|         --mode uld
    (9)  L    = L_CE + 1.5 (H + 0.1 K + 0.1 Q): (8)'s difference over matched tokens, a cross-entropy (K) and a
         transport between the steps of an answer (Q)                                                --mode mlot
(8), ULD (2402.12030), and (9), MultiLevelOT (2412.14528), serve language models whose tokenizers differ. Nothing is
sampled, unlike opd.py. S pairs no student row with its own teacher row, hence it needs (1) or (2) beside it.

Good to know
- S > 0 where student = teacher (mass leaks off the diagonal); sinkd/debiased, --debias, is 0 there.
- sinkd/grad_ratio, ||w grad S|| / ||alpha grad L_KD|| on the logits, is what to tune w by, not the losses' values.

Run: python methods/sinkd.py        Expected: see the results in sinkd.md beside it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from posttrain.common.cli import System, cli, require, require_no_idle
from posttrain.common.labelled.batches import logits_of
from posttrain.common.labelled.models import kind_of, load_all
from posttrain.common.models import prepare
from posttrain.common.rollout import seed_of
from posttrain.common.run import Run, sample_rows
from posttrain.common.training import Optimizer, Schedule, batch_of, resources
from posttrain.kernels.divergence import divergence
from posttrain.kernels.sinkhorn import converged_slope, pairwise_cost, sinkhorn, sinkhorn_scaling

KERNEL = {"kl": "forward_kl", "rkl": "reverse_kl", "js": "jsd"}
GLUE = {  # released: alpha, T, lr, batch, annealed T; --steps are yours, here 20, 10, 3, 6, 8, 5, 2 and 300 epochs
    "cola": (0.9, 1.0, 5e-5, 16, False), "mnli": (0.8, 3.0, 4e-5, 16, True), "mrpc": (1.0, 4.0, 3e-5, 16, True),
    "qnli": (0.8, 3.0, 3e-5, 16, False), "qqp": (1.0, 4.0, 4e-5, 32, True), "rte": (0.9, 3.5, 2e-5, 16, False),
    "sst2": (0.9, 2.0, 4e-5, 32, False), "gpt_neo": (0.1, 1.0, 1e-4, 4, False),
}  # fmt: skip
NAMES = ("alpha", "kd_temperature", "lr", "prompts_per_step", "anneal")
PRESETS = {task: {**dict(zip(NAMES, row, strict=True)), "schedule": "linear"} for task, row in GLUE.items()}
PRESETS |= {"none": {}, "uld": {"mode": "uld"}, "mlot": {"mode": "mlot", "iters": 10, "mlot_faithful": True}}
PRESETS["gpt_neo"] |= {"weight_decay": 0.01, "combine": "added", "divergence": "none"}  # it has no Sinkhorn term
PRESETS["t0"] = PRESETS["gpt_neo"] | {"divergence": "sinkhorn", "max_length": 1024}  # 10 epochs
PRESETS["rte"]["seed"] = 20


@dataclass
class Config:
    model: str = "digits-student"  # folder, hub name, or digits-student
    teacher: str = "digits-teacher"  # folder, hub name, or digits-teacher, which is trained at the start
    task: str = "digits"  # digits (digits:noise=0,rows=300), file.jsonl, file.csv, or a datasets name such as glue:sst2
    text_column: str = "text"  # of a file or datasets name, classification
    text_pair_column: str = ""  # second text; empty = none
    label_column: str = "label"  # classes, as words or numbers
    prompt_column: str = "prompt"  # of a file or datasets name, language models
    answer_column: str = "answer"  # of a file or datasets name, language models
    steps: int = 468  # batches; 25 epochs of the default
    prompts_per_step: int = 32  # examples of a batch
    lr: float = 3e-3  # for the tiny default; 2e-5 to 5e-5 for BERT
    warmup: int = 0  # steps of linear warm-up
    schedule: Schedule = "constant"  # of the learning rate: linear (as released) and cosine end at 0
    max_grad_norm: float = 1.0  # clip
    weight_decay: float = 0.0  # AdamW's
    seed: int = 0  # feeds initialisation, data order, dropout and the noise of digits
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 computes under autocast, weights stay fp32
    lora_rank: int = 0  # 0 = full fine-tuning
    eval_every: int = 100  # 0 = only before and after
    eval_problems: int = 600  # held-out examples
    save_every: int = 200  # steps between checkpoints
    resume: bool = False  # go on with the run in --out
    out: str = ""  # run folder; empty = a fresh one under runs/
    wandb: Literal["off", "offline", "online"] = "off"  # metrics.jsonl is always written
    system: System = System()  # flags about machines and engines: common/cli.py
    # --- this method
    preset: Literal[tuple(PRESETS)] = "none"  # the flags of one released script, see PRESETS; explicit flags win
    kind: Literal["auto", "classify", "seq2seq", "causal"] = "auto"  # of model; auto = by what its config names
    mode: Literal["batch", "uld", "mlot"] = "batch"  # Eq. 7, 8 or 9
    max_length: int = 128  # tokens: of a text; of prompt and answer together (causal); of each (seq2seq)
    alpha: float = 0.8  # weight of Eq. 2 (BERT: 0.8 to 1 by task; T0: 0.1)
    combine: Literal["convex", "added"] = "convex"  # added: Eq. 7 with CE's weight 1, as for T0
    kd_temperature: float = 3.0  # T of Eq. 2 (released default: 2; 1 to 4 by task)
    anneal: bool = False  # Eq. 3
    divergence: Literal["sinkhorn", "sinkhorn_sample", "kl", "rkl", "js", "tv", "l1", "none"] = "sinkhorn"  # third term
    divergence_weight: float = 0.1  # of kl, rkl, js, tv, l1 (released: 0.1 for T0, 1 for BERT), means over rows
    sink_weight: float = 0.0008  # of Eq. 6 and of sinkhorn_sample, row by row
    sink_reduction: Literal["sum", "mean"] = "sum"  # mean divides by N: then N times the weight is the same
    tau: float = 2.0  # temperature of the third term (released sinkhorn_sample: 1)
    cost: Literal["l1", "l2", "sq"] = "l1"  # Eq. 4, or its Euclidean form, or that squared
    eps: float = 0.1  # of Eq. 5
    iters: int = 20  # of Eq. 5 (MultiLevelOT: 10)
    sink_form: Literal["stable", "official"] = "stable"  # log domain, or Eq. 5 as it stands
    sink_grad: Literal["unroll", "plan", "implicit"] = "unroll"  # dS/dC through all iterations, P, or at convergence
    debias: bool = False  # S(s, t) - S(s, s)/2 - S(t, t)/2 instead of Eq. 6
    rows: int = 128  # language models: answer tokens a batch at most, in all terms, drawn anew each step; 0 = all
    vocab_top: int = 64  # language models: third term over the teacher's heaviest tokens and one rest; 0 = all tokens
    transport_weight: float = 1.5  # of uld and mlot
    mlot_top: int = 50  # tokens that Eq. 9 looks at, of each model its heaviest in the batch
    mlot_faithful: bool = False  # the released code: softmax of probabilities in K and Q, padding takes part


def annealed(t: float, epoch: int, epochs: int) -> float:
    """Eq. 3; T where there is but one epoch."""
    return t + (1 - t) * epoch / (epochs - 1) if epochs > 1 else t


def kd_rows(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Eq. 2 before its mean; gradient (softmax(student/T) - softmax(teacher/T)) / T.  [N, V] logits, twice -> [N]"""
    return -((teacher.detach() / t).softmax(-1) * (student / t).log_softmax(-1)).sum(-1)


def softened(student: Tensor, teacher: Tensor, tau: float, top: int = 0) -> list[Tensor]:
    """Logits over tau; with top, of the teacher's heaviest and of the rest as one.  [N, V] -> [N, V] or [N, top + 1]"""
    pair = [student / tau, teacher.detach() / tau]
    if not 0 < top < student.shape[-1]:
        return pair
    kept = pair[1].softmax(-1).sum(0).topk(top).indices
    return [torch.cat([x[:, kept], x.index_fill(1, kept, -torch.inf).logsumexp(1, True)], 1) for x in pair]


def transport(cost: Tensor, config) -> tuple[Tensor, Tensor]:
    """Eq. 5 and 6: S with the gradient of --sink-grad, and P without.  [N, N] -> scalar, [N, N]"""
    value, plan = (sinkhorn if config.sink_form == "stable" else sinkhorn_scaling)(cost, config.eps, config.iters)
    if config.sink_grad == "unroll":
        return value, plan
    slope = plan if config.sink_grad == "plan" else converged_slope(cost, plan, config.eps).to(plan.dtype)
    return value.detach() + (slope * (cost - cost.detach())).sum(), plan


def sinkhorn_loss(student: Tensor, teacher: Tensor, config) -> tuple[Tensor, Tensor]:
    """Eq. 4 to 6 of logits over tau, and P.  [N, V], [N, V] -> scalar, [N, N]"""
    metric = config.cost.replace("sq", "sql2")
    cost = pairwise_cost(student, teacher, metric)
    value, plan = transport(cost, config)
    if config.debias:
        own, theirs = pairwise_cost(student, student, metric), pairwise_cost(teacher.detach(), teacher, metric)
        own = own + own.T - own.detach()  # the same numbers, but with a gradient for both sides
        value = value - transport(own, config)[0] / 2 - transport(theirs, config)[0] / 2
    return value / (len(student) if config.sink_reduction == "mean" else 1), plan


def third_term(student: Tensor, teacher: Tensor, config) -> Tensor:
    """What --divergence adds to (1) and (2), without its weight, of logits over tau.  [N, V], [N, V] -> scalar"""
    if config.divergence == "sinkhorn":
        return sinkhorn_loss(student, teacher, config)[0]
    if config.divergence in KERNEL:
        return divergence(student, teacher, KERNEL[config.divergence]).mean()
    gap = (student.softmax(-1) - teacher.softmax(-1)).abs()  # [N, V]
    if config.divergence == "sinkhorn_sample":  # N problems of one row each, whose plan is 1
        return gap.sum() / (len(gap) if config.sink_reduction == "mean" else 1)
    return gap.mean() / 2 if config.divergence == "tv" else gap.sum(-1).mean()


def paired(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The k-th answer token of one tokenizer goes with the k-th of the other, as far as both reach. Owners [n], [m]
    -> indices [R] into each, and weights [R] of a mean over tokens, then examples."""
    counts = [owner.bincount() for owner in (ours, theirs)]
    least, kept = torch.minimum(*counts), []
    for owner, count in zip((ours, theirs), counts, strict=True):
        place = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
        kept.append((place < least[owner]).nonzero().squeeze(1))
    return *kept, 1 / (least[ours[kept[0]]] * len(least))


def uld_loss(student: Tensor, teacher: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Eq. 8 without CE and weight.  Logits [n, V], [m, W], owners [n], [m] -> scalar"""
    i, j, share = paired(ours, theirs)
    p, q = (x.softmax(-1).sort(-1, descending=True).values for x in (student[i], teacher[j].detach()))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (share * (p - q).abs().sum(-1)).sum()


def mlot_parts(student: Tensor, teacher: Tensor, ours: Tensor, theirs: Tensor, config) -> dict[str, tuple]:
    """H, K and Q of Eq. 9: name -> weight, value.  Logits [n, V], [m, W], owners [n], [m]"""
    i, j, share = paired(ours, theirs)
    p, q = ((x / (x.std(-1, keepdim=True) + 1e-4)).softmax(-1) for x in (student, teacher.detach()))
    top = min(config.mlot_top, p.shape[1], q.shape[1])
    p, q = (x[:, x.detach().sum(0).topk(top).indices] for x in (p, q))  # the heaviest column with the heaviest
    parts = {"mlot_h": (1.0, (share * (p[i] - q[j]).abs().sum(-1)).sum())}
    sizes = [owner.bincount().tolist() for owner in (ours, theirs)]
    if config.mlot_faithful:
        most = max(sizes[0] + sizes[1])  # steps; both sides are filled up with rows of zeros, which count
        p, q = (torch.stack([pad(each, (0, 0, 0, most - len(each))) for each in x.split(n)])
                for x, n in zip((p, q), sizes, strict=True))  # fmt: skip  # [B, steps, top]
        parts["mlot_k"] = 0.1, -(p.softmax(-1) * q.log_softmax(-1)).sum(-1).mean()
        costs = pairwise_cost(p, q, "l1", 2.0).mT  # [B, teacher's steps, student's]
        return parts | {"mlot_q": (0.1, 0.001 * sinkhorn_scaling(costs, config.eps, config.iters)[0].sum())}
    p, q = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (p, q))  # a softmax of these renormalises
    parts["mlot_k"] = 0.1, (share * divergence(p[i], q[j], "forward_kl")).sum()
    total = 0
    for a, b in zip(p.split(sizes[0]), q.split(sizes[1]), strict=True):
        mass = a.new_full((len(a),), len(b) / len(a))  # each teacher step sends 1
        total = total + sinkhorn(pairwise_cost(a, b).T, config.eps, config.iters, None, mass)[0]
    return parts | {"mlot_q": (0.1, 0.001 * total)}


def objective(student: Tensor, teacher: Tensor, labels: Tensor, owners: list, t: float, top: int, config) -> dict:
    """Eq. 7, 8 or 9: name -> weight, value.  Logits [N, V], [N, V] or [M, W], labels [N], owners [N], [M]"""
    parts = {"ce": (1 - config.alpha if config.combine == "convex" else 1.0, cross_entropy(student, labels))}  # Eq. 1
    if config.mode != "batch":
        own = mlot_parts(student, teacher, *owners, config) if config.mode == "mlot" else {}
        own = own or {"uld": (1.0, uld_loss(student, teacher, *owners))}
        return {"ce": (1.0, parts["ce"][1])} | {k: (config.transport_weight * w, x) for k, (w, x) in own.items()}
    parts["kd"] = config.alpha, kd_rows(student, teacher, t).mean()
    if config.divergence != "none":
        third = third_term(*softened(student, teacher, config.tau, top), config)
        ot = config.divergence.startswith("sinkhorn")
        parts["sinkhorn" if ot else config.divergence] = config.sink_weight if ot else config.divergence_weight, third
    return parts


def check(config: Config, kind: str) -> None:
    """Refuses flags that have nothing to act on; kind: classify, seq2seq, causal, or digits."""
    d, batch, lm, text = config.divergence, config.mode == "batch", kind in ("seq2seq", "causal"), kind != "digits"
    ot = batch and d == "sinkhorn"
    acts = {
        "alpha combine divergence": (batch, "--mode batch"),
        "kd_temperature anneal": (batch and config.alpha, "--mode batch with --alpha above 0"),
        "tau": (batch and d != "none", "--mode batch with a --divergence"),
        "sink_weight sink_reduction": (batch and "sinkhorn" in d, "--divergence sinkhorn or sinkhorn_sample"),
        "divergence_weight": (batch and d in (*KERNEL, "tv", "l1"), "--divergence kl, rkl, js, tv or l1"),
        "cost sink_form sink_grad debias": (ot, "--divergence sinkhorn"),
        "eps iters": (ot or config.mode == "mlot", "--divergence sinkhorn or --mode mlot"),
        "transport_weight": (not batch, "--mode uld or mlot"),
        "mlot_top mlot_faithful": (config.mode == "mlot", "--mode mlot"),
        "rows vocab_top": (lm and batch, "--mode batch and a language model"),
        "mode prompt_column answer_column": (lm, "a language model"),
        "text_column text_pair_column label_column": (text and not lm, "texts to classify"),
        "max_length kind": (text, "texts"),
    }
    require_no_idle(config, acts)
    require(config.alpha <= 1 or config.combine == "added", "--alpha is a share, at most 1, in --combine convex")
    largest = math.sqrt(2) if config.cost == "l2" else 2.0
    fits = (config.sink_form == "stable" and not config.mlot_faithful) or largest <= 103 * config.eps
    lost = f"Eq. 5 as it stands underflows in fp32 where costs, here up to {largest:.3g}, exceed 103 eps"
    require(fits, f"{lost}: raise --eps to {largest / 103:.3f}, or use --sink-form stable")


def main(config: Config) -> None:
    digits = config.task.partition(":")[0] == "digits"
    device = prepare(config, tiny=digits)
    kind = "digits" if digits else config.kind if config.kind != "auto" else kind_of(config.model)
    check(config, kind)
    same, lm = config.mode == "batch", kind in ("seq2seq", "causal")
    table, readers, policy, teacher, width = load_all(config, kind, device, same)
    top, size, names, tokenizer = config.vocab_top if lm else 0, table.size("train"), table.names, readers[0].tokenizer
    epochs = math.ceil(config.steps * config.prompts_per_step / size)
    optimizer = Optimizer(policy, config)
    run = Run(config, "sinkd")

    @torch.no_grad()
    def examine(step: int) -> dict[str, float]:
        """Held-out accuracy: an example's share of predictions that are right; greedy: whether all are."""
        hits, gaps, n = {"": [], "teacher/": []}, [], min(config.eval_problems, table.size("test"))
        for rows in torch.arange(n).split(8 if lm else 256):
            batches = [table.collate("test", rows.tolist(), reader) for reader in readers]
            out = [logits_of(*each)[:, :width] for each in zip((policy, teacher), batches, strict=True)]
            for who, batch, x in zip(hits, batches, out, strict=True):
                hits[who].append(batch.mean((x.argmax(-1) == batch.labels).double()))
            if same:
                p, q = ((x / config.tau).softmax(-1) for x in out)
                gaps.append(torch.stack([(p.argmax(-1) == q.argmax(-1)).float(), (p - q).abs().sum(-1)]))
        metrics = {}
        for who, right in ((who, torch.cat(right)) for who, right in hits.items() if not who or step == 0):
            error = right.std(correction=min(1, n - 1)).item() / math.sqrt(n)
            metrics |= {f"{who}eval/accuracy": right.mean().item(), f"{who}eval/accuracy_se": error}
            metrics |= {f"{who}eval/greedy": (right == 1).double().mean().item()} if lm else {}
        if same:
            metrics["sinkd/agreement"], metrics["sinkd/l1"] = torch.cat(gaps, 1).mean(1).tolist()
        said = ", ".join(f"{k.removeprefix('eval/')} {v:.3f}" for k, v in metrics.items() if "teacher" not in k)
        run.console.print(f"step {step}, student: {said}")
        return metrics

    done = run.restore(policy=policy, optimizer=optimizer)
    if not done:
        run.log(0, examine(0))

    for step in run.steps(done):
        # --- sample and grade: the data have been
        clock, key, keep = [time.perf_counter()], (config.seed, step, 2**31 + 3), None
        rows = batch_of(size, config.prompts_per_step, config.seed, step, 2**31 + 1).tolist()
        batch, given = (table.collate("train", rows, reader) for reader in readers)
        if lm and same and 0 < config.rows < len(batch.labels):
            order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed_of(*key)))
            keep = order[: config.rows].sort().values.to(device)
        clock.append(time.perf_counter())

        # --- score
        with torch.no_grad():
            target = logits_of(teacher, given, keep)[:, :width]  # [N, V]
        clock.append(time.perf_counter())

        # --- weigh
        torch.manual_seed(seed_of(*key))  # dropout, the same after --resume
        logits = logits_of(policy.train(), batch, keep)[:, :width]  # [N, V]
        labels, owner = (x if keep is None else x[keep] for x in (batch.labels, batch.owner))
        t = annealed(config.kd_temperature, config.anneal * ((step - 1) * config.prompts_per_step // size), epochs)
        terms = objective(logits, target, labels, [batch.owner, given.owner], t, top, config)
        # the gradient of each part on the logits, so that their sizes can be compared
        slopes = {k: torch.autograd.grad(weight * x, logits, retain_graph=True)[0] for k, (weight, x) in terms.items()}

        # --- update
        logits.backward(sum(slopes.values()))
        metrics = optimizer.step(step)
        policy.eval()
        clock.append(time.perf_counter())

        # --- log, evaluate and save
        logits = logits.detach()
        guess, row_loss = logits.argmax(-1), cross_entropy(logits, labels, reduction="none")
        metrics |= {f"loss/{name}": value.item() for name, (_, value) in terms.items()}
        metrics["loss/total"] = sum(weight * metrics[f"loss/{name}"] for name, (weight, _) in terms.items())
        metrics |= {"train/accuracy": (guess == labels).double().mean().item()} | resources(clock, labels >= 0)
        metrics |= {"sinkd/cut": batch.cut / len(rows), "sinkd/left_out": table.left_out} if lm else {}
        if same and config.divergence != "none":
            kd, third = (x.norm().item() for x in [*slopes.values()][1:])
            metrics["sinkd/grad_ratio"] = third / kd if kd else 0.0
        if run.due(step, config.eval_every):
            metrics |= examine(step)
            if same:  # of the batch, whatever --divergence is
                options = {"debias": True, "sink_form": "stable", "sink_grad": "plan"}
                value, plan = sinkhorn_loss(*softened(logits, target, config.tau, top), replace(config, **options))
                metrics |= {"sinkd/debiased": value.item(), "sinkd/diagonal": plan.diagonal().mean().item()}
        run.log(step, metrics)
        said = {"label": labels, "predicted": guess} | ({"teacher": target.argmax(-1)} if same else {})
        for name, i in sample_rows(-row_loss, step).items():
            words = {key: names[x[i]] if names else tokenizer.decode([x[i].item()]) for key, x in said.items()}
            about = {"kind": name, "text": table.describe("train", rows[owner[i]]), "loss": row_loss[i].item()}
            run.sample(step, [about | words])
        if run.due(step, config.save_every):
            run.save(step, policy=policy, optimizer=optimizer)
    run.finish(policy, tokenizer, compare=("sinkd", "sinkd-kd"))


if __name__ == "__main__":
    cli(main, Config, PRESETS)
