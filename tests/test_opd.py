"""methods/opd.py against plain loops and enumerated expectations in float64, from the equations of the sheet.

As in the code, p is the student and q the teacher (the sheet has the letters the other way round).
"""

import math

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from posttrain.common.cli import UserError
from posttrain.common.training import Stats
from posttrain.methods import grpo
from posttrain.methods.opd import (
    Config,
    check,
    distillation_advantages,
    early_token_weights,
    prefix_mask,
    row_weights,
    sampled_kl,
    task_advantages,
    teacher_divergence,
)

STUDENT, TEACHER = [0.3, -1.0, 0.8, 0.1, -0.4, 1.7], [1.0, 0.2, -0.5, 0.0, 2.0, -1.0]
V = len(STUDENT)
BETAS = (0.0, 0.01, 0.3, 0.5, 1.0)


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def random_batch(seed, n=5, t=7):
    """d and a mask with a hole, an empty row and a full row."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)).double()
    mask[0], mask[1], mask[2] = 1, 0, (torch.rand(t, generator=g) < 0.6).double()
    return torch.randn(n, t, generator=g).double(), mask


def gradient(fn, x):
    x = x.clone().requires_grad_()
    value = fn(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def model(bias=None, softcap=None, v=V):
    """A model whose LM head is the identity, so that hidden states are logits."""
    head = nn.Linear(v, v, bias=bias is not None).double()
    head.weight.data = torch.eye(v).double()
    if bias is not None:
        head.bias.data = f64(bias)
    made = nn.Module()
    made.head, made.get_output_embeddings = head, lambda: head
    made.config = PretrainedConfig(final_logit_softcapping=softcap)
    return made


def divergence_of(student, teacher, **flags):
    v = student.shape[-1]
    return teacher_divergence(model(v=v), student, model(v=v), teacher, v, Config(**flags))


def softmax(logits, temperature=1.0):
    weights = [math.exp(z / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def divergence_by_loop(p, q, beta):
    """GKD's divergence between outcomes of student probability p and teacher probability q."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if beta in (0, 1):
        return kl(p, q) if beta else kl(q, p)
    mix = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    return beta * kl(q, mix) + (1 - beta) * kl(p, mix)


def topk_by_loop(student, teacher, k, support, tail, beta, temperature=1.0):
    p, q = softmax(student, temperature), softmax(teacher, temperature)
    best = {name: sorted(range(len(x)), key=lambda i: -x[i])[:k] for name, x in (("student", p), ("teacher", q))}
    chosen = sorted({*best["student"], *best["teacher"]}) if support == "union" else best[support]
    p, q = [p[i] for i in chosen], [q[i] for i in chosen]
    if tail == "bucket" and len(chosen) < len(student):
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    if tail == "renorm":
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return divergence_by_loop(p, q, beta), len(set(best["student"]) & set(best["teacher"])) / k


def slope_by_differences(fn, x, h=1e-5):
    moved = [[v + s * h * (i == j) for j, v in enumerate(x)] for i in range(len(x)) for s in (1, -1)]
    values = [fn(m) for m in moved]
    return f64([(a - b) / (2 * h) for a, b in zip(values[::2], values[1::2], strict=True)])


def reverse_kl(z):
    return (z.softmax(-1) * (z.log_softmax(-1) - f64(TEACHER).log_softmax(-1))).sum()


def forward_kl(z):
    q = f64(TEACHER).log_softmax(-1)
    return (q.exp() * (q - z.log_softmax(-1))).sum()


def in_expectation(loss):
    """Sum over all tokens y of p(y) loss(logp_y, teacher_logp_y), p outside the gradient: one row a token."""

    def expected(z):
        logps, teacher_logps = z.log_softmax(-1)[:, None], f64(TEACHER).log_softmax(-1)[:, None]
        return (logps.exp().detach() * loss(logps, teacher_logps)).sum()

    return expected


