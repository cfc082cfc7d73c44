"""methods/scope_opd.py against plain loops in float64, from the equations of the sheet; the loop itself against models.

Each row of a batch is a list of its sampled tokens' log-probs; C are correct rows, W wrong ones.
"""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from posttrain.common.cli import UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.families.arithmetic import Arithmetic
from posttrain.common.models import TINY, load_model, load_tokenizer
from posttrain.common.rollout import Sampling
from posttrain.common.tasks import make_task
from posttrain.methods import opd, scope_opd
from posttrain.methods.scope_opd import (
    Config,
    adaptive_weights,
    check,
    distillation_loss,
    imitation_loss,
    mean_logps,
    path_batches,
    path_weights,
    paths,
    row_weights,
    signal_metrics,
    teacher_divergence,
)

HOW = ("paper", "uniform", "opposite")


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def random_batch(seed=0, prompts=4, group_size=5, t=7, drift=0.0):
    """logps (current), behaviour_logps, teacher_logps [N, T], mask, reward, group; one empty row, NaN in no place."""
    g = torch.Generator().manual_seed(seed)
    n = prompts * group_size
    mask = (torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)).double()
    mask[3] = 0
    behaviour, teacher = -3 * torch.rand(2, n, t, generator=g).double()
    teacher[::4, 0] -= 14  # beyond the clamp of k3
    logps = behaviour + drift * torch.randn(n, t, generator=g).double()
    reward = (torch.rand(n, generator=g) < 0.5).double()
    reward[:group_size], reward[-group_size:] = 0, 1  # one prompt all wrong, one all correct
    group = torch.arange(prompts).repeat_interleave(group_size)
    return SimpleNamespace(
        logps=logps * mask, behaviour=behaviour * mask, teacher=teacher * mask, mask=mask, reward=reward, group=group
    )


def weights_of(b, config):
    """The headings score and weigh of main."""
    on = paths(b.reward, b.mask.sum(1) > 0, config.routing)
    s, q = mean_logps(b.behaviour, b.mask), mean_logps(b.teacher, b.mask)
    weights = adaptive_weights(s, q, on, b.group, config)
    return on, weights


def loss_of(logps, b, config):
    """The heading update of main for --kl k1 and k3."""
    on, weights = weights_of(b, config)
    c = row_weights(weights, b.mask, config)
    mle = imitation_loss(logps, b.behaviour, config.objective)
    kl = distillation_loss(logps, b.behaviour, b.teacher, config.objective, config.kl)
    rows = {"mle": on["mle"][:, None] * b.mask, "opd": on["opd"][:, None] * b.mask}
    return (mle * rows["mle"] * c["mle"][:, None] + kl * rows["opd"] * c["opd"][:, None]).sum()


