"""Divergences between student p and teacher q over the vocabulary, straight from hidden states and LM heads.

    forward_kl  D = sum q (log q - log p)
    reverse_kl  D = sum p (log p - log q)
    jsd         D = beta KL(q|m) + (1-beta) KL(p|m),  m = beta q + (1-beta) p,  0 < beta < 1

The jsd formula tends to 0 at both ends (D/beta -> forward KL, D/(1-beta) -> reverse KL), hence three kinds.
No factor T^2. The teacher never gets a gradient. At most one chunk of rows of both logits exists at a time.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from posttrain.kernels.chunking import check_temperature, in_chunks, project

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Tail = Literal["bucket", "renorm", "drop"]
TAIL_FLOOR = 1e-6  # below it a teacher's tail mass is rounding of 1 - sum q


def divergence(student_logps: Tensor, teacher_logps: Tensor, kind: Kind, beta: float = 0.5) -> Tensor:
    """D over the last dimension; -inf entries are outcomes of probability 0.  [*, V], [*, V] -> [*]"""
    teacher_logps = teacher_logps.detach()
    p, q = student_logps.exp(), teacher_logps.exp()
    if kind == "forward_kl":
        return (q * (teacher_logps - student_logps).masked_fill(q == 0, 0)).sum(-1)
    if kind == "reverse_kl":
        return (p * (student_logps - teacher_logps).masked_fill(p == 0, 0)).sum(-1)
    if kind != "jsd" or not 0 < beta < 1:
        raise ValueError(f"kind must be forward_kl, reverse_kl or jsd with 0 < beta < 1; got {kind}, beta {beta}")
    never = (p == 0) & (q == 0)  # logaddexp of two -inf has a NaN gradient
    student_logps, teacher_logps = student_logps.masked_fill(never, 0), teacher_logps.masked_fill(never, 0)
    mixture = torch.logaddexp(teacher_logps + math.log(beta), student_logps + math.log1p(-beta))
    kl_q = (q * (teacher_logps - mixture).masked_fill(q == 0, 0)).sum(-1)
    kl_p = (p * (student_logps - mixture).masked_fill(p == 0, 0)).sum(-1)
    return beta * kl_q + (1 - beta) * kl_p


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    kind: Kind,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """D a row over the full vocabulary, differentiable for the student.

    student_hidden [n, Hs], teacher_hidden [n, Ht], weights [V, H] -> [n]. Heads padded to different sizes need
    vocab_size, the entries that both share.
    """
    check_temperature(temperature)
    if vocab_size is None and student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(f"heads of {student_weight.shape[0]} and {teacher_weight.shape[0]} tokens need vocab_size")

    def rows(student_hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor]:
        student = project(student_hidden, student_weight, student_bias, temperature, student_softcap, vocab_size)
        with torch.no_grad():
            teacher = project(teacher_hidden, teacher_weight, teacher_bias, temperature, teacher_softcap, vocab_size)
        return (divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind, beta),)

    return in_chunks(rows, (student_hidden, teacher_hidden), vocab_size or student_weight.shape[0], chunk)[0]


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: Kind,
    beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """D a row over K listed tokens, differentiable for the student.

    hidden [n, H] of the student, weight [V, H], topk_ids [n, K] (distinct in a row, -1 = padding but never first),
    topk_logprobs [n, K] of the teacher over its full vocabulary -> [n].
    tail: bucket = one more outcome holds the unlisted mass (a true divergence, at most the full one);
    renorm = both sides renormalised over the list, blind to the rest; drop = partial sums, may be negative.
    """
    check_temperature(temperature)
    width = vocab_size or weight.shape[0]
    if topk_ids.numel() and not bool(((topk_ids >= -1) & (topk_ids < width)).all()):
        raise ValueError(f"token ids must be in [0, {width}) or -1")

    def rows(hidden: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor]:
        x = project(hidden, weight, bias, temperature, softcap, vocab_size)
        padding = ids < 0
        ids = torch.where(padding, ids[:, :1], ids)
        teacher = teacher.to(x.dtype).masked_fill(padding, -torch.inf)
        student = (x.gather(-1, ids) - x.logsumexp(-1, keepdim=True)).masked_fill(padding, -torch.inf)
        if tail == "bucket":
            # The student's tail from its own logits, not 1 - sum p: a tail of 1e-18 must survive.
            rest = x.scatter(-1, ids, -torch.inf)
            empty = rest.detach().amax(-1, keepdim=True) == -torch.inf  # logsumexp of nothing has a NaN gradient
            tail_lse = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
            student_tail = tail_lse - x.logsumexp(-1, keepdim=True)
            mass = 1 - teacher.exp().sum(-1, keepdim=True)
            if kind == "reverse_kl":  # it divides by the teacher's tail: floor it
                teacher_tail = mass.clamp(min=TAIL_FLOOR).log()
            else:
                teacher_tail = mass.masked_fill(mass < TAIL_FLOOR, 0).log()
            student, teacher = torch.cat([student, student_tail], -1), torch.cat([teacher, teacher_tail], -1)
        elif tail == "renorm":
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        elif tail != "drop":
            raise ValueError(f"tail must be bucket, renorm or drop, got {tail}")
        return (divergence(student, teacher, kind, beta),)

    return in_chunks(rows, (hidden, topk_ids, topk_logprobs), vocab_size or weight.shape[0], chunk)[0]