def policy_gradient(logps, teacher_logps, advantages=None):
    """Eq. 1 and 2 on the first step, behaviour = the policy itself."""
    behaviour = logps.detach()
    if advantages is None:
        advantages = distillation_advantages(behaviour - teacher_logps, torch.ones_like(behaviour))
    return -(logps - behaviour).exp() * advantages


# --- advantages and masks


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("discount", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 13])
def test_discounted_advantages_equal_a_reverse_loop(t, discount, mean):
    d, mask = random_batch(t, t=t)
    ours = distillation_advantages(torch.where(mask > 0, d, 1e4), mask, discount, mean)  # garbage where nothing counts
    for i in range(len(d)):
        later, left = 0.0, 0
        for j in reversed(range(t)):
            later = -d[i, j].item() * mask[i, j].item() + discount * later
            left += int(mask[i, j])
            expected = later / (max(1, left) if mean else 1) * mask[i, j].item()
            assert ours[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_discount_zero_is_minus_d_and_one_is_the_reverse_cumulative_sum():
    d, mask = random_batch(0)
    torch.testing.assert_close(distillation_advantages(d, mask, 0.0), -d * mask)
    sums = (-d * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(distillation_advantages(d, mask, 1.0), sums)


@pytest.mark.parametrize("extra", [0.0, 0.5, 2.0])
def test_early_token_weights_equal_the_loop(extra):
    d, mask = random_batch(1)
    d[3] = 0
    ours = early_token_weights(torch.where(mask > 0, d, 1e4), mask, extra)
    for i in range(len(d)):
        sizes = [abs(d[i, t].item()) * mask[i, t].item() for t in range(d.shape[1])]
        for t in range(d.shape[1]):
            expected = 1 + extra * (1 - sum(sizes[:t]) / max(sum(sizes), 1e-8))
            assert ours[i, t].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.5, 1.0])
def test_prefix_mask_keeps_the_first_share_of_each_rows_sampled_tokens(fraction):
    for seed in range(5):
        mask = random_batch(seed, t=10)[1]
        ours = prefix_mask(mask, fraction)
        for row, kept in zip(mask.tolist(), ours.tolist(), strict=True):
            sampled = [t for t, m in enumerate(row) if m]
            first = sampled[: math.ceil(fraction * len(sampled) - 1e-9)]
            assert kept == [float(t in first) for t in range(len(row))]


def test_task_advantages_are_those_of_grpo():
    g = torch.Generator().manual_seed(0)
    reward, group = torch.randn(30, generator=g).double(), torch.randint(0, 7, (30,), generator=g) * 3
    reward[[2, 9, 20, 21]] = math.nan
    reward[group == 6] = 0.1
    for r, k in [(reward, group), (f64([1, 0, 0, 0]), torch.zeros(4)), (f64([2]), torch.zeros(1))]:
        torch.testing.assert_close(task_advantages(r, k), grpo.group_advantages(r, k, "group_std"), rtol=1e-9, atol=0)
    assert task_advantages(f64([1, 0, 0, 0]), torch.zeros(4)).tolist() == pytest.approx(
        [1.4997] + [-0.4999] * 3, abs=1e-5
    )


@pytest.mark.parametrize("value", [0.1, 1e-8, 1000.1, 12345.67, 1e7])
@pytest.mark.parametrize("size", [3, 6, 7])
def test_all_equal_group_has_task_advantage_exactly_zero_in_fp32(size, value):
    assert not task_advantages(torch.full((size,), value), torch.zeros(size)).any()


@pytest.mark.parametrize("agg", ["token", "seq", "const", "sum"])
def test_row_weights_equal_the_loop_and_do_not_divide_by_zero(agg):
    mask = random_batch(2)[1]
    n = mask.sum(1).tolist()
    expected = {
        "token": [1 / sum(n)] * 5,
        "seq": [1 / (5 * max(1, k)) for k in n],
        "const": [1 / (5 * 11)] * 5,
        "sum": [1.0] * 5,
    }[agg]
    assert row_weights(mask, agg, 11).tolist() == pytest.approx(expected)
    assert row_weights(mask * 0, agg, 11).isfinite().all()


