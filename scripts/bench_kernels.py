"""Our kernels against plain PyTorch, TRL, Liger-Kernel, cut-cross-entropy, verl and POT: time, memory, error, floor.

A row is forward + backward of one mean loss, on the same inputs and in one process; the rows take turns, so that a
busy machine slows all alike. Figures appear only where values and gradients agree with float64. A peer that is not
installed or refuses the machine says why.
    ms               median (min-max); with one CPU thread of CPU time, which neighbours on the machine disturb least,
                     otherwise of wall time. The JSON file holds both
    peak MB          growth of memory over the inputs, gradients included
    speed, memory    how many times as fast and as lean as the first row
    gap              time over the floor, which nothing beats: the library's own time for the least matrix products that
                     do it or, if more, its least bytes (inputs read, gradients written, once each) at copy speed
    error            of values, of gradients: largest difference from float64 over largest entry, worst tensor

Run: pip install -r requirements.txt -r requirements-bench.txt
     python scripts/bench_kernels.py                                          (15 minutes on two cores)
     python scripts/bench_kernels.py --only sinkhorn topk --repeats 9
     python scripts/bench_kernels.py --shapes large --dtype bfloat16          (a GPU of 80 GB)
"""

import importlib.util
import json
import logging
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from posttrain.common.cli import UserError, cli, first_line, require
from posttrain.kernels.divergence import divergence, linear_divergence
from posttrain.kernels.logprob import linear_token_logp, linear_weighted_logp, token_logp
from posttrain.kernels.sinkhorn import sinkhorn, sinkhorn_scaling
from posttrain.kernels.topk import linear_topk_divergence

SECTIONS = {  # what, default shapes
    "logp": ("log-prob, trainable head", "N=2048 D=512 V=32768", "N=128 D=512 V=151936"),
    "frozen": ("log-prob, frozen head", "N=1024 D=512 V=16384"),
    "forward_kl": ("forward KL, trainable student head", "N=1024 D=256 V=16384"),
    "reverse_kl": ("reverse KL, trainable student head", "N=1024 D=256 V=16384"),
    "jsd": ("JSD, trainable student head", "N=1024 D=256 V=16384"),
    "topk": ("forward KL on a teacher's top-k and the tail", "N=1024 D=256 V=16384 K=64"),
    "logits-logp": ("log-prob of logits", "N=1024 V=32768"),
    "logits-jsd": ("JSD of logits", "N=1024 V=16384"),
    "sinkhorn": ("Sinkhorn, 20 iterations", "G=64 A=32 B=32"),
}
SMALL, LARGE = "N=256 D=64 V=4096 K=16 G=8 A=16 B=16", "N=4096 D=4096 V=151936 K=64 G=256 A=64 B=64"
TARGETS = {  # at the first default shape: ours is so many times as fast or lean as each row that begins with ...
    "logp": (("ours one-pass", 1.05, "fast", "plain log"), ("ours one-pass", 5, "lean", "plain log"),
             ("ours + entropy", 1.2, "fast", "chunked"), ("ours + entropy", 7, "lean", "plain log")),
    "frozen": (("ours + entropy", 1.05, "fast", "plain log"), ("ours + entropy", 3, "lean", "plain log")),
    "forward_kl": (("ours one-pass", 1, "fast", "Liger eager"), ("ours one-pass", 2, "lean", "Liger eager")),
    "reverse_kl": (("ours one-pass", 1, "fast", "Liger eager"), ("ours one-pass", 2, "lean", "Liger eager")),
    "jsd": (("ours one-pass", 2, "fast", "plain"), ("ours one-pass", 1.8, "fast", "Liger eager"),
            ("ours one-pass", 3, "lean", "Liger eager")),
    "sinkhorn": (("ours", 2, "fast", "autograd"), ("ours", 4, "fast", "loop")),
}  # fmt: skip
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.2}  # beyond it a row computes something else
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # the peers' name for the kind
EPS, ITERS = 0.1, 20  # of Sinkhorn


@dataclass
class Config:
    only: tuple[Literal[tuple(SECTIONS)], ...] = tuple(SECTIONS)  # sections to run
    shapes: Literal["default", "small", "large"] = "default"  # small: a try-out; large: for a GPU
    repeats: int = 3  # timed turns of each row, after one that is not counted
    threads: int = 1  # CPU threads
    device: str = "auto"  # auto, cpu, cuda, ...
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of hidden states, heads and logits
    out: str = ""  # write everything as JSON


