"""Rows in chunks: no operation of this folder holds more than one chunk of [rows, vocabulary]."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**23  # 32 MiB of fp32 logits a buffer; never fewer than 256 rows, below which matmuls starve


def in_chunks(fn: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], width: int, chunk: int | None):
    """fn on slices of `rows` (tensors that share dimension 0), its outputs concatenated.

    Each chunk's logits are dropped after the forward and computed again in the backward, so the peak is one
    chunk of [chunk, width] whatever the number of rows. One chunk in all needs no recomputation.
    """
    n = rows[0].shape[0]
    chunk = chunk or max(256, CHUNK_ELEMENTS // width)
    if n <= chunk:
        return fn(*rows)
    pieces = []
    for start in range(0, n, chunk):
        piece = [row[start : start + chunk] for row in rows]
        if torch.is_grad_enabled():
            pieces.append(checkpoint(fn, *piece, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(fn(*piece))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
) -> Tensor:
    """Logits of the LM head over the temperature, centred on their row maximum.  [n, H], [V, H] -> [n, V]

    In fp32 whatever the inputs' dtype (float64 stays): bf16 logits would put 5e-2 nats of noise on a log-prob.
    Centring before dividing by the temperature keeps large logits exact; a shift changes no probability.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = hidden.to(dtype) @ weight[:vocab_size].to(dtype).T
        if bias is not None:
            logits = logits + bias[:vocab_size].to(dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits - logits.detach().amax(-1, keepdim=True)) / temperature


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
