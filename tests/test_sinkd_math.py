"""The arithmetic of methods/sinkd.py against float64 references, written from the equations of the method's sheet."""

import math

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from posttrain.methods.sinkd import (
    Config,
    annealed,
    kd_rows,
    mlot_parts,
    objective,
    paired,
    sinkhorn_loss,
    softened,
    third_term,
    transport,
    uld_loss,
)

F64 = torch.float64
GRADS = ("unroll", "plan", "implicit")
DIVERGENCES = ("sinkhorn", "sinkhorn_sample", "kl", "rkl", "js", "tv", "l1")


def rand(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pair(n=5, v=4, seed=0):
    return rand(n, v, seed=seed), rand(n, v, seed=seed + 1000)


def probs(z, tau=1.0):
    e = ((z - z.amax(-1, keepdim=True)) / tau).exp()
    return e / e.sum(-1, keepdim=True)


def costs(p, q, metric="l1"):
    """C_ij, rows from p, columns from q"""
    d = p[:, None] - q
    return {"l1": d.abs().sum(-1), "sq": (d * d).sum(-1), "l2": (d * d).sum(-1).sqrt()}[metric]


def loop(cost, eps=0.1, n=20):
    """5.1: rows over their sums, then columns over theirs"""
    k = (-cost / eps).exp()
    for _ in range(n):
        k = k / k.sum(1, keepdim=True)
        k = k / k.sum(0, keepdim=True)
    return k


def sharp(cost, eps=0.1, n=20):
    return (loop(cost, eps, n) * cost).sum()


def regularised(cost, eps=0.1, n=20):
    plan = loop(cost, eps, n)
    return (plan * cost).sum() + eps * (plan * (plan.log() - 1)).sum()


VALUES = [("unroll", sharp), ("plan", regularised), ("implicit", sharp)]  # what each mode's slope is that of


def differences(function, x, h=1e-6):
    """Central differences of a scalar, entry by entry"""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += h
        down.view(-1)[i] -= h
        grad.view(-1)[i] = (function(up) - function(down)) / (2 * h)
    return grad


def gradient(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def same(x, y, atol=1e-12, rtol=0.0):
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), atol=atol, rtol=rtol)


def loss(student, teacher, tau=2.0, **flags):
    """S of logits"""
    config = Config(tau=tau, **flags)
    return sinkhorn_loss(*softened(student, teacher, tau), config)[0]


def plan_of(student, teacher, tau=2.0, **flags):
    return sinkhorn_loss(*softened(student, teacher, tau), Config(tau=tau, **flags))[1]


def terms(student, teacher, labels, owners=None, t=3.0, top=0, **flags):
    return objective(student, teacher, labels, owners, t, top, Config(**flags))


def total(parts):
    return sum(weight * value for weight, value in parts.values())


def values_of(parts):
    """mlot_parts may give its weights too"""
    return {name: x[-1] if isinstance(x, tuple) else x for name, x in parts.items()}


# --- Eq. 2 and 3


def test_kd_is_a_cross_entropy_with_the_teachers_entropy_and_without_t_squared():
    student, teacher = pair()
    p, q = probs(student, 3.0), probs(teacher, 3.0)
    rows = kd_rows(student, teacher, 3.0)
    assert rows.shape == (5,)
    same(rows, [-sum(q[i, v] * math.log(p[i, v]) for v in range(4)) for i in range(5)])
    same(kd_rows(teacher, teacher, 3.0), -(q * q.log()).sum(-1))  # not 0


@pytest.mark.parametrize("t", [1.0, 3.5])
def test_gradient_of_kd(t):
    student, teacher = pair()
    _, grad = gradient(lambda x: kd_rows(x, teacher, t).mean(), student)
    same(grad, (probs(student, t) - probs(teacher, t)) / (t * 5))


def test_annealing_goes_in_equal_steps_from_t_to_1():
    assert [annealed(3.0, e, 5) for e in range(5)] == [3.0, 2.5, 2.0, 1.5, 1.0]
    assert annealed(4.0, 0, 1) == 4.0  # one epoch: T, no division by 0
    assert [annealed(1.0, e, 3) for e in range(3)] == [1.0] * 3
    assert [annealed(0.5, e, 2) for e in range(2)] == [0.5, 1.0]


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0, 3.5, 4.0])
def test_the_last_epoch_has_temperature_1_exactly_for_the_released_t(t):
    assert all(annealed(t, epochs - 1, epochs) == 1 for epochs in range(2, 101))


# --- Eq. 4


@pytest.mark.parametrize("metric", ["l1", "l2", "sq"])
def test_costs_of_the_three_metrics_by_the_value_of_one_iteration(metric):
    """N = 2 and one iteration: S tells the costs apart; tau is used once."""
    student, teacher = pair(2, 5)
    cost = costs(probs(student, 2.0), probs(teacher, 2.0), metric)
    same(loss(student, teacher, cost=metric, iters=1), sharp(cost, n=1))
    same(plan_of(student, teacher, cost=metric, iters=1), loop(cost, n=1))