def gradient(fn, x):
    x = x.clone().requires_grad_()
    value = fn(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def weights_by_loop(perplexities: list[float], power: float) -> list[float]:
    """Eq. 1 and 2 as the paper writes them, in perplexities: PPL^power over their sum."""
    return [p**power / sum(x**power for x in perplexities) for p in perplexities]


def loss_by_loop(b, config):
    """Value, gradient [N, T] and each token's factor [N, T] of the whole objective, from the sheet's 5.1 to 5.4."""
    n_rows, t = b.mask.shape
    tokens = [[j for j in range(t) if b.mask[i, j]] for i in range(n_rows)]
    prompts = sorted(set(b.group.tolist()))
    value, grad, factor = 0.0, *([[0.0] * t for _ in range(n_rows)] for _ in range(2))
    student = {"paper": 1, "uniform": 0, "opposite": -1}[config.student_weights] / config.tau
    teacher = {"paper": -1, "uniform": 0, "opposite": 1}[config.teacher_weights] / config.tau
    if config.weighting == "none":
        student = teacher = 0
    w = [0.0] * n_rows
    correct = [config.routing != "none" and r > 0 for r in b.reward.tolist()]
    wrong = [config.routing == "none" or r <= 0 for r in b.reward.tolist()]
    mean1 = config.weight_scale == "mean1" or (config.weight_scale, config.objective) == ("auto", "repo")
    for x in prompts:
        for chosen, logps, power in ((correct, b.behaviour, student), (wrong, b.teacher, teacher)):
            rows = [i for i in range(n_rows) if b.group[i] == x and tokens[i] and chosen[i]]
            ppl = [math.exp(-sum(logps[i, j].item() for j in tokens[i]) / len(tokens[i])) for i in rows]
            for i, share in zip(rows, weights_by_loop(ppl, power), strict=True):
                w[i] = share * (len(rows) if mean1 else 1)
                w[i] = 1.0 if config.routing == "none" else w[i]
    everything = sum(len(row) for row in tokens)
    on_correct, on_wrong = (
        sum(len(row) for row, on in zip(tokens, rows, strict=True) if on) for rows in (correct, wrong)
    )
    for i, j in [(row, token) for row in range(n_rows) for token in tokens[row]]:
        new, old, tea = (x[i, j].item() for x in (b.logps, b.behaviour, b.teacher))
        rho, d = math.exp(new - old), min(10.0, max(-10.0, tea - new))
        if config.objective == "paper":
            c = w[i] / len(prompts) / (len(tokens[i]) if config.reduction == "token_mean" else 1)
            loss, slope = rho * (new - tea), rho * (new - tea)  # the bracket is a constant
            if correct[i]:
                loss, slope = -rho, -rho
        else:
            c = w[i] / (on_correct if correct[i] else everything)
            a = tea - old
            options = [(-a * rho, -a * rho), (-a * min(1.2, max(0.8, rho)), -a * rho * (0.8 < rho < 1.2))]
            loss, slope = max(options)
            if a < 0:
                loss, slope = min((-3 * a, 0.0), (loss, slope))
            if correct[i]:
                loss, slope = -new, -1.0
        if config.kl == "k3" and not correct[i]:
            loss, slope = math.exp(d) - d - 1, (1 - math.exp(d)) * (abs(tea - new) < 10)
            if config.objective == "repo":
                c = w[i] / on_wrong
        value, grad[i][j], factor[i][j] = value + c * loss, c * slope, c
    return value, f64(grad), f64(factor)


# --- weights


def test_higher_student_perplexity_among_correct_rows_gets_the_larger_weight():
    """The released scripts do the reverse."""
    s = f64([-0.1, -0.7, -0.4])
    on = {"mle": torch.ones(3, dtype=torch.bool), "opd": torch.zeros(3, dtype=torch.bool)}
    w = adaptive_weights(s, -s, on, torch.zeros(3), Config())["mle"]
    assert w[1] > w[2] > w[0] > 0
    assert (Config().student_weights, Config().teacher_weights) == ("paper", "paper")


def test_lower_teacher_perplexity_among_wrong_rows_gets_the_larger_weight():
    b = random_batch()
    b.reward[:] = 0
    b.teacher[5:10] = b.mask[5:10] * f64([-0.1, -0.5, -0.2, -0.9, -0.3])[:, None]
    w = weights_of(b, Config())[1]["opd"][5:10]
    assert w.argsort(descending=True).tolist() == [0, 2, 4, 1, 3]


@pytest.mark.parametrize(
    ("tau", "student", "teacher"),
    [
        (1.0, [0.2553, 0.3191, 0.4255], [0.4261, 0.3305, 0.2434]),
        (0.5, [0.1873, 0.2926, 0.5202], [0.5188, 0.3120, 0.1692]),
    ],
)
def test_hand_numbers_of_the_weights(tau, student, teacher):
    every, group = torch.ones(3, dtype=torch.bool), torch.zeros(3)
    ours = path_weights(f64([1.2, 1.5, 2.0]).log(), every, group, "paper", tau, "sum1")
    torch.testing.assert_close(ours, f64(student), rtol=0, atol=5.1e-5)
    theirs = path_weights(-f64([1.361, 1.755, 2.383]).log(), every, group, "paper", tau, "sum1")
    torch.testing.assert_close(theirs, f64(teacher), rtol=0, atol=5.1e-5)


def test_weights_average_one_under_the_repos_objective_unless_told_otherwise():
    b = random_batch()
    sums = [weights_of(b, Config(objective=o, weight_scale=scale))[1]["mle"].sum().item()
            for o, scale in (("paper", "auto"), ("paper", "sum1"), ("repo", "auto"), ("repo", "mean1"))]  # fmt: skip
    assert sums[0] == sums[1] == pytest.approx(sum((b.reward[b.group == g] > 0).any().item() for g in b.group.unique()))
    assert sums[2] == sums[3] == pytest.approx(float((b.reward > 0).sum()))


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("how", HOW)
def test_weights_of_a_subset_sum_to_one_and_mean1_is_that_times_its_size(how, tau):
    b = random_batch(1)
    on, sum1 = weights_of(b, Config(student_weights=how, teacher_weights=how, tau=tau))
    mean1 = weights_of(b, Config(student_weights=how, teacher_weights=how, tau=tau, weight_scale="mean1"))[1]
    for path, x in itertools.product(on, range(4)):
        rows = on[path] & (b.group == x)
        size = int(rows.sum())
        assert sum1[path][rows].sum().item() == pytest.approx(float(size > 0))
        torch.testing.assert_close(mean1[path][rows], sum1[path][rows] * size)
        assert (sum1[path][rows] > 0).all() and (sum1[path] <= 1).all()
        assert not sum1[path][~on[path]].any() and not mean1[path][~on[path]].any()


@pytest.mark.parametrize(("how", "sign"), [("paper", 1), ("opposite", -1)])
def test_weights_are_strictly_monotone_and_uniform_when_perplexities_or_tau_say_so(how, sign):
    score, every, group = f64([0.3, 0.1, 0.9, 0.5]), torch.ones(4, dtype=torch.bool), torch.zeros(4)
    w = path_weights(score, every, group, how, 1.0, "sum1")
    assert (w[score.argsort()].diff() * sign > 0).all()
    for same in (
        path_weights(score * 0 - 2, every, group, how, 1.0, "sum1"),
        path_weights(score, every, group, how, 1e9, "sum1"),
        path_weights(score, every, group, how, math.inf, "sum1"),
        path_weights(score, every, group, "uniform", 0.1, "sum1"),
    ):
        torch.testing.assert_close(same, torch.full_like(w, 0.25), rtol=1e-8, atol=0)


@pytest.mark.parametrize("shift", [-1000.0, -3.0, 1000.0])
def test_a_constant_added_to_every_mean_log_prob_of_a_subset_changes_nothing(shift):
    b = random_batch(2)
    on = paths(b.reward, b.mask.sum(1) > 0, "correctness")
    for path, how in itertools.product(on, HOW):
        score = mean_logps(b.teacher, b.mask)
        w = path_weights(score, on[path], b.group, how, 0.5, "sum1")
        moved = path_weights(score + shift * (b.group == 1), on[path], b.group, how, 0.5, "sum1")
        torch.testing.assert_close(moved, w, rtol=1e-9, atol=1e-12)


def test_extreme_perplexities_and_tau_give_finite_weights():
    score = torch.tensor([-500.0, 0.0, -1e-3, -80.0, -80.0, 5.0])
    path = torch.tensor([True, True, True, True, True, False])
    group = torch.tensor([4, 4, 4, 9, 9, 9])
    for how, tau in itertools.product(HOW, (1e-6, 1.0, 1e6)):
        w = path_weights(score, path, group, how, tau, "mean1")
        assert w.isfinite().all() and w[5] == 0
        assert w[:3].sum().item() == pytest.approx(3) and w[3:5].tolist() == pytest.approx([1, 1])


def test_group_numbers_need_not_be_dense_nor_sorted():
    b = random_batch(3)
    order = torch.randperm(len(b.group), generator=torch.Generator().manual_seed(0))
    on, weights = weights_of(b, Config())
    for path, sign in (("mle", -1), ("opd", 1)):
        score = sign * mean_logps(b.behaviour if path == "mle" else b.teacher, b.mask)
        w = path_weights(score[order], on[path][order], 100 - 7 * b.group[order], "paper", 1.0, "sum1")
        torch.testing.assert_close(w, weights[path][order])


def test_mean_log_prob_is_minus_the_log_perplexity_over_sampled_tokens_only():
    b = random_batch(4)
    ours = mean_logps(torch.where(b.mask > 0, b.teacher, -1e4), b.mask)
    for i, n in enumerate(b.mask.sum(1).int().tolist()):
        assert ours[i].item() == pytest.approx(b.teacher[i, :n].mean().item() if n else 0.0)


# --- routing


def test_reward_above_zero_is_correct_and_nan_or_unusable_rows_take_no_path():
    reward, usable = f64([1, 0, 0.3, -1, math.nan, 1, 0]), torch.tensor([True] * 5 + [False] * 2)
    on = paths(reward, usable, "correctness")
    assert on["mle"].tolist() == [True, False, True, False, False, False, False]
    assert on["opd"].tolist() == [False, True, False, True, False, False, False]
    on = paths(reward, usable, "none")
    assert not on["mle"].any() and on["opd"].tolist() == usable.tolist()


def test_group_of_one_is_hard_routing_with_weight_one():
    b = random_batch(5, prompts=12, group_size=1)
    for scale, tau, how in itertools.product(("sum1", "mean1"), (0.1, 1.0), HOW):
        on, weights = weights_of(b, Config(weight_scale=scale, tau=tau, student_weights=how, teacher_weights=how))
        for path in on:
            torch.testing.assert_close(weights[path], on[path].double())


def test_an_empty_response_takes_no_weight_from_the_others():
    """Its perplexity would be 1, the best of all."""
    b = random_batch(6)
    b.reward[:] = 0
    w = weights_of(b, Config())[1]["opd"]
    assert b.mask[3].sum() == 0 and w[3] == 0
    rest = [i for i in range(5) if i != 3]
    ppl = (-mean_logps(b.teacher, b.mask)[rest]).exp().tolist()
    assert w[rest].tolist() == pytest.approx(weights_by_loop(ppl, -1))


def test_each_path_has_micro_batches_of_its_own_which_hold_its_rows_once():
    engine = HFEngine(load_model("addition-student", torch.device("cpu")), load_tokenizer("addition-student"))
    rollout = engine.generate(make_task("addition").draw(3, 0), 4, Sampling(1.0, 20), (0, 1))
    on = {"mle": torch.arange(12) % 3 == 0, "opd": torch.arange(12) % 3 == 1}
    for limit in (1, 60, 10**6):
        batches = path_batches(rollout, on, limit)
        for path in on:
            found = torch.cat([rows for name, rows in batches if name == path]).sort().values
            assert found.tolist() == on[path].nonzero().squeeze(1).tolist()
    assert path_batches(rollout, {"mle": on["mle"] & False, "opd": on["opd"] & False}, 60) == []


# --- the objective

GRID = [
    {"objective": o, "weight_scale": scale, "kl": kl, "reduction": r, **weighting}
    for o, scale, kl, r in itertools.product(
        ("paper", "repo"), ("sum1", "mean1"), ("k1", "k3"), ("token_sum", "token_mean")
    )
    for weighting in (
        *({"student_weights": a, "teacher_weights": b} for a, b in itertools.product(HOW, HOW)),
        {"tau": 0.5},
        {"weighting": "none"},
        {"routing": "none"},
    )
    if not (o == "repo" and r == "token_mean") and not (scale == "mean1" and "routing" in weighting)
]


@pytest.mark.parametrize("flags", GRID, ids=lambda flags: "-".join(map(str, flags.values())))
def test_loss_and_gradient_equal_the_loop_with_every_flag(flags):
    config = Config(prompts_per_step=4, **flags)
    check(config)
    for seed, drift in ((0, 0.0), (1, 0.3), (2, 1.5)):
        b = random_batch(seed, drift=drift)
        value, grad = gradient(lambda x, b=b: loss_of(x, b, config), b.logps)
        expected, slope, _ = loss_by_loop(b, config)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)
        assert grad.any()


