"""kernels/logprob.py and kernels/divergence.py on torch against dense float64: values, gradients, memory."""

import math
import subprocess
import sys

import pytest
import torch

from posttrain.kernels.divergence import divergence, linear_divergence, linear_topk_divergence
from posttrain.kernels.logprob import linear_gather_logp, linear_token_logp, linear_topk_logp

KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
TAILS = ("bucket", "renorm", "drop")
INF = math.inf


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
    mix = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
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


def test_all_rows_ignored_give_zeros_and_zero_gradients():
    hidden, weight = rand(4, 3).requires_grad_(), rand(6, 3, seed=1).requires_grad_()
    logp, entropy = linear_token_logp(hidden, weight, torch.full((4,), -100))
    assert not logp.any() and not entropy.any()
    (logp.sum() + entropy.sum()).backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("flags", [{}, {"temperature": 0.7, "softcap": 2.0}])
def test_gradcheck(flags, chunk):
    ids, bias = tokens_of(5, 7, ignored=[2]), rand(7, seed=2).requires_grad_()
    hidden, weight = rand(5, 3).requires_grad_(), rand(7, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_logp(h, w, ids, b, chunk=chunk, **flags), (hidden, weight, bias)
    )
    teacher, heads = rand(5, 4, seed=3), rand(7, 4, seed=4)
    sided = {("student_softcap" if k == "softcap" else k): v for k, v in flags.items()}
    for kind, beta in KINDS:
        assert torch.autograd.gradcheck(
            lambda h, w, b, k=kind, beta=beta: linear_divergence(
                h, w, teacher, heads, k, beta, student_bias=b, chunk=chunk, **sided
            ),
            (hidden, weight, bias),
        )


def test_gather_and_topk_equal_dense_float64():
    hidden, weight, bias = rand(5, 3), rand(11, 3, seed=1), rand(11, seed=2)
    listed = torch.tensor([[0, 8, -1]] * 5)
    for flags in HEADS.values():
        flags = flags | ({"vocab_size": 9} if "vocab_size" in flags else {})
        expected = dense_logits(hidden, weight, bias, **flags).log_softmax(-1)
        for chunk in (None, 1, 2):
            ours = linear_gather_logp(hidden, weight, listed, bias, chunk=chunk, **flags)
            torch.testing.assert_close(ours[:, :2], expected[:, [0, 8]])
            assert (ours[:, 2] == -INF).all()
            ids, logps = linear_topk_logp(hidden, weight, 4, bias, chunk=chunk, **flags)
            values, best = expected.topk(4)
            assert torch.equal(ids, best)
            torch.testing.assert_close(logps, values)
    logps = linear_gather_logp(hidden.requires_grad_(), weight, listed)
    logps[:, :2].sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad.any()


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


def test_bf16_inputs_are_computed_in_fp32_and_more_exactly_than_bf16_logits():
    hidden, weight = (rand(64, 32, seed=s, scale=1.5, dtype=torch.bfloat16) for s in (0, 1))
    ids = tokens_of(64, 64)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    with torch.autocast("cpu", torch.bfloat16):  # as in training under --dtype bfloat16
        ours = linear_token_logp(hidden, weight, ids)[0]
    plain = (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 5e-5 < 1e-2 < (plain - exact).abs().max()


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
        linear_gather_logp(hidden, weight, none),
        *linear_token_logp(hidden, weight, none[:, 0]),
    ]
    assert [x.numel() for x in outputs] == [0] * 5 and all(x.requires_grad for x in outputs)
    sum(x.sum() for x in outputs).backward()
    assert not weight.grad.any()
    assert [x.shape for x in linear_topk_logp(hidden, weight, 3)] == [(0, 3), (0, 3)]


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
IDS, LISTED = torch.tensor([0, 4]), torch.tensor([[0, 1], [2, 3]])
Q = torch.full((2, 2), 0.25).double().log()


@pytest.mark.parametrize(
    "call",
    [
        *(bad(linear_token_logp, X, W, IDS, temperature=t) for t in (0.0, -1.0, math.nan)),
        bad(linear_token_logp, X, W, torch.tensor([0, 5])),
        bad(linear_token_logp, X, W, torch.tensor([0, -1])),
        bad(linear_token_logp, X, W, IDS, vocab_size=4),
        bad(linear_gather_logp, X, W, LISTED, temperature=0.0),
        bad(linear_gather_logp, X, W, LISTED, vocab_size=3),
        bad(linear_topk_logp, X, W, k=0),
        bad(linear_topk_logp, X, W, k=6),
        bad(linear_topk_logp, X, W, k=5, vocab_size=4),
        bad(linear_topk_logp, X, W, k=1, temperature=0.0),
        bad(linear_divergence, X, W, X, W, "forward_kl", temperature=0.0),
        bad(linear_divergence, X, W, X, W, kind="kl"),
        bad(linear_divergence, X, W, X, W, "jsd", beta=0.0),
        bad(linear_divergence, X, W, X, W, "jsd", beta=1.0),
        bad(linear_divergence, X, W, X, W[:4], "forward_kl"),
        bad(linear_topk_divergence, X, W, LISTED, Q, "forward_kl", temperature=0.0),
        bad(linear_topk_divergence, X, W, LISTED, Q, "forward_kl", tail="none"),
        bad(linear_topk_divergence, X, W, LISTED, Q, kind="kl"),
        bad(linear_topk_divergence, X, W, LISTED, Q, "forward_kl", vocab_size=3),
        bad(linear_topk_divergence, X, W, torch.arange(6).expand(2, 6), rand(2, 6), "forward_kl"),
    ],
)
def test_bad_arguments_raise_value_errors(call):
    with pytest.raises(ValueError):
        call()


# --- memory

PEAK = """
import resource, sys, torch
sys.path.insert(0, sys.argv[2])
import posttrain
from posttrain.kernels.logprob import linear_token_logp
torch.set_num_threads(1)
n, h, v = 2048, 64, 32768
hidden, weight, ids = torch.randn(n, h).requires_grad_(), torch.randn(v, h).requires_grad_(), torch.randint(0, v, (n,))
def plain(hidden, weight, ids):
    logps = (hidden @ weight.T).log_softmax(-1)
    return logps.gather(-1, ids[:, None])[:, 0], -(logps.exp() * logps).sum(-1)
fn = {"ours": linear_token_logp, "plain": plain}[sys.argv[1]]
few = 4  # loads torch's libraries before the first measurement
sum(fn(hidden[:few], weight, ids[:few])).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logp, entropy = fn(hidden, weight, ids)
(logp + entropy).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_peak_memory_of_forward_and_backward_is_a_chunk_not_the_logits(name):
    from pathlib import Path

    methods = str(Path(__file__).resolve().parents[1] / "methods")
    run = subprocess.run([sys.executable, "-c", PEAK, name, methods], capture_output=True, text=True, check=True)
    grown, logits = int(run.stdout) * 1024, 2048 * 32768 * 4
    if name == "plain":
        assert grown > 2 * logits, "the measurement itself is broken"
    else:
        assert grown < 1.5 * logits, f"grew by {grown / 2**20:.0f} MiB; logits alone are {logits / 2**20:.0f} MiB"
