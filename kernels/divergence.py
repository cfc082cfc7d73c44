"""Divergences between student p and teacher q over the whole vocabulary, from logits or hidden states and LM heads.

    kind         D                                             dD/dx_v, x = c / T of the student (c: logprob.py)
    forward_kl   sum q (log q - log p)                         p_v - q_v
    reverse_kl   sum p (log p - log q)                         p_v (log p_v - log q_v - D)
    jsd          beta KL(q|m) + (1-beta) KL(p|m)               (1-beta) p_v (log p_v - log m_v - KL(p|m))
                 with m = beta q + (1-beta) p, 0 < beta < 1

The jsd formula tends to 0 at both ends (D/beta -> forward KL, D/(1-beta) -> reverse KL), hence three kinds. No factor
T^2, no gradient for the teacher. A term whose leading probability is 0 is 0; a token that only p lacks makes forward_kl
infinite, one that only q lacks reverse_kl. The plain version holds about 8 N V floats (logits, log-softmaxes, their
exps and gradients); here at most one chunk of rows of both logits exists (head.py), and the kernel sweeps it three
times: normalisers, sums, gradient over the student's logits. Nothing is saved: a later backward sweeps again.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_for, jit, launch, tile_for, tl
from posttrain.kernels.head import Source, apply, check, source_of
from posttrain.kernels.logprob import blocks, cap_factor, cap_slope, capped, load_capped, online

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
KINDS = ("forward_kl", "reverse_kl", "jsd")


# --- the twin: PyTorch


def log_softmax(logits: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and p in fp32 or fp64, centred before the division by T."""
    c = capped(logits, softcap)
    u = (c - c.amax(-1, keepdim=True)).div_(temperature)
    e = u.exp()
    s = e.sum(-1, keepdim=True)
    return u.sub_(s.log()), e.div_(s)