@pytest.mark.parametrize("metric", ["l1", "l2", "sq"])
def test_gradient_of_the_costs_against_differences(metric):
    student, teacher = pair()
    _, grad = gradient(lambda x: loss(x, teacher, cost=metric), student)
    expected = differences(lambda x: sharp(costs(probs(x, 2.0), probs(teacher, 2.0), metric)), student)
    same(grad, expected, 1e-7)


@pytest.mark.parametrize("tau", [0.55, 1.0, 2.0])
def test_tau_softens_both_sides(tau):
    student, teacher = pair()
    same(loss(student, teacher, tau), sharp(costs(probs(student, tau), probs(teacher, tau))))


# --- Eq. 5 and 6: invariants 1, 2, 3, 4, 10, 11


@pytest.mark.parametrize("form", ["stable", "official"])
@pytest.mark.parametrize("n", [1, 5, 20, 50])
def test_plan_and_value_equal_the_released_loop(form, n):
    student, teacher = pair(16, 5)
    cost = costs(probs(student, 2.0), probs(teacher, 2.0))
    value, plan = transport(cost, Config(sink_form=form, iters=n))
    same(plan, loop(cost, n=n))
    same(value, sharp(cost, n=n))


@pytest.mark.parametrize("grad", GRADS)
def test_official_form_equals_the_stable_one_in_value_and_gradient(grad):
    student, teacher = pair(7, 5)
    one, other = (
        gradient(lambda x: loss(x, teacher, sink_form=f, sink_grad=grad), student) for f in ("stable", "official")
    )
    same(one[0], other[0])
    same(one[1], other[1], 1e-10)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_columns_sum_to_1_after_any_round(n):
    same(plan_of(*pair(9, 6), iters=n).sum(0), torch.ones(9))


def test_rows_sum_to_1_in_the_limit_only():
    gaps = [(plan_of(*pair(9, 6), iters=n).sum(1) - 1).abs().max().item() for n in (1, 10, 100, 3000)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 1e-2 and gaps[-1] < 1e-9


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.5])
def test_converged_plan_is_that_of_pot_times_n(eps):
    student, teacher = pair(8, 5)
    cost = costs(probs(student, 2.0), probs(teacher, 2.0)).numpy()
    uniform = [1 / 8] * 8
    expected = ot.sinkhorn(uniform, uniform, cost, reg=eps, numItermax=100000, stopThr=1e-14)
    same(plan_of(student, teacher, eps=eps, iters=5000), 8 * torch.from_numpy(expected), 1e-9)
    same(loss(student, teacher, eps=eps, iters=5000), 8 * (expected * cost).sum(), 1e-9)


@pytest.mark.parametrize("divergence", ["sinkhorn", "sinkhorn_sample"])
def test_permuted_students_change_s_only_if_rows_are_paired(divergence):
    student, teacher = pair(6, 4)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    config = Config(divergence=divergence)
    (one, grad), (other, moved) = (
        gradient(lambda x: third_term(x, teacher, config), x) for x in (student, student[order])
    )
    if divergence == "sinkhorn":
        same(other, one)
        same(moved, grad[order])
    else:
        assert (other - one).abs() > 1e-2


def test_swapped_roles_give_the_same_s_at_convergence():
    student, teacher = pair(6, 4)
    same(loss(student, teacher, iters=5000), loss(teacher, student, iters=5000), 1e-9)
    same(plan_of(student, teacher, iters=5000), plan_of(teacher, student, iters=5000).T, 1e-9)
    assert (loss(student, teacher, iters=1) - loss(teacher, student, iters=1)).abs() > 1e-6  # rows come first


@pytest.mark.parametrize("seed", [0, 2])
def test_s_lies_between_the_assignment_and_2n_and_tends_to_the_assignment(seed):
    student, teacher = pair(7, 5, seed)
    cost = costs(probs(student, 2.0), probs(teacher, 2.0)).numpy()
    exact = cost[linear_sum_assignment(cost)].sum()
    gaps = [loss(student, teacher, eps=eps, iters=1500).item() - exact for eps in (0.5, 0.1, 0.02)]
    assert gaps == sorted(gaps, reverse=True) and -1e-6 < gaps[-1] < 0.05
    assert 0 <= loss(student, teacher).item() <= 2 * 7


def test_large_eps_gives_the_mean_cost():
    student, teacher = pair(6, 4)
    same(plan_of(student, teacher, eps=1e9), torch.full((6, 6), 1 / 6), 1e-8)
    same(loss(student, teacher, eps=1e9), 6 * costs(probs(student, 2.0), probs(teacher, 2.0)).mean(), 1e-7)