@pytest.mark.parametrize("objective", ["paper", "repo"])
def test_gradient_in_the_logits_on_policy(objective):
    """(w/P)(pi - [v = a]) on a correct row, (w/P) A ([v = a] - pi) on a wrong one, A = student - teacher log-prob."""
    z, tea, a, w = f64([0.3, -1.0, 0.8, 0.1]), -1.3, 2, 0.4
    pi, hot = z.softmax(-1), f64([0, 0, 1, 0])
    config = Config(prompts_per_step=5, objective=objective)

    def loss(z, correct):
        logps = z.log_softmax(-1)[a].reshape(1, 1)
        weights = {"mle": f64([w * correct]), "opd": f64([w * (not correct)])}
        c = row_weights(weights, torch.ones_like(logps), config)
        if correct:
            return (imitation_loss(logps, logps.detach(), objective) * c["mle"]).sum()
        return (distillation_loss(logps, logps.detach(), f64([[tea]]), objective, "k1") * c["opd"]).sum()

    n = 5 if objective == "paper" else 1
    gap = z.log_softmax(-1)[a] - tea
    torch.testing.assert_close(gradient(lambda x: loss(x, True), z)[1], w / n * (pi - hot))
    torch.testing.assert_close(gradient(lambda x: loss(x, False), z)[1], w / n * gap * (hot - pi))