def gap(p: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, 0 where p is 0."""
    return torch.where(p == 0, 0, log_a - log_b)


def value_and_slope(logp, p, logq, q, kind: str, beta: float, whole: bool = True) -> tuple[Tensor, Tensor]:
    """D [*] and dD/dx [*, V] from log-probs and probabilities; whole = False: the listed part of longer rows."""
    if kind == "forward_kl":
        d = torch.linalg.vecdot(q, gap(q, logq, logp))
        return d, (p if whole else p * q.sum(-1, keepdim=True)) - q
    log_b = logq
    if kind == "jsd":  # of the mixture; where both have underflowed, anything finite
        log_b = (beta * q).add_(p, alpha=1 - beta).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    over_p = gap(p, logp, log_b)
    d = inner = torch.linalg.vecdot(p, over_p)
    if kind == "jsd":
        d = beta * torch.linalg.vecdot(q, gap(q, logq, log_b)) + (1 - beta) * inner
        return d, over_p.sub_(inner[..., None]).mul_(p).mul_(1 - beta)
    rest = 0 if whole else 1 - p.sum(-1, keepdim=True)
    return d, over_p.sub_(inner[..., None] - rest).mul_(p)


def divergence_torch(student, teacher, kind, beta, temperature, caps, g=None, da=None) -> Tensor:
    """[R, V], [R, V] logits -> D [R]; with g [R], write g dD/da to da [R, V], which may be student itself."""
    out = []
    for block in blocks(student):
        logp, p = log_softmax(student[block], caps[0], temperature)
        logq, q = log_softmax(teacher[block], caps[1], temperature)
        d, slope = value_and_slope(logp, p, logq, q, kind, beta)
        out.append(d)
        if da is not None:
            grad = slope.mul_(g[block, None]).mul_(cap_slope(student[block], caps[0], temperature))
            da[block] = grad.masked_fill_(g[block, None] == 0, 0)  # a row without weight may be infinite
    return torch.cat(out)


# --- the kernel: Triton, one program a row


@jit
def log_prob(row, cols, V, m, log_s, temperature, cap, HAS_CAP: tl.constexpr):
    """A tile of log p, p and c."""
    c = load_capped(row, cols, V, cap, HAS_CAP)
    logp = (c - m) / temperature - log_s
    return logp, tl.exp(logp), c


@jit
def log_mixture(p, q, beta):
    m = beta * q + (1 - beta) * p
    return tl.log(tl.where(m > 0, m, 1.0))


@jit
def divergence_kernel(
    da, student, teacher, d, g, da_stride, stride, teacher_stride, V, beta, temperature, cap, teacher_cap,
    GRAD: tl.constexpr, KIND: tl.constexpr, HAS_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    m, s, w = -float("inf"), 0.0, 0.0
    mt, st, wt = -float("inf"), 0.0, 0.0
    for start in range(0, V, TILE):
        cols = start + tl.arange(0, TILE)
        m, s, w = online(m, s, w, load_capped(student, cols, V, cap, HAS_CAP), temperature)
        mt, st, wt = online(mt, st, wt, load_capped(teacher, cols, V, teacher_cap, TEACHER_CAP), temperature)
    log_s, log_st = tl.log(s), tl.log(st)
    over_q, over_p = 0.0, 0.0  # the sums with q and with p in front
    for start in range(0, V, TILE):
        cols = start + tl.arange(0, TILE)
        logp, p, c = log_prob(student, cols, V, m, log_s, temperature, cap, HAS_CAP)
        logq, q, c = log_prob(teacher, cols, V, mt, log_st, temperature, teacher_cap, TEACHER_CAP)
        if KIND == 2:
            log_m = log_mixture(p, q, beta)
            over_q += tl.sum(tl.where(q > 0, q * (logq - log_m), 0.0), 0)
            over_p += tl.sum(tl.where(p > 0, p * (logp - log_m), 0.0), 0)
        elif KIND == 1:
            over_p += tl.sum(tl.where(p > 0, p * (logp - logq), 0.0), 0)
        else:
            over_q += tl.sum(tl.where(q > 0, q * (logq - logp), 0.0), 0)
    tl.store(d + row, beta * over_q + (1 - beta) * over_p if KIND == 2 else over_q + over_p)
    if GRAD:
        g = tl.load(g + row)
        for start in range(0, V, TILE):
            cols = start + tl.arange(0, TILE)
            logq, q, c = log_prob(teacher, cols, V, mt, log_st, temperature, teacher_cap, TEACHER_CAP)
            logp, p, c = log_prob(student, cols, V, m, log_s, temperature, cap, HAS_CAP)
            if KIND == 2:
                grad = (1 - beta) * tl.where(p > 0, p * (logp - log_mixture(p, q, beta) - over_p), 0.0)
            elif KIND == 1:
                grad = tl.where(p > 0, p * (logp - logq - over_p), 0.0)
            else:
                grad = p - q
            if HAS_CAP:
                grad *= cap_factor(c, cap)
            grad = tl.where(g == 0, 0.0, grad * g / temperature)  # a row without weight may be infinite
            tl.store(da + row * da_stride + cols, grad.to(da.dtype.element_ty), mask=cols < V)


# --- the operation


@dataclass
class Divergence:
    """Output D."""

    kind: Kind
    beta: float
    temperature: float
    caps: tuple[float | None, float | None]
    teacher: Source

    def run(self, rows, student, teacher, saved=None, grads=None, da=None):
        g = grads[0] if da is not None else None
        if backend_for(student) == "torch":
            return (divergence_torch(student, teacher, self.kind, self.beta, self.temperature, self.caps, g, da),), ()
        (n, width), d = student.shape, student.new_empty(len(student), dtype=torch.float32)
        tensors = (student if da is None else da, student, teacher, d, d if g is None else g.contiguous())
        numbers = (width, self.beta, self.temperature, *(cap or 0.0 for cap in self.caps))
        forms = (da is not None, KINDS.index(self.kind), *map(bool, self.caps))
        strides = (x.stride(0) for x in tensors[:3])
        launch(divergence_kernel, n, student, *tensors, *strides, *numbers, *forms, **tile_for(width))
        return (d,), ()


def linear_divergence(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor | None,
    kind: Kind, beta: float = 0.5, temperature: float = 1.0, student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, student_softcap: float | None = None, teacher_softcap: float | None = None,
    vocab_size: int | None = None, token_weight: Tensor | None = None, chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """D a row over the full vocabulary, differentiable for the student.

    student_hidden [*, Hs], teacher_hidden [*, Ht], weights [V, H] -> D [*]. Heads padded to different sizes need
    vocab_size, the entries that both share. With token_weight [*] (mask, normaliser, importance weight; no gradient)
    -> (sum of token_weight x D, D without gradient), all of whose matrix products are in the forward.
    """
    check_kind(kind, beta, temperature)
    student = source_of(student_hidden, student_weight, student_bias, vocab_size)
    teacher = source_of(teacher_hidden, teacher_weight, teacher_bias, vocab_size)
    teacher = Source(*(x if x is None else x.detach() for x in teacher))
    if student.width != teacher.width or len(student.x) != len(teacher.x):
        sizes = f"{len(student.x)} x {student.width} and {len(teacher.x)} x {teacher.width}"
        raise ValueError(f"logits of student and teacher are {sizes}; padded heads need vocab_size")
    op = Divergence(kind, beta, temperature, (student_softcap, teacher_softcap), teacher)
    outputs = apply(op, student, chunk, token_weight, student_hidden.shape[:-1])
    return outputs if len(outputs) > 1 else outputs[0]


def divergence(student: Tensor, teacher: Tensor, kind: Kind, beta: float = 0.5, **options):
    """linear_divergence of logits [*, V] that exist already; log-probs are logits too."""
    return linear_divergence(student, None, teacher, None, kind, beta, **options)


def check_kind(kind: str, beta: float, temperature: float) -> None:
    check(temperature)
    if kind not in KINDS or (kind == "jsd" and not 0 < beta < 1):
        raise ValueError(f"kind must be forward_kl, reverse_kl or jsd with 0 < beta < 1; got {kind}, beta {beta}")