# --- sampled-token estimators


@pytest.mark.parametrize("est", ["k2", "k3", "k3_k2"])
def test_sampled_kl_and_gradient_equal_the_closed_forms(est):
    logps, teacher = f64([[-1.0, -2.0, -0.5, -0.1]]), f64([[-2.0, -0.3, -0.5, -math.inf]])
    value, grad = gradient(lambda x: sampled_kl(x, teacher, est), logps)
    for t in range(3):
        d = (teacher - logps)[0, t].item()
        k2, k3 = (d * d / 2, -d), (math.exp(d) - d - 1, 1 - math.exp(d))
        expected = {"k2": k2, "k3": k3, "k3_k2": (k3[0], k2[1])}[est]
        assert (value[0, t].item(), grad[0, t].item()) == pytest.approx(expected, abs=1e-12)
    assert value.isfinite().all() and grad.isfinite().all(), "a token that the teacher masks must not give NaN"
    assert sampled_kl(torch.tensor([[-400.0, 0.0]]), torch.tensor([[0.0, -400.0]]), est).isfinite().all()


@pytest.mark.parametrize(
    "loss,exact",
    [
        (policy_gradient, reverse_kl),
        (lambda s, t: sampled_kl(s, t, "k2"), reverse_kl),
        (lambda s, t: sampled_kl(s, t, "k3_k2"), reverse_kl),
        (lambda s, t: sampled_kl(s, t, "k3"), forward_kl),
        (lambda s, t: s - t, lambda z: z.sum() * 0),  # k1 as a direct loss, which is why it is not offered
        (lambda s, t: policy_gradient(s, t, -reverse_kl(s[:, 0]).detach()), lambda z: z.sum() * 0),  # full KL as A
    ],
    ids=["k1_pg", "k2", "k3_k2", "k3", "k1_direct", "full_as_advantage"],
)
def test_expected_gradient_over_the_vocabulary(loss, exact):
    ours, expected = gradient(in_expectation(loss), f64(STUDENT))[1], gradient(exact, f64(STUDENT))[1]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_expected_values_of_k1_and_k3_are_the_reverse_kl_and_k1_is_not_a_direct_loss():
    for loss in (lambda s, t: s - t, lambda s, t: sampled_kl(s, t, "k3"), lambda s, t: sampled_kl(s, t, "k3_k2")):
        torch.testing.assert_close(in_expectation(loss)(f64(STUDENT)), reverse_kl(f64(STUDENT)))
    with pytest.raises(KeyError):
        sampled_kl(f64([[0.0]]), f64([[0.0]]), "k1")


def test_hand_numbers_of_k1_and_its_expected_gradient():
    p, q = f64([0.5, 0.5]).log()[:, None], f64([0.75, 0.25]).log()[:, None]
    advantages = distillation_advantages(p - q, torch.ones_like(p))
    torch.testing.assert_close(advantages, f64([[0.405465], [-0.693147]]), rtol=0, atol=1e-6)
    assert (0.5 * (p - q)).sum().item() == pytest.approx(0.143841, abs=1e-6)

    def expected(z):
        logps = z.log_softmax(-1)[:, None]
        return (0.5 * policy_gradient(logps, q)).sum()

    grad = gradient(expected, f64([0, 0]))[1]
    torch.testing.assert_close(grad, f64([-0.274653, 0.274653]), rtol=0, atol=1e-6)