@pytest.mark.parametrize("grad", GRADS)
def test_a_constant_on_all_costs(grad):
    cost = costs(*map(probs, pair(6, 4)))
    config = Config(sink_grad=grad, eps=0.3, iters=300 if grad == "implicit" else 20)
    value, slope = gradient(lambda c: transport(c, config)[0], cost)
    same(transport(cost + 0.7, config)[1], transport(cost, config)[1])
    same(transport(cost + 0.7, config)[0], value + 0.7 * 6, 1e-11)
    same(slope.sum(), 6.0, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_at_a_small_eps(dtype):
    """float32 within 1e-3 of float64 at eps 0.01, where Eq. 5 as it stands may lose all mass; bf16 logits are read as
    they are, and computed in float32"""
    student, teacher = (x.to(dtype) for x in pair(16, 8))
    for tau in (0.25, 2.0):
        value, grad = gradient(lambda x, tau=tau: loss(x / tau, teacher / tau, 1.0, eps=0.01), student)
        exact = sharp(costs(*(probs((x / tau).double()) for x in (student, teacher))), 0.01)
        assert value.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all() and grad.any()
        same(value.double(), exact, rtol=1e-3)


# --- dS/dC: the hand check and invariant 6


@pytest.mark.parametrize("form", ["stable", "official"])
@pytest.mark.parametrize("grad", GRADS)
def test_hand_check_of_two_points(form, grad):
    cost, off = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64), 0.25 - 0.1875 * math.log(3)
    for n in (1, 20):
        config = Config(eps=1 / math.log(3), iters=n, sink_grad=grad, sink_form=form)
        same(transport(cost, config)[1], [[0.75, 0.25], [0.25, 0.75]])
        value, slope = gradient(lambda c, config=config: transport(c, config)[0], cost)
        same(value, 0.5)
        if grad == "plan":
            same(slope, [[0.75, 0.25], [0.25, 0.75]])
        elif n > 1:  # one iteration back is not yet the derivative at convergence
            same(slope, [[1 - off, off], [off, 1 - off]], 1e-9)
    assert off == pytest.approx(0.04401, abs=1e-5)


def recurrence(cost, eps, n):
    """5.4, unrolled, as the sheet states it; a = b = 1"""
    scores, us, vs = -cost / eps, [], [torch.zeros(len(cost), dtype=F64)]
    for _ in range(n):
        us.append(-(scores + vs[-1]).logsumexp(1))
        vs.append(-(scores + us[-1][:, None]).logsumexp(0))
    plan = (scores + us[-1][:, None] + vs[-1]).exp()
    q = plan * cost
    a, du, dv = q.clone(), q.sum(1), q.sum(0)
    for t in range(n, 0, -1):
        s = (scores + us[t - 1][:, None] + vs[t]).exp()
        a, du = a - s * dv, du - (s * dv).sum(1)
        r = (scores + us[t - 1][:, None] + vs[t - 1]).exp()
        a, dv, du = a - r * du[:, None], -(r * du[:, None]).sum(0), torch.zeros_like(du)
    return plan - a / eps


@pytest.mark.parametrize("n", [1, 3, 20])
def test_unrolled_slope_equals_the_recurrence_and_autograd_through_the_loop(n):
    cost = costs(*map(probs, pair(6, 4)))
    _, slope = gradient(lambda c: transport(c, Config(iters=n))[0], cost)
    same(slope, recurrence(cost, 0.1, n), 1e-9)
    same(slope, gradient(lambda c: sharp(c, n=n), cost)[1], 1e-9)


@pytest.mark.parametrize("eps", [0.2, 0.5])
@pytest.mark.parametrize("grad,value", [("plan", regularised), ("implicit", sharp)])
def test_slopes_at_convergence_against_differences(grad, value, eps):
    cost = costs(*map(probs, pair(5, 4)))
    _, slope = gradient(lambda c: transport(c, Config(iters=300, eps=eps, sink_grad=grad))[0], cost)
    same(slope, differences(lambda c: value(c, eps, 300), cost), 1e-5)


def test_modes_share_value_and_plan_and_differ_in_slope_before_convergence():
    cost = costs(*map(probs, pair(6, 4)))
    (v0, p0), *others = (transport(cost, Config(iters=3, sink_grad=grad)) for grad in GRADS)
    for value, plan in others:
        same(value, v0)
        same(plan, p0)
    slopes = [gradient(lambda c, g=g: transport(c, Config(iters=3, sink_grad=g))[0], cost)[1] for g in GRADS]
    assert all((x - y).abs().max() > 1e-3 for x, y in ((slopes[0], slopes[1]), (slopes[1], slopes[2])))
    same(slopes[1], p0)


