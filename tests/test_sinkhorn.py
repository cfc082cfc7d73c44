"""kernels/sinkhorn.py, both forms (PyTorch and Triton under Triton's interpreter), against float64 autograd.

Problems up to 64 x 64 lie in one tile of the kernel; larger ones go to the twin.
err = max|x - reference| / max(1, max|reference|), as everywhere in kernels/.
"""

import itertools
import math

import pytest
import torch

from posttrain.kernels import sinkhorn as module
from posttrain.kernels.backend import backend_for, triton, use_backend
from posttrain.kernels.sinkhorn import COST_TILES, SINKHORN_TILES, horizon, pairwise_cost, sinkhorn, sinkhorn_scaling

FORMS = ["torch", "triton"] if triton else ["torch"]
METRICS = ("l1", "l2", "sql2")
SIZES = [(1, 1), (1, 5), (5, 16), (16, 16), (33, 5), (16, 33), (64, 64), (70, 33)]
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(params=FORMS)
def form(request):
    with use_backend(request.param):
        assert backend_for(torch.zeros(1)) == request.param
        yield request.param


def rand(*shape, seed=0, scale=1.0, dtype=F64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def costs(*shape, seed=0, dtype=F64):
    """Uniform in [0, 2], as l1 distances of distributions."""
    return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def masses(*shape, seed=0):
    """Positive, fp32 numbers in float64, at most a factor 12 apart."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.1
    return x.float().double()


def close(ours, reference, tolerance):
    assert ours.shape == reference.shape
    error = (ours.double() - reference).abs().max() / max(1, reference.abs().max().item())
    assert error <= tolerance, f"error {error:.1e}"  # NaN fails too


def plain_sinkhorn(cost, eps, iters, a=None, b=None):
    """The log-domain loop for autograd, float64."""
    a = torch.ones(cost.shape[-2], dtype=F64) if a is None else a
    b = torch.ones(cost.shape[-1], dtype=F64) if b is None else b
    scores, g = -cost / eps, torch.zeros(*cost.shape[:-2], cost.shape[-1], dtype=F64)
    for _ in range(iters):
        f = a.log() - (scores + g[..., None, :]).logsumexp(-1)
        g = b.log() - (scores + f[..., :, None]).logsumexp(-2)
    plan = (scores + f[..., :, None] + g[..., None, :]).exp()
    return (plan * cost).sum((-1, -2)), plan


def plain_cost(student, teacher, metric, temperature=1.0):
    """By broadcasting, with a slope of 0 at C = 0 for l2."""
    p, q = (student / temperature).softmax(-1)[..., :, None, :], (teacher / temperature).softmax(-1)[..., None, :, :]
    if metric == "l1":
        return (p - q).abs().sum(-1)
    squared = (p - q).square().sum(-1)
    return squared if metric == "sql2" else torch.where(squared > 0, squared.clamp(min=1e-300).sqrt(), 0)


def value_plan_grad(fn, cost, upstream):
    cost = cost.detach().clone().requires_grad_()
    value, plan = fn(cost)
    (grad,) = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), cost)
    return value.detach(), plan.detach(), grad


# --- Sinkhorn: values and gradients


@pytest.mark.parametrize("with_marginals", [False, True])
@pytest.mark.parametrize("rows,cols", SIZES)
def test_value_plan_and_gradient_equal_float64_autograd(form, rows, cols, with_marginals):
    cost, upstream = costs(2, rows, cols, dtype=F32), rand(2, seed=1)
    a, b = (masses(2, rows, seed=2), masses(cols, seed=3)) if with_marginals else (None, None)
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, 0.1, 5, a, b), cost.double(), upstream)
    ours = value_plan_grad(lambda c: sinkhorn(c, 0.1, 5, a, b), cost, upstream)
    for x, y, tolerance in zip(ours, expected, (2e-5, 2e-5, 1e-4), strict=True):
        assert x.dtype == F32
        close(x, y, tolerance)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_precision_costs_are_computed_in_fp32(form, dtype):
    cost, upstream = costs(2, 9, 17, dtype=dtype), rand(2, seed=1)
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, 0.1, 4), cost.double(), upstream)
    value, plan, grad = value_plan_grad(lambda c: sinkhorn(c, 0.1, 4), cost, upstream)
    assert (value.dtype, plan.dtype, grad.dtype) == (F32, F32, dtype)
    close(value, expected[0], 2e-5)
    close(plan, expected[1], 2e-5)
    torch.testing.assert_close(grad.double(), expected[2], rtol=4e-3 if dtype == BF16 else 5e-4, atol=1e-5)


@pytest.mark.parametrize("iters", [1, 20, 50])
@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_the_policy_of_fp32_holds_to_50_iterations_and_eps_a_hundredth(form, eps, iters):
    cost, upstream = costs(1, 16, 16, seed=4, dtype=F32), rand(1, seed=1)
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, eps, iters), cost.double(), upstream)
    ours = value_plan_grad(lambda c: sinkhorn(c, eps, iters), cost, upstream)
    for x, y, tolerance in zip(ours, expected, (2e-5, 2e-5, 1e-4), strict=True):
        close(x, y, tolerance)


@pytest.mark.parametrize("eps", [0.1, 0.001])
@pytest.mark.parametrize("rows,cols", SIZES)
def test_float64_is_exact(rows, cols, eps):
    cost, upstream = costs(2, rows, cols), rand(2, seed=1)
    for a, b in ((None, None), (masses(rows, seed=2), masses(2, cols, seed=3))):
        expected = value_plan_grad(lambda c, a=a, b=b: plain_sinkhorn(c, eps, 20, a, b), cost, upstream)
        ours = value_plan_grad(lambda c, a=a, b=b: sinkhorn(c, eps, 20, a, b), cost, upstream)
        for x, y, tolerance in zip(ours, expected, (1e-10, 1e-10, 1e-8), strict=True):
            assert x.dtype == F64
            close(x, y, tolerance)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_the_twin_may_make_a_new_k_at_any_time(monkeypatch, every):
    cost, upstream, a, b = costs(2, 6, 9), rand(2, seed=1), masses(2, 6, seed=2), masses(2, 9, seed=3)
    monkeypatch.setattr(module, "horizon", lambda a, b: every)
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, 0.05, 7, a, b), cost, upstream)
    ours = value_plan_grad(lambda c: sinkhorn(c, 0.05, 7, a, b), cost, upstream)
    for x, y in zip(ours, expected, strict=True):
        close(x, y, 1e-10)


@pytest.mark.parametrize("iters", [30, 300])
def test_masses_that_are_300_orders_apart_neither_over_nor_underflow(iters):
    """In K every u and v would soon leave float64 here: 1e-300 is a mass, and half of the costs cannot be paid."""
    cost, upstream = costs(1, 5, 6), rand(1, seed=1)
    cost[:, :3, :3] += 40
    a, b = torch.logspace(-300, 0, 5, dtype=F64), torch.logspace(0, -20, 6, dtype=F64)
    assert horizon(a[None], b[None]) == 1 < horizon(masses(1, 5), masses(1, 6)) < iters + 300
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, 0.1, iters, a, b), cost, upstream)
    ours = value_plan_grad(lambda c: sinkhorn(c, 0.1, iters, a, b), cost, upstream)
    for x, y in zip(ours, expected, strict=True):
        close(x, y, 1e-8)


def test_many_iterations_cross_the_horizon():
    cost, upstream = costs(1, 40, 40), rand(1, seed=1)
    ones = torch.ones(1, 40, dtype=F64)
    assert 20 < horizon(ones, ones) < 130
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, 0.02, 130), cost, upstream)
    ours = value_plan_grad(lambda c: sinkhorn(c, 0.02, 130), cost, upstream)
    for x, y in zip(ours, expected, strict=True):
        close(x, y, 1e-8)


def test_the_twin_works_in_fp32_for_devices_without_float64():
    cost, ones = costs(2, 64, 64, dtype=F32), torch.ones(2, 1, 64)
    plan, saved = module.forward_twin(cost / -0.1, ones, ones, 20)
    assert len(saved) > 4  # the horizon of fp32 is nearer: several K
    close(plan, plain_sinkhorn(cost.double(), 0.1, 20)[1], 2e-5)
    d = plan * cost / -0.1
    grad = plan + d
    module.backward_twin(ones, ones, saved, d.sum(-1)[:, None], d.sum(-2)[:, None], grad)
    close(grad, value_plan_grad(lambda c: plain_sinkhorn(c, 0.1, 20), cost.double(), torch.ones(2))[2], 1e-4)


@pytest.mark.parametrize("with_marginals", [False, True])
@pytest.mark.parametrize("rows,cols", [(1, 1), (3, 3), (2, 5)])
def test_gradcheck_of_the_unrolled_gradient(rows, cols, with_marginals):
    a, b = (masses(rows, seed=2), masses(2, cols, seed=3)) if with_marginals else (None, None)
    cost = costs(2, rows, cols).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, 0.3, 4, a, b)[0], (cost,))


@pytest.mark.parametrize("with_marginals", [False, True])
def test_gradcheck_of_the_envelope_is_that_of_the_regularised_optimum(with_marginals):
    a, b = (masses(4, seed=2), masses(5, seed=3)) if with_marginals else (torch.ones(4), 0.8 * torch.ones(5))
    b = b * (a.sum() / b.sum())

    class Optimum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, cost):
            ctx.save_for_backward(cost)
            plan = sinkhorn(cost, 0.3, 2000, a, b)[1]
            return (plan * (cost + 0.3 * (plan.log() - 1))).sum()

        @staticmethod
        def backward(ctx, upstream):
            cost = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                value = sinkhorn(cost, 0.3, 2000, a, b, grad="envelope")[0]
            return upstream * torch.autograd.grad(value, cost)[0]

    assert torch.autograd.gradcheck(Optimum.apply, (costs(4, 5).requires_grad_(),))


def test_envelope_is_the_plan_and_another_gradient_than_unroll(form):
    cost, upstream = costs(2, 9, 9, dtype=F32), rand(2, seed=1)
    value, plan, grad = value_plan_grad(lambda c: sinkhorn(c, grad="envelope"), cost, upstream)
    unrolled = value_plan_grad(sinkhorn, cost, upstream)
    torch.testing.assert_close(grad, plan * upstream.float()[:, None, None])
    assert torch.equal(value, unrolled[0]) and torch.equal(plan, unrolled[1])
    assert (grad - unrolled[2]).norm() > 0.1 * unrolled[2].norm()


def test_hand_computed_case_of_two_points(form):
    """K = [[1, 1/3], [1/3, 1]]; both gradients worked out on paper."""
    cost, eps = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1 / math.log(3)
    value, plan, grad = value_plan_grad(lambda c: sinkhorn(c, eps, 30), cost, torch.ones(()))
    torch.testing.assert_close(plan, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    torch.testing.assert_close(value, torch.tensor(0.5))
    off = 0.25 - 0.1875 * math.log(3)
    torch.testing.assert_close(grad, torch.tensor([[1 - off, off], [off, 1 - off]]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value_plan_grad(lambda c: sinkhorn(c, eps, 1), cost, torch.ones(()))[1], plan)


# --- Sinkhorn: properties


@pytest.mark.parametrize("rows,cols", [(6, 6), (4, 19), (70, 3)])
def test_columns_sum_to_their_marginal_after_any_number_of_iterations(form, rows, cols):
    b = masses(2, cols, seed=3)
    for iters in (1, 3):
        plan = sinkhorn(costs(2, rows, cols, dtype=F32), 0.1, iters)[1]  # unit marginals, of unlike total mass
        torch.testing.assert_close(plan.sum(-2), torch.ones(2, cols), atol=1e-5, rtol=1e-5)
        plan = sinkhorn(costs(2, rows, cols, dtype=F32), 0.1, iters, None, b)[1]
        torch.testing.assert_close(plan.sum(-2), b.float(), atol=1e-5, rtol=1e-5)


def test_rows_tend_to_their_marginal(form):
    cost, a = costs(1, 5, 7, dtype=F32), masses(5, seed=2)
    b = a.sum() / 7 * torch.ones(7)
    gaps = [(sinkhorn(cost, 0.3, iters, a, b)[1].sum(-1) - a).abs().max().item() for iters in (1, 4, 30)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] and gaps[2] < 1e-5


@pytest.mark.parametrize("grad", ["unroll", "envelope"])
def test_a_constant_on_all_costs_leaves_the_plan_and_its_slope_is_the_mass(form, grad):
    cost = costs(2, 8, 8, dtype=F64 if form == "torch" else F32)
    value, plan, slope = value_plan_grad(lambda c: sinkhorn(c, grad=grad), cost, torch.ones(2))
    shifted = value_plan_grad(lambda c: sinkhorn(c + 3, grad=grad), cost, torch.ones(2))
    torch.testing.assert_close(shifted[1], plan, atol=2e-5, rtol=0)
    torch.testing.assert_close(shifted[0], value + 3 * 8, atol=1e-4, rtol=0)
    torch.testing.assert_close(slope.sum((-1, -2)), torch.full((2,), 8.0, dtype=slope.dtype), atol=1e-4, rtol=0)


def test_constant_costs_give_the_product_of_the_marginals(form):
    a, b = masses(5, seed=2), masses(3, seed=3)
    value, plan = sinkhorn(torch.full((5, 3), 0.7), 0.1, 3, a, b)
    expected = a[:, None] * b / a.sum()
    close(plan, expected, 1e-6)
    close(value, 0.7 * expected.sum(), 1e-6)


def test_permuting_rows_permutes_the_plan_only(form):
    cost, order = costs(7, 7, dtype=F32), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    value, plan = sinkhorn(cost)
    permuted = sinkhorn(cost[order])
    torch.testing.assert_close(permuted[0], value)
    torch.testing.assert_close(permuted[1], plan[order])


def test_the_literal_iteration_agrees_at_eps_a_tenth_value_and_gradient(form):
    cost, upstream = costs(3, 12, 12, dtype=F32), rand(3, seed=1)
    literal = value_plan_grad(sinkhorn_scaling, cost.double(), upstream)
    for x, y, tolerance in zip(value_plan_grad(sinkhorn, cost, upstream), literal, (2e-5, 2e-5, 1e-4), strict=True):
        close(x, y, tolerance)
    exact = value_plan_grad(lambda c: plain_sinkhorn(c, 0.1, 20), cost.double(), upstream)
    for x, y in zip(literal, exact, strict=True):
        close(x, y, 1e-12)


def test_small_eps_underflows_the_literal_iteration_only(form):
    """Least cost 1.05 over eps 0.01 is 105 > 103; with 0.95 on the diagonal the literal form still has a few bits."""
    cost = 1.05 + costs(1, 9, 9, dtype=F32) * (1 - torch.eye(9))
    assert sinkhorn_scaling(cost, 0.01)[0].isnan().all()
    assert sinkhorn_scaling(cost - 0.1, 0.01)[0].isfinite().all()
    assert sinkhorn_scaling(-cost, 0.01)[0].isnan().all()
    assert sinkhorn_scaling(cost.double(), 0.01)[0].isfinite().all()
    expected = value_plan_grad(lambda c: plain_sinkhorn(c, 0.01, 20), cost.double(), torch.ones(1))
    ours = value_plan_grad(lambda c: sinkhorn(c, 0.01), cost, torch.ones(1))
    for x, y, tolerance in zip(ours, expected, (2e-5, 5e-5, 2e-4), strict=True):  # S is up to 305 in fp32
        close(x, y, tolerance)
    value, plan, grad = value_plan_grad(lambda c: sinkhorn(c, 1e-4), cost, torch.ones(1))
    assert value.isfinite().all() and plan.isfinite().all() and grad.isfinite().all()


def test_shapes_of_leading_dimensions(form):
    cost = costs(2, 3, 4, 5, dtype=F32)
    value, plan = sinkhorn(cost, iters=3)
    assert value.shape == (2, 3) and plan.shape == cost.shape
    single = sinkhorn(cost[1, 2], iters=3)
    assert single[0].shape == ()
    torch.testing.assert_close(single, (value[1, 2], plan[1, 2]))
    a = masses(2, 3, 4)
    torch.testing.assert_close(sinkhorn(cost, 0.1, 3, a)[1][1, 2], sinkhorn(cost[1, 2], 0.1, 3, a[1, 2])[1])


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (2, 0, 0)])
def test_empty_problems_are_zeros_in_the_graph(form, shape):
    cost = torch.zeros(shape, dtype=BF16, requires_grad=True)
    value, plan = sinkhorn(cost)
    assert value.shape == shape[:1] and plan.shape == shape and value.dtype == plan.dtype == F32
    assert not value.any() and not plan.requires_grad
    value.sum().backward()
    assert cost.grad.shape == shape


def test_inputs_stay_two_runs_are_bit_equal_and_strides_are_free(form):
    a, b, upstream = masses(6, seed=2), masses(2, 21, seed=3), rand(2, seed=1)
    wide = costs(2, 21, 13, dtype=F32)
    cost = wide[:, :, :12:2].transpose(1, 2)
    kept = [x.clone() for x in (wide, a, b)]
    first, second, packed = (
        value_plan_grad(lambda c: sinkhorn(c, 0.1, 4, a, b), c, upstream) for c in (cost, cost, cost.contiguous())
    )
    for x, y, z in zip(first, second, packed, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)
    assert all(map(torch.equal, kept, (wide, a, b)))
    leaf = wide.requires_grad_()
    sinkhorn(leaf[:, :, :12:2].transpose(1, 2), 0.1, 4, a, b)[0].backward(upstream.float())
    torch.testing.assert_close(leaf.grad[:, :, :12:2].transpose(1, 2), first[2])
    assert not leaf.grad[:, :, 1::2].any() and not leaf.grad[:, :, 12:].any()


def test_the_plan_carries_no_gradient_and_nothing_is_differentiable_twice(form):
    cost = costs(1, 4, 4, dtype=F32).requires_grad_()
    value, plan = sinkhorn(cost, iters=2)
    assert value.requires_grad and not plan.requires_grad
    assert not sinkhorn(cost.detach(), iters=2)[0].requires_grad
    weight = torch.ones(1, requires_grad=True)
    (grad,) = torch.autograd.grad((weight * value).sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_touch_the_arithmetic(form):
    student, teacher = rand(1, 6, 40, dtype=F32).requires_grad_(), rand(1, 6, 40, seed=1, dtype=F32)
    outside = torch.autograd.grad(sinkhorn(pairwise_cost(student, teacher), iters=3)[0].sum(), student)
    with torch.autocast("cpu", BF16):
        inside = torch.autograd.grad(sinkhorn(pairwise_cost(student, teacher), iters=3)[0].sum(), student)
    assert torch.equal(outside[0], inside[0])


def test_the_table_of_tiles_grows_in_powers_of_two():
    """The first tile that holds a problem is taken; what none holds goes to the twin (70 x 33 above)."""
    assert list(SINKHORN_TILES) == sorted(SINKHORN_TILES)
    assert all(size & (size - 1) == 0 for tile in (*SINKHORN_TILES, *COST_TILES) for size in tile)


# --- pairwise cost


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows,cols,vocab", [(1, 1, 1), (5, 3, 7), (16, 16, 256), (3, 33, 37), (2, 18, 513)])
def test_cost_and_gradient_equal_broadcasting_in_float64(form, metric, rows, cols, vocab):
    student, teacher = rand(2, rows, vocab, scale=2, dtype=F32), rand(2, cols, vocab, seed=1, scale=2, dtype=F32)
    upstream = rand(2, rows, cols, seed=2)
    for temperature, dtype in itertools.product((0.5, 2.0), (F32, F64) if form == "torch" else (F32,)):
        x, y = student.to(dtype).requires_grad_(), student.double().requires_grad_()
        ours = pairwise_cost(x, teacher.to(dtype), metric, temperature)
        expected = plain_cost(y, teacher.double(), metric, temperature)
        assert ours.dtype == dtype
        close(ours.detach(), expected.detach(), 2e-5 if dtype == F32 else 1e-10)
        grads = [torch.autograd.grad((c * upstream).sum(), z)[0] for c, z in ((ours, x), (expected, y))]
        close(*grads, 2e-5 if dtype == F32 else 1e-8)


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_logits_are_computed_in_fp32(form, metric):
    student, teacher = rand(1, 4, 19, dtype=BF16).requires_grad_(), rand(1, 6, 19, seed=1, dtype=torch.float16)
    upstream, exact = rand(1, 4, 6, seed=2), student.detach().double().requires_grad_()
    ours, expected = pairwise_cost(student, teacher, metric), plain_cost(exact, teacher.double(), metric)
    assert ours.dtype == F32
    close(ours.detach(), expected.detach(), 2e-5)
    grads = [torch.autograd.grad((c * upstream).sum(), z)[0] for c, z in ((ours, student), (expected, exact))]
    assert grads[0].dtype == BF16
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_of_the_cost(metric):
    student, teacher = rand(2, 3, 4).requires_grad_(), rand(2, 2, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: pairwise_cost(x, teacher, metric, 0.7), (student,))
    assert torch.autograd.gradcheck(lambda x: sinkhorn(pairwise_cost(x, teacher, metric), 0.2, 3)[0], (student,))


@pytest.mark.parametrize("metric", METRICS)
def test_ties_and_equal_rows_have_no_slope(form, metric):
    student = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 5.0]]).requires_grad_()
    teacher = student.detach().clone()  # C = 0 on the diagonal
    cost = pairwise_cost(student, teacher, metric)
    assert not cost.diagonal().any() and cost[0, 1] > 0
    (grad,) = torch.autograd.grad(cost.diagonal().sum(), student, retain_graph=True)
    assert not grad.any()
    (grad,) = torch.autograd.grad(cost.sum(), student)
    assert grad.isfinite().all() and grad.any()


def test_a_tie_in_one_entry_has_slope_0_there(form):
    """Two entries of a row swapped: the slope on P is (-1, 1, 0), and p (slope - <p, slope>) on the logits."""
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]).requires_grad_(), torch.tensor([[1.0, 0.0, 2.0]])
    (grad,) = torch.autograd.grad(pairwise_cost(student, teacher).sum(), student)
    p, slope = student.detach().softmax(-1), torch.tensor([[-1.0, 1.0, 0.0]])
    torch.testing.assert_close(grad, p * (slope - (p * slope).sum()))


@pytest.mark.parametrize("metric", METRICS)
def test_nearly_equal_rows_keep_their_digits(form, metric):
    """The form |P|^2 + |Q|^2 - 2PQ' would give 0 or noise of 1e-4 for l2."""
    student, teacher = torch.zeros(1, 4), torch.tensor([[1e-4, 0.0, 0.0, 0.0]])
    expected = plain_cost(student.double(), teacher.double(), metric)
    torch.testing.assert_close(pairwise_cost(student, teacher, metric).double(), expected, rtol=2e-3, atol=0)


def test_shifted_logits_lose_nothing_more(form):
    student, teacher = rand(1, 4, 21, scale=3) + 3000, rand(1, 5, 21, seed=1, scale=3) - 3000
    student, teacher = student.float(), teacher.float()
    expected = plain_cost(student.double(), teacher.double(), "l1", 1.3)
    close(pairwise_cost(student, teacher, "l1", 1.3), expected, 5e-6)


def test_no_gradient_to_the_teacher_none_along_the_logits_shift_inputs_stay(form):
    student, teacher = rand(2, 5, 9, dtype=F32).requires_grad_(), rand(2, 4, 9, seed=1, dtype=F32).requires_grad_()
    kept = student.detach().clone(), teacher.detach().clone()
    runs = []
    for _ in range(2):
        student.grad = None
        cost = pairwise_cost(student, teacher)
        (cost * cost.detach()).sum().backward()
        runs.append((cost.detach(), student.grad))
    assert teacher.grad is None and torch.equal(student, kept[0]) and torch.equal(teacher, kept[1])
    assert all(map(torch.equal, *runs))
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)