def test_first_step_gradient_is_the_log_ratio_over_the_tokens_and_equals_the_sampled_loss_of_trl():
    g = torch.Generator().manual_seed(0)
    logps, teacher = -torch.rand(2, 5, 7, generator=g).double() * 3
    mask = random_batch(3)[1]
    c = row_weights(mask, "token", 9)[:, None]
    advantages = distillation_advantages(logps - teacher, mask)
    grad = gradient(lambda x: (-(x - logps).exp() * advantages * mask * c).sum(), logps)[1]
    torch.testing.assert_close(grad, (logps - teacher) * mask / mask.sum())
    trl = gradient(lambda x: ((x - teacher).detach() * x * mask * c).sum(), logps)[1]
    torch.testing.assert_close(grad, trl)


@pytest.mark.parametrize("agg", ["token", "seq", "const"])
def test_without_kl_the_task_term_has_the_gradient_of_grpo(agg):
    logps, mask = -random_batch(4)[0].abs(), random_batch(4)[1]
    reward, group = f64([1, 0, 0.5, 0.2, math.nan]), torch.tensor([0, 0, 1, 1, 1])
    advantages = 0.0 * distillation_advantages(logps, mask) + 1.0 * task_advantages(reward, group)[:, None]
    c = row_weights(mask, agg, 9)[:, None]
    ours = gradient(lambda x: (-(x - logps).exp() * advantages * mask * c).sum(), logps)[1]

    def grpo_loss(x):
        a = grpo.group_advantages(reward, group, "group_std")
        ratio = grpo.importance_ratio(x, logps, mask, "token")
        c = grpo.row_weights(mask, group, agg, 9)[:, None]
        return (grpo.policy_token_loss(x, ratio, a, grpo.Config()) * mask * c).sum()

    torch.testing.assert_close(ours, gradient(grpo_loss, logps)[1])
    assert ours.any()


# --- whole-vocabulary and top-k divergences


