"""methods/grpo.py against plain loops in float64, written from the equations of the method's sheet."""

import json
import math
import statistics

import pytest
import torch

from posttrain.methods import grpo
from posttrain.methods.grpo import (
    Config,
    clip_fractions,
    group_advantages,
    high_entropy,
    importance_ratio,
    informative_rows,
    kl_token_penalty,
    overlong_penalty,
    policy_token_loss,
    rollout_weights,
    row_weights,
    stale_rows,
)

NAN, INF = math.nan, math.inf
ADVS = ("group_std", "center", "batch_std", "rloo")
AGGS = ("token", "token_group", "seq", "const")
L_MAX = 9
SEEDS = range(8)
# every loss with its ratio; the extremes of eps and cap are those of the papers
LOSSES = {
    "pg": {},
    "clip_higher": {"eps_hi": 0.28},
    "delta": {"delta": 1.5},
    "gspo": {"ratio_level": "seq", "eps_lo": 0.1, "eps_hi": 0.15},
    "gspo_delta": {"ratio_level": "seq", "delta": 1.3},
    "seqsum": {"ratio_level": "seqsum"},
    "cispo": {"loss": "cispo", "cispo_cap": 1.4},
    "sapo": {"loss": "sapo"},
    "reinforce": {"loss": "reinforce"},
}


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def random_batch(seed, n=6, t=7, spread=0.8):
    """logps, old, behaviour, ref, mask with a hole, an empty row and a full one, advantages, group; all float64."""
    g = torch.Generator().manual_seed(seed)
    logps, noise = -3 * torch.rand(n, t, generator=g).double(), torch.randn(3, n, t, generator=g).double()
    old, behaviour, ref = logps + spread * noise
    mask = (torch.arange(t) < torch.randint(1, t, (n, 1), generator=g)).double()
    mask[0], mask[1], mask[2] = 1, 0, f64([0, 1, 0, 1, 1, 0, 0])
    advantages = torch.randn(n, generator=g).double()
    advantages[3] = 0
    return logps, old, behaviour, ref, mask, advantages, torch.tensor([5, 5, 2, 2, 9, 9])


def total_loss(logps, old, mask, advantages, group, config, weights=None):
    ratio = importance_ratio(logps, old, mask, config.ratio_level)
    c = row_weights(mask, group, config.agg, L_MAX)[:, None]
    weights = 1 if weights is None else weights
    return (policy_token_loss(logps, ratio, advantages, config) * weights * mask * c).sum()


def gradient(fn, *args):
    """Value, and gradient for the first argument."""
    x = args[0].clone().requires_grad_()
    value = fn(x, *args[1:])
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


# --- references: loops over rows and tokens


def advantages_by_loop(reward, group, adv, eps, ddof):
    scorable = [r for r in reward if not math.isnan(r)]
    out = []
    for r, g in zip(reward, group, strict=True):
        others = [s for s, h in zip(reward, group, strict=True) if h == g and not math.isnan(s)]
        if math.isnan(r) or len(others) < 2 or len(set(others)) == 1:
            out.append(0.0)
            continue
        centred = r - sum(others) / len(others)
        std = statistics.stdev if ddof else statistics.pstdev
        if adv == "group_std":
            centred /= std(others) + eps
        elif adv == "batch_std":
            centred /= std(scorable) + eps
        elif adv == "rloo":
            centred = r - (sum(others) - r) / (len(others) - 1)
        out.append(centred)
    return out


def loss_and_slope(rho, logp, a, config):
    """l, and its derivative for log rho (pg, sapo) or for logp (cispo, reinforce)."""
    if config.loss == "reinforce":
        return -a * logp, -a
    if config.loss == "cispo":
        return -min(rho, config.cispo_cap) * a * logp, -min(rho, config.cispo_cap) * a
    if config.loss == "sapo":
        tau = 1.0 if a > 0 else 1.05
        sigmoid = 1 / (1 + math.exp(-tau * (rho - 1)))
        return -4 / tau * sigmoid * a, -4 * sigmoid * (1 - sigmoid) * rho * a
    delta = config.delta or INF
    bounded, clipped = min(rho, delta) * a, min(max(rho, 1 - config.eps_lo), 1 + config.eps_hi) * a
    flows = bounded <= clipped and rho < delta
    return -min(bounded, clipped), -rho * a if flows else 0.0


