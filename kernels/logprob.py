"""Log-probabilities of chosen tokens and entropies, from logits or straight from hidden states and the LM head.

    c = cap tanh(a / cap), or a     m = max c     u = (c - m) / T     s = sum exp u     w = sum u exp u
    logp = u_y - log s              p = exp u / s                     H = log s - w / s          (nats)
    da_v = (g ([v=y] - p_v) - g_H p_v (log p_v + H)) (1 - (c_v / cap)^2) / T

with y the chosen token, a the raw logits, T the temperature and g, g_H the gradients of logp and H. The maximum goes
off before dividing by T and (m, log s) are kept apart: near -3000 their sum would cost three digits. Saved for the
backward: m, log s and H, three floats a row. Over tiles of a row, s and w move to a new maximum m' by

    d = (m - m') / T      w <- e^d (w + d s)      s <- e^d s

Entries of -inf are tokens of probability 0: they add nothing to s, w or any gradient (0 * -inf is 0 here).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.kernels.backend import backend_for, jit, launch, tile_for, tl
from posttrain.kernels.head import Source, apply, check, chunks, source_of

NEVER = -1000.0  # nats; exp of it is 0 in every dtype, and 0 * NEVER is 0 where 0 * -inf is NaN
BLOCK_ELEMENTS = {"cpu": 2**17}  # the twins work on as many rows at a time as stay in a core's cache; else 256 MiB


# --- the twins: PyTorch


def blocks(logits: Tensor) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS.get(logits.device.type, 2**26) // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, max(1, len(logits)), step)]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """c; what is masked with -inf stays masked."""
    c = logits if logits.dtype == torch.float64 else logits.float()
    return (softcap * torch.tanh(c / softcap)).masked_fill_(c == -torch.inf, -torch.inf) if softcap else c


def cap_slope(logits: Tensor, softcap: float | None, temperature: float) -> Tensor | float:
    """du/da, the last factors of da."""
    c = logits if logits.dtype == torch.float64 else logits.float()
    return (1 - torch.tanh(c / softcap) ** 2) / temperature if softcap else 1 / temperature


def row_stats_torch(logits: Tensor, ids: Tensor, temperature: float, softcap: float | None, entropy: bool = True):
    """[R, V], [R] (negative: none, its logp is of no use) -> logp, H (of no use unless entropy), m, log s: [R]"""
    out = []
    for block in blocks(logits):
        c = capped(logits[block], softcap)
        m = c.amax(-1, keepdim=True)
        u = (c - m).div_(temperature)
        logp = u.gather(-1, ids[block].clamp(min=0)[:, None])
        e = u.exp()
        s = e.sum(-1, keepdim=True)
        w = torch.linalg.vecdot(e, u.clamp_(min=NEVER))[:, None] if entropy else 0 * s
        out.append(torch.cat([logp - s.log(), s.log() - w / s, m, s.log()], -1))
    return torch.cat(out).unbind(-1)


def row_grad_torch(da, logits, ids, m, log_s, entropy, g, g_entropy, temperature, softcap) -> None:
    """Write da [R, V] (it may be logits itself).  m, log_s, entropy, g [R], g_entropy [R] or None"""
    for block in blocks(logits):
        logp = (capped(logits[block], softcap) - m[block, None]).div_(temperature).sub_(log_s[block, None])
        p, weight = logp.exp(), -g[block, None]
        if g_entropy is not None:
            weight = weight - g_entropy[block, None] * logp.clamp_(min=NEVER).add_(entropy[block, None])
        target = torch.where(ids[block] < 0, 0, g[block])[:, None]
        grad = p.mul_(weight).scatter_add_(-1, ids[block].clamp(min=0)[:, None], target)
        da[block] = grad.mul_(cap_slope(logits[block], softcap, temperature))


# --- the kernels: Triton, one program a row


@jit
def load_capped(row, cols, V, cap, HAS_CAP: tl.constexpr):
    """A tile of c in fp32, -inf beyond the row's end."""
    c = tl.load(row + cols, mask=cols < V, other=0.0).to(tl.float32)
    if HAS_CAP:
        c = tl.where(c == -float("inf"), c, cap * (2 * tl.sigmoid(2 * c / cap) - 1))
    return tl.where(cols < V, c, -float("inf"))