def test_teacher_on_correct_rows_changes_neither_loss_nor_gradient():
    for flags in ({}, {"objective": "repo"}, {"kl": "k3"}, {"reduction": "token_mean"}):
        config = Config(prompts_per_step=4, **flags)
        b = random_batch(7, drift=0.2)
        before = gradient(lambda x, b=b, c=config: loss_of(x, b, c), b.logps)
        b.teacher = torch.where(b.reward[:, None] > 0, -2 * torch.rand_like(b.teacher) * b.mask, b.teacher)
        after = gradient(lambda x, b=b, c=config: loss_of(x, b, c), b.logps)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_weights_are_constants():
    """Finite differences of the loss with frozen weights and frozen bracket equal autograd."""
    b = random_batch(8)
    s = mean_logps(b.behaviour.requires_grad_(), b.mask)
    assert not path_weights(-s, b.reward > 0, b.group, "paper", 1.0, "sum1").requires_grad
    b.behaviour = b.behaviour.detach()
    config, h = Config(prompts_per_step=4), 1e-6
    grad = gradient(lambda x: loss_of(x, b, config), b.logps)[1]
    c = row_weights(weights_of(b, config)[1], b.mask, config)
    frozen = (b.logps - b.teacher) * c["opd"][:, None] - c["mle"][:, None]

    def loss(logps):
        return (frozen * (logps - b.behaviour).exp() * b.mask).sum().item()

    for i, j in ((0, 0), (7, 1), (12, 2), (19, 0)):
        step = torch.zeros_like(b.logps)
        step[i, j] = h
        assert grad[i, j].item() == pytest.approx((loss(b.logps + step) - loss(b.logps - step)) / (2 * h), abs=1e-8)


@pytest.mark.parametrize("kl", ["k1", "k3"])
@pytest.mark.parametrize("objective", ["paper", "repo"])
def test_the_student_as_its_own_teacher_has_no_distillation_loss_nor_gradient(objective, kl):
    b = random_batch(9)
    b.reward[:], b.teacher = 0, b.logps.clone()
    value, grad = gradient(lambda x: loss_of(x, b, Config(prompts_per_step=4, objective=objective, kl=kl)), b.logps)
    assert value == 0 and not grad.any()


def test_all_rows_wrong_without_weighting_under_the_repos_objective_is_plain_opd():
    b = random_batch(10)
    b.reward[:] = 0
    flags = {"objective": "repo", "weight_scale": "mean1", "weighting": "none"}
    ours = gradient(lambda x: loss_of(x, b, Config(**flags)), b.logps)
    unrouted = gradient(lambda x: loss_of(x, b, Config(objective="repo", routing="none")), b.logps)
    advantages = opd.distillation_advantages(b.behaviour - b.teacher, b.mask)
    c = opd.row_weights(b.mask, "token", 9)[:, None]
    plain = gradient(lambda x: -((x - b.behaviour).exp() * advantages * b.mask * c).sum(), b.logps)
    for x, y, z in zip(ours, unrouted, plain, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-12)


def test_without_teacher_and_weighting_the_correct_path_is_reinforce_with_a_0_1_reward():
    b = random_batch(11)
    n_correct = torch.zeros(4).double().index_add(0, b.group, b.reward * (b.mask.sum(1) > 0))[b.group]
    config = Config(prompts_per_step=4, weighting="none")
    c = row_weights(weights_of(b, config)[1], b.mask, config)["mle"][:, None]
    grad = gradient(lambda x: (imitation_loss(x, b.behaviour, "paper") * b.mask * c).sum(), b.logps)[1]
    torch.testing.assert_close(grad, -b.reward[:, None] * b.mask / n_correct.clamp(min=1)[:, None] / 4)