# --- edge cases of S, debias, reductions


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("eps", [0.01, 3.0])
def test_a_batch_of_one_is_the_l1_distance_in_value_and_gradient(grad, eps):
    student, teacher = pair(1, 6)
    value, slope = gradient(lambda x: loss(x, teacher, eps=eps, sink_grad=grad), student)
    p, q = probs(student, 2.0), probs(teacher, 2.0)
    sign = (p - q).sign()
    same(value, (p - q).abs().sum())
    same(slope, p * (sign - (p * sign).sum()) / 2.0)
    same(plan_of(student, teacher, eps=eps), [[1.0]])


@pytest.mark.parametrize("eps", [0.003, 0.1, 50.0])
def test_sample_wise_is_the_sum_of_l1_distances_whatever_eps(eps):
    student, teacher = pair(6, 4)
    value = third_term(*softened(student, teacher, 2.0), Config(divergence="sinkhorn_sample", eps=eps))
    same(value, (probs(student, 2.0) - probs(teacher, 2.0)).abs().sum())
    same(value, sum(loss(student[i : i + 1], teacher[i : i + 1], eps=eps) for i in range(6)))


def test_student_equal_to_teacher_leaks_mass_and_debias_takes_it_off():
    teacher = rand(16, 3)
    assert loss(teacher, teacher).item() > 0.01 and 0.3 < plan_of(teacher, teacher).diagonal().mean() < 0.99
    for form in ("stable", "official"):
        same(loss(teacher, teacher, debias=True, sink_form=form), 0.0)
    _, grad = gradient(lambda x: loss(x, teacher, debias=True, eps=0.3, iters=300), teacher)
    same(grad, torch.zeros(16, 3), 1e-8)


@pytest.mark.parametrize("metric", ["l1", "sq"])
@pytest.mark.parametrize("grad,value", VALUES)
def test_debias_value_and_gradient(grad, value, metric):
    """Both sides of S(s, s) move with the student."""
    (student, teacher), n = pair(5, 4), 20 if grad == "unroll" else 300
    flags = {"debias": True, "iters": n, "sink_grad": grad, "cost": metric}

    def reference(x, f=value):
        p, q = probs(x, 2.0), probs(teacher, 2.0)
        own, theirs = (f(costs(y, y, metric), n=n) for y in (p, q))
        return f(costs(p, q, metric), n=n) - own / 2 - theirs / 2

    ours, slope = gradient(lambda x: loss(x, teacher, **flags), student)
    same(ours, reference(student, sharp), 1e-9)
    same(slope, differences(reference, student), 1e-6)


def test_debias_leaves_the_plan_alone():
    same(plan_of(*pair(), debias=True), plan_of(*pair()))


def test_twice_the_batch_has_twice_the_sum_and_the_same_mean():
    """Duplicates: every block of the plan is half of it."""
    student, teacher = (torch.cat([x, x]) for x in pair(5, 4))
    same(loss(student, teacher), 2 * loss(*pair(5, 4)))
    same(loss(student, teacher, sink_reduction="mean"), loss(*pair(5, 4), sink_reduction="mean"))
    same(plan_of(student, teacher)[:5, 5:], plan_of(*pair(5, 4)) / 2)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("grad", GRADS)
def test_mean_reduction_divides_value_and_gradient_by_n(grad, debias):
    student, teacher = pair(7, 4)
    flags = {"sink_grad": grad, "debias": debias}
    whole, mean = (
        gradient(lambda x, r=r: loss(x, teacher, sink_reduction=r, **flags), student) for r in ("sum", "mean")
    )
    same(whole[0], 7 * mean[0])
    same(whole[1], 7 * mean[1])


def test_mean_reduction_of_sample_wise_and_no_effect_on_the_others():
    student, teacher = pair(7, 4)
    for name in DIVERGENCES:
        whole, mean = (third_term(student, teacher, Config(divergence=name, sink_reduction=r)) for r in ("sum", "mean"))
        same(whole, (7 if "sinkhorn" in name else 1) * mean)


@pytest.mark.parametrize("grad", GRADS)
def test_one_class_has_nothing_to_transport(grad):
    value, slope = gradient(lambda x: loss(x, rand(4, 1, seed=1), sink_grad=grad), rand(4, 1))
    same(value, 0.0)
    assert not slope.any()


def test_ties_have_no_slope():
    """Entry by entry: the first is tied, the other two are swapped."""
    student, teacher = torch.tensor([[1.0, 0.0, 2.0]], dtype=F64), torch.tensor([[1.0, 2.0, 0.0]], dtype=F64)
    sign = torch.tensor([[0.0, -1.0, 1.0]], dtype=F64)
    p = probs(student)
    for name in ("sinkhorn", "sinkhorn_sample", "l1"):
        _, grad = gradient(lambda x, name=name: third_term(x, teacher, Config(divergence=name)), student)
        same(grad, p * (sign - (p * sign).sum()))
        assert not gradient(lambda x, n=name: third_term(x, student, Config(divergence=n)), student)[1].any()


# --- 5.5: the other divergences


