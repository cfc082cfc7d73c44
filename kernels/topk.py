"""Divergences over the K tokens that a teacher lists, such as a server's top-k log-probs.

    tail     outcomes                                       D
    bucket   the K tokens and one bucket for all others     a true divergence, at most the full one
    renorm   the K tokens, both sides renormalised          a true divergence, blind to the rest
    drop     the K tokens as they are                       partial sums, may be negative

divergence.py's D and dD/dx hold for the outcomes; with t the bucket and r_v = p_v / p_t the student's distribution over
the unlisted tokens alone, an unlisted token has

    da_v = r_v dD/dx_t / T     drop: -r_v sum over the list of dD/dx, since da sums to 0; renorm: 0

(and with a soft-cap its slope, as in logprob.py). A teacher's t below 1e-6 is rounding and counts as none.

p_t comes from the unlisted logits themselves, not from 1 - sum p: a tail of 1e-18 must survive. So the listed logits
are taken out of the row and overwritten by -inf; logprob.py's kernels then see the rest. Saved: dD/dx of the outcomes
and the rest's maximum and log-sum, K + 3 floats a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_for
from posttrain.kernels.divergence import Kind, check_kind, value_and_slope
from posttrain.kernels.head import Source, apply, check, source_of
from posttrain.kernels.logprob import cap_slope, capped, row_grad, row_stats

Tail = Literal["bucket", "renorm", "drop"]
TAIL_FLOOR = 1e-6  # below it a teacher's tail mass is rounding of 1 - sum q


@dataclass
class TopkDivergence:
    """Output D over the listed tokens.  ids [N, K], -1 = padding; logq [N, K]"""

    ids: Tensor
    logq: Tensor
    kind: Kind
    beta: float
    tail: Tail
    temperature: float
    softcap: float | None
    owned: bool  # the logits are a buffer that may be overwritten
    teacher: Source | None = None

    def run(self, rows, logits, saved=None, grads=None, da=None):
        padding, form, how = self.ids[rows] < 0, backend_for(logits), (self.temperature, self.softcap)
        ids = torch.where(padding, self.ids[rows, :1], self.ids[rows])  # repeats the first, which is never padding
        listed, none = logits.gather(-1, ids), torch.full_like(ids[:, 0], -1)
        rest = logits if self.owned else logits.clone() if da is None else da.copy_(logits)
        rest = rest.scatter_(-1, ids, -torch.inf)
        outputs = ()
        if saved is None:
            m, log_s = row_stats[form](rest, none, *how, False)[2:]
            empty = m == -torch.inf  # every token is listed
            c = capped(listed, self.softcap).masked_fill(padding, -torch.inf)
            d, slopes = self.outcomes(rows, c, m, log_s.masked_fill(empty, -torch.inf))
            outputs, saved = (d,), (slopes, m.masked_fill(empty, 0), log_s.masked_fill(empty, 0))
        if da is not None:
            (slopes, m, log_s), g = saved, grads[0][:, None]
            slopes = torch.where(g == 0, 0, g * slopes)
            row_grad[form](da, rest, none, m, log_s, m, -slopes[:, -1], None, *how)
            here = slopes[:, :-1] * cap_slope(listed, self.softcap, self.temperature)
            da.scatter_(-1, ids, torch.where(padding, here[:, :1], here).to(da.dtype))  # what repeats writes the same
        return outputs, saved

    def outcomes(self, rows: slice, c: Tensor, m: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        """D [R], and dD/dx of the listed tokens and of the rest [R, K + 1].  c listed logits; m, log_s of the rest"""
        top = torch.maximum(m, c.amax(-1))[:, None]
        rest = torch.where(log_s == -torch.inf, log_s, (m - top[:, 0]) / self.temperature + log_s)[:, None]
        logp = (c - top) / self.temperature
        logq = self.logq[rows].to(c.dtype).masked_fill(self.ids[rows] < 0, -torch.inf)
        log_all = torch.cat([logp, rest], -1).logsumexp(-1, keepdim=True)
        if self.tail == "renorm":
            logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
        else:
            logp = logp - log_all
        if self.tail == "bucket":
            mass = 1 - logq.exp().sum(-1, keepdim=True)
            zero = TAIL_FLOOR if self.kind == "reverse_kl" else 0  # the reverse KL divides by it
            mass = mass.masked_fill(mass < TAIL_FLOOR, zero)
            logp, logq = torch.cat([logp, rest - log_all], -1), torch.cat([logq, mass.log()], -1)
        whole = self.tail != "drop"
        d, slopes = value_and_slope(logp, logp.exp(), logq, logq.exp(), self.kind, self.beta, whole)
        if self.tail == "bucket":
            return d, slopes
        unlisted = slopes.sum(-1, keepdim=True)
        return d, torch.cat([slopes, torch.zeros_like(unlisted) if whole else -unlisted], -1)


def linear_topk_divergence(
    hidden: Tensor, weight: Tensor | None, topk_ids: Tensor, topk_logprobs: Tensor, kind: Kind, beta: float = 0.5,
    tail: Tail = "bucket", temperature: float = 1.0, bias: Tensor | None = None, softcap: float | None = None,
    vocab_size: int | None = None, token_weight: Tensor | None = None, chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """D a row over K listed tokens, differentiable for the student.

    hidden [*, H] of the student, weight [V, H], topk_ids [*, K] (distinct in a row, -1 = padding but never first),
    topk_logprobs [*, K] of the teacher over its full vocabulary at the same temperature -> D [*].
    With token_weight [*] (no gradient) -> (sum of token_weight x D, D without gradient), as in linear_divergence.
    """
    source, k = source_of(hidden, weight, bias, vocab_size), topk_ids.shape[-1]
    check_kind(kind, beta, temperature)
    check(temperature, topk_ids, source.width)
    if tail not in ("bucket", "renorm", "drop"):
        raise ValueError(f"tail must be bucket, renorm or drop, got {tail}")
    if topk_ids.device.type == "cpu":  # a GPU would have to wait
        ordered = topk_ids.sort(-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("a token is listed twice in a row of topk_ids")
    ids, logq = topk_ids.reshape(-1, k).long(), topk_logprobs.detach().reshape(-1, k)
    op = TopkDivergence(ids, logq, kind, beta, tail, temperature, softcap, weight is not None)
    outputs = apply(op, source, chunk, token_weight, hidden.shape[:-1])
    return outputs if len(outputs) > 1 else outputs[0]


def topk_divergence(logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, kind: Kind, *args, **options):
    """linear_topk_divergence of logits [*, V] that exist already."""
    return linear_topk_divergence(logits, None, topk_ids, topk_logprobs, kind, *args, **options)