def test_hand_numbers_of_the_divergences_and_their_gradients():
    student, teacher = f64([[0.0, 0.0]]), f64([[math.log(3), 0.0]])
    for beta, value, slope in [(0.0, 0.130812, -0.25), (1.0, 0.143841, -0.274653), (0.5, 0.033822, -0.0638532)]:
        ours, grad = gradient(lambda z: divergence_of(z, teacher, est="full", beta=beta)[0], student)
        assert ours.item() == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(grad, f64([[slope, -slope]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_full_divergence_and_gradient_equal_the_sheet(beta, temperature):
    def ours(z):
        return divergence_of(z[None], f64([TEACHER]), est="full", beta=beta, divergence_temperature=temperature)[0]

    value, grad = gradient(ours, f64(STUDENT))
    p, q = softmax(STUDENT, temperature), softmax(TEACHER, temperature)
    d = divergence_by_loop(p, q, beta)
    mix = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    kl_mix = divergence_by_loop(p, mix, 1)
    if beta == 0:
        slope = [x - y for x, y in zip(p, q, strict=True)]
    elif beta == 1:
        slope = [x * (math.log(x / y) - d) for x, y in zip(p, q, strict=True)]
    else:
        slope = [(1 - beta) * x * (math.log(x / m) - kl_mix) for x, m in zip(p, mix, strict=True)]
    assert value.item() == pytest.approx(d, rel=1e-9)
    torch.testing.assert_close(grad, f64(slope) / temperature, rtol=1e-9, atol=1e-12)
    assert abs(grad.sum().item()) < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renorm", "drop"])
@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_topk_divergence_and_gradient_equal_the_loop(support, tail, beta):
    for k, temperature in [(1, 1.0), (2, 1.5), (3, 1.0)]:
        flags = {"est": "topk", "top_k": k, "support": support, "tail": tail, "beta": beta}

        def ours(z, flags=flags, temperature=temperature):
            return divergence_of(z[None], f64([TEACHER]), divergence_temperature=temperature, **flags)[0]

        def loop(z, k=k, temperature=temperature):
            return topk_by_loop(z, TEACHER, k, support, tail, beta, temperature)[0]

        value, grad = gradient(ours, f64(STUDENT))
        assert value.item() == pytest.approx(loop(STUDENT), rel=1e-9, abs=1e-12)
        torch.testing.assert_close(grad, slope_by_differences(loop, STUDENT), rtol=1e-6, atol=1e-8)
        assert abs(grad.sum().item()) < 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [4, V])
def test_union_may_list_more_columns_than_there_are_tokens(k, beta):
    flags = {"est": "topk", "top_k": k, "support": "union", "beta": beta}
    value = divergence_of(f64([STUDENT]), f64([TEACHER]), **flags)[0].item()
    assert value == pytest.approx(topk_by_loop(STUDENT, TEACHER, k, "union", "bucket", beta)[0], abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_bucket_is_at_most_the_full_divergence_and_equal_with_the_whole_vocabulary(support, beta):
    g = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 40, V, generator=g).double()
    full = divergence_of(student, teacher, est="full", beta=beta)[0]
    values = [
        divergence_of(student, teacher, est="topk", top_k=k, support=support, beta=beta)[0] for k in range(1, V + 1)
    ]
    for value in values:
        # the kernel drops a teacher's tail below 1e-6, whose term is -1e-6 log(1e6) at the lowest
        assert (value <= full + 1.4e-5).all() and (value >= -1e-6).all()
    torch.testing.assert_close(values[-1], full, rtol=0, atol=1e-6)
    slopes = [
        gradient(lambda z: divergence_of(z, teacher, beta=beta, **flags)[0], student)[1]
        for flags in ({"est": "full"}, {"est": "topk", "top_k": V, "support": support})
    ]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_renorm_over_one_token_is_blind_and_drop_can_be_negative(beta):
    flags = {"est": "topk", "top_k": 1, "beta": beta}
    value, grad = gradient(lambda z: divergence_of(z, f64([TEACHER]), tail="renorm", **flags)[0], f64([STUDENT]))
    assert abs(value.item()) < 1e-12 and grad.abs().max() < 1e-12
    ours = divergence_of(f64([TEACHER]), f64([STUDENT]), tail="drop", support="student", **flags)[0].item()
    assert ours == pytest.approx(topk_by_loop(TEACHER, STUDENT, 1, "student", "drop", beta)[0], rel=1e-9)
    unclamped = divergence_of(f64([[3.0, 0, 0]]), f64([[1.0, 0, 0]]), tail="drop", est="topk", top_k=1, beta=0.0)[0]
    assert unclamped.item() < -0.1


def test_diagnostics_of_the_supports():
    measured = divergence_of(f64([STUDENT]), f64([TEACHER]), est="topk", top_k=3)[1]
    p, q = sorted(softmax(STUDENT)), sorted(softmax(TEACHER))
    assert measured["opd/overlap"].tolist() == [topk_by_loop(STUDENT, TEACHER, 3, "teacher", "drop", 0)[1]]
    assert measured["opd/teacher_mass"].item() == pytest.approx(sum(q[-3:]))
    assert measured["opd/student_mass"].item() == pytest.approx(sum(p[-3:]))


@pytest.mark.parametrize("flags", [{"est": "full"}, {"est": "topk", "top_k": 2}, {"est": "topk", "support": "union"}])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_same_model_as_teacher_gives_no_loss_and_no_gradient(flags, beta):
    flags = {"top_k": 3, "beta": beta} | flags
    value, grad = gradient(lambda z: divergence_of(z, f64([STUDENT]), **flags)[0], f64([STUDENT]))
    assert abs(value.item()) < 1e-12 and grad.abs().max() < 1e-12
    for est in ("k2", "k3", "k3_k2"):
        value, grad = gradient(lambda x: sampled_kl(x, f64([STUDENT]), est), f64([STUDENT]))
        assert not value.any() and not grad.any()
    assert not distillation_advantages(torch.zeros(1, 6), torch.ones(1, 6), 0.9).any()


@pytest.mark.parametrize("flags", [{"est": "full"}, *({"est": "topk", "support": s} for s in ("teacher", "union"))])
def test_teacher_gets_no_gradient_and_heads_use_bias_softcap_and_the_shared_vocabulary(flags):
    student, teacher = model(bias=[0.5, -1, 0, 0, 2, 9.0]), model(softcap=1.5)
    hidden, teacher_hidden = f64([STUDENT]).requires_grad_(), f64([TEACHER]).requires_grad_()
    config = Config(top_k=3, beta=0.0, **flags)
    value = teacher_divergence(student, hidden, teacher, teacher_hidden, V - 1, config)[0]
    value.sum().backward()
    assert teacher_hidden.grad is None and teacher.head.weight.grad is None
    assert hidden.grad[0, -1] == 0 and hidden.grad[0, :-1].any() and student.head.weight.grad.any()
    z = [a + b for a, b in zip(STUDENT, [0.5, -1, 0, 0, 2], strict=False)]
    capped = [1.5 * math.tanh(x / 1.5) for x in TEACHER[:-1]]
    expected = divergence_by_loop(softmax(z), softmax(capped), 0)
    if flags["est"] == "topk":
        expected = topk_by_loop(z, capped, 3, flags["support"], "bucket", 0)[0]
    assert value.item() == pytest.approx(expected, rel=1e-9)


# --- the whole


def test_calls_leave_their_inputs_as_they_were():
    d, mask = random_batch(5)
    reward, group = d[:, 0].clone(), torch.tensor([0, 0, 1, 1, 1])
    before = [x.clone() for x in (d, mask, reward, group)]
    distillation_advantages(d, mask, 0.9, True)
    early_token_weights(d, mask, 0.5)
    prefix_mask(mask, 0.3)
    task_advantages(reward, group)
    sampled_kl(d, d + 1, "k3_k2")
    assert all(torch.equal(x, y) for x, y in zip((d, mask, reward, group), before, strict=True))


def test_wider_padding_and_micro_batches_change_nothing():
    d, mask = random_batch(6)
    wide = [torch.nn.functional.pad(x, (0, 4)) for x in (d, mask)]
    for discount, mean in [(0.0, False), (0.95, True), (1.0, False)]:
        whole = distillation_advantages(d, mask, discount, mean)
        torch.testing.assert_close(distillation_advantages(*wide, discount, mean)[:, :7], whole)
        parts = [distillation_advantages(a, b, discount, mean) for a, b in zip(d.split(2), mask.split(2), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole)
    student, teacher = torch.randn(2, 9, V, generator=torch.Generator().manual_seed(1)).double()
    for flags in ({"est": "full", "beta": 0.5}, {"est": "topk", "top_k": 2, "support": "union"}):
        whole = divergence_of(student, teacher, **flags)[0]
        parts = [divergence_of(a, b, **flags)[0] for a, b in zip(student.split(4), teacher.split(4), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_token_metrics_are_means_over_the_tokens_counted():
    stats, mask = Stats(), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    for rows in (slice(0, 1), slice(1, 2)):
        stats.tokens(mask[rows], {"overlap": torch.full((1, 3), 0.5)})
        stats.tokens(mask[rows], {"entropy": torch.full((1, 3), 2.0)}, count=False)
    assert stats.metrics()["entropy"] == pytest.approx(2.0)
    assert stats.metrics()["overlap"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "flags",
    [
        {"lmbda": 0.5, "est": "k1_pg"},
        {"lmbda": 1.5, "est": "full"},
        {"beta": -0.1, "est": "full"},
        {"temperature": 0.0},
        {"divergence_temperature": 0.0, "est": "full"},
        {"est": "topk", "tail": "renorm"},
        {"est": "topk", "tail": "drop"},
        {"teacher": "self", "teacher_sync": "ema", "lora_rank": 4},
    ],
)
def test_combinations_without_meaning_are_refused(flags):
    with pytest.raises(UserError):
        check(Config(**flags))