def reference_divergence(name, p, q):
    """p the student, q the teacher; means over rows, tv over all entries"""
    n, v = p.shape
    kl = [sum(q[i, k] * math.log(q[i, k] / p[i, k]) for k in range(v)) for i in range(n)]
    rkl = [sum(p[i, k] * math.log(p[i, k] / q[i, k]) for k in range(v)) for i in range(n)]
    m = (p + q) / 2
    js = (p * (p / m).log() + q * (q / m).log()).sum() / 2 / n
    gap = (p - q).abs().sum()
    return {"kl": sum(kl) / n, "rkl": sum(rkl) / n, "js": js, "tv": 0.5 * gap / (n * v), "l1": gap / n}[name]


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("name", ["kl", "rkl", "js", "tv", "l1"])
def test_value_and_gradient_of_the_other_divergences(name, tau):
    student, teacher = pair(5, 4)
    config = Config(divergence=name, tau=tau)
    value, grad = gradient(lambda x: third_term(*softened(x, teacher, tau), config), student)
    same(value, reference_divergence(name, probs(student, tau), probs(teacher, tau)))
    reference = differences(lambda x: reference_divergence(name, probs(x, tau), probs(teacher, tau)), student)
    same(grad, reference, 1e-8)
    same(third_term(student, student, config), 0.0, 1e-15)


def test_kl_has_the_gradient_of_kd_at_its_temperature():
    student, teacher = pair()
    _, one = gradient(lambda x: third_term(*softened(x, teacher, 2.0), Config(divergence="kl")), student)
    same(one, gradient(lambda x: kd_rows(x, teacher, 2.0).mean(), student)[1])


# --- 5.8: the heaviest tokens and the rest


def test_softened_keeps_the_teachers_heaviest_of_the_batch_and_sums_the_rest():
    student, teacher = pair(6, 9)
    p, q = probs(student, 2.0), probs(teacher, 2.0)
    order = sorted(range(9), key=lambda v: -q[:, v].sum().item())
    ours = softened(student, teacher, 2.0, 3)
    for logits, x in zip(ours, (p, q), strict=True):
        assert logits.shape == (6, 4)
        rest = x[:, order[3:]].sum(1, keepdim=True)
        same(probs(logits), torch.cat([x[:, order[:3]], rest], 1))
    assert order[:3] != sorted(range(9), key=lambda v: -p[:, v].sum().item())[:3]
    assert order[:3] != sorted(range(9), key=lambda v: -teacher[:, v].sum().item())[:3]  # of mass, not of logits


def test_softened_chooses_at_the_temperature_of_the_third_term():
    """At tau 1 token 0, sure in one row only, outweighs token 1; softened it is the other way round."""
    teacher = torch.tensor([[6.0, 0, 1], [-3, 0, 1], [-3, 0, 1]], dtype=F64)
    teacher = torch.cat([teacher[:, :2], teacher[:, 2:] - 3], 1)
    heaviest = {tau: probs(teacher, tau).sum(0).argmax().item() for tau in (1.0, 9.0)}
    for tau, kept in heaviest.items():
        same(probs(softened(teacher, teacher, tau, 1)[1])[:, 0], probs(teacher, tau)[:, kept])


@pytest.mark.parametrize("top", [0, 4, 5, 99])
def test_softened_without_effect(top):
    student, teacher = pair(5, 4)
    ours = softened(student, teacher, 2.0, top)
    same(ours[0], student / 2)
    same(ours[1], teacher / 2)


@pytest.mark.parametrize("top", [0, 2])
def test_softened_lets_no_gradient_to_the_teacher(top):
    student, teacher = (x.requires_grad_() for x in pair())
    ours, theirs = softened(student, teacher, 2.0, top)
    assert ours.requires_grad and not theirs.requires_grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_rest_of_one_token_changes_nothing_but_the_order(name):
    (student, teacher), config = pair(5, 6), Config(divergence=name)
    cut, whole = (gradient(lambda x, t=t: third_term(*softened(x, teacher, 2.0, t), config), student) for t in (5, 0))
    same(cut[0], whole[0])
    same(cut[1], whole[1], 1e-11)


@pytest.mark.parametrize("name", ["sinkhorn", "kl", "l1"])
def test_gradient_through_the_rest_reaches_every_token(name):
    (student, teacher), config = pair(4, 7), Config(divergence=name)
    order = probs(teacher, 2.0).sum(0).argsort(descending=True)

    def reference(x):
        p, q = (
            torch.cat([y[:, order[:2]], y[:, order[2:]].sum(1, True)], 1) for y in (probs(x, 2.0), probs(teacher, 2.0))
        )
        return sharp(costs(p, q)) if name == "sinkhorn" else reference_divergence(name, p, q)

    value, grad = gradient(lambda x: third_term(*softened(x, teacher, 2.0, 2), config), student)
    same(value, reference(student))
    same(grad, differences(reference, student), 1e-7)
    assert grad[:, order[2:]].abs().min() > 0