def row_weight_by_loop(mask, group, agg):
    n = [sum(row) for row in mask]
    groups = sorted(set(group))
    if agg == "token":
        return [1 / max(1, sum(n))] * len(n)
    if agg == "seq":
        return [1 / len(n) / max(1, k) for k in n]
    if agg == "const":
        return [1 / (len(n) * L_MAX)] * len(n)
    return [1 / len(groups) / max(1, sum(k for k, h in zip(n, group, strict=True) if h == g)) for g in group]


def loss_by_loop(logps, old, mask, advantages, group, config, weights):
    rows, width = mask.shape
    c = row_weight_by_loop(mask.tolist(), group.tolist(), config.agg)
    loss, grad = 0.0, torch.zeros(rows, width, dtype=torch.float64)
    for i in range(rows):
        valid = [t for t in range(width) if mask[i, t]]
        gaps = {t: float(logps[i, t] - old[i, t]) for t in valid}
        for t in valid:
            if config.ratio_level == "token":
                reach, rho = {t: 1.0}, math.exp(gaps[t])
            else:
                share = 1 / len(valid) if config.ratio_level == "seq" else 1.0
                reach, rho = dict.fromkeys(valid, share), math.exp(share * sum(gaps.values()))
            value, slope = loss_and_slope(rho, float(logps[i, t]), float(advantages[i]), config)
            scale = c[i] * float(weights[i, t])
            loss += scale * value
            for s, share in reach.items():
                grad[i, s] += scale * slope * share
    return loss, grad


# --- advantages


@pytest.mark.parametrize("ddof,eps", [(1, 1e-4), (0, 1e-8), (1, 1e-6)])
@pytest.mark.parametrize("adv", ADVS)
def test_advantages_equal_the_loop(adv, ddof, eps):
    cases = [
        ([1, 0, 0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]),
        ([0.3, -2, 5, 0.1, 0.1, 0.1], [4, 9, 4, 4, 9, 4]),  # interleaved, arbitrary ids
        ([NAN, 1, 0, 2, NAN, NAN, NAN, 3, 3], [0, 0, 0, 0, 1, 1, 2, 2, 2]),
        ([1, 1, 1, 0, 0, 7], [0, 0, 0, 1, 1, 2]),  # all equal; group of one
        ([NAN, NAN], [0, 0]),
        ([2.5], [3]),
    ]
    for reward, group in cases:
        ours = group_advantages(f64(reward), torch.tensor(group), adv, eps, ddof)
        expected = f64(advantages_by_loop(reward, group, adv, eps, ddof))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adv", ADVS)
@pytest.mark.parametrize("value", [0.1, -1.0, 1e-8, 1000.1, 1e7])
def test_all_equal_group_has_advantage_exactly_zero_in_fp32(adv, value):
    reward = torch.cat([torch.full((7,), value), torch.tensor([0.0, 1.0, NAN])])
    group = torch.tensor([0] * 7 + [1] * 3)
    advantages = group_advantages(reward, group, adv)
    assert (advantages[:7] == 0).all() and advantages[9] == 0 and advantages[8] > 0


