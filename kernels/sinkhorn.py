"""Entropic optimal transport for many small problems at once, and the pairwise cost between two sets of distributions.

    C_ij = sum_v |P_iv - Q_jv| (l1), sum_v (P_iv - Q_jv)^2 (sql2) or its root (l2);  P, Q = softmax(logits / T)
    S = -C/eps, g^0 = 0;  k = 1..I:  f^k_i = log a_i - LSE_j(S_ij + g^(k-1)_j),  g^k_j = log b_j - LSE_i(S_ij + f^k_i)
    plan = exp(S + f^I + g^I), whose columns sum to b exactly and rows to a in the limit;  value = sum plan C

Derivative through all I iterations. D = -(dvalue/dS)/eps starts as plan S; e and h are what reaches f and g:
    e = rowsum(plan S), h = colsum(plan S);  k = I..1:
        X = exp(S + f^k + g^k) h/b,      D -= X,  e -= rowsum X
        Y = exp(S + f^k + g^(k-1)) e/a,  D -= Y,  h = -colsum Y, e = 0;      at the end dvalue/dC = plan + D
grad="envelope" leaves D out: the exact gradient of the regularised optimum sum plan (C + eps log plan), not of value.
dC_ij/dP_iv = sign(P_iv - Q_jv), 0 at ties (l1); (P_iv - Q_jv)/C_ij, 0 where C is 0 (l2); 2 (P_iv - Q_jv) (sql2).

The kernel saves C, plan and all f^k, g^k for its backward: 2 A B + I (A + B) numbers a problem, where autograd through
the loop keeps at least 2 I A B. The cost saves P, Q and C; their differences [A, B, V] never exist at once.

The twin spares the 2 I A B exponentials. One iteration in the log domain gives K = exp(S + f + g), whose columns sum to
b: none has underflowed. From there f^k = f + log u and g^k = g + log v with u = a/(K v) and v = b/(K'u). Rows of K sum
to between a_i min(b)/sum(a) and sum(b), and iterations only draw them nearer to a, so each multiplies u and v by at
most r = max(sum(a)/min(b), sum(b)/min(a)). Before r^k can leave float64 (`horizon`), the next log-domain iteration
absorbs u and v in a new K. In the backward X and Y are K with rows and columns scaled: the sum of them all is K times,
elementwise, one matrix product. The twin saves K, u and v, and exp(S + f + g) between the two steps that made K.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.kernels.backend import backend_for, jit, launch, tl

COST_TILES = ((16, 256, 4),)  # columns of C and vocabulary entries at a time, warps
SINKHORN_TILES = ((16, 16, 2), (32, 32, 4), (64, 64, 8))  # rows, columns, warps: C stays in registers; else the twin


# --- pairwise cost


def cost_twin(p: Tensor, q: Tensor, metric: str) -> Tensor:
    """Differences, forward and backward: |P|^2 + |Q|^2 - 2PQ' would lose every digit near 0.  -> [G, A, B]"""
    cost = torch.cdist(p, q, 1.0 if metric == "l1" else 2.0, compute_mode="donot_use_mm_for_euclid_dist")
    return cost**2 if metric == "sql2" else cost


@jit
def difference(p, q, cols, v, B, V):
    """P_iv - Q_jv of a tile, 0 outside.  -> [COLS, TILE]"""
    inside = (cols < B)[:, None] & (v < V)[None, :]
    at = q + cols.to(tl.int64)[:, None] * V + v[None, :]
    return tl.where(inside, tl.load(p + v, v < V, 0.0)[None, :] - tl.load(at, inside, 0.0), 0.0)


@jit
def cost_kernel(P, Q, C, A, B, V, L1: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # one program a row of C
    p, q = P + row * V, Q + row // A * B * V
    for j in range(0, B, COLS):
        cols, total = j + tl.arange(0, COLS), tl.zeros([COLS], tl.float32)
        for start in range(0, V, TILE):
            d = difference(p, q, cols, start + tl.arange(0, TILE), B, V)
            total += tl.sum(tl.abs(d) if L1 else d * d, 1)
        tl.store(C + row * B + cols, total, cols < B)


@jit
def cost_grad_kernel(P, Q, W, dP, A, B, V, L1: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr):
    """dP_iv = sum_j W_ij (P_iv - Q_jv), or of its sign for l1"""
    row = tl.program_id(0).to(tl.int64)
    p, q = P + row * V, Q + row // A * B * V
    for start in range(0, V, TILE):
        v, total = start + tl.arange(0, TILE), tl.zeros([TILE], tl.float32)
        for j in range(0, B, COLS):
            cols = j + tl.arange(0, COLS)
            d = difference(p, q, cols, v, B, V)
            d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)) if L1 else d
            total += tl.sum(tl.load(W + row * B + cols, cols < B, 0.0)[:, None] * d, 0)
        tl.store(dP + row * V + v, total, v < V)