# --- Eq. 7


LABELS = torch.tensor([2, 0, 1, 1, 3])


def cross_entropy(student, labels):
    return -sum(probs(student)[i, y].log() for i, y in enumerate(labels.tolist())) / len(labels)


def soft(student, teacher, t):
    return -(probs(teacher, t) * probs(student, t).log()).sum() / len(student)


@pytest.mark.parametrize("combine", ["convex", "added"])
@pytest.mark.parametrize("name", [*DIVERGENCES, "none"])
def test_objective_has_the_weights_and_names_of_the_sheet(name, combine):
    student, teacher = pair()
    flags = {"divergence": name, "combine": combine, "sink_weight": 0.01, "divergence_weight": 0.3, "alpha": 0.7}
    parts = terms(student, teacher, LABELS, t=1.5, **flags)
    third = {"sinkhorn_sample": "sinkhorn"}.get(name, name)
    assert [*parts] == ["ce", "kd"] + [third] * (name != "none")
    assert parts["ce"][0] == pytest.approx(0.3 if combine == "convex" else 1.0) and parts["kd"][0] == 0.7
    same(parts["ce"][1], cross_entropy(student, LABELS))
    same(parts["kd"][1], soft(student, teacher, 1.5))
    if name != "none":
        p, q = probs(student, 2.0), probs(teacher, 2.0)
        values = {"sinkhorn": sharp(costs(p, q)), "sinkhorn_sample": (p - q).abs().sum()}
        assert parts[third][0] == (0.01 if "sinkhorn" in name else 0.3)
        same(parts[third][1], values[name] if name in values else reference_divergence(name, p, q))


@pytest.mark.parametrize("name", ["sinkhorn", "kl", "tv"])
def test_objective_cuts_the_third_term_only(name):
    """Eq. 2 keeps every token."""
    student, teacher = pair(5, 9)
    parts = terms(student, teacher, LABELS, t=1.5, top=2, divergence=name)
    same(parts["kd"][1], soft(student, teacher, 1.5))
    same(parts[name][1], third_term(*softened(student, teacher, 2.0, 2), Config(divergence=name)))
    assert (parts[name][1] - terms(student, teacher, LABELS, t=1.5, divergence=name)[name][1]).abs() > 1e-3


def test_defaults_are_those_of_the_sheet():
    c = Config()
    assert (c.alpha, c.combine, c.divergence, c.sink_weight, c.sink_reduction) == (
        0.8,
        "convex",
        "sinkhorn",
        8e-4,
        "sum",
    )
    assert (c.tau, c.cost, c.eps, c.iters, c.sink_grad, c.debias) == (2.0, "l1", 0.1, 20, "unroll", False)
    assert (c.divergence_weight, c.rows, c.vocab_top, c.transport_weight, c.mlot_top) == (0.1, 128, 64, 1.5, 50)
    assert not c.anneal and not c.mlot_faithful and c.max_grad_norm == 1 and not c.weight_decay


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("grad,value", VALUES)
def test_gradient_of_the_whole_objective_against_differences(grad, value, debias):
    (student, teacher), n = pair(), 20 if grad == "unroll" else 300
    flags = {"sink_grad": grad, "iters": n, "sink_weight": 0.3, "eps": 0.2, "debias": debias}

    def reference(x):
        p, q = probs(x, 2.0), probs(teacher, 2.0)
        s = value(costs(p, q), 0.2, n) - (value(costs(p, p), 0.2, n) / 2 if debias else 0)
        return 0.2 * cross_entropy(x, LABELS) + 0.8 * soft(x, teacher, 3.0) + 0.3 * s

    _, slope = gradient(lambda x: total(terms(x, teacher, LABELS, **flags)), student)
    same(slope, differences(reference, student), 1e-6)


# --- 5.6 and 5.7: answers of two tokenizers

SIZES = [([3, 1, 4], [2, 5, 4]), ([1], [1]), ([2, 2], [2, 2]), ([1, 6, 2, 3], [4, 1, 1, 5])]


def ragged(sizes, v, seed):
    """Lists of logits and, end to end, the same with owners"""
    rows = [rand(n, v, seed=seed + 7 * i) for i, n in enumerate(sizes)]
    return rows, torch.cat(rows), torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@pytest.mark.parametrize("ours,theirs", SIZES)
def test_paired_equals_the_loop(ours, theirs):
    owners = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (ours, theirs)]
    expected = []
    for b, (n, m) in enumerate(zip(ours, theirs, strict=True)):
        for k in range(min(n, m)):
            expected.append((sum(ours[:b]) + k, sum(theirs[:b]) + k, 1 / min(n, m) / len(ours)))
    i, j, share = paired(*owners)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(a, b) for a, b, _ in expected]
    assert share.tolist() == pytest.approx([w for *_, w in expected], rel=1e-6)
    assert share.sum().item() == pytest.approx(1, rel=1e-6)