def test_hand_numbers_of_one_correct_in_four():
    reward, group = f64([1, 0, 0, 0]), torch.zeros(4, dtype=torch.long)
    third = -1 / 3
    for adv, ddof, expected in [
        ("center", 1, [0.75, -0.25, -0.25, -0.25]),
        ("group_std", 1, [1.49970, -0.49990, -0.49990, -0.49990]),
        ("group_std", 0, [1.731651, -0.577217, -0.577217, -0.577217]),
        ("rloo", 1, [1, third, third, third]),
    ]:
        ours = group_advantages(reward, group, adv, 1e-4, ddof)
        torch.testing.assert_close(ours, f64(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adv", ADVS)
def test_advantages_sum_to_zero_ignore_shifts_and_follow_permuted_rows(adv):
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(24, generator=g).double()
    reward[[3, 10, 11]] = NAN
    group = torch.arange(24) // 6
    advantages = group_advantages(reward, group, adv)
    sums = torch.zeros(4).double().index_add(0, group, advantages)
    torch.testing.assert_close(sums, torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(group_advantages(reward + 37, group, adv), advantages, rtol=1e-9, atol=1e-12)
    order = torch.randperm(24, generator=g)
    torch.testing.assert_close(group_advantages(reward[order], group[order], adv), advantages[order])


def test_rloo_is_center_times_g_over_g_minus_one_and_batch_std_divides_by_one_number():
    reward, group = f64([1, 0, 2, 5, 0, 0, 1, 1]), torch.arange(8) // 4
    center = group_advantages(reward, group, "center")
    torch.testing.assert_close(group_advantages(reward, group, "rloo"), center * 4 / 3)
    std = statistics.stdev(reward.tolist())
    torch.testing.assert_close(group_advantages(reward, group, "batch_std"), center / (std + 1e-4))


def test_informative_rows_are_the_whole_first_groups_with_different_rewards():
    reward = torch.tensor([1.0, 1, 0, 1, NAN, 1, 1, 0, NAN, 0.1, 0.2, 0.2])
    group = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4])  # 1 and 4 are informative
    assert informative_rows(reward, group, 5).tolist() == [2, 3, 4, 9, 10, 11]
    assert informative_rows(reward, group, 1).tolist() == [2, 3, 4]
    assert informative_rows(torch.ones(4), torch.tensor([0, 0, 1, 1]), 2).tolist() == []


@pytest.mark.parametrize(
    "length,expected", [(0, 0), (16, 0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1), (21, -1), (99, -1)]
)
def test_overlong_penalty_falls_linearly_to_minus_one_at_the_limit(length, expected):
    assert overlong_penalty(torch.tensor([float(length)]), 20, 4).item() == expected
    assert overlong_penalty(torch.tensor([float(length)]), 20, 0).item() == 0


# --- policy loss


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss_and_gradient_equal_the_loop(name, agg):
    config = Config(agg=agg, **LOSSES[name])
    for seed in SEEDS:
        logps, old, _, _, mask, advantages, group = random_batch(seed)
        weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).double()
        value, grad = gradient(total_loss, logps, old, mask, advantages, group, config, weights)
        expected, slope = loss_by_loop(logps, old, mask, advantages, group, config, weights)
        assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level,low,high", [("token", 0.8, 1.5), ("seq", 0.9, 1.3), ("seqsum", 0.8, 1.5)])
def test_the_random_batches_reach_every_branch_of_the_clip(level, low, high):
    logps, old, _, _, mask, advantages, _ = (torch.cat(x) for x in zip(*map(random_batch, SEEDS), strict=True))
    ratio, a = importance_ratio(logps, old, mask, level).expand_as(mask), advantages[:, None]
    for rows in (a > 0, a < 0):
        assert (rows & (mask > 0) & (ratio < low)).any() and (rows & (mask > 0) & (ratio > high)).any()


def test_hand_numbers_of_the_clipped_loss_in_three_aggregations():
    rho, mask = f64([[1.5, 0.9], [0.5, 1.0]]), f64([[1, 1], [1, 0]])
    advantages, group, old = f64([1, -1]), torch.tensor([0, 0]), torch.zeros(2, 2).double()
    token = policy_token_loss(rho.log(), rho, advantages, Config())
    torch.testing.assert_close(token * mask, f64([[-1.2, -0.9], [0.8, 0]]))
    expected = {"seq": -0.125, "token": -1.3 / 3, "const": -1.3 / 8, "token_group": -1.3 / 3}
    for agg, value in expected.items():
        c = row_weights(mask, group, agg, 4)[:, None]
        assert (token * mask * c).sum().item() == pytest.approx(value, abs=1e-12)
    _, grad = gradient(total_loss, rho.log(), old, mask, advantages, group, Config())
    torch.testing.assert_close(grad, f64([[0, -0.3], [0, 0]]))