@pytest.mark.parametrize("flags", [{}, {"objective": "repo", "kl": "k3"}, {"reduction": "token_mean", "tau": 0.5}])
def test_row_order_padding_and_the_split_into_micro_batches_change_nothing(flags):
    b, config = random_batch(12, drift=0.2), Config(prompts_per_step=4, **flags)
    value, grad = gradient(lambda x: loss_of(x, b, config), b.logps)
    order = torch.randperm(len(b.group), generator=torch.Generator().manual_seed(1))
    moved = SimpleNamespace(**{key: x[order] for key, x in vars(b).items()})
    other = gradient(lambda x: loss_of(x, moved, config), moved.logps)
    torch.testing.assert_close(other[0], value)
    torch.testing.assert_close(other[1], grad[order])
    wide = SimpleNamespace(**{k: nn.functional.pad(x, (0, 3)) if x.dim() == 2 else x for k, x in vars(b).items()})
    torch.testing.assert_close(loss_of(wide.logps, wide, config), value)
    c = row_weights(weights_of(b, config)[1], b.mask, config)  # fixed before the split
    total = 0.0
    for rows in torch.arange(len(b.group)).split(3):  # splits the groups of 5
        mle = imitation_loss(b.logps[rows], b.behaviour[rows], config.objective) * c["mle"][rows, None]
        kl = distillation_loss(b.logps[rows], b.behaviour[rows], b.teacher[rows], config.objective, config.kl)
        total += ((mle + kl * c["opd"][rows, None]) * b.mask[rows]).sum()
    torch.testing.assert_close(total, value)


def test_inputs_stay_as_they_were():
    b = random_batch(13)
    before = {key: x.clone() for key, x in vars(b).items()}
    for flags in ({}, {"objective": "repo", "kl": "k3"}):
        loss_of(b.logps, b, Config(**flags))
    signal_metrics(*weights_of(b, Config()), b.group)
    assert all(torch.equal(x, before[key]) for key, x in vars(b).items())


def test_nothing_on_any_path_is_a_loss_of_zero():
    b = random_batch(14)
    b.reward[:] = math.nan
    for flags in ({}, {"objective": "repo"}, {"objective": "repo", "kl": "k3"}, {"reduction": "token_mean"}):
        value, grad = gradient(lambda x, flags=flags: loss_of(x, b, Config(**flags)), b.logps)
        assert value == 0 and not grad.any() and grad.isfinite().all()


# --- KL over many tokens

STUDENT, TEACHER = [0.3, -1.0, 0.8, 0.1, -0.4, 1.7], [1.0, 0.2, -0.5, 0.0, 2.0, -1.0]


def model(bias=None, softcap=None):
    """A model whose LM head is the identity, so that hidden states are logits."""
    head = nn.Linear(6, 6, bias=bias is not None).double()
    head.weight.data = torch.eye(6).double()
    if bias is not None:
        head.bias.data = f64(bias)
    made = nn.Module()
    made.head, made.get_output_embeddings = head, lambda: head
    made.config = PretrainedConfig(final_logit_softcapping=softcap)
    return made


def kl_by_loop(student, teacher, t_student, t_teacher, chosen):
    """KL(student || teacher) and its gradient in the student's logits, both renormalised over the chosen tokens."""
    p = [math.exp(student[v] / t_student) if v in chosen else 0.0 for v in range(len(student))]
    q = [math.exp(teacher[v] / t_teacher) if v in chosen else 0.0 for v in range(len(teacher))]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    logs = [math.log(x / y) if x else 0.0 for x, y in zip(p, q, strict=True)]
    d = sum(x * r for x, r in zip(p, logs, strict=True))
    return d, f64([x * (r - d) / t_student for x, r in zip(p, logs, strict=True)])


@pytest.mark.parametrize("temperatures", [(1.0, 0.0), (0.6, 0.0), (0.6, 1.0), (1.0, 1.7)])
@pytest.mark.parametrize(("kl", "k"), [("full", 6), ("topk", 2), ("topk", 4), ("topk", 6)])
def test_divergence_over_k_or_all_tokens_equals_the_loop_at_both_temperatures(kl, k, temperatures):
    t_student, t_teacher = temperatures[0], temperatures[1] or temperatures[0]
    bias, softcap = [0.5, -1, 0, 0, 2, 0.3], 1.5
    for teacher, seen in (
        (model(), TEACHER),
        (model(softcap=softcap), [softcap * math.tanh(x / softcap) for x in TEACHER]),
        (model(bias=bias), [x + y for x, y in zip(TEACHER, bias, strict=True)]),
    ):
        config = Config(kl=kl, top_k=k, temperature=t_student, teacher_temperature=temperatures[1])

        def ours(z, teacher=teacher, config=config):
            return teacher_divergence(model(), z[None], teacher, f64([TEACHER]), 6, config)

        value, grad = gradient(ours, f64(STUDENT))
        chosen = sorted(range(6), key=lambda v: -seen[v])[:k]
        expected, slope = kl_by_loop(STUDENT, seen, t_student, t_teacher, chosen)
        assert value.item() == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(grad, slope, rtol=1e-8, atol=1e-12)