def uld_reference(ours, theirs):
    means = []
    for x, y in zip(ours, theirs, strict=True):
        steps = []
        for k in range(min(len(x), len(y))):
            p, q = (sorted(probs(z[k]).tolist(), reverse=True) for z in (x, y))
            width = max(len(p), len(q))
            p, q = p + [0.0] * (width - len(p)), q + [0.0] * (width - len(q))
            steps.append(sum(abs(a - b) for a, b in zip(p, q, strict=True)))
        means.append(sum(steps) / len(steps))
    return sum(means) / len(means)


@pytest.mark.parametrize("widths", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("ours,theirs", SIZES)
def test_uld_equals_the_loop(ours, theirs, widths):
    (xs, student, a), (ys, teacher, b) = ragged(ours, widths[0], 0), ragged(theirs, widths[1], 500)
    same(uld_loss(student, teacher, a, b), uld_reference(xs, ys), 1e-7)
    order = torch.randperm(widths[0], generator=torch.Generator().manual_seed(0))
    same(uld_loss(student[:, order], teacher, a, b), uld_loss(student, teacher, a, b))  # names of tokens play no role


def test_gradient_of_uld_against_differences():
    ours, theirs = SIZES[0]
    (_, student, a), (ys, teacher, b) = ragged(ours, 6, 0), ragged(theirs, 4, 500)
    _, grad = gradient(lambda x: uld_loss(x, teacher, a, b), student)
    same(grad, differences(lambda x: uld_reference(x.split(ours), ys), student), 1e-6)
    assert not grad[2].any() and not grad[:2].eq(0).all(-1).any()  # the third token of the first answer has no partner


def truncated(rows, top):
    """Softmax of logits over (their deviation + 1e-4), n - 1 in the deviation; the batch's heaviest columns in order"""
    scaled = []
    for z in rows:
        mean = z.mean(-1, keepdim=True)
        scaled.append(probs(z / (((z - mean) ** 2).sum(-1, keepdim=True) / (z.shape[-1] - 1)).sqrt().add(1e-4)))
    mass = torch.cat(scaled).sum(0)
    columns = sorted(range(len(mass)), key=lambda v: -mass[v].item())[:top]
    return [p[:, columns] for p in scaled]


def matched(p, q, step):
    """mean_b mean_{first min(n_s, n_t) steps}"""
    means = [
        sum(step(x[k], y[k]) for k in range(min(len(x), len(y)))) / min(len(x), len(y))
        for x, y in zip(p, q, strict=True)
    ]
    return sum(means) / len(means)


def mlot_reference(ours, theirs, top, faithful, eps=0.1, n=10):
    top = min(top, ours[0].shape[1], theirs[0].shape[1])
    p, q = truncated(ours, top), truncated(theirs, top)
    h = matched(p, q, lambda x, y: (x - y).abs().sum())
    if faithful:  # padded with rows of zeros; a softmax of probabilities in K, another of half of them in Q
        longest = max(len(x) for x in (*p, *q))
        p, q = ([torch.cat([x, x.new_zeros(longest - len(x), top)]) for x in side] for side in (p, q))
        k = sum(-(probs(x) * probs(y).log()).sum() for x, y in zip(p, q, strict=True)) / (len(p) * longest)
        s = sum(sharp(costs(probs(y, 2.0), probs(x, 2.0)), eps, n) for x, y in zip(p, q, strict=True))
        return h, k, 0.001 * s
    p, q = ([x / x.sum(-1, keepdim=True) for x in side] for side in (p, q))
    k = matched(p, q, lambda x, y: (y * (y / x).log()).sum())
    s = 0
    for x, y in zip(p, q, strict=True):
        cost, u, v = costs(y, x), None, torch.ones(len(x), dtype=F64)  # rows: the teacher's steps, 1 each
        kernel = (-cost / eps).exp()
        for _ in range(n):
            u = 1 / (kernel @ v)
            v = len(y) / len(x) / (kernel.T @ u)
        s = s + (u[:, None] * kernel * v * cost).sum()
    return h, k, 0.001 * s


@pytest.mark.parametrize("widths,top", [((7, 5), 3), ((5, 7), 50), ((6, 6), 6)])
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("ours,theirs", SIZES)
def test_mlot_equals_the_loops(ours, theirs, faithful, widths, top):
    (xs, student, a), (ys, teacher, b) = ragged(ours, widths[0], 0), ragged(theirs, widths[1], 500)
    config = Config(mode="mlot", mlot_top=top, mlot_faithful=faithful, iters=10)
    parts = values_of(mlot_parts(student, teacher, a, b, config))
    assert [*parts] == ["mlot_h", "mlot_k", "mlot_q"]
    for value, expected in zip(parts.values(), mlot_reference(xs, ys, top, faithful), strict=True):
        same(value, expected, rtol=1e-6)


@pytest.mark.parametrize("faithful", [False, True])
def test_rows_of_the_steps_are_the_teachers(faithful):
    """After one round only the columns, the student's steps, have their mass."""
    (xs, student, a), (ys, teacher, b) = ragged([3, 5], 7, 0), ragged([4, 2], 5, 500)
    config = Config(mode="mlot", mlot_top=4, mlot_faithful=faithful, iters=1, eps=0.02)
    value = values_of(mlot_parts(student, teacher, a, b, config))["mlot_q"]
    same(value, mlot_reference(xs, ys, 4, faithful, 0.02, 1)[2])
    assert (value - mlot_reference(ys, xs, 4, faithful, 0.02, 1)[2]).abs() > 1e-9


@pytest.mark.parametrize("faithful", [False, True])
def test_gradient_of_mlot_against_differences(faithful):
    ours, theirs = SIZES[0]
    (_, student, a), (ys, teacher, b) = ragged(ours, 6, 0), ragged(theirs, 5, 500)
    config = Config(mode="mlot", mlot_top=4, mlot_faithful=faithful, iters=5, eps=0.2)
    for i, name in enumerate(("mlot_h", "mlot_k", "mlot_q")):
        _, grad = gradient(lambda x, name=name: values_of(mlot_parts(x, teacher, a, b, config))[name], student)

        def reference(x, i=i):
            return mlot_reference(x.split(ours), ys, 4, faithful, 0.2, 5)[i]

        same(grad, differences(reference, student, 1e-5), 1e-7)


def test_modes_weigh_their_parts():
    (_, student, a), (_, teacher, b) = ragged([3, 2], 6, 0), ragged([2, 4], 5, 500)
    for mode, expected in (("uld", {"uld": 0.7}), ("mlot", {"mlot_h": 0.7, "mlot_k": 0.07, "mlot_q": 0.07})):
        parts = terms(student, teacher, LABELS, [a, b], mode=mode, transport_weight=0.7)
        assert {name: weight for name, (weight, _) in parts.items()} == pytest.approx({"ce": 1.0} | expected)
        same(parts["ce"][1], cross_entropy(student, LABELS))
        own = {"uld": uld_loss(student, teacher, a, b)} if mode == "uld" else None
        own = own or values_of(mlot_parts(student, teacher, a, b, Config(mode="mlot")))
        for name, value in own.items():
            same(parts[name][1], value)


# --- of every objective: invariant 7, the teacher, the inputs

EVERY = [
    *({"divergence": name} for name in (*DIVERGENCES, "none")),
    *({"sink_grad": grad, "debias": True} for grad in GRADS),
    {"sink_form": "official"}, {"cost": "l2"}, {"cost": "sq"}, {"combine": "added"}, {"sink_reduction": "mean"},
    {"mode": "uld"}, {"mode": "mlot"}, {"mode": "mlot", "mlot_faithful": True},
]  # fmt: skip


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("flags", EVERY)
def test_slopes_sum_to_0_in_a_row_the_teacher_has_none_and_inputs_stay(flags, top):
    student, teacher = (x.requires_grad_() for x in pair(5, 4))
    kept, owner = [x.detach().clone() for x in (student, teacher, LABELS)], torch.tensor([0, 0, 0, 1, 1])
    parts = terms(student, teacher, LABELS, [owner, owner], top=top, sink_weight=0.3, **({"mlot_top": 3} | flags))
    for name, (_, value) in parts.items():
        (grad,) = torch.autograd.grad(value, student, retain_graph=True)
        assert value.dim() == 0 and grad.isfinite().all() and grad.any(), name
        same(grad.sum(-1), torch.zeros(5))
    total(parts).backward()
    assert teacher.grad is None
    assert all(map(torch.equal, kept, (student, teacher, LABELS)))


@pytest.mark.parametrize("flags", EVERY)
def test_every_objective_in_float32_and_shifted_by_a_constant(flags):
    """Logits 40 apart: probabilities of 1 and of 0 to the last bit; a constant on a row's logits has no effect."""
    student, teacher = (20 * x.float() for x in pair(5, 4))
    owner, flags = torch.tensor([0, 0, 0, 1, 1]), {"mlot_top": 3} | flags
    value, grad = gradient(lambda x: total(terms(x, teacher, LABELS, [owner, owner], **flags)), student)
    assert value.isfinite() and grad.isfinite().all()
    if (
        "mode" not in flags or flags["mode"] == "uld"
    ):  # mlot divides by a deviation, which the shift perturbs in float32
        shifted = total(terms(student + 8, teacher - 16, LABELS, [owner, owner], **flags))
        torch.testing.assert_close(shifted, value, atol=1e-4, rtol=1e-4)