def test_hand_numbers_of_two_sided_clipping_which_is_dual_clip():
    old, one, a = torch.zeros(1, 1).double(), f64([[1]]), f64([-1])
    for delta, value, slope in [(0.0, 10, 10), (4.0, 4, 0)]:
        args = (f64([[math.log(10)]]), old, one, a, torch.tensor([0]), Config(delta=delta))
        ours = gradient(total_loss, *args)
        torch.testing.assert_close(ours, (f64(value), f64([[slope]])))
    for rho in (0.3, 0.9, 1.1, 3.9, 4.1, 50.0):  # dual-clip: min(max(-rho A, -clip(rho) A), -c A) where A < 0
        ours = policy_token_loss(f64([[0.0]]), f64([[rho]]), a, Config(delta=4.0)).item()
        assert ours == pytest.approx(min(max(rho, min(max(rho, 0.8), 1.2)), 4.0))
        plus = policy_token_loss(f64([[0.0]]), f64([[rho]]), -a, Config(delta=4.0)).item()
        assert plus == pytest.approx(-min(rho, 1.2)), "delta must not act where A > 0"


def test_hand_numbers_of_the_gspo_ratio_and_its_gradient():
    logps, old, mask = f64([[0.1, -0.05, 9.0]]), torch.zeros(1, 3).double(), f64([[1, 1, 0]])
    ratio, grad = gradient(importance_ratio, logps, old, mask, "seq")
    assert ratio.item() == pytest.approx(1.025315, abs=1e-6)
    torch.testing.assert_close(grad, ratio * f64([[0.5, 0.5, 0]]))
    assert importance_ratio(logps, old, mask, "seqsum").item() == pytest.approx(math.exp(0.05))


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_gradient_is_minus_advantage_times_mask_over_the_normaliser(name, agg):
    config = Config(agg=agg, **LOSSES[name])
    logps, _, _, _, mask, advantages, group = random_batch(1)
    _, grad = gradient(total_loss, logps, logps.clone(), mask, advantages, group, config)
    c = row_weights(mask, group, agg, L_MAX)[:, None]
    expected = -advantages[:, None] * mask * c
    if config.ratio_level == "seqsum":  # every one of the n_i equal token terms has the whole sum's gradient
        expected = expected * mask.sum(1, keepdim=True)
    torch.testing.assert_close(grad, expected)
    ratio = importance_ratio(logps, logps, mask, config.ratio_level)
    assert not any(clipped.any() for clipped in clip_fractions(ratio, advantages, config).values())


def test_on_policy_loss_with_seq_aggregation_is_zero_though_its_gradient_is_not():
    logps, _, _, _, mask, _, group = random_batch(2)
    mask[1, :3] = 1
    advantages = group_advantages(f64([1, 0, 0, 1, 1, 0]), group, "group_std")
    value, grad = gradient(total_loss, logps, logps.clone(), mask, advantages, group, Config(agg="seq"))
    assert abs(value.item()) < 1e-12 and grad.abs().max() > 0.01


def test_without_clip_it_is_importance_weighted_reinforce():
    logps, old, _, _, mask, advantages, group = random_batch(3)
    config = Config(eps_lo=1e9, eps_hi=1e9)
    value, grad = gradient(total_loss, logps, old, mask, advantages, group, config)
    weighted = -(logps - old).exp() * advantages[:, None] * mask / mask.sum()
    torch.testing.assert_close((value, grad), (weighted.sum(), weighted))


def test_aggregations_agree_where_they_must():
    g = torch.Generator().manual_seed(0)
    equal, ragged, group = torch.ones(6, 5).double(), random_batch(0)[4], torch.arange(6) // 2
    c = {agg: row_weights(equal, group, agg, L_MAX) for agg in AGGS}
    torch.testing.assert_close(c["seq"], c["token"])
    torch.testing.assert_close(c["token_group"], c["token"])
    ratio = ragged.sum() / (6 * L_MAX)
    torch.testing.assert_close(
        row_weights(ragged, group, "const", L_MAX), row_weights(ragged, group, "token", 1) * ratio
    )
    order = torch.randperm(6, generator=g)
    for agg in AGGS:
        c = row_weights(ragged, group, agg, L_MAX)
        torch.testing.assert_close(row_weights(ragged[order], group[order], agg, L_MAX), c[order])
    # DAPO's paper: every prompt weighs the same, whatever the lengths of its responses
    shares = torch.zeros(3).double().index_add(0, group, row_weights(ragged, group, "token_group", 1) * ragged.sum(1))
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("name", LOSSES)
def test_garbage_in_padding_wider_padding_and_permuted_rows_change_nothing(name, agg):
    config = Config(agg=agg, **LOSSES[name])
    logps, old, _, _, mask, advantages, group = random_batch(5)
    value, grad = gradient(total_loss, logps, old, mask, advantages, group, config)
    masked = 1 - mask
    dirty = [torch.where(mask > 0, x, y) for x, y in ((logps, -600.0), (old, 90.0))]
    dirty_value, dirty_grad = gradient(total_loss, *dirty, mask, advantages, group, config)
    torch.testing.assert_close((dirty_value, dirty_grad), (value, grad))
    assert not (dirty_grad * masked).any()
    wide = [torch.nn.functional.pad(x, (0, 4)) for x in (logps, old, mask)]
    torch.testing.assert_close(total_loss(*wide, advantages, group, config), value)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    mixed = total_loss(logps[order], old[order], mask[order], advantages[order], group[order], config)
    torch.testing.assert_close(mixed, value)