def test_full_and_topk_are_zero_for_the_student_as_its_own_teacher():
    for flags in ({"kl": "full"}, {"kl": "topk", "top_k": 3}):
        config = Config(**flags)
        value, grad = gradient(
            lambda z, c=config: teacher_divergence(model(), z[None], model(), f64([STUDENT]), 6, c), f64(STUDENT)
        )
        assert abs(value.item()) < 1e-12 and grad.abs().max() < 1e-12


def test_expected_gradient_of_k1_is_that_of_the_full_divergence():
    z, q = f64(STUDENT), f64(TEACHER).log_softmax(-1)

    def expected(z):
        logps = z.log_softmax(-1)[:, None]
        loss = distillation_loss(logps, logps.detach(), q[:, None], "paper", "k1")
        return (logps.exp().detach() * loss).sum()

    full = gradient(lambda z: teacher_divergence(model(), z[None], model(), f64([TEACHER]), 6, Config(kl="full")), z)
    torch.testing.assert_close(gradient(expected, z)[1], full[1], rtol=1e-9, atol=1e-12)


# --- metrics


def test_metrics_of_the_signal_by_hand():
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    on = {"mle": torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]) > 0, "opd": torch.tensor([0, 0, 0, 0, 1, 1, 1, 0]) > 0}
    weights = {"mle": f64([0.4261, 0.3305, 0.2434, 1, 0, 0, 0, 0]), "opd": f64([0, 0, 0, 0, 1, 0.25, 0.75, 0])}
    ours = signal_metrics(on, weights, group)
    assert (ours["scope/all_correct"], ours["scope/mixed"], ours["scope/all_wrong"]) == (0.25, 0.25, 0.25)
    assert ours["scope/mle_ess"] == pytest.approx(2.86 / 3, abs=2e-3)  # the sheet: 2.86 of 3
    assert ours["scope/mle_max"] == pytest.approx(3 * 0.4261, abs=1e-3)
    assert ours["scope/opd_ess"] == pytest.approx(1 / (0.25**2 + 0.75**2) / 2) and ours["scope/opd_max"] == 1.5
    scaled = {path: w * 3 for path, w in weights.items()}
    assert signal_metrics(on, scaled, group) == pytest.approx(ours)
    none = {path: rows & False for path, rows in on.items()}
    nothing = signal_metrics(none, {path: w * 0 for path, w in weights.items()}, group)
    assert nothing["scope/mle_ess"] == 1 and nothing["scope/mle_max"] == 0 and nothing["scope/mixed"] == 0


# --- main

SMALL = {"steps": 1, "prompts_per_step": 6, "group_size": 6, "eval_problems": 2, "eval_samples": 1, "eval_every": 0}


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(out):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines(out)]


@pytest.fixture
def spy(monkeypatch):
    """Runs main and returns the folder, the last rollout, the gradients of the last step and the rows scored."""

    def start(out, **flags):
        seen = {"scored": 0}

        class Recorder(scope_opd.Optimizer):
            def step(self, step):
                seen["gradients"] = [
                    p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in self.weights
                ]
                return super().step(step)

        metrics, score = scope_opd.rollout_metrics, scope_opd.score

        def scored(model, rollout, *rest):
            seen["scored"] += len(rollout)
            return score(model, rollout, *rest)

        monkeypatch.setattr(scope_opd, "Optimizer", Recorder)
        monkeypatch.setattr(scope_opd, "score", scored)
        monkeypatch.setattr(scope_opd, "rollout_metrics", lambda r, *rest: seen.update(rollout=r) or metrics(r, *rest))
        monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)
        scope_opd.main(Config(**{**SMALL, **flags}, out=str(out)))
        return seen

    return start


WHOLE = [
    {}, {"objective": "repo"}, {"objective": "repo", "weight_scale": "mean1", "student_weights": "opposite"},
    {"kl": "k3"}, {"kl": "full"}, {"kl": "topk", "top_k": 3}, {"objective": "repo", "kl": "full"},
    {"reduction": "token_mean", "tau": 0.3}, {"weighting": "none"}, {"routing": "none"},
    {"routing": "none", "objective": "repo", "kl": "k3"}, {"temperature": 0.8}, {"student_weights": "uniform"},
    {"temperature": 0.8, "teacher_temperature": 1.3, "teacher_weights": "opposite"}, {"mask_eos": True},
    {"temperature": 0.8, "teacher_temperature": 1.3, "kl": "full"}, {"drop_truncated": True, "max_new_tokens": 15},
    {"drop_truncated": True, "max_new_tokens": 15, "objective": "repo"},
    {"micro_batch_tokens": 70, "kl": "topk", "top_k": 2}, {"micro_batch_tokens": 70, "objective": "repo"},
]  # fmt: skip


def mle_by_loop(b, config):
    """The part of correct rows: where a wrong row's k1, k3 and advantage are 0, since rho is 1."""
    return loss_by_loop(SimpleNamespace(**{**vars(b), "teacher": b.logps}), config)[0]