class PairwiseCost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, q, metric):
        (n, a, v), b, (*tile, warps) = p.shape, q.shape[1], COST_TILES[0]
        cost = p.new_empty(n, a, b)
        launch(cost_kernel, n * a, p, p, q, cost, a, b, v, metric == "l1", *tile, num_warps=warps)
        cost = cost.sqrt_() if metric == "l2" else cost
        ctx.save_for_backward(p, q, cost)
        ctx.metric = metric
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (p, q, cost), (*tile, warps) = ctx.saved_tensors, COST_TILES[0]
        (n, a, v), b, l1, grad = p.shape, q.shape[1], ctx.metric == "l1", torch.empty_like(p)
        slope = 1 if l1 else 2 if ctx.metric == "sql2" else torch.where(cost > 0, 1 / cost, 0)
        weight = (upstream * slope).contiguous()
        launch(cost_grad_kernel, n * a, p, p, q, weight, grad, a, b, v, l1, *tile, num_warps=warps)
        return grad, None, None


def pairwise_cost(
    student: Tensor, teacher: Tensor, metric: Literal["l1", "l2", "sql2"] = "l1", temperature: float = 1.0
) -> Tensor:
    """Distance of each student row's softmax to each teacher row's.  Logits [*, A, V], [*, B, V] -> [*, A, B]

    fp32, float64 for float64 logits. Differentiable for the student only.
    """
    if metric not in ("l1", "l2", "sql2") or not temperature > 0:
        raise ValueError(f"metric must be l1, l2 or sql2 and temperature positive; got {metric}, {temperature}")
    if student.dim() < 2 or student.shape[:-2] + student.shape[-1:] != teacher.shape[:-2] + teacher.shape[-1:]:
        raise ValueError(f"need logits [*, A, V] and [*, B, V], got {[*student.shape]} and {[*teacher.shape]}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    p, q = student.to(dtype), teacher.detach().to(dtype)
    if not (p.numel() and q.numel()):
        return p.sum(-1)[..., :, None] * q.sum(-1)[..., None, :]  # zeros or empty, but in the graph
    p, q = (((x - x.detach().amax(-1, keepdim=True)) / temperature).softmax(-1) for x in (p, q))
    flat = [x.reshape(-1, *x.shape[-2:]).contiguous() for x in (p, q)]
    cost = PairwiseCost.apply(*flat, metric) if backend_for(student) == "triton" else cost_twin(*flat, metric)
    return cost.reshape(*p.shape[:-1], q.shape[-2])


# --- Sinkhorn


def horizon(a: Tensor, b: Tensor) -> int:
    """Iterations that one K serves: r^(horizon - 1) bounds u and v, so that u v' stays below (largest float)^0.6."""
    r = max((a.sum(-1).max() / b.min()).item(), (b.sum(-1).max() / a.min()).item())
    return 1 + int(0.3 * math.log(torch.finfo(a.dtype).max) / max(math.log(r), 0.1))


def normalised(x: Tensor, dim: int, marginal: Tensor) -> tuple[Tensor, Tensor]:
    """marginal softmax(x), written over x, and log marginal - LSE(x), over dim."""
    top = x.amax(dim, keepdim=True)
    total = x.sub_(top).exp_().sum(dim, keepdim=True)
    return x.mul_(marginal / total), marginal.log() - top - total.log()


def forward_twin(scores: Tensor, a: Tensor, b: Tensor, iters: int) -> tuple[Tensor, list[Tensor]]:
    """S [G, A, B], a [G, 1, A], b [G, 1, B] -> plan and, for each K, what the header says: two [G, A, B], u [G, n, A]
    and v [G, n, B]. Vectors are rows, since bmm is several times faster with those from the left.
    """
    every, g, saved = horizon(a, b), 0, []
    for start in range(0, iters, every):
        by_row, f = normalised(scores + g, -1, a.mT)
        matrix, g = normalised(scores + f, -2, b)
        u, v = [torch.ones_like(a)], [torch.ones_like(b)]
        for _ in range(start + 1, min(start + every, iters)):
            u.append(a / v[-1].bmm(matrix.mT))
            v.append(b / u[-1].bmm(matrix))
        g = g + v[-1].log()
        saved += by_row, matrix, torch.cat(u, 1), torch.cat(v, 1)
    return (matrix * u[-1].mT).mul_(v[-1]), saved


def backward_twin(a: Tensor, b: Tensor, saved: list[Tensor], e: Tensor, h: Tensor, grad: Tensor) -> None:
    """Takes all X and Y off grad [G, A, B]. e [G, 1, A] and h [G, 1, B] as the header starts them."""
    for i in reversed(range(0, len(saved), 4)):
        by_row, matrix, *uv = saved[i : i + 4]
        u_over_a, v_over_b, u, v = (x.split(1, 1) for x in (uv[0] / a, uv[1] / b, *uv))
        x, y = [], []  # X = K u y' and Y = K x v', elementwise
        for k in reversed(range(len(u))):
            y.append(v_over_b[k] * h)
            e = e - u[k] * y[-1].bmm(matrix.mT)
            x.append(u_over_a[k] * e)
            if k:
                h, e = -v[k - 1] * x[-1].bmm(matrix), 0
        log_step = x.pop()
        h, e = -log_step.bmm(by_row), 0
        products = torch.cat([*u[::-1], *x], 1).mT.bmm(torch.cat([*y, *v[-2::-1]], 1))
        grad -= products.mul_(matrix).addcmul_(by_row, log_step.mT)


@jit
def step(s, other, log_marginal, inside, AXIS: tl.constexpr):
    """log marginal - LSE(S + other) over an axis of the tile, 0 outside the problem."""
    x = s + tl.expand_dims(other, 1 - AXIS)
    top = tl.where(inside, tl.max(x, AXIS), 0.0)
    return tl.where(inside, log_marginal - top - tl.log(tl.sum(tl.exp(x - tl.expand_dims(top, AXIS)), AXIS)), 0.0)


@jit
def sinkhorn_kernel(C, a, b, f, g, A, B, iters, scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program a problem. f [I, G, A], g [I + 1, G, B] with g^0 = 0."""
    n, G = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (rows < A)[:, None] & (cols < B)[None, :]
    c = tl.load(C + n * A * B + rows[:, None] * B + cols[None, :], inside, 0.0).to(tl.float32)
    s = tl.where(inside, scale * c, -float("inf"))
    log_a = tl.log(tl.load(a + n * A + rows, rows < A, 1.0))
    log_b = tl.log(tl.load(b + n * B + cols, cols < B, 1.0))
    g_k = tl.zeros([COLS], tl.float32)
    for k in range(iters):
        f_k = step(s, g_k, log_a, rows < A, 1)
        g_k = step(s, f_k, log_b, cols < B, 0)
        tl.store(f + (k * G + n) * A + rows, f_k, rows < A)
        tl.store(g + ((k + 1) * G + n) * B + cols, g_k, cols < B)


@jit
def sinkhorn_grad_kernel(C, a, b, f, g, e, h, grad, A, B, iters, scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Takes all X and Y off grad, as the twin."""
    n, G = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside, at = (rows < A)[:, None] & (cols < B)[None, :], n * A * B + rows[:, None] * B + cols[None, :]
    s = tl.where(inside, scale * tl.load(C + at, inside, 0.0).to(tl.float32), -float("inf"))
    d, a, b = (
        tl.load(grad + at, inside, 0.0),
        tl.load(a + n * A + rows, rows < A, 1.0),
        tl.load(b + n * B + cols, cols < B, 1.0),
    )
    e, h = tl.load(e + n * A + rows, rows < A, 0.0), tl.load(h + n * B + cols, cols < B, 0.0)
    g_k = tl.load(g + (iters * G + n) * B + cols, cols < B, 0.0)
    for back in range(iters):
        k = iters - 1 - back
        by_row = s + tl.load(f + (k * G + n) * A + rows, rows < A, 0.0)[:, None]
        x = tl.exp(by_row + g_k[None, :]) * (h / b)[None, :]
        e -= tl.sum(x, 1)
        g_k = tl.load(g + (k * G + n) * B + cols, cols < B, 0.0)
        y = tl.exp(by_row + g_k[None, :]) * (e / a)[:, None]
        d -= x + y
        e, h = 0 * e, -tl.sum(y, 0)
    tl.store(grad + at, d, inside)


class Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, a, b, eps, iters, mode, tile):
        c = cost.to(a.dtype)
        scores = c * (-1 / eps)
        if tile:
            (n, rows, cols), (*sizes, warps) = cost.shape, tile
            f, g = a.new_empty(iters, n, rows), a.new_zeros(iters + 1, n, cols)
            numbers = (rows, cols, iters, -1 / eps, *sizes)
            launch(sinkhorn_kernel, n, cost, cost, a, b, f, g, *numbers, num_warps=warps)
            plan, saved = scores.add_(f[-1, ..., None]).add_(g[-1, :, None]).exp_(), [f, g]
        else:
            plan, saved = forward_twin(scores, a[:, None], b[:, None], iters)
        value, plan = (x.to(torch.promote_types(cost.dtype, torch.float32)) for x in ((plan * c).sum((-1, -2)), plan))
        ctx.save_for_backward(plan, *((cost, a, b, *saved) if mode == "unroll" else ()))
        ctx.eps, ctx.tile, ctx.dtype = eps, tile, cost.dtype
        ctx.mark_non_differentiable(plan)
        ctx.set_materialize_grads(False)
        return value, plan

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        if upstream is None:
            return (None,) * 7
        plan, *saved = ctx.saved_tensors
        grad = plan * upstream[:, None, None]
        if saved:  # unroll
            cost, a, b, *saved = saved
            grad = grad.to(a.dtype)
            d = grad * cost * (-1 / ctx.eps)
            e, h, grad = d.sum(-1), d.sum(-2), grad + d
            if ctx.tile:
                (n, rows, cols), (*sizes, warps) = cost.shape, ctx.tile
                numbers = (rows, cols, len(saved[0]), -1 / ctx.eps, *sizes)
                launch(sinkhorn_grad_kernel, n, cost, cost, a, b, *saved, e, h, grad, *numbers, num_warps=warps)
            else:
                backward_twin(a[:, None], b[:, None], saved, e[:, None], h[:, None], grad)
        return grad.to(ctx.dtype), None, None, None, None, None, None


def check_problem(cost: Tensor, eps: float, iters: int) -> None:
    if cost.dim() < 2 or not cost.is_floating_point():
        raise ValueError(f"cost must be floating point [*, A, B], got {cost.dtype} {[*cost.shape]}")
    if not 0 < eps < math.inf or not isinstance(iters, int) or iters < 1:
        raise ValueError(f"eps must be positive and iters a whole number from 1, got {eps} and {iters}")


def sinkhorn(
    cost: Tensor, eps: float = 0.1, iters: int = 20, row_marginal: Tensor | None = None,
    col_marginal: Tensor | None = None, grad: Literal["unroll", "envelope"] = "unroll",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Finite cost [*, A, B], marginals [*, A] or [A] and [*, B] or [B] (positive constants, default ones)
    -> value [*], plan [*, A, B] without gradient; fp32, float64 for a float64 cost.
    """
    check_problem(cost, eps, iters)
    if grad not in ("unroll", "envelope"):
        raise ValueError(f"grad must be unroll or envelope, got {grad}")
    if not cost.numel():
        zeros = cost.to(torch.promote_types(cost.dtype, torch.float32))
        return zeros.sum((-1, -2)), zeros.detach()
    *lead, rows, cols = cost.shape
    fits = (t for t in SINKHORN_TILES if rows <= t[0] and cols <= t[1])
    tile, marginals = next(fits, None) if backend_for(cost) == "triton" else None, []
    dtype = torch.float32 if tile or cost.device.type == "mps" else torch.float64
    for x, size in ((row_marginal, rows), (col_marginal, cols)):
        x = cost.new_ones(size) if x is None else x
        if x.shape not in ((size,), (*lead, size)) or x.requires_grad or (x.device.type == "cpu" and not (x > 0).all()):
            raise ValueError(f"a marginal must be [{size}] or {[*lead, size]}, positive and without gradient")
        marginals.append(x.to(cost.device, dtype).expand(*lead, size).reshape(-1, size).contiguous())
    flat = cost.reshape(-1, rows, cols).contiguous()
    value, plan = Sinkhorn.apply(flat, *marginals, eps, iters, grad, tile)
    return value.reshape(lead), plan.reshape(cost.shape)


def sinkhorn_scaling(cost: Tensor, eps: float = 0.1, iters: int = 20) -> tuple[Tensor, Tensor]:
    """SinKD's own iteration with unit marginals, to compare with: K = exp(-C/eps), rows over their sums, then columns.

    In fp32 a row or column whose least cost is above 103 eps underflows (745 eps in float64) and all becomes NaN;
    so does a cost below -88 eps (-709 eps), which overflows.
    """
    check_problem(cost, eps, iters)
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    plan = torch.exp(-cost / eps)
    for _ in range(iters):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return (plan * cost).sum((-1, -2)), plan.detach()


def converged_slope(cost: Tensor, plan: Tensor, eps: float) -> Tensor:
    """dvalue/dC where the iteration has converged, without replaying it.  C, plan [A, B] -> [A, B], fp64

    With r = rowsum(plan C), s = colsum(plan C) solve  a x + plan y = r,  plan' x + b y = s;  then the derivative is
    plan (1 + (x_i + y_j - C_ij)/eps). The system is symmetric and singular (x + t, y - t), hence the pseudo-inverse.
    """
    cost, plan = cost.detach().double(), plan.double()
    a, b, product = plan.sum(1), plan.sum(0), plan * cost
    system = torch.cat([torch.cat([a.diag(), plan], 1), torch.cat([plan.T, b.diag()], 1)])
    solution = torch.linalg.pinv(system, hermitian=True) @ torch.cat([product.sum(1), product.sum(0)])
    x, y = solution.split([len(a), len(b)])
    return plan * (1 + (x[:, None] + y - cost) / eps)
