"""The LM head in chunks of rows: the linear algebra around every row operation of this folder.

A row operation turns a row of logits a [V] into a number D (logprob.py: a log-prob; divergence.py: a divergence). With
h [N, H] hidden states, W [V, H] and b [V] the head, g = dL/dD, and R rows at a time:

    forward     a = h W^T + b
    backward    da = g dD/da     dh = da W     dW = sum over chunks da^T h     db = sum over rows da

The plain version keeps a, its softmax and da of all N rows: 3 N V floats. Here one buffer of R V floats is reused (two
with a teacher, which adds a product a pass), and da overwrites a (bf16 on a GPU: it has a bf16 buffer). Three ways, by
what is known when, and their products of N H V multiply-adds, with a frozen head in brackets (plain: 3 [2]):

    two-phase     g comes with the backward, which computes a again.                                          4 [3]
    one-pass      token weights g are given: da, dh, dW in the forward; the backward multiplies by a scalar.  3 [2]
    factorised    frozen head, g unknown: dD/dh [N, H] does not depend on g; store it, dh = g dD/dh.            [2]

Logits and sums are fp32 whatever the operands' dtype (float64 for float64): bf16 logits would put 5e-2 nats of noise on
a log-prob. dW grows in a fixed order of chunks without atomics, so two runs are equal to the bit. An operation has

    run(rows, logits [R, V], [teacher's], saved=None, grads=None, da=None) -> outputs, each [R]; saved, each [R, ...]

and `teacher`, a Source or None. With da [R, V], which may be the logits themselves, g dD/da is written there; grads
holds g of each output or None. saved is what the first call for these rows returned.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_ELEMENTS = 2**23  # of a chunk: 32 MiB (one-pass without teacher: double); below 256 rows matmuls starve
GPU_ELEMENTS = 2**28  # 1 GiB; at least 1024 rows, below which dW moves more bytes than its product is worth
COLUMNS = 4096  # of W at a time on a CPU, so that a tile of it and of the logits stay in cache


class Source(NamedTuple):
    """Where rows of logits come from: hidden states and a head, or (weight None) logits that exist already."""

    x: Tensor  # [N, H], or [N, V] without a weight
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]

    @property
    def width(self) -> int:
        return self.x.shape[1] if self.weight is None else len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and results."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def half(self) -> bool:
        """Whether the GEMMs take bf16 operands (into fp32 sums: GPUs only). Else tiles are cast up first; fp16 too, in
        whose range a gradient of 1/N a token underflows.
        """
        gpu = self.x.device.type in ("cuda", "xpu") and self.weight is not None
        return gpu and self.x.dtype == self.weight.dtype == torch.bfloat16

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        step = COLUMNS if self.x.device.type == "cpu" else self.width
        for start in range(0, self.width, step):
            tile = self.weight[start : start + step]
            yield slice(start, start + step), tile if self.half else tile.to(self.dtype)

    def hidden(self, rows: slice) -> Tensor:
        return self.x[rows] if self.half else self.x[rows].to(self.dtype)

    def logits(self, rows: slice, buffer: Tensor | None) -> Tensor:
        """[R, V], in the buffer, or a view of the logits that were given."""
        if self.weight is None:
            return self.x[rows]
        h, out = self.hidden(rows), buffer[: rows.stop - rows.start]
        for columns, weight in self.tiles():
            multiply(out[:, columns], h, weight.T, add=False)
        return out if self.bias is None else out.add_(self.bias)

    def pull_back(self, rows: slice, da: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None):
        """Add da [R, V] to the gradients that are wanted."""
        h = self.hidden(rows)
        for columns, weight in self.tiles():
            if dx is not None:
                multiply(dx[rows], da[:, columns], weight, add=columns.start > 0)
            if dweight is not None:
                multiply(dweight[columns], da[:, columns].T, h, add=rows.start > 0)
        if dbias is not None:
            dbias += da.sum(0, dtype=dbias.dtype)


def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (+)= a b, where half-precision a and b may sum into an fp32 out."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=float(add))
    elif not add:
        torch.mm(a, b, out.dtype, out=out)
    else:
        for start in range(0, len(out), 16384):  # bounds the product; an addmm of these dtypes is not for every GPU
            out[start : start + 16384] += torch.mm(a[start : start + 16384], b, out.dtype)


def chunk_rows(width: int, device: str, elements: int = CPU_ELEMENTS) -> int:
    """Rows of `width` logits at a time, unless told otherwise."""
    return max(256, elements // width) if device == "cpu" else max(1024, GPU_ELEMENTS // width // 128 * 128)


def chunks(chunk: int | None, *sources: Source, elements: int = CPU_ELEMENTS) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of rows and every source's logits there, in buffers that the next slice overwrites; at least one slice."""
    n, device = len(sources[0].x), sources[0].x.device.type
    if chunk is None and (width := sum(source.width for source in sources if source.weight is not None)):
        chunk = chunk_rows(width, device, elements)
    chunk = max(1, min(chunk or n, n))
    buffers = [None if s.weight is None else s.x.new_empty(chunk, s.width, dtype=s.dtype) for s in sources]
    for start in range(0, max(1, n), chunk):
        rows = slice(start, min(start + chunk, n))
        with torch.autocast(device, enabled=False):
            logits = [source.logits(rows, buffer) for source, buffer in zip(sources, buffers, strict=True)]
        yield rows, logits


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: Any, chunk: int | None, token_weight: Tensor | None, training: bool, *source: Tensor | None):
        ctx.set_materialize_grads(False)
        student, known = Source(*source), token_weight is not None
        need = [training and needed for needed in ctx.needs_input_grad[4:]]
        early = any(need) and (known or (student.weight is not None and not any(need[1:])))  # one-pass or factorised
        grads, results = new_gradients(student, need) if early else None, []
        elements = CPU_ELEMENTS * (2 if known and not op.teacher else 1)
        for rows, logits in chunks(chunk, student, *([op.teacher] if op.teacher else []), elements=elements):
            g = (token_weight[rows] if known else torch.ones_like(student.x[rows, 0], dtype=student.dtype), None)
            results.append(run(op, student, rows, logits, None, g, grads))
        outputs, saved = ([torch.cat(x) for x in zip(*parts, strict=True)] for parts in zip(*results, strict=True))
        ctx.op, ctx.chunk, ctx.known, ctx.grads = op, chunk, known, grads
        ctx.save_for_backward(*source, *([] if known else saved))
        if not known:
            return tuple(outputs)
        ctx.mark_non_differentiable(*outputs)
        return torch.where(token_weight == 0, 0, token_weight * outputs[0]).sum(), *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor | None):
        x, weight, bias, *saved = ctx.saved_tensors  # once: activation checkpointing forbids a second look
        source, grads = (x, weight, bias), ctx.grads
        student = Source(*source)
        if all(g is None for g in upstream):
            return (None,) * 7
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph: keep ours as they are
        ctx.grads = grads if again else None
        if ctx.known:
            grads = [g if g is None else g * upstream[0] if again else g.mul_(upstream[0]) for g in grads]
        elif grads and all(g is None for g in upstream[1:]):
            g = upstream[0][:, None]
            grads = [torch.where(g == 0, 0, grads[0] * g), None, None]  # a row without weight may be infinite
        else:
            grads = new_gradients(student, ctx.needs_input_grad[4:])
            for rows, logits in chunks(ctx.chunk, student, *([ctx.op.teacher] if ctx.op.teacher else [])):
                g = [g if g is None else g[rows] for g in upstream]
                run(ctx.op, student, rows, logits, [s[rows] for s in saved], g, grads)
        grads = [g if g is None else g.to(of.dtype) for g, of in zip(grads, source, strict=True)]
        return None, None, None, None, *grads