@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("split", [[1] * 6, [5, 1], [2, 4]])
def test_micro_batches_add_up_to_the_whole_batch(agg, split):
    logps, old, _, _, mask, advantages, group = random_batch(4)
    config = Config(agg=agg, ratio_level="seq", eps_lo=0.1)
    value, grad = gradient(total_loss, logps, old, mask, advantages, group, config)
    c = row_weights(mask, group, agg, L_MAX)[:, None]  # of the whole batch
    x, parts = logps.clone().requires_grad_(), 0.0
    for rows in torch.arange(6).split(split):
        ratio = importance_ratio(x[rows], old[rows], mask[rows], "seq")
        part = (policy_token_loss(x[rows], ratio, advantages[rows], config) * mask[rows] * c[rows]).sum()
        part.backward()
        parts += part.item()
    assert parts == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_fully_masked_batch_gives_a_zero_loss_with_a_graph(name):
    logps, old, _, _, mask, advantages, group = random_batch(6)
    for agg in AGGS:
        config = Config(agg=agg, **LOSSES[name])
        value, grad = gradient(total_loss, logps, old, mask * 0, advantages, group, config)
        assert value == 0 and not grad.any()


def test_calls_leave_their_inputs_as_they_were_and_weights_carry_no_gradient():
    inputs = random_batch(7)
    inputs[0].requires_grad_()
    before = [x.detach().clone() for x in inputs]
    logps, old, behaviour, ref, mask, advantages, group = inputs
    for overrides in LOSSES.values():
        config = Config(**overrides)
        total_loss(logps, old, mask, advantages, group, config)
        kl_token_penalty(logps, ref, importance_ratio(logps, old, mask, config.ratio_level), "k3_is")
    for adv in ADVS:
        group_advantages(advantages, group, adv)
    for tis in ("token_truncate", "token_mask", "seq_truncate", "seq_mask"):
        assert not rollout_weights(logps, behaviour, mask, tis, 0.0, 2.0).requires_grad
    assert not stale_rows(logps, behaviour, mask, advantages, 0.1).requires_grad
    assert not high_entropy(-logps, mask, 0.5).requires_grad
    informative_rows(advantages, group, 2)
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y)


def test_cispo_ratio_carries_no_gradient_and_has_no_lower_bound():
    logps, old, a = f64([[-1.0, -2.0, -3.0]]), f64([[-9.0, -2.0, -0.5]]), f64([-2.0])  # rho e^8, 1, e^-2.5
    config = Config(loss="cispo", cispo_cap=5.0)
    _, grad = gradient(total_loss, logps, old, torch.ones(1, 3).double(), a, torch.tensor([0]), config)
    torch.testing.assert_close(grad, 2 / 3 * f64([[5.0, 1.0, math.exp(-2.5)]]))


