"""Both forms of the row operations, PyTorch and Triton under Triton's interpreter, against float64 on the same numbers.

A tile of 16 columns is forced, so that a row of 35 takes three steps, the last of them ragged.

bf16: the interpreter keeps bf16 as raw 16-bit integers and computes with those (the last test of this file shows it).
The kernels cast right after each load and have no tl.dot, so bf16 logits are tested as they are: load, cast, fp32.
"""

import math

import pytest
import torch

from posttrain.kernels.backend import backend_for, tl, triton, use_backend
from posttrain.kernels.divergence import divergence, linear_divergence
from posttrain.kernels.logprob import linear_token_logp, linear_topk_logp, linear_weighted_logp, token_logp
from posttrain.kernels.topk import linear_topk_divergence, topk_divergence

if triton is None:
    pytest.skip("Triton has no wheel for this platform; its twins serve there", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # what tl.where drops

TILE = 16
V = 2 * TILE + 3
KINDS = (("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3))
ROW_OPS = [("logp", None, None), *((*kind, None) for kind in KINDS)]
TOPK_OPS = [(*kind, tail) for kind in KINDS for tail in ("bucket", "renorm", "drop")]
OPS = ROW_OPS + TOPK_OPS
FEW_OPS = [*ROW_OPS, TOPK_OPS[0], TOPK_OPS[4], TOPK_OPS[8]]
INF = math.inf


def over(ops):
    return pytest.mark.parametrize("op", ops, ids=["-".join(x for x in (kind, tail) if x) for kind, _, tail in ops])


@pytest.fixture(params=["torch", "triton"])
def form(request):
    with use_backend(request.param, TILE):
        assert backend_for(torch.zeros(1)) == request.param
        yield request.param


def rand(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def labels_of(n, v):
    """Spread over the row, its last column among them; the second row is ignored."""
    return torch.tensor([(v - 1 - 7 * i) % v if i != 1 else -100 for i in range(n)], dtype=torch.long)


def listed_of(n, v, k=3):
    rows = torch.stack([torch.arange(v).roll(5 * i + 1) for i in range(n)]) if n else torch.zeros(0, v).long()
    rows = rows[:, : min(k, v)].clone()
    if rows.shape[1] > 1:
        rows[1:2, 1:] = -1
    return rows


# --- the reference: float64 and autograd


def exact_logps(logits, temperature, softcap):
    """In float64. A mask of -inf becomes a log-prob so low that p is 0, but finite: autograd gives no NaN then."""
    c = logits.double()
    c = softcap * torch.tanh(c / softcap) if softcap else c
    lowest = c.detach().amax(-1, keepdim=True) - 1e6
    return (torch.where(logits == -INF, lowest, c) / temperature).log_softmax(-1)


def exact_divergence(p, q, kind, beta):
    """Of log-probs, all finite."""

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    mixture = torch.logaddexp(q + math.log(beta), p + math.log(1 - beta))
    jsd = beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jsd": jsd}[kind]


def exact(op, student, teacher, labels, listed, temperature, softcap):
    (kind, beta, tail), p = op, exact_logps(student, temperature, softcap)
    if kind == "logp":
        kept, logp = labels >= 0, p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        return logp.where(kept, 0), (-(p.exp() * p).sum(-1)).where(kept, 0)
    q = exact_logps(teacher, temperature, softcap and 2 * softcap)
    if not tail:
        return (exact_divergence(p, q, kind, beta),)
    values = [p[:0, 0]]
    for a, b, ids in zip(p, q, listed.tolist(), strict=True):
        ids = [i for i in ids if i >= 0]
        rest = [i for i in range(len(a)) if i not in ids]
        outcomes = [(x[ids], x[rest].logsumexp(0)[None]) for x in (a, b)]
        x, y = (torch.cat(o) if tail == "bucket" and rest else o[0] for o in outcomes)
        if tail == "renorm":
            x, y = x.log_softmax(0), y.log_softmax(0)
        values.append(exact_divergence(x, y, kind, beta)[None])
    return (torch.cat(values),)


# --- the comparison


def ours(op, student, teacher, labels, listed, temperature, softcap):
    kind, beta, tail = op
    if kind == "logp":
        return token_logp(student, labels, temperature=temperature, softcap=softcap)
    if not tail:
        caps = {"student_softcap": softcap, "teacher_softcap": softcap and 2 * softcap}
        return (divergence(student, teacher, kind, beta, temperature=temperature, **caps),)
    logq = exact_logps(teacher, temperature, softcap and 2 * softcap).gather(-1, listed.clamp(min=0)).float()
    how = {"tail": tail, "temperature": temperature, "softcap": softcap}
    return (topk_divergence(student, listed, logq, kind, beta, **how),)


def error(found, expected):
    """kernels' tolerance policy: absolute near 0, else relative to the largest; NaN compares as too large."""
    assert found.shape == expected.shape
    if not found.numel():
        return 0.0
    worst = ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    return worst if worst == worst else INF


def rounding(dtype):
    """Of a gradient when it is stored; to bf16 the interpreter cuts digits off, where a GPU rounds to the nearest."""
    cut_off = 2 if backend_for(torch.zeros(1)) == "triton" else 1
    return {torch.float32: 0.0, torch.bfloat16: cut_off * 4e-3, torch.float16: 5e-4}[dtype]


def check(op, student, teacher, temperature=1.0, softcap=None, labels=None, listed=None, tolerance=2e-5):
    labels = labels_of(*student.shape) if labels is None else labels
    listed = listed_of(*student.shape) if listed is None else listed
    flags = labels, listed, temperature, softcap
    reference, student = student.detach().double().requires_grad_(), student.detach().requires_grad_()
    teacher.requires_grad_()
    expected, found = exact(op, reference, teacher.detach(), *flags), ours(op, student, teacher, *flags)
    upstream = [rand(len(student), seed=20 + i, dtype=torch.float64) for i in range(len(expected))]
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert error(x, y) <= tolerance
    (slope,) = torch.autograd.grad(sum((x * g).sum() for x, g in zip(expected, upstream, strict=True)), reference)
    sum((x * g.float()).sum() for x, g in zip(found, upstream, strict=True)).backward()
    assert student.grad.dtype == student.dtype and teacher.grad is None
    allowed = tolerance * slope.abs().max().clamp(min=1) if slope.numel() else 0
    assert ((student.grad.double() - slope).abs() <= allowed + rounding(student.dtype) * slope.abs()).all()


# --- sizes, options, dtypes


CASES = [(1.0, None), (0.5, 2.0), (2.0, None), (1.0, 30.0), (0.5, None), (2.0, 2.0), (0.7, None)]


@pytest.mark.parametrize("v,case", list(zip((1, 7, 37, TILE - 1, TILE, TILE + 1, V), CASES, strict=True)), ids=str)
@over(FEW_OPS)
def test_widths_that_are_no_multiple_of_the_tile(form, op, v, case):
    check(op, rand(3, v, scale=2), rand(3, v, seed=1, scale=2), *case)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@over(OPS)
def test_temperature_softcap_kind_and_tail(form, op, temperature, softcap):
    check(op, rand(2, 2 * TILE - 3, scale=2), rand(2, 2 * TILE - 3, seed=1, scale=2), temperature, softcap)


@pytest.mark.parametrize("n", [0, 1, 5])
@over(FEW_OPS)
def test_numbers_of_rows(form, op, n):
    check(op, rand(n, TILE + 1), rand(n, TILE + 1, seed=1))


@pytest.mark.parametrize("v", [1023, 1024, 1025, 4099])
@pytest.mark.parametrize("op", [ROW_OPS[0], ROW_OPS[3]], ids=["logp", "jsd"])
def test_the_tiles_that_are_chosen_by_width(op, v):
    with use_backend("triton"):
        check(op, rand(1, v), rand(1, v, seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@over(FEW_OPS)
def test_half_precision_logits_are_computed_in_fp32(form, op, softcap, dtype):
    """Values as exact as for fp32; gradients rounded once, when they are stored."""
    check(op, rand(2, V, scale=3, dtype=dtype), rand(2, V, seed=1, scale=3, dtype=dtype), 1.3, softcap)


@pytest.mark.parametrize("k", [1, V], ids=["K=1", "K=V"])
@over(TOPK_OPS)
def test_one_token_or_all_of_them_listed(form, op, k):
    listed = torch.arange(V).flip(0)[None, :k]
    check(op, rand(1, V), rand(1, V, seed=1), 0.7, 2.0, listed=listed)


def test_every_column_can_be_the_chosen_one(form):
    columns = torch.tensor([0, TILE - 1, TILE, 2 * TILE - 1, 2 * TILE, V - 1])
    check(ROW_OPS[0], rand(6, V), rand(6, V), labels=columns)


def test_ignored_labels_are_never_looked_up(form):
    """-100 and 10^12 lie outside any memory that is ours; 2 would be a token."""
    logits = rand(3, V)
    for label in (-100, -1, 2, 10**12):
        leaf, ids = logits.clone().requires_grad_(), torch.tensor([label, 4, label])
        logp, entropy = token_logp(leaf, ids, ignore_index=label)
        assert not logp[[0, 2]].any() and not entropy[[0, 2]].any() and logp[1] != 0
        (logp + entropy).sum().backward()
        assert not leaf.grad[[0, 2]].any() and leaf.grad[1].any()


# --- memory layouts


LAYOUTS = {
    "all but the last column": lambda wide, x: wide[: len(x), : x.shape[1]],
    "row stride beyond V": lambda wide, x: wide[::2, 1 : x.shape[1] + 1],
    "transposed": lambda wide, x: wide.T.contiguous().T[::2, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@over(FEW_OPS)
def test_rows_are_read_where_they_lie_and_their_neighbours_are_not(form, op, layout):
    def placed(x, beside):
        wide = torch.full((2 * len(x), x.shape[1] + beside), math.nan)
        view = LAYOUTS[layout](wide, x)
        view.copy_(x)
        assert not view.is_contiguous()
        return view

    check(op, placed(rand(2, V), 2), placed(rand(2, V, seed=1), 5))


@over(FEW_OPS)
def test_one_row_expanded_to_several(form, op):
    check(op, rand(1, V).expand(2, V), rand(1, V, seed=1).expand(2, V))


# --- masks and extreme numbers


MASKS = {
    "first tile": range(TILE),
    "last tile": range(2 * TILE, V),
    "all but one tile": [*range(TILE), *range(2 * TILE, V)],
    "all but one token": [i for i in range(V) if i != TILE + 4],
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", MASKS)
@over(OPS)
def test_tokens_masked_in_both_models(form, op, mask, softcap):
    student, teacher, masked = rand(2, V), rand(2, V, seed=1), list(MASKS[mask])
    student[:, masked] = teacher[:, masked] = -INF
    few = mask == "all but one token"
    listed = torch.tensor([[TILE + 4, -1 if few else TILE + 1]] * 2)
    check(op, student, teacher, 0.7, softcap, torch.tensor([TILE + 4, TILE + 4]), listed)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("masked", [[0], [V - 1], list(range(TILE))], ids=["first", "last", "first tile"])
def test_tokens_masked_in_one_model(form, masked, side):
    logits = {"student": rand(1, V), "teacher": rand(1, V, seed=1)}
    logits[side][:, masked] = -INF
    p, q = (logits[x].double().softmax(-1) for x in ("student", "teacher"))
    for kind, beta in KINDS:
        leaf = logits["student"].clone().requires_grad_()
        value = divergence(leaf, logits["teacher"], kind, beta)
        value.sum().backward()
        mixture = beta * q + (1 - beta) * p
        kl_p = torch.where(p > 0, p * (p / mixture).log(), 0).sum(-1, keepdim=True)
        kl_q = torch.where(q > 0, q * (q / mixture).log(), 0).sum(-1, keepdim=True)
        if (kind, side) in (("forward_kl", "student"), ("reverse_kl", "teacher")):
            assert value.item() == INF
        elif kind == "jsd":
            assert error(value, (beta * kl_q + (1 - beta) * kl_p)[:, 0]) <= 2e-5
            slope = (1 - beta) * torch.where(p > 0, p * ((p / mixture).log() - kl_p), 0)
            assert error(leaf.grad, slope) <= 2e-5
        else:
            a, b = (q, p) if kind == "forward_kl" else (p, q)
            terms = torch.where(a > 0, a * (a / b).log(), 0).sum(-1, keepdim=True)
            assert error(value, terms[:, 0]) <= 2e-5
            slope = p - q if kind == "forward_kl" else torch.where(p > 0, p * ((p / q).log() - terms), 0)
            assert error(leaf.grad, slope) <= 2e-5
        if kind == "forward_kl":
            assert error(leaf.grad, p - q) <= 2e-5  # finite beside an infinite value


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("listed", [None, torch.tensor([[4, 0]] * 3)], ids=["full", "top-k"])
def test_row_of_infinite_value_and_slope_that_the_loss_leaves_out(form, listed, weighted):
    """Reverse KL, the teacher masks a token of one row."""
    student, teacher = rand(3, V).requires_grad_(), rand(3, V, seed=1)
    teacher[1, 4] = -INF
    flags = {"token_weight": torch.tensor([1.0, 0.0, 1.0])} if weighted else {}
    if listed is None:
        out = divergence(student, teacher, "reverse_kl", **flags)
    else:
        out = topk_divergence(student, listed, teacher.log_softmax(-1).gather(-1, listed), "reverse_kl", **flags)
    value = out[1] if weighted else out
    assert value.isinf().tolist() == [False, True, False]
    (out[0] if weighted else value[[0, 2]].sum()).backward()
    assert student.grad.isfinite().all() and student.grad[[0, 2]].any() and not student.grad[1].any()


def test_a_masked_token_is_chosen(form):
    logits = rand(1, V)
    logits[:, 3] = -INF
    for inputs, slope in ((logits.clone(), 1.0), (logits.clone(), -2.0)):
        leaf = inputs.requires_grad_()
        logp, entropy = token_logp(leaf, torch.tensor([3]))
        assert logp.item() == -INF and entropy.isfinite().all()
        (slope * logp).sum().backward()
        expected = -slope * logits.double().softmax(-1)
        expected[:, 3] += slope
        assert error(leaf.grad, expected) <= 2e-5


EXTREMES = {
    "near 3000": lambda x: 3 * x + 3000,
    "near -3000": lambda x: 3 * x - 3000,
    "all near -120": lambda x: x - 120,
    "1e30": lambda x: 1e30 * x,
    "1e-30": lambda x: 1e-30 * x,
    "all equal": lambda x: 0 * x,
    "near one-hot": lambda x: 60 * x,
    "lowest number as a mask": lambda x: torch.cat([torch.full_like(x[:, :TILE], -3.4e38), x[:, TILE:]], -1),
    "falling over 300 nats": lambda x: -torch.arange(300.0, 300 - 8 * V, -8).flip(0) + x,
}


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("extreme", EXTREMES)
@over(FEW_OPS)
def test_extreme_numbers(form, op, extreme, temperature):
    """The reference gets the same fp32 numbers, after their shift or scale."""
    student, teacher = (EXTREMES[extreme](x) for x in (rand(2, V), rand(2, V, seed=1)))
    inside = torch.tensor([[TILE + 4, TILE + 1, V - 2]] * 2)
    check(op, student, teacher, temperature, labels=inside[:, 0], listed=inside)


def test_probabilities_below_the_smallest_normal_number(form):
    """exp(-103.5) is the least positive fp32; half of it is 0, and so would be the mixture of p and q."""
    for low in (-88.0, -95.0, -103.2, -103.5, -103.9, -110.0):
        for other in (-200.0, -INF, low):
            x, y = torch.tensor([[0.0, low]]), torch.tensor([[0.0, other]])
            for student, teacher in ((x, y), (y, x)):
                check(ROW_OPS[3], student, teacher)


@over(ROW_OPS[1:])
def test_equal_models_up_to_a_shift(form, op):
    logits = rand(2, V, scale=4)
    leaf = (logits * 8).round().div(8).requires_grad_()  # exact beside a shift
    (value,) = ours(op, leaf, leaf.detach() + 1024, None, None, 0.7, None)
    value.sum().backward()
    assert value.abs().max() <= 1e-7 and leaf.grad.abs().max() <= 1e-7


@pytest.mark.parametrize("centre", [0.0, -20.0, -120.0])
def test_width_1000_with_tiles_of_256(centre):
    """A fused kernel of a peer lost 0.02 to 16 nats here and gave inf near -120: its maximum began at 0."""
    logits = rand(1, 1000) + centre
    with use_backend("triton", 256):
        for op in ROW_OPS:
            check(op, logits, rand(1, 1000, seed=1) + centre)


def test_bounds(form):
    logits = rand(4, V, scale=3)
    logp, entropy = token_logp(logits, logits.argmax(-1))
    assert (logp >= -math.log(V)).all() and (logp <= 0).all()
    assert (entropy >= 0).all() and (entropy <= math.log(V)).all()
    value = divergence(logits, -logits, "jsd", 0.3)
    assert (value > 0).all() and (value <= -0.3 * math.log(0.3) - 0.7 * math.log(0.7)).all()
    assert token_logp(logits, logits.argmax(-1), entropy=False)[1] is None


# --- through the head: the same three ways as in test_kernels.py, each with the kernels


@pytest.mark.parametrize("way", ["two-phase", "one-pass", "frozen head"])
@over(FEW_OPS)
def test_linear_forms(form, op, way):
    """Two chunks, the second of one row; gradient other than one; one weight 0.

    The gradient overwrites a chunk's logits, so that a write beyond a row's end would spoil the next row.
    """
    (kind, beta, tail), n, flags = op, 3, {"temperature": 0.7, "chunk": 2}
    inputs = rand(n, 4), rand(V, 4, seed=1), rand(V, seed=2)
    teacher, weights, labels, listed = (
        rand(n, V, seed=3),
        torch.tensor([0.5, -1.5, 0.0]),
        labels_of(n, V),
        listed_of(n, V),
    )
    known = {"token_weight": weights} if way == "one-pass" else {}
    leaves = [x.requires_grad_(way != "frozen head" or i == 0) for i, x in enumerate(inputs)]
    hidden, weight, bias = leaves
    if kind == "logp":
        fn = linear_weighted_logp if known else linear_token_logp
        out = fn(hidden, weight, labels, bias=bias, softcap=3.0, entropy=True, **flags, **known)
    elif tail:
        logq = exact_logps(teacher, 0.7, 6.0).gather(-1, listed.clamp(min=0)).float()
        out = linear_topk_divergence(
            hidden, weight, listed, logq, kind, beta, tail=tail, bias=bias, softcap=3.0, **flags, **known
        )
    else:
        out = linear_divergence(
            hidden, weight, torch.eye(n), teacher.T, kind, beta, student_bias=bias,
            student_softcap=3.0, teacher_softcap=6.0, **flags, **known,
        )  # fmt: skip
    out = out if isinstance(out, tuple) else (out,)
    reference = [x.detach().double().requires_grad_() for x in inputs]
    expected = exact(op, reference[0] @ reference[1].T + reference[2], teacher, labels, listed, 0.7, 3.0)
    total = (weights * expected[0]).sum()
    for x, y in zip(out[1:] if known else out, expected, strict=True):
        assert error(x, y) <= 2e-5
    slopes = torch.autograd.grad(-2 * total, reference)
    (-2 * (out[0] if known else (weights * out[0]).sum())).backward()
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else error(leaf.grad, slope) <= 2e-5


def test_topk_logp(form):
    hidden, weight = rand(3, 4), rand(V, 4, seed=1)
    ids, logps = linear_topk_logp(hidden, weight, 4, temperature=0.7, softcap=3.0, chunk=2)
    values, best = exact_logps((hidden.double() @ weight.double().T), 0.7, 3.0).topk(4)
    assert torch.equal(ids, best) and error(logps, values) <= 2e-5
    again = linear_topk_logp(hidden, weight, ids=best, temperature=0.7, softcap=3.0)[1]
    assert error(again, values) <= 2e-5


# --- the interpreter itself


@triton.jit
def double_kernel(x, out, CAST: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    loaded = tl.load(x + at)
    if CAST:
        loaded = loaded.to(tl.float32)
    tl.store(out + at, (loaded + loaded).to(out.dtype.element_ty))


def test_the_interpreter_cannot_add_bf16_and_cuts_off_what_it_stores_as_bf16_but_loads_it_exactly():
    """If this fails, a defect is gone from the pinned Triton: bf16 can be tested as any other dtype then."""
    x, found = rand(16, dtype=torch.bfloat16), {}
    for cast in (False, True):
        found[cast] = torch.zeros(16)
        double_kernel[(1,)](x, found[cast], cast, 16)
    assert torch.equal(found[True], 2 * x.float())
    assert not torch.allclose(found[False], 2 * x.float(), rtol=0.1, equal_nan=True)
    exact, stored = rand(16), torch.zeros(16, dtype=torch.bfloat16)
    double_kernel[(1,)](exact, stored, True, 16)
    assert (stored.float().abs() <= 2 * exact.abs()).all() and not torch.equal(stored, (2 * exact).bfloat16())
