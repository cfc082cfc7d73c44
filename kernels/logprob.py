"""Log-probabilities of chosen tokens straight from hidden states and the LM head.

    x = head(hidden) / T      logp = x_y - logsumexp(x)      H = -sum_v p_v log p_v

A plain version holds the logits of every token, forward and backward: n x V x 4 bytes several times over
(2,048 tokens x 151,936 entries: 1.2 GB a copy). Here at most one chunk of rows exists at a time.
"""

import torch
from torch import Tensor

from posttrain.kernels.chunking import check_temperature, in_chunks, project


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of ids and entropy (nats) of the row's distribution, both differentiable.

    hidden [*, H], weight [V, H], ids [*] int -> logp [*], entropy [*] or None; fp32, float64 for float64 input.
    vocab_size slices padding rows off the head. Rows with ignore_index give 0 and no gradient.
    """
    check_temperature(temperature)
    width = vocab_size or weight.shape[0]
    flat = ids.reshape(-1)
    kept = flat != ignore_index
    if flat.numel() and not bool(((flat >= 0) & (flat < width) | ~kept).all()):
        raise ValueError(f"token ids must be in [0, {width}) or {ignore_index}")

    def rows(hidden: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        x = project(hidden, weight, bias, temperature, softcap, vocab_size)
        log_s = x.logsumexp(-1)
        logp = x.gather(-1, ids.clamp(min=0)[:, None]).squeeze(-1) - log_s
        out = [torch.where(kept, logp, 0.0)]
        if entropy:
            p = (x - log_s[:, None]).exp()
            mean_x = (p * x.masked_fill(p == 0, 0)).sum(-1)  # 0 * -inf is 0 here
            out.append(torch.where(kept, log_s - mean_x, 0.0))
        return tuple(out)

    out = in_chunks(rows, (hidden.reshape(-1, hidden.shape[-1]), flat, kept), width, chunk)
    logp, *rest = (x.reshape(ids.shape) for x in out)
    return logp, rest[0] if rest else None


def linear_gather_logp(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Log-probs of K tokens a row.  hidden [n, H], weight [V, H], ids [n, K] (-1 = padding) -> [n, K]; padding -inf"""
    check_temperature(temperature)
    width = vocab_size or weight.shape[0]
    if ids.numel() and not bool(((ids >= -1) & (ids < width)).all()):
        raise ValueError(f"token ids must be in [0, {width}) or -1")

    def rows(hidden: Tensor, ids: Tensor) -> tuple[Tensor]:
        x = project(hidden, weight, bias, temperature, softcap, vocab_size)
        logps = x.gather(-1, ids.clamp(min=0)) - x.logsumexp(-1, keepdim=True)
        return (logps.masked_fill(ids < 0, -torch.inf),)

    return in_chunks(rows, (hidden, ids), vocab_size or weight.shape[0], chunk)[0]


@torch.no_grad()
def linear_topk_logp(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens a row and their log-probs over the full vocabulary.  [n, H], [V, H] -> [n, k], [n, k]"""
    check_temperature(temperature)
    width = vocab_size or weight.shape[0]
    if not 0 < k <= width:
        raise ValueError(f"k must be in 1..{width}, got {k}")

    def rows(hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = project(hidden, weight, bias, temperature, softcap, vocab_size)
        values, ids = x.topk(k, dim=-1)
        return ids, values - x.logsumexp(-1, keepdim=True)

    return in_chunks(rows, (hidden,), width, chunk)