# --- rows of the tables: functions of the inputs x -> (mean loss, {name: values}); the first of a section is plain

ROWS: dict[str, dict[str, Callable]] = {section: {} for section in SECTIONS}
HEAD, LOGP, KL = ("logp", "frozen"), ("logp", "frozen", "logits-logp"), ("forward_kl", "reverse_kl", "jsd")
DIVERGENCE = (*KL, "topk", "logits-jsd")


def row(name: str, *sections: str, **options: Any) -> Callable:
    """Put the decorated function into the tables. Of several such decorators, the lowest comes first."""

    def register(fn: Callable) -> Callable:
        for section in sections:
            ROWS[section][name] = partial(fn, **options)
        return fn

    return register


def nll(logp: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return -logp.mean(), {"logp": logp.flatten()} | ({} if entropy is None else {"entropy": entropy.flatten()})


def mean(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return values.mean(), {"values": values}


def raw_logits(x):
    return x.logits if hasattr(x, "logits") else x.hidden @ x.weight.T


def log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


@row("plain + entropy", *LOGP, entropy=True)
@row("plain log_softmax + gather", *LOGP)
def plain_logp(x, entropy=False):
    logps = log_softmax(raw_logits(x))
    with torch.no_grad():
        h = -(logps.exp() * logps).sum(-1) if entropy else None
    return nll(logps.gather(-1, x.ids[:, None]), h)


@row("F.cross_entropy", *LOGP)
def plain_cross_entropy(x):
    return F.cross_entropy(raw_logits(x).float(), x.ids), {}


@row("plain", *DIVERGENCE)
def plain_divergence(x):
    logp = log_softmax(raw_logits(x))
    if hasattr(x, "topk_ids"):  # one more outcome holds what is not listed
        both = logp.gather(-1, x.topk_ids), x.topk_logps
        logp, logq = (torch.cat([t, torch.log1p(-t.exp().sum(-1, keepdim=True))], -1) for t in both)
    else:
        logq = log_softmax(x.teacher_logits if hasattr(x, "logits") else x.teacher_hidden @ x.teacher_weight.T)
    if x.kind == "forward_kl":
        return mean((logq.exp() * (logq - logp)).sum(-1))
    if x.kind == "reverse_kl":
        return mean((logp.exp() * (logp - logq)).sum(-1))
    mixture = torch.logaddexp(logp, logq) - math.log(2)
    return mean(0.5 * (logq.exp() * (logq - mixture) + logp.exp() * (logp - mixture)).sum(-1))


@row("autograd through the log domain", "sinkhorn")
def plain_sinkhorn(x):
    scores, g = -x.cost / EPS, 0.0
    for _ in range(ITERS):
        f = -(scores + g).logsumexp(-1, keepdim=True)
        g = -(scores + f).logsumexp(-2, keepdim=True)
    return mean(((scores + f + g).exp() * x.cost).sum((-1, -2)))


@row("loop over problems, as SinKD's", "sinkhorn")
def looped_sinkhorn(x):
    values = []
    for cost in x.cost:
        plan = (-cost / EPS).exp()
        for _ in range(ITERS):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        values.append((plan * cost).sum())
    return mean(torch.stack(values))


# peers, imported when called, so that a missing one is a row


@row("TRL selective + entropy", "logits-logp", entropy=True)
@row("TRL selective_log_softmax", *LOGP)
def trl_selective(x, entropy=False):
    from trl.trainer import utils

    logits = raw_logits(x)
    logits, ids = logits.view(8, -1, logits.shape[-1]), x.ids.view(8, -1)  # a batch: it loops over sequences
    if entropy:
        return nll(*utils.selective_log_softmax_and_entropy(logits, ids, entropy_requires_grad=False))
    return nll(utils.selective_log_softmax(logits, ids))


@row("chunked: TRL + entropy", *HEAD)
def trl_chunked(x):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Function

    return nll(*Function.apply(x.hidden, x.weight, None, x.ids, 1.0, 32_768, None, 1.0, ("entropy",))[:2])


@row("TRL chunked", *KL)
def trl_divergence(x):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Function

    return mean(Function.apply(x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None, BETA[x.kind])[0])


@row("TRL top-k", "topk")
def trl_topk(x):
    from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

    head, listed = (x.hidden, x.weight, None, 1.0, None), torch.ones_like(x.topk_ids, dtype=torch.bool)
    total, *_ = _chunked_jsd_loss(*head, x.topk_ids, x.topk_logps, listed, BETA[x.kind], 1.0, True, None, 0, 256)
    return total / len(x.ids), {}


@row("Liger scaled CE", *HEAD)
@row("chunked: Liger scaled CE + entropy", *HEAD, entropy=True)
def liger_scaled(x, entropy=False):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    found = Function.apply(x.hidden, x.weight, x.ids, 1.0, -100, 1, entropy)
    return nll(-found[0], found[1]) if entropy else nll(-found)


@row("Liger selective", *HEAD)
def liger_selective(x):
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as Function

    return nll(Function.apply(x.hidden, x.weight, x.ids, None, 1.0, 4096))


@row("Liger Triton", *HEAD, *KL)
def liger_triton(x):
    from liger_kernel import ops

    if x.kind:
        sides = (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        return ops.LigerFusedLinearJSDFunction.apply(*sides, x.ids, BETA[x.kind]), {}
    return ops.LigerFusedLinearCrossEntropyFunction.apply(x.hidden, x.weight, x.ids)[0], {}


@row("Liger compiled, 1024 rows", *KL, rows=1024, compiled=True)
@row("Liger compiled, 256 rows", *KL, rows=256, compiled=True)
@row("Liger eager, 1024 rows", *KL, rows=1024, compiled=False)
@row("Liger eager, 256 rows", *KL, rows=256, compiled=False)
def liger_divergence(x, rows, compiled):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, BETA[x.kind], compiled=compiled, chunk_size=rows)
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.ids), {}


@row("chunked: verl + entropy", *HEAD)
def verl_fused(x):  # its file by itself, as `import verl` needs ray
    path = metadata.distribution("verl").locate_file("verl/utils/experimental/torch_functional.py")
    spec = importlib.util.spec_from_file_location("verl_fused", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return nll(*module.FusedLinearForPPO()(x.hidden, x.weight, x.ids))


@row("CCE torch_compile", *HEAD, impl="torch_compile")
@row("CCE kernel", *HEAD, impl="cce")
def cce(x, impl):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x.hidden, x.weight, x.ids, impl=impl), {}


@row("POT, forward only", "sinkhorn")
def pot_sinkhorn(x):
    import ot

    options, values = {"method": "sinkhorn_log", "numItermax": ITERS, "stopThr": 0, "warn": False}, []
    for cost in x.cost.detach():
        a, b = (torch.full((n,), 1 / n, device=cost.device) for n in cost.shape)
        plan = ot.sinkhorn(b, a, cost.T, EPS, **options).T  # transposed: POT begins with columns, we with rows
        values.append(len(a) * (plan * cost).sum())
    return mean(torch.stack(values))


# ours


@row("ours + entropy", *LOGP)
def ours_logp(x):
    return nll(*(token_logp(x.logits, x.ids) if hasattr(x, "logits") else linear_token_logp(x.hidden, x.weight, x.ids)))


@row("ours one-pass + entropy", *HEAD, entropy=True)
@row("ours one-pass", *HEAD, entropy=False)
def ours_weighted_logp(x, entropy):
    weight = torch.full(x.ids.shape, -1 / len(x.ids), device=x.ids.device)
    loss, logp, h = linear_weighted_logp(x.hidden, x.weight, x.ids, weight, entropy=entropy)
    return loss, nll(logp, h)[1]


@row("ours two-phase", *DIVERGENCE, one_pass=False)
@row("ours one-pass", *DIVERGENCE, one_pass=True)
def ours_divergence(x, one_pass):
    if hasattr(x, "topk_ids"):
        form = partial(linear_topk_divergence, x.hidden, x.weight, x.topk_ids, x.topk_logps, x.kind)
    elif hasattr(x, "logits"):
        form = partial(divergence, x.logits, x.teacher_logits, x.kind)
    else:
        form = partial(linear_divergence, x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.kind)
    if not one_pass:
        return mean(form())
    loss, values = form(token_weight=torch.full(x.ids.shape, 1 / len(x.ids), device=x.ids.device))
    return loss, {"values": values}


@row("ours", "sinkhorn", form=sinkhorn)
@row("ours: SinKD's, batched autograd", "sinkhorn", form=sinkhorn_scaling)
def ours_sinkhorn(x, form):
    return mean(form(x.cost, eps=EPS, iters=ITERS)[0])


# --- inputs and the reference


def make_inputs(section: str, shape: str, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """Random; logits have standard deviation 2. A tensor with "weight" in its name is a head, all others are rows."""
    size = {letter: int(value) for letter, value in (part.split("=") for part in shape.split())}
    random = torch.Generator().manual_seed(0)

    def normal(letters: str, scale: float, grad: bool = False) -> Tensor:
        x = torch.randn([size[letter] for letter in letters], generator=random) * scale
        return x.to(device, dtype).requires_grad_(grad)

    x = SimpleNamespace(kind={"topk": "forward_kl", "logits-jsd": "jsd"}.get(section, section if section in KL else ""))
    if section == "sinkhorn":
        x.cost = 2 * torch.rand(size["G"], size["A"], size["B"], generator=random).to(device)
        x.cost.requires_grad_()
        return x
    x.ids = torch.randint(size["V"], (size["N"],), generator=random).to(device)
    if section.startswith("logits"):
        x.logits = normal("NV", 2, grad=True)
    else:
        head = 2 * size["D"] ** -0.5
        x.hidden, x.weight = normal("ND", 1, grad=True), normal("VD", head, grad=section != "frozen")
    if section == "logits-jsd":
        x.teacher_logits = normal("NV", 2)
    if section in KL:
        x.teacher_hidden, x.teacher_weight = normal("ND", 1), normal("VD", head)
    if section == "topk":
        x.topk_logps, x.topk_ids = normal("NV", 2).float().log_softmax(-1).topk(size["K"])
    return x


def tensors(x: SimpleNamespace) -> dict[str, Tensor]:
    return {name: t for name, t in vars(x).items() if torch.is_tensor(t)}


def run(fn: Callable, x: SimpleNamespace) -> tuple[Tensor, dict[str, Tensor]]:
    loss, values = fn(x)
    if loss.requires_grad:
        loss.backward()
    return loss, values


def clear(x: SimpleNamespace) -> None:
    for t in tensors(x).values():
        t.grad = None


def outcome(loss: Tensor, values: dict[str, Tensor], x: SimpleNamespace) -> tuple[dict, dict]:
    """Values and gradients, as float64 on the CPU."""
    both = {"loss": loss, **values}, {name: t.grad for name, t in tensors(x).items() if t.grad is not None}
    return tuple({name: t.detach().double().cpu() for name, t in found.items()} for found in both)


def reference(section: str, x: SimpleNamespace, step: int = 256) -> tuple[dict, dict]:
    """Plain PyTorch's outcome in float64 on the same, already rounded inputs; in slices of rows, so that it fits."""
    plain = ROWS[section].get("plain + entropy") or next(iter(ROWS[section].values()))
    exact, loss, pieces = {}, 0.0, []
    for name, t in tensors(x).items():
        exact[name] = t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
    n = len(next(iter(exact.values())))
    for start in range(0, n, step):
        part = {name: t if "weight" in name else t[start : start + step] for name, t in exact.items()}
        share, values = plain(SimpleNamespace(kind=x.kind, **part))
        share = share * min(step, n - start) / n
        share.backward()
        loss += share.detach()
        pieces.append({name: t.detach() for name, t in values.items()})
    values = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return outcome(loss, values, SimpleNamespace(**exact))


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of the worst tensor; NaN stays NaN."""
    each = [(t - exact[name]).abs().max() / exact[name].abs().max() for name, t in found.items()]
    return torch.stack(each).max().item() if each else 0.0


# --- time, memory, floor


def turn(fn: Callable, x: SimpleNamespace, device: torch.device) -> dict[str, float]:
    """One timed run: seconds of the wall and of the CPU and, on a GPU, the peak over the memory in use before."""
    clear(x)
    gpu = device.type != "cpu"
    if gpu:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()  # by tensors, whatever the allocator keeps in reserve
    wall, cpu = time.perf_counter(), time.process_time()
    run(fn, x)
    if gpu:
        torch.accelerator.synchronize()
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return took | ({"peak": torch.accelerator.max_memory_allocated() - before} if gpu else {})


def resident_growth(section: str, shape: str, name: str, dtype: torch.dtype) -> int:
    """Bytes by which one run of a row raises the peak resident memory of this process, gradients included.

    The parent has fixed malloc's mmap threshold at 64 KiB for this child: each larger tensor is mapped when made and
    handed back when freed, so nothing that imports, compilers or the run before have left can hide growth.
    """
    x = make_inputs(section, shape, torch.device("cpu"), dtype)
    run(ROWS[section][name], x)  # compiles and loads all that is lazy
    clear(x)

    def kib(entry: str) -> int:
        return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run(ROWS[section][name], x)
    return 1024 * (kib("VmHWM") - before)


def ask_child(section: str, shape: str, name: str) -> dict[str, Any]:
    asked = {"BENCH_MEMORY_OF": f"{section}|{shape}|{name}", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, *sys.argv], capture_output=True, text=True, env=os.environ | asked)
    if done.returncode:
        return {"no_peak": " ".join(done.stderr.strip().splitlines()[-1:])}
    return {"peak": spread([int(done.stdout.split()[-1])])}


def spread(figures: list[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


def least_products(x: SimpleNamespace) -> Callable | None:
    """A run of the matrix products that the problem can't do without, on buffers at hand."""
    t, products = SimpleNamespace(**{name: t.detach() for name, t in tensors(x).items()}), []
    if hasattr(t, "cost"):  # each iteration sweeps over columns and rows, in the forward and in the backward
        kernel, column, line = (-t.cost / EPS).exp(), t.cost[..., :1].clone(), t.cost[:, :1].mT.clone()
        products = [(kernel.mT, column, line), (kernel, line, column)] * 2 * ITERS
    elif hasattr(t, "hidden"):
        logits = t.hidden @ t.weight.T
        products = [(t.hidden, t.weight.T, logits), (logits, t.weight, torch.empty_like(t.hidden))]
        products += [(logits.T, t.hidden, torch.empty_like(t.weight))] if x.weight.requires_grad else []
        products += [(t.teacher_hidden, t.teacher_weight.T, logits)] if hasattr(t, "teacher_hidden") else []

    def multiply(_):
        for a, b, out in products:
            torch.matmul(a, b, out=out)
        return products[0][2].flatten()[0], {}

    return multiply if products else None


def copy_speed(device: torch.device, clock: str) -> float:
    """Bytes a second that a copy of 256 MB reads and writes."""
    a, b = torch.zeros(2, 2**26, device=device)
    return 2 * a.nbytes / min(turn(lambda _: (b.copy_(a)[0], {}), SimpleNamespace(), device)[clock] for _ in range(6))


def measure(section: str, shape: str, config: Config, device: torch.device, clock: str, speed: float) -> dict[str, Any]:
    torch.compiler.reset()  # its limit of variants of one function then holds for a table and not for the whole run
    x = make_inputs(section, shape, device, getattr(torch, config.dtype))
    exact, works, rows = reference(section, x), {}, {}
    for name, fn in ROWS[section].items():
        clear(x)
        try:
            found = outcome(*run(fn, x), x)
        except Exception as why:  # of any type: not installed, made for another machine, out of memory
            rows[name] = {"refused": f"{type(why).__name__}: {first_line(why)}"}
            continue
        errors = [error(*pair) for pair in zip(found, exact, strict=True)]
        if all(e < TOLERANCE[config.dtype] for e in errors):  # not so for NaN
            works[name], rows[name] = fn, {"errors": errors}
        else:
            rows[name] = {"refused": f"disagrees with float64: values {errors[0]:.0e}, gradients {errors[1]:.0e}"}
    del exact
    products = least_products(x)
    timed = works | ({"floor": products} if products else {})
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in timed}
    for _ in range(config.repeats):
        for name, fn in timed.items():
            turns[name].append(turn(fn, x, device))
    for name, taken in turns.items():
        rows[name] = rows.get(name, {}) | {key: spread([one[key] for one in taken]) for key in taken[0]}
    least_bytes = sum(t.nbytes * (1 + t.requires_grad) for t in tensors(x).values())
    del x, products, timed
    if device.type == "cpu":  # needs no quiet machine: two children at a time
        with ThreadPoolExecutor(2) as pool:
            for name, answer in zip(works, pool.map(partial(ask_child, section, shape), works), strict=True):
                rows[name] |= answer
    work = rows.pop("floor")[clock]["median"] if "floor" in rows else 0.0
    floor = {"products_seconds": work, "least_bytes": least_bytes, "seconds": max(work, least_bytes / speed)}
    targets = judge(section, rows, clock) if shape == SECTIONS[section][1] else []
    return {"section": section, "shape": shape, "clock": clock, "floor": floor, "rows": rows, "targets": targets}


def judge(section: str, rows: dict[str, dict], clock: str) -> list[dict[str, Any]]:
    verdicts = []
    for ours, factor, what, rivals in TARGETS.get(section, ()):
        key = clock if what == "fast" else "peak"
        theirs = [row[key]["median"] for name, row in rows.items() if name.startswith(rivals) and key in row]
        ratio = min(theirs) / rows[ours][key]["median"] if theirs and key in rows[ours] else math.nan
        claim = f"{ours} is {ratio:.2f} times as {what} as the best of '{rivals}...'; target {factor}"
        verdicts.append({"claim": claim, "ratio": ratio, "met": ratio >= factor})
    return verdicts


# --- report


def show(console: Console, found: dict[str, Any]) -> None:
    clock, floor, rows = found["clock"], found["floor"], found["rows"]
    table = Table(title=f"{SECTIONS[found['section']][0]}, {found['shape']}", title_justify="left", box=None)
    for column in ("", f"{clock} ms", "(min-max)", "speed", "gap", "peak MB", "memory", "error", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    first, unknown = next(iter(rows.values())), {"median": math.nan}
    for name, row in rows.items():
        if "refused" in row:
            continue
        took, peak = row[clock], row.get("peak", unknown)["median"] or math.nan
        low, middle, high = (f"{1e3 * took[key]:.4g}" for key in ("min", "median", "max"))
        faster, leaner = (
            first.get(clock, unknown)["median"] / took["median"],
            first.get("peak", unknown)["median"] / peak,
        )
        cells = middle, f"({low}-{high})", f"{faster:.2f}x", f"{took['median'] / floor['seconds']:.2f}"
        errors = (f"{e:.0e}" if e else "-" for e in row["errors"])
        memory = (
            ("-", "-") if math.isnan(peak) else (f"{peak / 1e6:.4g}", f"{leaner:.2f}x")
        )  # below a page, or unmeasured
        table.add_row(name, *cells, *memory, *errors)
    console.print(table)
    work = f"matrix products {1e3 * floor['products_seconds']:.4g} ms, " if floor["products_seconds"] else ""
    console.print(f"  floor {1e3 * floor['seconds']:.4g} ms: {work}least bytes {floor['least_bytes'] / 1e6:.4g} MB")
    for name, row in rows.items():
        if "refused" in row:
            console.print(f"  {name}: {row['refused']}", markup=False)
    for verdict in found["targets"]:
        console.print(f"  {'met' if verdict['met'] else 'MISSED'}: {verdict['claim']}")
    console.print()


def main(config: Config) -> None:
    require(config.threads > 0, "--threads must be at least 1")
    torch.set_num_threads(config.threads)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.disable(logging.WARNING)  # peers list what else could be installed
    if "BENCH_MEMORY_OF" in os.environ:
        print(resident_growth(*os.environ["BENCH_MEMORY_OF"].split("|"), getattr(torch, config.dtype)))
        return
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.empty(0, device=auto if config.device == "auto" else config.device).device
    except (RuntimeError, AssertionError) as why:
        raise UserError(f"no device {config.device!r} here ({first_line(why)}); try --device cpu") from None
    clock = "cpu" if device.type == "cpu" and config.threads == 1 else "wall"
    console, speed = Console(width=None if sys.stdout.isatty() else 120, highlight=False), copy_speed(device, clock)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else model[1] if model else platform.machine()
    console.print(f"{machine}, {config.threads} CPU thread(s), {config.dtype}, copies {speed / 1e9:.1f} GB/s\n")
    tables = []
    for section in config.only:
        _, *default = SECTIONS[section]
        for shape in {"default": default, "small": [SMALL], "large": [LARGE]}[config.shapes]:
            letters = {part[0] for part in default[0].split()}
            shape = " ".join(part for part in shape.split() if part[0] in letters)
            tables.append(measure(section, shape, config, device, clock, speed))
            show(console, tables[-1])
    if config.out:
        from posttrain.common.run import versions, write_atomically  # it loads transformers: not in each child

        peers = ("triton", "trl", "liger_kernel", "cut-cross-entropy", "verl", "POT")
        found = versions() | {
            package.name: package.version for package in metadata.distributions() if package.name in peers
        }
        stored = {"command": " ".join(["python", "scripts/bench_kernels.py", *sys.argv[1:]]), "machine": machine}
        stored |= {"versions": found, "config": vars(config), "copy_bytes_per_second": speed, "tables": tables}
        write_atomically(Path(config.out), json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    cli(main, Config)