def new_gradients(source: Source, need: list[bool]) -> list[Tensor | None]:
    """What the chunks fill: sums in fp32, but given logits' gradient in their own dtype. Only db starts at 0."""
    dtype = source.x.dtype if source.weight is None else source.dtype
    new = (torch.empty_like, torch.empty_like, torch.zeros_like)
    like = zip(new, source, need, strict=True)
    return [f(x, dtype=dtype, memory_format=torch.contiguous_format) if needed else None for f, x, needed in like]


def run(op: Any, source: Source, rows: slice, logits: list[Tensor], saved: Any, g: Any, grads: list | None) -> Any:
    """One chunk: op's outputs and, where grads are wanted, its share of them."""
    with torch.autocast(source.x.device.type, enabled=False):
        if not grads:
            return op.run(rows, *logits)
        if source.weight is None:
            return op.run(rows, *logits, saved=saved, grads=g, da=grads[0][rows])
        da = torch.empty_like(logits[0], dtype=source.x.dtype) if source.half else logits[0]
        result = op.run(rows, *logits, saved=saved, grads=g, da=da)
        source.pull_back(rows, da, *grads)
        return result


def source_of(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, vocab_size: int | None = None) -> Source:
    """x [*, H] (or logits [*, V]) as rows and the head, without the entries beyond vocab_size that pad it."""
    x = x.reshape(-1, x.shape[-1])
    if weight is None:
        if bias is not None:
            raise ValueError("a bias belongs to a head: add it to the logits yourself")
        return Source(x[:, :vocab_size] if x.stride(-1) == 1 else x[:, :vocab_size].contiguous())
    if vocab_size not in (None, len(weight)):  # the gradient of a slice is one more [V, H]: only where it must be
        weight, bias = weight[:vocab_size], bias if bias is None else bias[:vocab_size]
    return Source(x, weight, bias)


def apply(op: Any, source: Source, chunk: int | None, token_weight: Tensor | None, shape: torch.Size) -> tuple:
    """op's outputs [*shape]; with token_weight [*], before them the sum of weight x output 1, which alone trains."""
    if token_weight is not None:
        token_weight = token_weight.detach().reshape(-1).to(source.dtype)
    outputs = Rows.apply(op, chunk, token_weight, torch.is_grad_enabled(), *source)
    total = () if token_weight is None else outputs[:1]
    return *total, *(x.view(shape) for x in outputs[len(total) :])


def check(temperature: float, ids: Tensor | None = None, width: int = 0, ignored: int = -1) -> None:
    """ValueError on a temperature that is not positive or, on a CPU (a GPU would have to wait), ids out of range."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if ids is not None and ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < width) | (ids == ignored)).all()):
        raise ValueError(f"token ids must be in [0, {width}) or {ignored}")