def test_logits_of_any_strides_and_leading_dimensions(form):
    student, teacher = rand(3, 2, 5, 40, dtype=F32)[..., 3:], rand(3, 2, 40, 4, seed=1, dtype=F32).mT[..., 3:]
    upstream, leaf = rand(3, 2, 4, 5, seed=2, dtype=F32).mT, student.detach().requires_grad_()
    cost = pairwise_cost(leaf, teacher, "l1")
    assert cost.shape == (3, 2, 5, 4)
    torch.testing.assert_close(cost[1, 0], pairwise_cost(student[1, 0], teacher[1, 0], "l1"))
    exact = student.double().requires_grad_()
    plain_cost(exact, teacher.double(), "l1").backward(upstream.double())
    cost.backward(upstream)
    close(leaf.grad, exact.grad, 2e-5)


@pytest.mark.parametrize("shapes", [((0, 3, 4), (0, 2, 4)), ((2, 0, 4), (2, 3, 4)), ((2, 3, 0), (2, 5, 0))])
def test_empty_costs_are_in_the_graph(form, shapes):
    student, teacher = torch.zeros(shapes[0], requires_grad=True), torch.zeros(shapes[1])
    cost = pairwise_cost(student, teacher)
    assert cost.shape == (*shapes[0][:2], shapes[1][1]) and not cost.any()
    cost.sum().backward()
    assert student.grad.shape == shapes[0]