@pytest.mark.parametrize("flags", WHOLE, ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()))
def test_the_first_step_of_a_run_equals_a_float64_reference_from_whole_logits(flags, spy, tmp_path):
    """Loss parts, metrics and every gradient, from the rollout that main sampled and the two models in float64."""
    config, got = Config(**{**SMALL, **flags}), spy(tmp_path / "run", **flags)
    r, row = got["rollout"], lines(tmp_path / "run")[1]
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(TINY / f"addition-{name}", dtype=torch.float64)
        for name in ("student", "teacher")
    )
    hot = (config.temperature, config.teacher_temperature or config.temperature)
    ours, theirs = (
        torch.cat([m(r.tokens).logits[:, :1] * 0, m(r.tokens).logits[:, :-1]], 1) / t
        for m, t in zip((student, teacher), hot, strict=True)
    )  # logits at t now speak of token t
    theirs = theirs.detach()
    logps, tea = (x.log_softmax(-1).gather(-1, r.tokens[..., None])[..., 0] for x in (ours, theirs))
    mask = r.loss_mask.double()
    if config.mask_eos:
        mask = mask * (r.tokens != student.generation_config.eos_token_id)
    dropped = ~r.finished & config.drop_truncated
    b = SimpleNamespace(
        logps=(logps * mask).detach(), behaviour=(logps * mask).detach(), teacher=tea * mask, mask=mask,
        reward=r.reward.double().masked_fill(dropped, math.nan), group=r.group,
    )  # fmt: skip
    sampled_token = Config(**{**SMALL, **flags, "kl": "k1" if config.kl != "k3" else "k3"})
    value, slope, _ = loss_by_loop(b, sampled_token)
    correct, wrong = b.reward > 0, b.reward <= 0
    if config.routing == "none":
        correct, wrong = correct & False, wrong | True
    if config.kl in ("full", "topk"):  # the same weights and means, with another loss on wrong rows
        c = loss_by_loop(b, Config(**{**SMALL, **flags, "kl": "k3"}))[2] * wrong[:, None]
        best = theirs.topk(config.top_k if config.kl == "topk" else theirs.shape[-1], -1).indices
        p, q = (x.gather(-1, best).log_softmax(-1) for x in (ours, theirs))
        wrong_loss = ((p.exp() * (p - q)).sum(-1) * c * mask).sum()
        right_loss = (logps * slope * correct[:, None]).sum()
        (wrong_loss + right_loss).backward()
        opd_value = wrong_loss.item()
    else:
        (logps * slope).sum().backward()
        opd_value = value - mle_by_loop(b, sampled_token)
    expected = [p.grad for p in student.parameters()]
    scale = max(g.abs().max().item() for g in expected)
    for mine, theirs_ in zip(got["gradients"], expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs_, rtol=2e-3, atol=2e-5 * scale)
    assert row["loss/opd"] == pytest.approx(opd_value, rel=1e-4, abs=1e-6)
    assert row["loss/mle"] == pytest.approx(mle_by_loop(b, sampled_token), rel=1e-4, abs=1e-6)
    assert row["loss/total"] == pytest.approx(row["loss/opd"] + row["loss/mle"], rel=1e-5)
    read = mask * wrong[:, None]
    assert row["teacher/kl"] == pytest.approx(((logps - tea) * read).sum().item() / read.sum().item(), rel=1e-4)
    assert got["scored"] == int((read.sum(1) > 0).sum()), "the teacher read a row that needs none"
    assert (dropped.any() and (~dropped).any()) or not config.drop_truncated


def test_rewards_of_minus_one_and_one_route_like_zero_and_one(spy, tmp_path):
    (tmp_path / "mine.py").write_text("def sign(e, text):\n    return 2.0 * text.endswith('=' + e.answer) - 1\n")
    (tmp_path / "same.py").write_text("def zero(e, text):\n    return 0.5 * text.endswith('=' + e.answer)\n")
    a = spy(tmp_path / "a", reward=f"{tmp_path}/mine.py:sign")["gradients"]
    b = spy(tmp_path / "b", reward=f"{tmp_path}/same.py:zero")["gradients"]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and any(x.any() for x in a)


def test_a_row_whose_reward_raises_takes_no_path(spy, tmp_path):
    (tmp_path / "mine.py").write_text("def f(e, text):\n    return 1 / (text[:1] != '1') * (text[:1] > '4')\n")
    got = spy(tmp_path / "run", reward=f"{tmp_path}/mine.py:f")
    unscored = got["rollout"].reward.isnan()
    assert unscored.any() and got["scored"] == int((got["rollout"].reward == 0).sum()) < int((~unscored).sum())


def test_a_response_without_tokens_takes_no_path(spy, tmp_path, monkeypatch):
    """With --mask-eos, a response of the end token alone: its perplexity would be 1, and win."""

    class Mute(HFEngine):
        def complete(self, *args):
            ids, logps = super().complete(*args)
            return [self.stop_ids[:1], *ids[1:]], [[-1.0], *logps[1:]]

    monkeypatch.setattr(scope_opd, "make_engine", lambda *args: Mute(*args[:2]) if args[2:] else HFEngine(*args))
    for masked in (True, False):
        got = spy(tmp_path / f"{masked}", mask_eos=masked)
        assert got["rollout"].reward[0] == 0 and got["rollout"].loss_mask[0].sum() == 1
        assert got["scored"] == int((got["rollout"].reward == 0).sum()) - masked
        assert all(g.isfinite().all() for g in got["gradients"])


