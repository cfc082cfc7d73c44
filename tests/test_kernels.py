"""kernels/ on torch against dense float64: values, gradients, the three ways through the head, memory.

tests/test_triton.py does the same for the Triton forms of the row operations.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from posttrain.kernels.backend import backend_for, use_backend
from posttrain.kernels.divergence import divergence, linear_divergence
from posttrain.kernels.head import COLUMNS, Source, chunks
from posttrain.kernels.logprob import linear_token_logp, linear_topk_logp, linear_weighted_logp, token_logp
from posttrain.kernels.topk import linear_topk_divergence, topk_divergence

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
TAILS = ("bucket", "renorm", "drop")
INF = math.inf
HALF = (torch.bfloat16, torch.float16)


def rand(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def dense_logits(hidden, weight, bias=None, temperature=1.0, softcap=None, vocab_size=None):
    logits = hidden @ weight[:vocab_size].T
    if bias is not None:
        logits = logits + bias[:vocab_size]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def dense_divergence(student, teacher, kind, beta=0.5):
    """From log-probs, all finite."""
    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    mix = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * (teacher.exp() * (teacher - mix)).sum(-1) + (1 - beta) * (student.exp() * (student - mix)).sum(-1)


def dense_topk(logps, teacher, ids, kind, beta, tail):
    """One row at a time over the listed ids, -1 left out; teacher holds all log-probs."""
    out = []
    for p, q, row in zip(logps, teacher, ids.tolist(), strict=True):
        listed = [i for i in row if i >= 0]
        rest = [i for i in range(len(p)) if i not in listed]
        a, b = p[listed], q[listed]
        if tail == "bucket" and rest:
            a, b = torch.cat([a, p[rest].logsumexp(0)[None]]), torch.cat([b, q[rest].logsumexp(0)[None]])
        if tail == "renorm":
            a, b = a.log_softmax(0), b.log_softmax(0)
        out.append(dense_divergence(a, b, kind, beta))
    return torch.stack(out)


def compare(ours, dense, inputs, rtol=1e-10, atol=1e-8):
    """Values, and gradients of a randomly weighted sum, of two functions of the same inputs."""
    grads = []
    for fn in (ours, dense):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = fn(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = sum((rand(*x.shape, seed=9 + i).to(x.dtype) * x).sum() for i, x in enumerate(outputs))
        grads.append((outputs, torch.autograd.grad(upstream, leaves, allow_unused=True)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def error(found, expected):
    """Absolute near 0, else relative to the largest; NaN counts as infinite."""
    worst = ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    return worst if worst == worst else INF


def tokens_of(n, v, ignored=()):
    ids = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(5))
    ids[list(ignored)] = -100
    return ids


HEADS = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.3},
    "softcap": {"softcap": 1.5, "temperature": 0.7},
    "sliced": {"vocab_size": 23},
}


# --- one interface to all operations, for what must hold for each of them

OPS = [("logp", None, None)]
OPS += [(*kind, tail) for tail in (None, *TAILS) for kind in (("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3))]
every_op = pytest.mark.parametrize("op", OPS, ids=["-".join(x for x in (k, t) if x) for k, _, t in OPS])
N, H, V = 5, 3, 11
LABELS = tokens_of(N, V, ignored=[2])
TEACHER, TEACHER_HEAD, TEACHER_BIAS = rand(N, 6, seed=3), rand(V, 6, seed=4), rand(V, seed=5)
LISTED = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:4] for i in range(N)])
LISTED[2, 2:] = LISTED[4, 1:] = -1


def teacher_logits(softcap=None, temperature=1.0):
    return dense_logits(TEACHER, TEACHER_HEAD, TEACHER_BIAS, temperature, softcap)


def call(op, x, weight=None, bias=None, temperature=1.0, softcap=None, token_weight=None, chunk=None):
    """x [n, H] with a head, or logits [n, V] without -> D [n]; with token_weight (sum, D)"""
    (kind, beta, tail), n = op, len(x)
    flags = {"temperature": temperature} | ({} if token_weight is None else {"token_weight": token_weight})
    if weight is not None:
        flags["chunk"] = chunk
    if kind == "logp":
        if weight is None:
            return token_logp(x, LABELS[:n], softcap=softcap, entropy=False, **flags)[0]
        fn = linear_token_logp if token_weight is None else linear_weighted_logp
        *out, none = fn(x, weight, LABELS[:n], bias=bias, softcap=softcap, entropy=False, **flags)
        assert none is None
        return out[0] if token_weight is None else tuple(out)
    if tail:
        q = teacher_logits(softcap, temperature).log_softmax(-1).gather(-1, LISTED.clamp(min=0))
        listed = LISTED[:n], q[:n], kind, beta
        flags |= {"tail": tail, "softcap": softcap}
        if weight is None:
            return topk_divergence(x, *listed, **flags)
        return linear_topk_divergence(x, weight, *listed, bias=bias, **flags)
    flags |= {"student_softcap": softcap, "teacher_softcap": softcap}
    if weight is None:
        return divergence(x, teacher_logits()[:n].to(x.dtype), kind, beta, **flags)
    teacher = TEACHER[:n].to(x.dtype), TEACHER_HEAD.to(x.dtype)
    flags |= {"student_bias": bias, "teacher_bias": TEACHER_BIAS.to(x.dtype)}
    return linear_divergence(x, weight, *teacher, kind, beta, **flags)


def dense_call(op, x, weight, bias=None, temperature=1.0, softcap=None):
    (kind, beta, tail), n = op, len(x)
    logps = dense_logits(x, weight, bias, temperature, softcap).log_softmax(-1)
    if kind == "logp":
        return logps.gather(-1, LABELS[:n].clamp(min=0)[:, None])[:, 0] * (LABELS[:n] >= 0)
    teacher = teacher_logits(softcap, temperature).log_softmax(-1)[:n]
    if tail:
        return dense_topk(logps, teacher, LISTED[:n], kind, beta, tail)
    return dense_divergence(logps, teacher, kind, beta)


def leaves_of(dtype=torch.float64, frozen=()):
    """hidden, weight, bias; those whose position is in frozen want no gradient."""
    inputs = rand(N, H, dtype=dtype), rand(V, H, seed=1, dtype=dtype), rand(V, seed=2, dtype=dtype)
    return [x.requires_grad_(i not in frozen) for i, x in enumerate(inputs)]


WEIGHTS = rand(N, seed=8).index_fill(0, torch.tensor([1]), 0)
OPTIONS = pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 2.0}], ids=["plain", "softcap"])


@every_op
@OPTIONS
def test_every_operation_equals_dense_float64(op, options):
    inputs = [x.detach() for x in leaves_of()]
    tail = op[2] == "bucket"  # whose teacher mass is 1 - sum q
    compare(
        lambda *x: call(op, *x, **options),
        lambda *x: dense_call(op, *x, **options),
        inputs,
        atol=1e-7 if tail else 1e-8,
    )


@every_op
@OPTIONS
@pytest.mark.parametrize("chunk", [None, 1, 3, N])
def test_one_pass_equals_two_phase_and_backward_can_be_repeated(op, options, chunk):
    leaves = leaves_of()
    d = call(op, *leaves, **options, chunk=chunk)
    two_phase = torch.autograd.grad(-2.5 * (WEIGHTS * d).sum(), leaves)
    total, values = call(op, *leaves, **options, chunk=chunk, token_weight=WEIGHTS)
    assert not values.requires_grad and values.shape == d.shape and total.shape == ()
    torch.testing.assert_close(values, d)
    torch.testing.assert_close(total, (WEIGHTS * d).sum())
    for again in (True, True, False):
        one_pass = torch.autograd.grad(-2.5 * total, leaves, retain_graph=again)
        torch.testing.assert_close(one_pass, two_phase, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves)


@every_op
@OPTIONS
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["two-phase", "one-pass"])
@pytest.mark.parametrize("frozen", [(1, 2), (0, 2), (0, 1), (1,), (0,)], ids=str)
def test_frozen_inputs_leave_the_other_gradients_as_they_are(op, options, weights, frozen):
    grads = []
    for without in ((), frozen):
        leaves = leaves_of(frozen=without)
        out = call(op, *leaves, **options, chunk=3, token_weight=weights)
        (3 * (out * WEIGHTS).sum() if weights is None else 3 * out[0]).backward()
        grads.append([x.grad for x in leaves])
    for i, (all_trained, ours) in enumerate(zip(*grads, strict=True)):
        if i in frozen:
            assert ours is None
        else:
            torch.testing.assert_close(ours, all_trained, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [(1, 2), (1,), ()])
@pytest.mark.parametrize("outputs", ["logp", "entropy", "both"])
def test_gradients_through_one_output_or_both_with_and_without_a_frozen_head(outputs, frozen):
    leaves, upstream = leaves_of(frozen=frozen), (rand(N, seed=6), rand(N, seed=7))
    wanted = {"logp": (0,), "entropy": (1,), "both": (0, 1)}[outputs]
    trained = [x for x in leaves if x.requires_grad]

    def weighted(logp, entropy):
        return sum(((logp, entropy)[i] * upstream[i]).sum() for i in wanted)

    logps, kept = dense_logits(*leaves, 0.7).log_softmax(-1), LABELS >= 0
    dense = logps.gather(-1, LABELS.clamp(min=0)[:, None])[:, 0] * kept, -(logps.exp() * logps).sum(-1) * kept
    ours = linear_token_logp(*leaves[:2], LABELS, leaves[2], 0.7, chunk=2)
    expected = torch.autograd.grad(weighted(*dense), trained)
    for again in (True, False):
        found = torch.autograd.grad(weighted(*ours), trained, retain_graph=again)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if outputs == "logp":  # an entropy that nobody uses changes nothing
        without = linear_token_logp(*leaves[:2], LABELS, leaves[2], 0.7, entropy=False, chunk=2)[0]
        assert all(map(torch.equal, torch.autograd.grad((without * upstream[0]).sum(), trained), found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, -2.0, 0.5])], ids=["two-phase", "one-pass"])
def test_head_of_more_columns_than_are_multiplied_at_a_time(weights, dtype):
    n, v = 3, 2 * COLUMNS + 5
    leaves = [rand(*x, seed=i, dtype=dtype).requires_grad_() for i, x in enumerate([(n, 2), (v, 2), (v,)])]
    hidden, weight, bias = leaves
    ids, factor = torch.tensor([5, COLUMNS, v - 1]), torch.tensor([1.0, -2.0, 0.5]) if weights is None else weights
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logps = (exact[0] @ exact[1].T + exact[2]).log_softmax(-1)
    expected = logps.gather(-1, ids[:, None])[:, 0]
    if weights is None:
        logp, _ = linear_token_logp(hidden, weight, ids, bias, chunk=2)
        total = (logp * factor).sum()
    else:
        total, logp, _ = linear_weighted_logp(hidden, weight, ids, weights, bias=bias, chunk=2)
    total.backward()
    slopes = torch.autograd.grad((expected * factor).sum(), exact)
    assert error(logp, expected) < (1e-10 if dtype == torch.float64 else 5e-5)
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert error(leaf.grad, slope) < (1e-10 if dtype == torch.float64 else 5e-3)


def test_weighted_logp_gives_the_entropy_without_gradient():
    leaves = leaves_of()
    expected = linear_token_logp(*leaves[:2], LABELS, leaves[2], 0.7)
    how = {"bias": leaves[2], "temperature": 0.7, "entropy": True}
    total, logp, entropy = linear_weighted_logp(*leaves[:2], LABELS, WEIGHTS, **how)
    torch.testing.assert_close((logp, entropy), tuple(x.detach() for x in expected))
    assert total.requires_grad and not logp.requires_grad and not entropy.requires_grad


@every_op
@OPTIONS
def test_logits_give_what_the_linear_form_gives(op, options):
    hidden, weight, bias = leaves_of()
    logits = (hidden @ weight.T + bias).detach().requires_grad_()
    upstream = rand(N, seed=9)
    linear, direct = call(op, hidden, weight, bias, **options), call(op, logits, **options)
    torch.testing.assert_close(direct, linear)
    dh, db = torch.autograd.grad((linear * upstream).sum(), (hidden, bias))
    (da,) = torch.autograd.grad((direct * upstream).sum(), logits)
    torch.testing.assert_close((da @ weight, da.sum(0)), (dh, db), rtol=1e-10, atol=1e-12)
    if op[0] != "logp":
        total, values = call(op, logits, **options, token_weight=upstream)
        torch.testing.assert_close(values, direct.detach())
        torch.testing.assert_close(total, (upstream * values).sum())
        for again in (True, False):
            torch.testing.assert_close(torch.autograd.grad(-2 * total, logits, retain_graph=again)[0], -2 * da)


@every_op
@OPTIONS
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["two-phase", "one-pass"])
def test_gradcheck(op, options, weights):
    def value(*inputs, chunk=None):
        out = call(op, *inputs, **options, chunk=chunk, token_weight=weights)
        return out if weights is None else out[0]

    leaves = leaves_of()
    assert torch.autograd.gradcheck(lambda *x: value(*x, chunk=2), leaves)
    assert torch.autograd.gradcheck(lambda h: value(h, *(x.detach() for x in leaves[1:])), leaves[:1])
    if op[0] != "logp" or weights is None:
        assert torch.autograd.gradcheck(value, (rand(N, V, seed=6).requires_grad_(),))


@OPTIONS
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck_of_logp_and_entropy_together(options, chunk):
    hidden, weight, bias = leaves_of()
    fn = linear_token_logp
    assert torch.autograd.gradcheck(lambda h, w, b: fn(h, w, LABELS, b, chunk=chunk, **options), (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda a: token_logp(a, LABELS, **options), (rand(N, V).requires_grad_(),))


@every_op
@pytest.mark.parametrize("way", ["two-phase", "one-pass", "frozen head"])
def test_runs_are_bit_equal_chunks_change_nothing_and_inputs_stay_as_they_were(op, way):
    runs = []
    for chunk in (3, 3, 1, N, None):
        leaves = leaves_of(torch.float32, frozen=(1, 2) if way == "frozen head" else ())
        before = [x.detach().clone() for x in leaves]
        out = call(op, *leaves, chunk=chunk, token_weight=WEIGHTS if way == "one-pass" else None)
        values = out[1] if way == "one-pass" else out
        (out[0] if way == "one-pass" else (out * WEIGHTS.float()).sum()).backward()
        assert values.dtype == torch.float32 and all(map(torch.equal, leaves, before))
        runs.append([values, *(x.grad for x in leaves if x.requires_grad)])
    first, second, *others = runs
    assert all(map(torch.equal, first, second))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=2e-6)


def views(x):
    """The values of x [n, V] in other memory layouts, surrounded by NaN."""
    wide = torch.full((2 * len(x), x.shape[1] + 3), math.nan, dtype=x.dtype)
    wide[::2, :-3] = x
    return {"row stride > V": wide[::2, :-3], "transposed": x.T.contiguous().T, "expanded": x[:1].expand_as(x)}


@every_op
@pytest.mark.parametrize("layout", views(torch.zeros(1, 1)))
def test_memory_layout_of_inputs_changes_nothing(op, layout):
    hidden, weight, bias = (x.detach() for x in leaves_of())
    for inputs in ((hidden, weight, bias), (hidden @ weight.T + bias,)):
        grads = []
        for plain in (True, False):
            own = [views(x)[layout] if x.dim() == 2 else x for x in inputs]
            own = [x.contiguous() if plain else x for x in own]
            assert plain or not own[0].is_contiguous()
            own = [x.requires_grad_() for x in own]
            value = call(op, *own, chunk=2 if len(own) > 1 else None)
            grads.append([value, *torch.autograd.grad((WEIGHTS * value).sum(), own)])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@every_op
def test_no_second_derivative(op):
    for weights in (None, WEIGHTS):
        for frozen in ((), (1, 2)):
            leaves = leaves_of(frozen=frozen)
            out = call(op, *leaves, token_weight=weights)
            value = out.square().sum() if weights is None else out[0].square()
            (slope,) = torch.autograd.grad(value, leaves[0], create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                slope.sum().backward()


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [(), (1, 2)], ids=str)
def test_gradients_under_activation_checkpointing(op, frozen, reentrant):
    grads = []
    for weights in (None, WEIGHTS):
        for wrapped in (False, True):
            leaves = leaves_of(frozen=frozen)
            args = op, *leaves, 1.0, None, weights
            out = checkpoint(call, *args, use_reentrant=reentrant) if wrapped else call(*args)
            ((out * WEIGHTS).sum() if weights is None else out[0]).backward()
            grads.append([x.grad for x in leaves if x.requires_grad])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-10, atol=1e-12)


@every_op
def test_zero_rows_give_zeros_that_are_connected_to_the_graph(op):
    for weights in (None, WEIGHTS[:0]):
        for frozen in ((), (1, 2)):
            hidden, weight, bias = leaves_of(frozen=frozen)
            out = call(op, hidden[:0], weight, bias, token_weight=weights)
            value = out.sum() if weights is None else out[0]
            assert value.requires_grad and value == 0
            value.backward()
            assert not hidden.grad.any()
            assert frozen or not (weight.grad.any() or bias.grad.any())
    logits = rand(0, V).requires_grad_()
    call(op, logits).sum().backward()
    assert logits.grad.shape == (0, V)


@every_op
def test_without_gradients_nothing_is_kept_and_values_are_the_same(op):
    leaves = leaves_of()
    expected = call(op, *leaves).detach()
    with torch.no_grad():
        for out in (call(op, *leaves), call(op, *leaves, token_weight=WEIGHTS)[1]):
            assert torch.equal(out, expected) and not out.requires_grad


class Allocations(TorchDispatchMode):
    """The largest number of elements that an operation laid out anew, views and writes into buffers left out."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = (x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in old)
        self.most = max(self.most, *(x.untyped_storage().nbytes() // x.element_size() for x in fresh), 0)
        return out


@pytest.mark.parametrize("weights", [None, torch.ones(N)], ids=["two-phase", "one-pass"])
@pytest.mark.parametrize("op", [*OPS, "entropy"], ids=str)
def test_no_buffer_of_all_logits_and_none_for_the_gradient_of_a_frozen_head(op, weights):
    most, wide = {}, 40
    for frozen in ((), (1, 2)):
        leaves = rand(N, wide, dtype=torch.float32), rand(V, wide, seed=1, dtype=torch.float32)
        leaves = [x.requires_grad_(i not in frozen) for i, x in enumerate(leaves)]
        with Allocations() as allocations:
            if op == "entropy":  # whose gradient takes two phases with a frozen head, too
                out = linear_token_logp(*leaves, LABELS, chunk=2)[1]
            else:
                out = call(op, *leaves, chunk=2, token_weight=weights)
            (out[0] if isinstance(out, tuple) else out.sum()).backward()
        most[frozen] = allocations.most
    assert most[()] == V * wide, "the measurement itself is broken"
    assert most[1, 2] == N * wide  # dh


# --- log-probs and entropy


@pytest.mark.parametrize("chunk", [None, 1, 3, 11])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_token_logp_and_entropy_equal_dense_float64(head, with_bias, chunk):
    ids, flags = tokens_of(11, 23, ignored=[0, 4]), HEADS[head]
    inputs = [rand(11, 5), rand(29, 5, seed=1), *([rand(29, seed=2)] if with_bias else [])]

    def ours(hidden, weight, bias=None):
        return linear_token_logp(hidden, weight, ids, bias=bias, chunk=chunk, **flags)

    def dense(hidden, weight, bias=None):
        logps, kept = dense_logits(hidden, weight, bias, **flags).log_softmax(-1), ids >= 0
        logp = logps.gather(-1, ids.clamp(min=0)[:, None])[:, 0]
        return logp * kept, -(logps.exp() * logps).sum(-1) * kept

    compare(ours, dense, inputs)


@pytest.mark.parametrize("v", [1, 7, 37])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_token_logp_with_few_rows_and_tokens(n, v):
    ids = tokens_of(n, v)

    def dense(hidden, weight):
        logps = (hidden @ weight.T).log_softmax(-1)
        return logps.gather(-1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    compare(lambda h, w: linear_token_logp(h, w, ids), dense, [rand(n, 4), rand(v, 4, seed=1)])
    if v == 1:
        logp, entropy = linear_token_logp(rand(n, 4), rand(1, 4), ids)
        assert not logp.any() and not entropy.any()


def test_token_logp_keeps_leading_dimensions_int32_ids_and_can_leave_out_the_entropy():
    hidden, weight, ids = rand(2, 3, 4), rand(7, 4, seed=1), tokens_of(6, 7).view(2, 3)
    logp, entropy = linear_token_logp(hidden, weight, ids)
    expected = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(logp, expected.gather(-1, ids[..., None])[..., 0])
    assert entropy.shape == (2, 3)
    narrow = hidden.transpose(0, 1)[:, :, :]  # not contiguous
    torch.testing.assert_close(linear_token_logp(narrow, weight, ids.T, entropy=False), (logp.T, None))
    torch.testing.assert_close(linear_token_logp(hidden, weight, ids.int())[0], logp)
    total, weighted, entropy = linear_weighted_logp(narrow, weight, ids.T.int(), torch.ones(3, 2), entropy=True)
    torch.testing.assert_close((total, weighted, entropy.shape), (logp.sum(), logp.T, torch.Size([3, 2])))
    from_logits, entropy = token_logp(narrow @ weight.T, ids.T.int())
    torch.testing.assert_close((from_logits, entropy.shape), (logp.T, torch.Size([3, 2])))
    one, _ = linear_token_logp(hidden[0, 0], weight, ids[0, 0])  # no leading dimension at all
    torch.testing.assert_close(one, logp[0, 0])


def test_divergences_keep_leading_dimensions_and_take_int32_ids():
    student, teacher = rand(2, 3, 7), rand(2, 3, 7, seed=1)
    for kind, beta in KINDS:
        expected = dense_divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind, beta)
        torch.testing.assert_close(divergence(student, teacher, kind, beta), expected)
        heads = torch.eye(7).double(), teacher, torch.eye(7).double()
        torch.testing.assert_close(linear_divergence(student, *heads, kind, beta), expected)
        total, values = linear_divergence(student, *heads, kind, beta, token_weight=torch.ones(2, 3))
        torch.testing.assert_close((total, values), (expected.sum(), expected))
        logq, ids = teacher.log_softmax(-1).topk(4)
        value = topk_divergence(student, ids, logq, kind, beta)
        assert value.shape == (2, 3)
        torch.testing.assert_close(topk_divergence(student, ids.int(), logq, kind, beta), value)
        total, values = linear_topk_divergence(student, heads[0], ids, logq, kind, beta, token_weight=torch.ones(2, 3))
        torch.testing.assert_close((total, values), (value.sum(), value))


@pytest.mark.parametrize("label", [-100, -1, 2, 10**12])  # inside the vocabulary, or far outside any memory
def test_all_rows_ignored_give_zeros_and_zero_gradients(label):
    hidden, weight = rand(4, 3).requires_grad_(), rand(6, 3, seed=1).requires_grad_()
    ids = torch.full((4,), label)
    logp, entropy = linear_token_logp(hidden, weight, ids, ignore_index=label)
    total, weighted, _ = linear_weighted_logp(hidden, weight, ids, torch.ones(4), ignore_index=label)
    assert not logp.any() and not entropy.any() and total == 0 and not weighted.any()
    for value in (logp.sum() + entropy.sum(), total):
        grads = torch.autograd.grad(value, (hidden, weight))
        assert not grads[0].any() and not grads[1].any()
    logits = rand(4, 6).requires_grad_()
    logp, entropy = token_logp(logits, ids, ignore_index=label)
    assert not logp.any() and not entropy.any()
    (logp.sum() + entropy.sum()).backward()
    assert not logits.grad.any()


def test_rows_with_any_ignored_label_equal_the_rows_without_it():
    hidden, weight = rand(4, 3), rand(6, 3, seed=1)
    for label in (-100, 2, 10**12):
        ids = torch.tensor([0, label, 5, label])
        ours, kept = linear_token_logp(hidden, weight, ids, ignore_index=label), [0, 2]
        for x, y in zip(ours, linear_token_logp(hidden[kept], weight, ids[kept]), strict=True):
            torch.testing.assert_close(x[kept], y)
            assert not x[[1, 3]].any()


def test_gather_and_topk_equal_dense_float64():
    hidden, weight, bias = rand(5, 3), rand(11, 3, seed=1), rand(11, seed=2)
    listed = torch.tensor([[0, 8, -1]] * 5)
    for flags in HEADS.values():
        flags = flags | ({"vocab_size": 9} if "vocab_size" in flags else {})
        expected = dense_logits(hidden, weight, bias, **flags).log_softmax(-1)
        for chunk in (None, 1, 2):
            for given in (listed, listed.int()):
                same, ours = linear_topk_logp(hidden, weight, ids=given, bias=bias, chunk=chunk, **flags)
                torch.testing.assert_close(ours[:, :2], expected[:, [0, 8]])
                assert (ours[:, 2] == -INF).all() and torch.equal(same, given)
            ids, logps = linear_topk_logp(hidden, weight, 4, bias=bias, chunk=chunk, **flags)
            values, best = expected.topk(4)
            assert torch.equal(ids, best)
            torch.testing.assert_close(logps, values)
    assert not linear_topk_logp(hidden.requires_grad_(), weight, ids=listed)[1].requires_grad


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("shift", [3000.0, -3000.0])
def test_shifted_fp32_logits_lose_nothing_more(shift, temperature):
    logits = (rand(9, 37, scale=5.0) + shift).float()  # the identity as hidden states makes these the exact logits
    other, eye, ids = (rand(9, 37, seed=1, scale=5.0) + shift).float(), torch.eye(9), tokens_of(9, 37)
    exact, exact_other = ((x.double() / temperature).log_softmax(-1) for x in (logits, other))
    logp, entropy = linear_token_logp(eye, logits.T, ids, temperature=temperature)
    torch.testing.assert_close(logp.double(), exact.gather(-1, ids[:, None])[:, 0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=2e-5, atol=2e-5)
    for kind, beta in KINDS:
        ours = linear_divergence(eye, logits.T, eye, other.T, kind, beta, temperature)
        torch.testing.assert_close(
            ours.double(), dense_divergence(exact, exact_other, kind, beta), rtol=2e-5, atol=2e-5
        )


PRECISION = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (5e-5, 5e-3), torch.float16: (5e-5, 5e-3)}


@every_op
@OPTIONS
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["two-phase", "one-pass"])
def test_precision_of_values_and_gradients_against_float64_of_the_same_inputs(op, options, dtype, weights):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves_of()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    rounded = [x.to(dtype) for x in (TEACHER, TEACHER_HEAD, TEACHER_BIAS)]
    with pytest.MonkeyPatch.context() as patch:  # the teacher that call() sees after rounding
        for name, x in zip(("TEACHER", "TEACHER_HEAD", "TEACHER_BIAS"), rounded, strict=True):
            patch.setitem(globals(), name, x.double())
        expected, out = dense_call(op, *exact, **options), call(op, *leaves, **options, token_weight=weights)
    slopes = torch.autograd.grad((3 * WEIGHTS * expected).sum(), exact)
    (3 * (out * WEIGHTS).sum() if weights is None else 3 * out[0]).backward()
    values, gradients = PRECISION[dtype]
    value = out if weights is None else out[1]
    assert value.dtype == torch.float32 and error(value, expected) < values
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert leaf.grad.dtype == dtype and error(leaf.grad, slope) < gradients


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_inputs_are_computed_in_fp32_and_more_exactly_than_half_precision_logits(dtype):
    hidden, weight, teacher, head = (rand(64, 32, seed=s, scale=1.5, dtype=dtype) for s in range(4))
    ids = tokens_of(64, 64)
    exact, other = ((h.double() @ w.double().T).log_softmax(-1) for h, w in ((hidden, weight), (teacher, head)))
    plain, plain_other = ((h @ w.T).float().log_softmax(-1) for h, w in ((hidden, weight), (teacher, head)))
    rough = {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    with torch.autocast("cpu", dtype):  # as in training with --dtype
        logp, entropy = linear_token_logp(hidden, weight, ids)
        values = [linear_divergence(hidden, weight, teacher, head, *kind) for kind in KINDS]
    target = exact.gather(-1, ids[:, None])[:, 0]
    assert logp.dtype == entropy.dtype == torch.float32
    by_half = plain.gather(-1, ids[:, None])[:, 0]
    assert (logp - target).abs().max() < 5e-5 < rough < (by_half - target).abs().max()
    assert error(entropy, -(exact.exp() * exact).sum(-1)) < 5e-5
    for kind, value in zip(KINDS, values, strict=True):
        expected, rounded = dense_divergence(exact, other, *kind), dense_divergence(plain, plain_other, *kind)
        assert error(value, expected) < 5e-5
        assert 10 * error(value, expected) < error(rounded, expected)


@every_op
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["two-phase", "one-pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(op, weights, dtype):
    runs = []
    for inside in (False, True):
        leaves = [x.detach().to(dtype).requires_grad_() for x in leaves_of()]
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out = call(op, *leaves, token_weight=weights, chunk=2)
            (out.sum() if weights is None else out[0]).backward()
        runs.append([out if weights is None else out[1], *(x.grad for x in leaves)])
    assert all(map(torch.equal, *runs))


class Slices(TorchFunctionMode):
    """Indexing by slices without the device behind it: without CUDA, fake CUDA tensors know all but that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:  # after an in-place operation on the slice
            return None
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
            start, stop, _ = part.indices(x.shape[dim])
            x = torch.narrow(x, dim, start, stop - start)
        return x


@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_products_on_a_gpu_are_well_typed(dtype, device):
    """Half-precision operands into fp32 logits and sums, which only GPUs offer: checked on fake tensors."""
    with FakeTensorMode(), Slices():
        hidden, weight, bias = (torch.empty(*shape, dtype=dtype, device=device) for shape in ((5, 8), (33, 8), (33,)))
        source = Source(hidden, weight, bias)
        for rows, (logits,) in chunks(2, source):
            assert logits.shape == (rows.stop - rows.start, 33)
            assert logits.dtype == torch.float32 and logits.device.type == device
            da = torch.empty_like(logits, dtype=dtype)
            sums = [torch.zeros_like(x, dtype=torch.float32) for x in (hidden, weight, bias)]
            source.pull_back(rows, da, *sums)
            assert all(x.dtype == torch.float32 for x in sums)


def test_the_form_is_chosen_by_device_and_dtype_unless_forced():
    cpu = torch.zeros(1)
    with FakeTensorMode():
        for device in ("cuda", "xpu"):
            for dtype in (torch.float32, *HALF):
                assert backend_for(torch.empty(1, device=device, dtype=dtype)) == "triton"
            assert backend_for(torch.empty(1, device=device, dtype=torch.float64)) == "torch"
    assert backend_for(cpu) == "torch"
    with use_backend("triton"):
        assert backend_for(cpu) == "triton"
        with use_backend("torch"):
            assert backend_for(cpu) == "torch"
        assert backend_for(cpu) == "triton"
    with pytest.raises(ZeroDivisionError), use_backend("triton", 16):
        raise ZeroDivisionError
    assert backend_for(cpu) == "torch"


def test_logp_and_entropy_bounds():
    hidden, weight = rand(50, 6, scale=3.0), rand(17, 6, seed=1)
    ids, best = linear_topk_logp(hidden, weight, 1)
    logp, entropy = linear_token_logp(hidden, weight, ids[:, 0])
    torch.testing.assert_close(logp, best[:, 0])
    assert (logp >= -math.log(17)).all() and (entropy >= 0).all() and (entropy <= math.log(17) + 1e-12).all()


# --- tokens masked with -inf


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("masked", [[0, 1], [5, 6], [0, 2, 3, 4, 5, 6]])
def test_masked_tokens_have_no_probability_and_no_gradient(masked, chunk):
    hidden, weight, bias, kept = (
        rand(4, 3),
        rand(7, 3, seed=1),
        rand(7, seed=2),
        [i for i in range(7) if i not in masked],
    )
    masked_bias = bias.clone()
    masked_bias[masked] = -INF
    ids = torch.tensor([kept[0], kept[-1], kept[0], -100])
    smaller = torch.tensor([0, len(kept) - 1, 0, -100])

    def ours(hidden, weight):
        return linear_token_logp(hidden, weight, ids, masked_bias, chunk=chunk)

    def dense(hidden, weight):
        return linear_token_logp(hidden, weight[kept], smaller, bias[kept])

    compare(ours, dense, [hidden, weight])


def test_selected_masked_token_is_minus_infinity_with_finite_gradient():
    hidden, weight, bias = rand(1, 3).requires_grad_(), rand(5, 3, seed=1).requires_grad_(), rand(5, seed=2)
    bias[3] = -INF
    logp, entropy = linear_token_logp(hidden, weight, torch.tensor([3]), bias)
    assert logp.item() == -INF and entropy.isfinite().all()
    (logp + entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("kind,beta", KINDS)
def test_tokens_masked_in_both_models_count_as_absent(kind, beta):
    bias, other, kept = rand(7, seed=2), rand(7, seed=5), [1, 2, 4, 5]
    teacher, heads = rand(4, 3, seed=3), rand(7, 3, seed=4)
    masked_bias, masked_other = bias.clone(), other.clone()
    masked_bias[[0, 3, 6]] = masked_other[[0, 3, 6]] = -INF

    def ours(hidden, weight):
        return linear_divergence(
            hidden, weight, teacher, heads, kind, beta, student_bias=masked_bias, teacher_bias=masked_other
        )

    def dense(hidden, weight):
        student = (hidden @ weight[kept].T + bias[kept]).log_softmax(-1)
        return dense_divergence(student, (teacher @ heads[kept].T + other[kept]).log_softmax(-1), kind, beta)

    compare(ours, dense, [rand(4, 3), rand(7, 3, seed=1)])


@pytest.mark.parametrize("kind,beta", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_masked_in_one_model_only(side, kind, beta):
    bias, mask = torch.zeros(5).double(), torch.tensor([0, -INF, 0, 0, 0]).double()
    hidden, weight = rand(3, 4).requires_grad_(), rand(5, 4, seed=1).requires_grad_()
    biases = {"student_bias": bias, "teacher_bias": bias, f"{side}_bias": mask}
    value = linear_divergence(hidden, weight, rand(3, 4, seed=2), rand(5, 4, seed=3), kind, beta, **biases)
    p, q = (
        (h @ w.T + biases[f"{s}_bias"]).softmax(-1).tolist()
        for s, h, w in (("student", hidden, weight), ("teacher", rand(3, 4, seed=2), rand(5, 4, seed=3)))
    )

    def kl(a, b):
        return sum(x * (math.log(x / y) if y else INF) for x, y in zip(a, b, strict=True) if x)

    for ours, x, y in zip(value.tolist(), p, q, strict=True):
        mix = [beta * b + (1 - beta) * a for a, b in zip(x, y, strict=True)]
        jsd = beta * kl(y, mix) + (1 - beta) * kl(x, mix)
        assert ours == pytest.approx({"forward_kl": kl(y, x), "reverse_kl": kl(x, y), "jsd": jsd}[kind])
    value.sum().backward()
    if (side, kind) != ("teacher", "reverse_kl"):  # there the divergence and its slope are infinite
        assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("kind,beta", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [2, 4])
def test_topk_with_masked_tokens_outside_the_list(k, tail, kind, beta):
    """k = 4: every unlisted token is masked in both models, so that the bucket is empty."""
    kept, ids = [1, 2, 4, 5], torch.tensor([[1, 2, 4, 5][:k]] * 3)
    mask = torch.full((7,), -INF).double()
    mask[kept] = 0
    teacher = (rand(3, 7, seed=3) + mask).log_softmax(-1)

    def ours(hidden, weight):
        return linear_topk_divergence(hidden, weight, ids, teacher.gather(-1, ids), kind, beta, tail, bias=mask)

    def dense(hidden, weight):
        logps, small = (hidden @ weight[kept].T).log_softmax(-1), torch.arange(k).expand(3, k)
        return dense_topk(logps, teacher[:, kept], small, kind, beta, tail)

    compare(ours, dense, [rand(3, 4), rand(7, 4, seed=1)], atol=1e-5 if tail == "bucket" else 1e-8)


@every_op
@pytest.mark.parametrize("frozen", [False, True])
def test_row_without_weight_may_be_infinite(op, frozen):
    """A token that the student masks: its log-prob is -inf, forward KL infinite, all else finite."""
    bias = torch.zeros(V).double()
    bias[LABELS[1] if op[0] == "logp" else LISTED[1, 0]] = -INF
    hidden, weight, _ = leaves_of(frozen=(1,) if frozen else ())
    trained = [hidden] if frozen else [hidden, weight]
    value = call(op, hidden, weight, bias, chunk=2)
    infinite = value.isinf()
    assert infinite[1] == (op[0] in ("logp", "forward_kl")) and not value.isnan().any()
    total, values = call(op, hidden, weight, bias, chunk=2, token_weight=torch.where(infinite, 0, 2))
    torch.testing.assert_close((total, values), (2 * value[~infinite].sum(), value.detach()))
    grads = torch.autograd.grad(total, trained)
    torch.testing.assert_close(grads, torch.autograd.grad(2 * value[~infinite].sum(), trained))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("k", [None, 3])
def test_infinite_rows_that_the_loss_leaves_out_add_nothing(k, frozen):
    """Reverse KL where the teacher masks a token that the student gives probability: value and slope are infinite."""
    hidden, weight = rand(3, 4).requires_grad_(), rand(5, 4, seed=1).requires_grad_(not frozen)
    teacher, heads, mask = rand(3, 2, seed=2), rand(5, 2, seed=3), torch.tensor([0, 0, -INF, 0, 0]).double()
    if k:
        ids = torch.tensor([[2, 0, 4]] * 3)
        logq = (teacher @ heads.T + mask).log_softmax(-1).gather(-1, ids)
        value = linear_topk_divergence(hidden, weight, ids, logq, "reverse_kl")
    else:
        value = linear_divergence(hidden, weight, teacher, heads, "reverse_kl", teacher_bias=mask)
    assert (value == INF).all()
    torch.where(value == INF, 0, value).sum().backward()
    assert not hidden.grad.any() and (frozen or not weight.grad.any())


# --- divergences


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind,beta", KINDS)
def test_divergence_equals_dense_float64_with_heads_of_different_width(kind, beta, head, chunk):
    flags = HEADS[head]
    vocab = 23 if head == "sliced" else None  # heads padded to 29 and 31 rows
    rows = (29, 31) if vocab else (29, 29)
    teacher, heads, other = rand(7, 6, seed=3), rand(rows[1], 6, seed=4), rand(rows[1], seed=5)
    shared = {"temperature": flags.get("temperature", 1.0), "vocab_size": vocab}
    cap = flags.get("softcap")

    def ours(hidden, weight, bias):
        return linear_divergence(
            hidden, weight, teacher, heads, kind, beta, chunk=chunk, student_bias=bias, teacher_bias=other,
            student_softcap=cap, teacher_softcap=2 * cap if cap else None, **shared,
        )  # fmt: skip

    def dense(hidden, weight, bias):
        student = dense_logits(hidden, weight, bias, softcap=cap, **shared)
        target = dense_logits(teacher, heads, other, softcap=2 * cap if cap else None, **shared)
        return dense_divergence(student.log_softmax(-1), target.log_softmax(-1), kind, beta)

    compare(ours, dense, [rand(7, 5), rand(rows[0], 5, seed=1), rand(rows[0], seed=2)])


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind,beta", KINDS)
def test_topk_divergence_equals_dense_float64(kind, beta, tail, chunk):
    ids = torch.tensor([[3, 0, 7], [5, -1, -1], [1, 2, -1], [8, 7, 6]])
    flags = {"temperature": 1.7, "softcap": 3.0, "vocab_size": 9}
    teacher = rand(4, 9, seed=3).log_softmax(-1)
    listed = teacher.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 123.0)  # garbage beside the padding

    def ours(hidden, weight, bias):
        return linear_topk_divergence(hidden, weight, ids, listed, kind, beta, tail, bias=bias, chunk=chunk, **flags)

    def dense(hidden, weight, bias):
        return dense_topk(dense_logits(hidden, weight, bias, **flags).log_softmax(-1), teacher, ids, kind, beta, tail)

    compare(ours, dense, [rand(4, 5), rand(11, 5, seed=1), rand(11, seed=2)])


@pytest.mark.parametrize("kind,beta", KINDS)
def test_topk_whose_only_listed_token_the_student_masks(kind, beta):
    """Outcomes: that token with p = 0, q = 0.3, and the bucket with p = 1, q = 0.7."""
    logits, q = torch.tensor([[0.5, -INF, 1.0]]).double().requires_grad_(), 0.3
    value = topk_divergence(logits, torch.tensor([[1]]), torch.tensor([[q]]).double().log(), kind, beta)
    mix = beta * (1 - q) + 1 - beta
    jsd = beta * (q * -math.log(beta) + (1 - q) * math.log((1 - q) / mix)) - (1 - beta) * math.log(mix)
    assert value.item() == pytest.approx({"forward_kl": INF, "reverse_kl": -math.log(1 - q), "jsd": jsd}[kind])
    value.backward()
    rest = logits.detach().softmax(-1)
    rest[0, 1] = -1
    torch.testing.assert_close(logits.grad, q * rest if kind == "forward_kl" else 0 * rest)


def test_topk_over_the_whole_vocabulary_is_the_full_divergence():
    ids, teacher = torch.arange(6).expand(3, 6), rand(3, 6, seed=3).log_softmax(-1)
    for kind, beta in KINDS:
        exact = dense_divergence((rand(3, 4) @ rand(6, 4, seed=1).T).log_softmax(-1), teacher, kind, beta)
        for tail in TAILS:
            for dtype in (torch.float64, torch.float32):
                hidden, weight = rand(3, 4, dtype=dtype).requires_grad_(), rand(6, 4, seed=1, dtype=dtype)
                ours = linear_topk_divergence(hidden, weight, ids, teacher.to(dtype), kind, beta, tail)
                torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)
                ours.sum().backward()
                assert hidden.grad.isfinite().all()


def test_bucket_keeps_a_students_tail_far_below_rounding():
    logits = torch.tensor([[50.0, 0.0, 1.0]], requires_grad=True)  # tail e^-50, which 1 - sum p would round to 0
    teacher = torch.tensor([[0.9]]).log()
    value = linear_topk_divergence(torch.eye(1), logits.T, torch.tensor([[0]]), teacher, "forward_kl")
    tail = math.log(1 + math.e) - 50
    assert value.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - tail), rel=1e-5)
    value.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.1, -0.1 / (1 + math.e), -0.1 * math.e / (1 + math.e)]]))


@pytest.mark.parametrize("off", [-1e-7, 0.0, 1e-7])  # what rounding leaves of 1 - sum q
@pytest.mark.parametrize("kind,beta", KINDS)
def test_bucket_of_a_teacher_without_a_tail(kind, beta, off):
    hidden, q = rand(1, 4).requires_grad_(), [0.7, 0.3 + off]
    ids, weight = torch.tensor([[2, 0]]), rand(5, 4, seed=1)
    value = linear_topk_divergence(hidden, weight, ids, torch.tensor([q]).double().log(), kind, beta)
    p = (hidden @ weight.T).softmax(-1)[0].tolist()
    listed, tail = [p[2], p[0]], p[1] + p[3] + p[4]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    mix = [beta * y + (1 - beta) * x for x, y in zip(listed, q, strict=True)]
    expected = {
        "forward_kl": kl(q, listed),
        "reverse_kl": kl(listed, q) + tail * math.log(tail / 1e-6),  # floored
        "jsd": beta * kl(q, mix) + (1 - beta) * (kl(listed, mix) - tail * math.log(1 - beta)),
    }[kind]
    assert value.item() == pytest.approx(expected, abs=2e-6)
    value.sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad.any()


@pytest.mark.parametrize("kind,beta", KINDS)
def test_identities_of_the_divergences(kind, beta):
    p, q = (rand(200, 9, seed=s, scale=3.0).log_softmax(-1) for s in (0, 1))
    value = divergence(p, q, kind, beta)
    assert (value >= -1e-12).all()
    assert divergence(p, p, kind, beta).abs().max() < 1e-12
    if kind == "jsd":
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert (value <= bound + 1e-12).all()
        torch.testing.assert_close(value, divergence(q, p, "jsd", 1 - beta))
    else:
        torch.testing.assert_close(value, divergence(q, p, {"forward_kl": "reverse_kl"}.get(kind, "forward_kl"), 0.5))


def test_jsd_over_its_weight_tends_to_the_two_kls():
    p, q = (rand(20, 9, seed=s).log_softmax(-1) for s in (0, 1))
    for beta, scale, kind in [(1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")]:
        torch.testing.assert_close(divergence(p, q, "jsd", beta) / scale, divergence(p, q, kind), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind,beta", KINDS)
def test_equal_models_and_near_one_hot_rows_give_no_nan_in_fp32(kind, beta):
    eye = torch.eye(3)
    logits = torch.tensor([[300.0, 0, 0, -300], [0, 0, 0, 0], [1e4, -1e4, 0, 0]])
    student = logits.clone().requires_grad_()
    value = linear_divergence(eye, student.T, eye, logits.T, kind, beta)
    value.sum().backward()
    assert value.abs().max() <= 1e-7 and student.grad.abs().max() <= 1e-7
    student.grad = None
    linear_divergence(eye, student.T, eye, logits.flip(1).T, kind, beta).sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind,beta", KINDS)
def test_teacher_and_weights_get_no_gradient(kind, beta):
    hidden, weight, teacher, head, bias, factor = (
        rand(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 2), (5, 2), (3, 4), (5, 4), (5,), (3,)])
    )
    ids, logits = torch.tensor([[0, 3]] * 3), rand(3, 5).requires_grad_()
    listed = (teacher @ head.T).log_softmax(-1).gather(-1, ids)
    for known in (None, factor):
        outputs = [
            linear_divergence(hidden, weight, teacher, head, kind, beta, teacher_bias=bias, token_weight=known),
            divergence(logits, teacher @ head.T + bias, kind, beta, token_weight=known),
            *(
                linear_topk_divergence(hidden, weight, ids, listed, kind, beta, tail=t, token_weight=known)
                for t in TAILS
            ),
            *(topk_divergence(logits, ids, listed, kind, beta, tail=t, token_weight=known) for t in TAILS),
        ]
        sum(out.sum() if known is None else out[0] for out in outputs).backward()
    linear_weighted_logp(hidden, weight, ids[:, 0], factor)[0].backward()
    assert all(x.grad is None for x in (teacher, head, bias, factor))
    assert all(x.grad.any() for x in (hidden, weight, logits))


@pytest.mark.parametrize("kind,beta", KINDS)
def test_topk_with_a_bucket_is_at_most_the_full_divergence(kind, beta):
    student, teacher = rand(100, 9, scale=3.0), rand(100, 9, seed=1, scale=3.0)
    full, logq = divergence(student, teacher, kind, beta), teacher.log_softmax(-1)
    for k in range(1, 10):
        values, ids = logq.topk(k)
        value = topk_divergence(student, ids, values, kind, beta)
        assert (value <= full + 1.4e-5).all()  # a tail below 1e-6 counts as none
    torch.testing.assert_close(value, full, rtol=0, atol=1e-6)


def test_list_may_have_more_columns_than_the_vocabulary_has_tokens_if_the_rest_is_padding():
    ids, teacher = torch.tensor([[2, 0, 1, -1, -1], [1, -1, -1, -1, -1]]), rand(2, 3, seed=1).log_softmax(-1)
    student = rand(2, 3)
    listed = teacher.gather(-1, ids.clamp(min=0))
    for kind, beta in KINDS:
        expected = dense_topk(student.log_softmax(-1), teacher, ids, kind, beta, "bucket")
        torch.testing.assert_close(topk_divergence(student, ids, listed, kind, beta), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind,beta", KINDS)
def test_gradient_sums_to_zero_over_the_vocabulary_and_teacher_has_none(kind, beta):
    logits, other = rand(4, 7).requires_grad_(), rand(4, 7, seed=1).requires_grad_()
    eye, ids = torch.eye(4).double(), torch.tensor([[0, 3]] * 4)
    linear_divergence(eye, logits.T, eye, other.T, kind, beta, temperature=0.5).sum().backward()
    for tail in TAILS:
        listed = other.log_softmax(-1).gather(-1, ids)
        linear_topk_divergence(eye, logits.T, ids, listed, kind, beta, tail).sum().backward()
    assert other.grad is None and logits.grad.any()
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_zero_rows_stay_connected_to_the_graph():
    hidden, weight = rand(0, 4).requires_grad_(), rand(7, 4, seed=1).requires_grad_()
    none = torch.zeros(0, 2, dtype=torch.long)
    outputs = [
        linear_divergence(hidden, weight, rand(0, 3), rand(7, 3), "jsd"),
        linear_topk_divergence(hidden, weight, none, none.double(), "forward_kl"),
        *linear_token_logp(hidden, weight, none[:, 0]),
    ]
    assert [x.numel() for x in outputs] == [0] * 4 and all(x.requires_grad for x in outputs)
    sum(x.sum() for x in outputs).backward()
    assert not weight.grad.any()
    assert [x.shape for x in linear_topk_logp(hidden, weight, 3)] == [(0, 3), (0, 3)]
    assert [x.shape for x in linear_topk_logp(hidden, weight, ids=none)] == [(0, 2), (0, 2)]


def test_two_runs_are_bit_equal_and_inputs_unchanged():
    inputs = [rand(7, 5, dtype=torch.float32), rand(29, 5, seed=1, dtype=torch.float32)]
    before, ids, runs = [x.clone() for x in inputs], tokens_of(7, 29), []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in inputs]
        logp, entropy = linear_token_logp(*leaves, ids, chunk=2)
        jsd = linear_divergence(*leaves, rand(7, 3).float(), rand(29, 3).float(), "jsd", chunk=2)
        runs.append([logp, entropy, jsd, *torch.autograd.grad((logp + entropy + jsd).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# --- refusals


def bad(fn, *args, **flags):
    return pytest.param(lambda: fn(*args, **flags), id=f"{fn.__name__}-{'-'.join(flags) or 'ids'}")


X, W = rand(2, 3), rand(5, 3, seed=1)
IDS, PAIRS = torch.tensor([0, 4]), torch.tensor([[0, 1], [2, 3]])
Q = torch.full((2, 2), 0.25).double().log()


@pytest.mark.parametrize(
    "call",
    [
        *(bad(linear_token_logp, X, W, IDS, temperature=t) for t in (0.0, -1.0, math.nan)),
        bad(linear_token_logp, X, W, torch.tensor([0, 5])),
        bad(linear_token_logp, X, W, torch.tensor([0, -1])),
        bad(linear_token_logp, X, W, IDS, vocab_size=4),
        bad(token_logp, X, IDS.clamp(max=2), bias=torch.zeros(3)),
        bad(linear_topk_logp, X, W, ids=PAIRS, temperature=0.0),
        bad(linear_topk_logp, X, W, ids=PAIRS, vocab_size=3),
        bad(linear_topk_logp, X, W),
        bad(linear_topk_logp, X, W, k=0),
        bad(linear_topk_logp, X, W, k=6),
        bad(linear_topk_logp, X, W, k=5, vocab_size=4),
        bad(linear_topk_logp, X, W, k=1, temperature=0.0),
        bad(linear_divergence, X, W, X, W, "forward_kl", temperature=0.0),
        bad(linear_divergence, X, W, X, W, kind="kl"),
        bad(linear_divergence, X, W, X, W, "jsd", beta=0.0),
        bad(linear_divergence, X, W, X, W, "jsd", beta=1.0),
        bad(linear_divergence, X, W, X, W[:4], "forward_kl"),
        bad(linear_topk_divergence, X, W, PAIRS, Q, "forward_kl", temperature=0.0),
        bad(linear_topk_divergence, X, W, PAIRS, Q, "forward_kl", tail="none"),
        bad(linear_topk_divergence, X, W, PAIRS, Q, kind="kl"),
        bad(linear_topk_divergence, X, W, PAIRS, Q, "forward_kl", vocab_size=3),
        bad(linear_topk_divergence, X, W, torch.arange(6).expand(2, 6), rand(2, 6), "forward_kl"),
        bad(linear_topk_divergence, X, W, torch.tensor([[0, 1], [2, 2]]), Q, "forward_kl"),
        bad(linear_topk_divergence, X, W, torch.tensor([[0, 1, 0], [2, 3, -1]]), rand(2, 3), "forward_kl"),
        bad(linear_topk_divergence, X, W, torch.tensor([[0, 1], [2, -2]]), Q, "forward_kl"),
        *(bad(token_logp, X @ W.T, IDS, temperature=t) for t in (0.0, -1.0, math.nan)),
        bad(token_logp, X @ W.T, torch.tensor([0, 5])),
        bad(linear_weighted_logp, X, W, torch.tensor([0, 5]), torch.ones(2)),
        bad(linear_weighted_logp, X, W, IDS, torch.ones(2), temperature=0.0),
        bad(divergence, X, X, "forward_kl", temperature=-1.0),
        bad(divergence, X, X, kind="kl"),
        bad(divergence, X, X, "jsd", beta=0.0),
        bad(divergence, X, X[:, :2], "forward_kl"),
        bad(topk_divergence, X @ W.T, PAIRS, Q, "forward_kl", tail="none"),
        bad(topk_divergence, X @ W.T, torch.tensor([[0, 5], [2, 3]]), Q, "forward_kl"),
    ],
)
def test_bad_arguments_raise_value_errors(call):
    with pytest.raises(ValueError):
        call()


# --- memory

PEAK = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import posttrain
from posttrain.kernels.divergence import linear_divergence
from posttrain.kernels.logprob import linear_token_logp, linear_weighted_logp
from posttrain.kernels.topk import linear_topk_divergence
torch.set_num_threads(1)
CHUNK, H, V = 256, 16, 16384
name = sys.argv[1]

def plain(h, w, ids):
    logps = (h @ w.T).log_softmax(-1)
    return (logps.gather(-1, ids[:, None])[:, 0] - (logps.exp() * logps).sum(-1)).sum()

FORMS = {
    "logp two-phase": lambda h, w, ids: sum(linear_token_logp(h, w, ids, chunk=CHUNK)).sum(),
    "logp one-pass": lambda h, w, ids: linear_weighted_logp(h, w, ids, torch.ones(len(h)), chunk=CHUNK)[0],
    "logp frozen": lambda h, w, ids: linear_token_logp(h, w.detach(), ids, chunk=CHUNK)[0].sum(),
    "jsd two-phase": lambda h, w, ids: linear_divergence(h, w, h, w, "jsd", chunk=CHUNK).sum(),
    "jsd one-pass": lambda h, w, ids: linear_divergence(
        h, w, h, w, "jsd", chunk=CHUNK, token_weight=torch.ones(len(h)))[0],
    "top-k": lambda h, w, ids: linear_topk_divergence(
        h, w, ids[:, None], torch.full((len(h), 1), -1.0), "jsd", chunk=CHUNK).sum(),
    "plain": plain,
}

def status(field):  # kB; not getrusage, whose maximum a child inherits from its parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def step(n):
    h, ids = torch.randn(n, H).requires_grad_(), torch.randint(0, V, (n,))
    FORMS[name](h, weight, ids).backward()
    weight.grad = None

weight = torch.randn(V, H).requires_grad_()
step(4)  # loads torch's libraries
before = status("VmRSS")
peaks = []
for n in (512, 1024):
    step(n)
    peaks.append(status("VmHWM") - before)
print(*peaks)
"""


MEBI = 1024  # kB
CHUNK_BUFFER, HEAD = 16 * MEBI, 1 * MEBI  # 256 x 16384 and 16384 x 16 floats


PEAKS = {  # buffers of a chunk, gradient of the head
    "logp two-phase": (1, HEAD),
    "logp one-pass": (1, HEAD),
    "logp frozen": (1, 0),
    "jsd two-phase": (2, HEAD),
    "jsd one-pass": (2, HEAD),
    "top-k": (1, HEAD),
    "plain": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_memory_is_a_chunk_and_stays_when_rows_double(name):
    methods = str(Path(__file__).resolve().parents[1] / "methods")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, "-c", PEAK, name, methods]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, second = map(int, run.stdout.split())
    if name == "plain":
        assert first > 3 * 2 * CHUNK_BUFFER and second > 1.9 * first, "the measurement itself is broken"
        return
    buffers, gradients = PEAKS[name]
    # beside the buffers: hidden states and their gradient (64 kB each), and some temporaries of 2^17 elements
    assert first < 1.1 * (gradients + buffers * CHUNK_BUFFER) + 4 * MEBI
    assert second < first + MEBI