# --- KL


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3_is"])
def test_kl_penalties_and_gradients_equal_the_closed_forms(kl):
    logps, old, _, ref, mask, _, _ = random_batch(8)
    ref = ref.clone()
    ref[0, 0], ref[0, 1] = logps[0, 0] + 30, logps[0, 1] - 30  # beyond the clamp: constant, no gradient of d
    ref[0, 2] = -INF
    value, grad = gradient(lambda x: kl_token_penalty(x, ref, (x - old).exp(), kl), logps)
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            exact, rho = float(ref[i, t] - logps[i, t]), math.exp(logps[i, t] - old[i, t])
            d, inside = min(max(exact, -20), 20), float(abs(exact) < 20)
            k3, slope = math.exp(d) - d - 1, inside * (1 - math.exp(d))
            expected = {
                "k1": (-d, inside),
                "k2": (d * d / 2, -d * inside),
                "k3": (k3, slope),
                "k3_is": (rho * k3, rho * (k3 + slope)),
            }[kl]
            assert (value[i, t].item(), grad[i, t].item()) == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_hand_numbers_of_k3_and_its_on_policy_weighted_form():
    logp, ref = f64([[-1.0]]), f64([[-2.0]])
    value, grad = gradient(lambda x: kl_token_penalty(x, ref, (x - x.detach()).exp(), "k3"), logp)
    assert (value.item(), grad.item()) == pytest.approx((0.367879, 0.632121), abs=1e-6)
    value, grad = gradient(lambda x: kl_token_penalty(x, ref, (x - x.detach()).exp(), "k3_is"), logp)
    assert (value.item(), grad.item()) == pytest.approx((0.367879, 1.0), abs=1e-6)


@pytest.mark.parametrize("kl,direction", [("k1", "none"), ("k2", "reverse"), ("k3", "forward"), ("k3_is", "reverse")])
def test_expected_kl_gradient_over_the_vocabulary_has_the_documented_direction(kl, direction):
    logits, ref_logits = f64([0.3, -1.0, 0.8, 0.1]), f64([1.0, 0.2, -0.5, 0.0])

    def expected(z):  # sum over tokens of p(token) grad k(token): p outside the gradient
        logps, ref = z.log_softmax(-1)[:, None], ref_logits.log_softmax(-1)[:, None]
        return (logps.exp().detach() * kl_token_penalty(logps, ref, (logps - logps.detach()).exp(), kl)).sum()

    def exact(z):
        p, q = z.log_softmax(-1), ref_logits.log_softmax(-1)
        return {"none": p.sum() * 0, "reverse": (p.exp() * (p - q)).sum(), "forward": (q.exp() * (q - p)).sum()}[
            direction
        ]

    torch.testing.assert_close(gradient(expected, logits)[1], gradient(exact, logits)[1], rtol=1e-9, atol=1e-12)


def test_sequence_ratio_weighs_the_whole_row_in_k3_is():
    logps, old, _, ref, mask, _, _ = random_batch(9)
    ratio = importance_ratio(logps, old, mask, "seq")
    weighted = kl_token_penalty(logps, ref, ratio, "k3_is")
    torch.testing.assert_close(weighted, ratio.expand_as(mask) * kl_token_penalty(logps, ref, ratio, "k3"))


# --- rollout correction, stale rows, entropy


@pytest.mark.parametrize("low,high", [(0.0, 2.0), (0.5, 1.3)])
@pytest.mark.parametrize("tis", ["off", "bypass", "token_truncate", "token_mask", "seq_truncate", "seq_mask"])
def test_rollout_weights_equal_the_loop(tis, low, high):
    _, old, behaviour, _, mask, _, _ = random_batch(10)
    behaviour = behaviour.clone()
    behaviour[0, :3] = f64([NAN, -INF, INF])  # an engine that reports nonsense: w = 1 there, 0 in the sum
    behaviour[mask == 0] = -77.0
    ours = rollout_weights(old, behaviour, mask, tis, low, high).expand_as(mask)
    for i in range(mask.shape[0]):
        gap = [
            float(old[i, t] - behaviour[i, t]) if mask[i, t] and math.isfinite(behaviour[i, t]) else 0.0
            for t in range(mask.shape[1])
        ]
        for t in range(mask.shape[1]):
            w = math.exp(sum(gap) if tis.startswith("seq") else gap[t])
            if tis.endswith("truncate"):
                w = min(max(w, low), high)
            elif tis.endswith("mask"):
                w = w if low <= w <= high else 0.0
            else:
                w = 1.0
            if mask[i, t]:
                assert ours[i, t].item() == pytest.approx(w, rel=1e-12)