def test_the_backward_of_the_cost_never_holds_all_differences():
    """64 x 64 x 4096 differences are 67 MB in fp32; the allocations of forward and backward stay far below."""
    student, teacher = rand(64, 4096, dtype=F32).requires_grad_(), rand(64, 4096, seed=1, dtype=F32)
    for metric in METRICS:
        with torch.profiler.profile(profile_memory=True) as profile:
            pairwise_cost(student, teacher, metric).sum().backward()
        largest = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
        assert 0 < largest < 8 * 2**20


# --- errors

C, L = costs(2, 3, 4), rand(2, 3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinkhorn(C, eps=0.0),
        lambda: sinkhorn(C, eps=-1.0),
        lambda: sinkhorn(C, eps=math.nan),
        lambda: sinkhorn(C, eps=math.inf),
        lambda: sinkhorn(C, iters=0),
        lambda: sinkhorn(C, iters=2.5),
        lambda: sinkhorn(C, grad="implicit"),
        lambda: sinkhorn(C[0, 0]),
        lambda: sinkhorn(C.long()),
        lambda: sinkhorn(C, row_marginal=torch.ones(4)),
        lambda: sinkhorn(C, col_marginal=torch.ones(3, 4)),
        lambda: sinkhorn(C, row_marginal=torch.tensor([1.0, 0.0, 1.0])),
        lambda: sinkhorn(C, col_marginal=torch.tensor([1.0, -1.0, 1.0, 1.0])),
        lambda: sinkhorn(C, col_marginal=torch.tensor([1.0, math.nan, 1.0, 1.0])),
        lambda: sinkhorn(C, row_marginal=torch.ones(3, requires_grad=True)),
        lambda: sinkhorn_scaling(C, eps=0.0),
        lambda: sinkhorn_scaling(C, iters=0),
        lambda: pairwise_cost(L, L, "linf"),
        lambda: pairwise_cost(L, L, temperature=0.0),
        lambda: pairwise_cost(L, L[..., :3]),
        lambda: pairwise_cost(L, L[:1]),
        lambda: pairwise_cost(L[0, 0], L[0, 0]),
        lambda: pairwise_cost(L, L[0]),
    ],
)
def test_bad_arguments_raise_value_errors(call):
    with pytest.raises(ValueError):
        call()