@jit
def cap_factor(c, cap):
    """1 - (c / cap)^2, 0 where masked."""
    t = tl.maximum(c / cap, -1.0)
    return 1 - t * t


@jit
def online(m, s, w, c, temperature):
    """m, s, w of a row after one more tile c; a tile, or a past, of nothing but -inf changes nothing."""
    m_new = tl.maximum(m, tl.max(c, 0))
    base = tl.where(m_new == -float("inf"), 0.0, m_new)
    d = tl.where(m == -float("inf"), 0.0, (m - base) / temperature)
    r = tl.where(m == -float("inf"), 0.0, tl.exp(d))
    u = (c - base) / temperature
    e = tl.exp(u)
    w = r * w + tl.where(r > 0, r * d * s, 0.0)  # d may be -inf
    return m_new, r * s + tl.sum(e, 0), w + tl.sum(tl.where(e > 0, e * u, 0.0), 0)


@jit
def row_stats_kernel(logits, ids, stats, stride, R, V, temperature, cap, HAS_CAP: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    m, s, w = -float("inf"), 0.0, 0.0
    for start in range(0, V, TILE):
        m, s, w = online(m, s, w, load_capped(logits, start + tl.arange(0, TILE), V, cap, HAS_CAP), temperature)
    y = tl.maximum(tl.load(ids + row), 0) + tl.arange(0, 1)
    u = (tl.max(load_capped(logits, y, V, cap, HAS_CAP), 0) - m) / temperature  # -inf for a token beyond V
    tl.store(stats + row, u - tl.log(s))
    tl.store(stats + R + row, tl.log(s) - w / s)
    tl.store(stats + 2 * R + row, m)
    tl.store(stats + 3 * R + row, tl.log(s))


@jit
def row_grad_kernel(
    da, logits, ids, m, log_s, entropy, g, g_entropy, da_stride, stride, V, temperature, cap,
    HAS_ENTROPY: tl.constexpr, HAS_CAP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    da += row * da_stride
    logits += row * stride
    m, log_s, g, y = tl.load(m + row), tl.load(log_s + row), tl.load(g + row), tl.load(ids + row)
    h, g_h = tl.load(entropy + row), tl.load(g_entropy + row)
    for start in range(0, V, TILE):
        cols = start + tl.arange(0, TILE)
        c = load_capped(logits, cols, V, cap, HAS_CAP)
        logp = (c - m) / temperature - log_s
        p = tl.exp(logp)
        grad = tl.where(cols == y, g, 0.0) - g * p
        if HAS_ENTROPY:
            grad -= g_h * tl.where(p > 0, p * (logp + h), 0.0)
        if HAS_CAP:
            grad *= cap_factor(c, cap)
        tl.store(da + cols, (grad / temperature).to(da.dtype.element_ty), mask=cols < V)


def row_stats_triton(logits, ids, temperature, softcap, entropy=True):
    stats, (n, width) = logits.new_empty(4, len(logits), dtype=torch.float32), logits.shape
    numbers = (logits.stride(0), n, width, temperature, softcap or 0.0, bool(softcap))
    launch(row_stats_kernel, n, logits, logits, ids.contiguous(), stats, *numbers, **tile_for(width))
    return stats.unbind()


def row_grad_triton(da, logits, ids, m, log_s, entropy, g, g_entropy, temperature, softcap) -> None:
    (n, width), forms = logits.shape, (g_entropy is not None, bool(softcap))
    rows = [x.contiguous() for x in (ids, m, log_s, entropy, g, g if g_entropy is None else g_entropy)]
    numbers = (da.stride(0), logits.stride(0), width, temperature, softcap or 0.0)
    launch(row_grad_kernel, n, logits, da, logits, *rows, *numbers, *forms, **tile_for(width))


row_stats = {"torch": row_stats_torch, "triton": row_stats_triton}
row_grad = {"torch": row_grad_torch, "triton": row_grad_triton}


# --- the operations


@dataclass
class TokenLogp:
    """Outputs logp and, if asked for, H; both 0 on ignored rows, whose ids are -1 here."""

    ids: Tensor
    temperature: float
    softcap: float | None
    entropy: bool
    teacher: Source | None = None

    def run(self, rows, logits, saved=None, grads=None, da=None):
        form, ids, how = backend_for(logits), self.ids[rows], (self.temperature, self.softcap)
        outputs, ignored = (), ids < 0
        if saved is None:
            logp, entropy, m, log_s = row_stats[form](logits, ids, *how, self.entropy)
            outputs = [x.masked_fill(ignored, 0) for x in (logp, entropy)[: 1 + self.entropy]]
            saved = (m, log_s, entropy)
        if da is not None:
            g, g_entropy = (x if x is None else x.masked_fill(ignored, 0) for x in (*grads, None)[:2])
            g = torch.zeros_like(saved[0]) if g is None else g
            row_grad[form](da, logits, ids, *saved, g, g_entropy, *how)
        return outputs, saved


def linear_token_logp(
    hidden: Tensor, weight: Tensor | None, ids: Tensor, bias: Tensor | None = None, temperature: float = 1.0,
    softcap: float | None = None, ignore_index: int = -100, entropy: bool = True, vocab_size: int | None = None,
    chunk: int | None = None, token_weight: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Log-prob of ids and entropy (nats) of the row's distribution, both differentiable.

    hidden [*, H], weight [V, H], ids [*] int -> logp [*], entropy [*] or None; fp32, float64 for float64 input.
    vocab_size slices padding rows off the head. Rows with ignore_index give 0 and no gradient. chunk: rows at a time.
    """
    source = source_of(hidden, weight, bias, vocab_size)
    check(temperature, ids, source.width, ignore_index)
    flat = ids.reshape(-1).long()
    op = TokenLogp(flat.masked_fill(flat == ignore_index, -1), temperature, softcap, entropy)
    outputs = apply(op, source, chunk, token_weight, ids.shape)
    return outputs if entropy else (*outputs, None)


def token_logp(logits: Tensor, ids: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """linear_token_logp of logits [*, V] that exist already: their gradient [*, V] is the only large tensor made.

    Of logits[:, :-1] with a batch dimension torch makes a copy: better slice the hidden states.
    """
    return linear_token_logp(logits, None, ids, **options)


def linear_weighted_logp(hidden, weight, ids, token_weight: Tensor, bias=None, entropy: bool = False, **options):
    """sum of token_weight x logp for weights that are known beforehand: one product less than linear_token_logp.

    SFT, REINFORCE, or the first on-policy step, where every ratio is 1. token_weight [*] gets no gradient
    -> scalar with gradient; logp [*] and entropy [*] or None without.
    """
    return linear_token_logp(hidden, weight, ids, bias, entropy=entropy, token_weight=token_weight, **options)


@torch.no_grad()
def linear_topk_logp(
    hidden: Tensor, weight: Tensor, k: int = 0, ids: Tensor | None = None, bias: Tensor | None = None,
    temperature: float = 1.0, softcap: float | None = None, vocab_size: int | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K tokens a row and their log-probs over the full vocabulary, without gradient: the k likeliest, or the given ids.

    hidden [n, H], weight [V, H], ids [n, K] (-1 = padding, its log-prob is -inf) -> ids [n, K], log-probs [n, K]
    """
    source, out = source_of(hidden, weight, bias, vocab_size), []
    check(temperature, ids, source.width)
    if ids is None and not 0 < k <= source.width:
        raise ValueError(f"k must be in 1..{source.width}, got {k}")
    for rows, (logits,) in chunks(chunk, source):
        none = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        _, _, m, log_s = row_stats[backend_for(logits)](logits, none, temperature, softcap, False)
        listed = logits.topk(k, -1).indices if ids is None else ids[rows]
        c = capped(logits.gather(-1, listed.clamp(min=0)), softcap)
        logps = (c - m[:, None]) / temperature - log_s[:, None]
        out.append((listed, logps.masked_fill(listed < 0, -torch.inf)))
    return tuple(torch.cat(parts) for parts in zip(*out, strict=True))