def test_hand_numbers_of_rollout_weights():
    old, behaviour, mask = f64([[-0.5, -2.0, 0.0]]), f64([[-1.0, -1.0, 0.0]]), torch.ones(1, 3).double()
    token = rollout_weights(old, behaviour, mask, "token_truncate", 0.0, 9.0)
    torch.testing.assert_close(token, f64([[1.6487213, 0.3678794, 1.0]]), rtol=0, atol=1e-6)
    assert rollout_weights(old, behaviour, mask, "seq_truncate", 0.0, 9.0).item() == pytest.approx(0.6065307)
    assert rollout_weights(old, behaviour, mask, "token_truncate", 0.5, 1.5).tolist() == [[1.5, 0.5, 1.0]]
    assert rollout_weights(old, behaviour, mask, "token_mask", 0.0, 1.5)[0, 0] == 0


def test_huge_engine_gaps_stay_finite_in_fp32():
    old, behaviour = torch.tensor([[-1.0, -500.0]]), torch.tensor([[-900.0, -0.1]])
    for tis in ("token_truncate", "token_mask", "seq_truncate", "seq_mask"):
        w = rollout_weights(old, behaviour, torch.ones(1, 2), tis, 0.0, 3.0)
        assert w.isfinite().all() and w.max() <= 3 and w.min() >= 0


def test_stale_rows_are_those_with_negative_advantage_and_a_large_mean_gap():
    behaviour = f64([[-1, -1, 50], [-1, -1, 0], [-1, -1, 0], [0, 0, 0]])
    logps = f64([[-2, -1.2, 0], [-1.8, -1.4, 0], [-2, -1.2, 0], [-9, -9, -9]])  # mean gaps .6, .6, .6 (1 token: 1)
    mask = f64([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    a = f64([-1, 1, -1, -1])
    assert stale_rows(logps, behaviour, mask, a, 0.5).tolist() == [True, False, True, False]
    assert stale_rows(logps, behaviour, mask, a, 0.7).tolist() == [False, False, True, False]


@pytest.mark.parametrize("top", [1.0, 0.9, 0.5, 0.2, 0.05])
def test_high_entropy_keeps_tokens_above_the_interpolated_quantile_of_valid_tokens(top):
    for seed in range(5):
        mask, entropy = random_batch(seed)[4], -random_batch(seed + 50)[0]
        entropy = torch.where(mask > 0, entropy, 1e6)  # garbage in padding must not move the quantile
        valid = sorted(entropy[mask > 0].tolist())
        place = (1 - top) * (len(valid) - 1)
        low = math.floor(place)
        bound = valid[low] + (place - low) * (valid[min(low + 1, len(valid) - 1)] - valid[low])
        kept = high_entropy(entropy, mask, top) * mask
        expected = (entropy >= bound - 1e-12).double() * mask if top < 1 else mask
        assert torch.equal(kept, expected)
    assert torch.equal(high_entropy(entropy, mask * 0, top), torch.ones_like(mask))


@pytest.mark.parametrize("level", ["token", "seq"])
def test_clip_fractions_count_only_the_side_that_clips(level):
    logps, old, _, _, mask, a, _ = random_batch(11)
    ratio = importance_ratio(logps, old, mask, level)
    clipped = clip_fractions(ratio, a, Config(ratio_level=level, eps_lo=0.1, eps_hi=0.3))
    for i, row in enumerate(ratio.tolist()):
        for t, rho in enumerate(row):
            assert clipped["policy/clip_low"][i, t] == float(a[i] < 0 and rho < 0.9)
            assert clipped["policy/clip_high"][i, t] == float(a[i] > 0 and rho > 1.3)


def test_prompts_read_once_give_the_same_step(tmp_path):
    """Two minibatches, so that old log-probs are scored, and a reference."""
    small = {
        "steps": 1,
        "prompts_per_step": 4,
        "group_size": 4,
        "beta": 0.1,
        "minibatches": 2,
        "micro_batch_tokens": 90,
    }
    small |= {"eval_every": 0, "eval_problems": 1, "eval_samples": 1, "warmup": 0}
    lines = []
    for share in (False, True):
        folder = tmp_path / str(share)
        grpo.main(Config(**small, share_prompts=share, out=str(folder)))
        lines.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
    for key in ("loss/total", "loss/kl", "optim/grad_norm", "train/entropy", "engine/logp_gap", "policy/kl_old"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-3, abs=1e-5), key
    assert lines[0]["optim/grad_norm"] > 1e-3