def test_a_group_of_one_runs_with_weights_of_one(spy, tmp_path):
    got = spy(tmp_path / "run", group_size=1, prompts_per_step=24)
    row = lines(tmp_path / "run")[1]
    assert row["scope/mixed"] == 0 and row["scope/all_correct"] + row["scope/all_wrong"] == 1
    assert row["scope/mle_ess"] == row["scope/opd_ess"] == row["scope/opd_max"] == 1 and row["optim/grad_norm"] > 0
    assert row["loss/mle"] == pytest.approx(-got["rollout"].loss_mask[got["rollout"].reward > 0].sum().item() / 24)


@pytest.mark.parametrize(("reward", "path"), [("1.0", "mle"), ("0.0", "opd")])
def test_all_correct_never_asks_the_teacher_and_all_wrong_never_imitates(reward, path, spy, tmp_path):
    (tmp_path / "mine.py").write_text(f"def same(example, completion):\n    return {reward}\n")
    got = spy(tmp_path / "run", reward=f"{tmp_path}/mine.py:same")
    row = lines(tmp_path / "run")[1]
    assert got["scored"] == (0 if path == "mle" else 36)
    assert row["scope/all_correct"] == (path == "mle") and row["scope/all_wrong"] == (path == "opd")
    assert row["loss/total"] == row[f"loss/{path}"] != 0 == row["loss/opd" if path == "mle" else "loss/mle"]


def test_when_every_row_is_cut_and_dropped_nothing_moves(spy, tmp_path):
    got = spy(tmp_path / "run", drop_truncated=True, max_new_tokens=3)
    row = lines(tmp_path / "run")[1]
    assert got["scored"] == 0 and not any(g.any() for g in got["gradients"])
    assert row["loss/total"] == row["teacher/kl"] == row["scope/mixed"] == row["optim/grad_norm"] == 0
    assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_teacher_whose_scores_are_not_finite_is_one_line(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(scope_opd, "score", lambda m, r, *rest: (r.loss_mask * r.loss_mask.clone().fill_(bad), None))
    with pytest.raises(UserError, match=r"step 1: the teacher.*not finite"):
        scope_opd.main(Config(**SMALL, out=str(tmp_path / "run")))


def test_recovery_probe_sorts_by_teacher_perplexity_and_repairs_wrong_responses(spy, tmp_path, capsys):
    spy(tmp_path / "run", recovery_probe=16)
    start = lines(tmp_path / "run")[0]
    perplexities = [start[f"scope/perplexity_q{i}"] for i in range(1, 5)]
    assert perplexities == sorted(perplexities) and perplexities[0] > 1
    recovered = [[start[f"scope/recovered_{kept}_q{i}"] for i in range(1, 5)] for kept in (20, 40, 60, 80)]
    assert all(0 <= x <= 1 for row in recovered for x in row)
    assert sum(recovered[0]) > 3.5, "the teacher is nearly always right from a fifth of a response on"
    assert capsys.readouterr().out.count("means of a quartile") == 4
    with pytest.raises(UserError, match="--recovery-probe"):
        spy(tmp_path / "few", recovery_probe=1, group_size=1)


def test_the_probe_grades_what_was_kept_and_what_the_teacher_added(capsys):
    """With a teacher that ends at once, what is graded is the kept part of each wrong response."""
    engine = HFEngine(load_model("addition-student", torch.device("cpu")), load_tokenizer("addition-student"))
    graded = []

    class Task(Arithmetic):
        def grade(self, example, completion):
            graded.append((example.prompt[-1]["content"], completion, super().grade(example, completion)))
            return graded[-1][-1]

    class Silent(HFEngine):
        def complete(self, contexts, *args):
            return [[self.stop_ids[0]] for _ in contexts], [[0.0] for _ in contexts]

    teacher, config = Silent(engine.model, engine.tokenizer), Config(group_size=4, recovery_probe=8)
    scope_opd.recovery_probe(engine, teacher, Task("addition"), Sampling(1.0, 20), 98, config)
    wrong, rest = [(p, text) for p, text, grade in graded[:32] if not grade], graded[32:]
    assert len(rest) == 4 * len(wrong) > 16
    for kept, part in zip(
        (20, 40, 60, 80), [rest[i : i + len(wrong)] for i in range(0, len(rest), len(wrong))], strict=True
    ):
        lengths = [len(text) + (len(text) < 20) for _, text in wrong]  # a token a character, and the end token
        expected = [(p, text[: n * kept // 100]) for (p, text), n in zip(wrong, lengths, strict=True)]
        assert sorted((p, text) for p, text, _ in part) == sorted(expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.0}, {"tau": 0.0}, {"weighting": "none", "student_weights": "opposite"},
        {"weighting": "none", "teacher_weights": "uniform"}, {"weighting": "none", "tau": 0.5},
        {"routing": "none", "weighting": "none"}, {"routing": "none", "teacher_weights": "opposite"},
        {"routing": "none", "weight_scale": "mean1"}, {"routing": "none", "tau": 2.0},
        {"objective": "repo", "reduction": "token_mean"}, {"kl": "topk", "top_k": 1},
    ],
    ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()),
)  # fmt: skip
def test_combinations_without_meaning_are_refused(flags):
    with pytest.raises(UserError, match="--"):
        check(Config(**flags))
