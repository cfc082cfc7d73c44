"""methods/sod.py against plain loops in float64, from the equations of the sheet; the loop itself against models.

A batch holds rows of every kind: turns with and without observations between them, a turn that lost its tokens, a row
that has none, garbage where nobody sampled, a reward that could not be scored.
"""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from posttrain.common.cli import UserError
from posttrain.common.environments.episodes import Episode, Turn
from posttrain.common.models import TINY
from posttrain.common.rollout import assemble
from posttrain.methods import grpo, sod
from posttrain.methods.sod import (
    Config,
    calls,
    check,
    gate,
    group_advantages,
    policy_token_loss,
    row_weights,
    shaped_reward,
    step_divergence,
    step_metrics,
    step_weights,
    token_advantages,
)

NAN = math.nan


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def random_batch(seed=0, prompts=4, group_size=5, t=24, drift=0.0):
    """logps, old, teacher [N, T] with garbage off the mask, mask, turn, failed [N, K], reward, group."""
    g = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=g))

    n = prompts * group_size
    turn = torch.full((n, t), -1)
    failed = torch.zeros(n, 5, dtype=torch.bool)
    for i in range(n):
        at, last = number(1, 3), number(0, 4)
        for k in range(last + 1):
            if (i, k) in ((1, 1), (2, 0)) or i == 3:  # a turn without tokens; a row without any
                continue
            tokens = number(1, 3)
            turn[i, at : at + tokens] = k
            at += tokens + number(0, 1)  # without an observation two turns touch
            failed[i, k] = k < last and number(0, 2) == 0
    turn[1, 15:18], turn[2, 15:18] = 3, 4  # turns behind the one that is missing
    mask = (turn >= 0).double()
    old, teacher = -3 * torch.rand(2, n, t, generator=g).double()
    logps = old + drift * torch.randn(n, t, generator=g).double()
    reward = (torch.rand(n, generator=g) < 0.5).double()
    reward[:group_size], reward[-group_size:], reward[-group_size - 1] = 0, 1, NAN
    group = torch.arange(prompts).repeat_interleave(group_size)
    return SimpleNamespace(
        logps=logps, old=old, teacher=teacher, mask=mask, turn=turn, failed=failed, reward=reward, group=group
    )


def signal_of(b, config):
    """The heading weigh of main: advantages [N], d, w [N, K], weights, Adv [N, T]."""
    turns = (b.turn.amax(1) + 1).to(b.reward)
    outcome = shaped_reward(b.reward, turns) if config.tool_bonus else b.reward
    advantages = group_advantages(outcome, b.group, config.adv_eps, config.adv_ddof)
    d, there = step_divergence(b.old, b.teacher, b.turn)
    w = step_weights(d, there, b.failed[:, : d.shape[1]], config)
    gated = config.weighting == "gated"
    weights = b.mask * (gate(advantages, config) if gated else w.gather(1, b.turn.clamp(min=0)))
    return advantages, d, w, weights, token_advantages(advantages, weights, b.old, b.teacher, b.mask, config)


def loss_of(logps, b, config):
    """The heading update of main, the whole batch as one mini-batch."""
    signal = signal_of(b, config)[-1]
    return (
        policy_token_loss(logps, b.old, signal, config)[0] * b.mask * row_weights(b.mask, config.loss_agg)[:, None]
    ).sum()


def gradient(fn, x):
    x = x.clone().requires_grad_()
    value = fn(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def advantages_by_loop(reward, group, eps, ddof):
    """Eq. 5.1; NaN is left out of its group's statistics."""
    out = []
    for r, x in zip(reward, group, strict=True):
        rs = [s for s, y in zip(reward, group, strict=True) if y == x and not math.isnan(s)]
        mean = sum(rs) / len(rs)
        std = math.sqrt(sum((s - mean) ** 2 for s in rs) / (len(rs) - ddof))
        out.append(0.0 if math.isnan(r) else (r - mean) / (std + eps))
    return out


def weights_by_loop(d: list[float], failed: list[bool], config) -> list[float]:
    """Eq. 5.3, the product as the paper writes it, and section 7, for the turns that have tokens."""
    eps, w = config.d_floor or config.eps, [1.0] * len(d)
    for k in range(len(d)):
        if config.weighting in ("sod", "unclipped") and k:
            product = 1.0
            for u in range(k):
                product *= (d[u] + eps) / (d[u + 1] + eps)
            if config.ref_step == "mean":
                product = (sum(d[:k]) / k + eps) / (d[k] + eps)
            w[k] = product if config.weighting == "unclipped" else min(product, 1 + config.delta)
        if config.weighting == "heuristic" and any(failed[: k + 1]):
            w[k] = 0.9 ** (k - failed.index(True))
        if config.weighting == "mask_after_error" and any(failed[:k]):
            w[k] = 0.0
    return w


def reference(b, config):
    """Value, gradient [N, T], Adv [N, T] and w of each row's turns, from sections 5 to 8 of the sheet."""
    n, t = b.mask.shape
    tokens = [[j for j in range(t) if b.turn[i, j] >= 0] for i in range(n)]
    reward = b.reward.tolist()
    if config.tool_bonus:
        models = [max([int(k) + 1 for k in row]) for row in b.turn]
        num_turns = [m + (m - 1) + 1 for m in models]
        shaped = [min(-0.6, -1 + 0.1 * (x - 2) / 2) for x in num_turns]
        reward = [r if r == 1 or math.isnan(r) else s for r, s in zip(reward, shaped, strict=True)]
    a = advantages_by_loop(reward, b.group.tolist(), config.adv_eps, config.adv_ddof)
    value, grad, adv, ws = 0.0, torch.zeros(n, t).double(), torch.zeros(n, t).double(), []
    for i in range(n):
        ks = sorted({int(b.turn[i, j]) for j in tokens[i]})
        gap = {j: (b.old[i, j] - b.teacher[i, j]).item() for j in tokens[i]}
        parts = [[abs(gap[j]) for j in tokens[i] if b.turn[i, j] == k] for k in ks]
        w = weights_by_loop([sum(x) / len(x) for x in parts], [bool(b.failed[i, k]) for k in ks], config)
        ws.append(w)
        beta = config.beta_min + (config.beta_max - config.beta_min) / (1 + math.exp(config.gate_gamma * a[i]))
        for j in tokens[i]:
            weight = beta if config.weighting == "gated" else w[ks.index(int(b.turn[i, j]))]
            signal = -gap[j]
            if config.opd_clip:
                signal = min(config.opd_clip, max(-config.opd_clip, signal))
            x = adv[i, j] = config.adv_grpo * a[i] + config.coef * weight * signal
            log_ratio = (b.logps[i, j] - b.old[i, j]).item()
            r = math.exp(min(20.0, max(-20.0, log_ratio)))
            slope = r if abs(log_ratio) < 20 else 0.0
            low, high = 1 - config.clip_low, 1 + config.clip_high
            inside = low <= r <= high
            loss, dloss = max((-x * r, -x * slope), (-x * min(high, max(low, r)), -x * slope * inside))
            if x < 0 and config.dual_clip and -config.dual_clip * x < loss:
                loss, dloss = -config.dual_clip * x, 0.0
            c = 1 / sum(map(len, tokens)) if config.loss_agg == "token" else 1 / (n * len(tokens[i]))
            value, grad[i, j] = value + c * loss, c * dloss
    return float(value), grad, adv, ws


FLAGS = [
    {}, {"weighting": "unclipped"}, {"weighting": "uniform"}, {"weighting": "heuristic"},
    {"weighting": "mask_after_error"}, {"weighting": "gated"}, {"d_floor": 0.05}, {"opd_clip": 0.4},
    {"weighting": "gated", "gate_gamma": 2.5, "beta_min": 0.02, "beta_max": 0.7}, {"delta": 0.5}, {"delta": 0.0},
    {"ref_step": "mean"}, {"ref_step": "mean", "weighting": "unclipped", "d_floor": 0.3}, {"eps": 0.1},
    {"loss_agg": "seq"}, {"loss_agg": "seq", "weighting": "gated"}, {"tool_bonus": True}, {"coef": 0.4},
    {"coef": 0.0}, {"adv_grpo": 0.0}, {"adv_grpo": 0.5, "coef": 2.0}, {"adv_eps": 0.3, "adv_ddof": 0},
    {"clip_low": 0.1, "clip_high": 0.5}, {"dual_clip": 0.0}, {"dual_clip": 1.5}, {"opd_clip": 0.2, "coef": 3.0},
]  # fmt: skip


def named(flags):
    return ",".join(f"{k}={v}" for k, v in flags.items()) or "default"


@pytest.mark.parametrize("flags", FLAGS, ids=named)
def test_weights_advantages_loss_and_gradient_equal_the_loop(flags):
    config = Config(**flags)
    check(config)
    for seed, drift in ((0, 0.0), (1, 0.3), (2, 1.5), (3, 12.0)):
        b = random_batch(seed, drift=drift)
        value, grad = gradient(lambda x, b=b: loss_of(x, b, config), b.logps)
        expected, slope, adv, ws = reference(b, config)
        _, _, w, _, signal = signal_of(b, config)
        torch.testing.assert_close(signal, adv, rtol=1e-10, atol=1e-13)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-14)
        for i, row in enumerate(ws):
            ks = b.turn[i].unique()
            assert w[i, ks[ks >= 0]].tolist() == pytest.approx(row, rel=1e-10)
        assert grad.any()


# --- the sheet's invariants, section 9


def test_1_without_the_coefficient_or_with_the_student_as_teacher_the_advantage_is_grpos_bit_for_bit():
    b = random_batch(4)
    plain = grpo.group_advantages(b.reward, b.group, "group_std", eps=1e-6, ddof=1)
    for weighting in ("sod", "unclipped", "uniform", "heuristic", "mask_after_error", "gated"):
        assert torch.equal(signal_of(b, Config(coef=0, weighting=weighting))[-1], b.mask * plain[:, None])
    b.teacher = b.old.clone()
    for flags in ({}, {"weighting": "unclipped"}, {"d_floor": 0.05}, {"ref_step": "mean"}):
        _, d, w, weights, signal = signal_of(b, Config(**flags))
        assert torch.equal(signal, b.mask * plain[:, None]) and not d.any()
        assert torch.equal(w, torch.ones_like(w)) and torch.equal(weights, b.mask)
    assert (Config().adv_eps, Config().adv_ddof) == (1e-6, 1)


def test_1_the_loss_of_a_single_update_is_then_grpos():
    b = random_batch(5, drift=0.2)
    config = Config(coef=0, dual_clip=0)
    theirs = grpo.Config(eps_lo=0.2, eps_hi=0.28)
    a = grpo.group_advantages(b.reward, b.group, "group_std", eps=1e-6, ddof=1)
    c = grpo.row_weights(b.mask, b.group, "token", 24)[:, None]

    def plain(x):
        return (grpo.policy_token_loss(x, (x - b.old).exp(), a, theirs) * b.mask * c).sum()

    for x, y in zip(gradient(lambda x: loss_of(x, b, config), b.logps), gradient(plain, b.logps), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-14)


def test_2_weights_lie_above_0_and_at_most_at_the_cap_and_begin_with_1():
    for seed, delta in itertools.product(range(5), (0.0, 0.2, 0.5)):
        b = random_batch(seed)
        w, there = signal_of(b, Config(delta=delta))[2], step_divergence(b.old, b.teacher, b.turn)[1]
        assert (w[there] > 0).all() and (w[there] <= 1 + delta).all() and (w[there] == 1 + delta).any()
        first = there.double().argmax(1)[there.any(1)]
        assert (w[there.any(1)].gather(1, first[:, None]) == 1).all()
        assert first.max() > 0, "a row whose first turn lost its tokens"


def test_2_scaling_every_log_ratio_hardly_changes_the_weights():
    b = random_batch(6)
    for weighting, ref_step in itertools.product(("sod", "unclipped"), ("first", "mean")):
        config = Config(weighting=weighting, ref_step=ref_step)
        w = signal_of(b, config)[2]
        there = step_divergence(b.old, b.teacher, b.turn)[1]
        for c in (0.5, 3.0, 40.0):
            moved = SimpleNamespace(**{**vars(b), "teacher": b.old + c * (b.teacher - b.old)})
            torch.testing.assert_close(signal_of(moved, config)[2][there], w[there], rtol=1e-4, atol=0)


def test_3_no_turn_speaks_louder_than_the_first():
    for seed in range(5):
        b = random_batch(seed)
        _, d, w, _, _ = signal_of(b, Config(delta=100.0))
        there = step_divergence(b.old, b.teacher, b.turn)[1]
        first = d.gather(1, there.double().argmax(1, keepdim=True))
        assert (torch.where(there, w * d, 0) <= first + 1e-6 + 1e-12).all()


@pytest.mark.parametrize("flags", [{}, {"weighting": "gated"}, {"loss_agg": "seq", "ref_step": "mean"}], ids=named)
def test_4_what_nobody_sampled_changes_neither_value_nor_gradient(flags):
    b, config = random_batch(7, drift=0.3), Config(**flags)
    before = gradient(lambda x: loss_of(x, b, config), b.logps)
    for garbage in (1e4, -1e4, 0.0):
        other = SimpleNamespace(**vars(b))
        for name in ("logps", "old", "teacher"):
            noise = garbage * torch.rand(b.mask.shape, generator=torch.Generator().manual_seed(len(name))).double()
            setattr(other, name, torch.where(b.mask > 0, getattr(b, name), noise))
        after = gradient(lambda x, o=other: loss_of(x, o, config), other.logps)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert not after[1][b.mask == 0].any()


def test_4_a_score_that_is_not_finite_where_nobody_sampled_stays_out():
    b = random_batch(7)
    expected = signal_of(b, Config())[-1]
    for bad in (NAN, math.inf, -math.inf):
        b.teacher = torch.where(b.mask > 0, b.teacher, bad)
        assert torch.equal(signal_of(b, Config())[-1], expected)


def test_5_gradient_in_the_logits_of_the_first_mini_batch():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 6, 4, generator=g).double()
    ids = torch.randint(0, 4, (2, 6), generator=g)
    b = random_batch(8)
    b.turn = torch.tensor([[-1, 0, 0, -1, 1, -1], [-1, 0, -1, 1, 1, 2]])
    b.mask, b.failed, b.reward = (b.turn >= 0).double(), torch.zeros(2, 3, dtype=torch.bool), f64([0, 1])
    b.group = torch.zeros(2)
    b.old = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    b.teacher = b.teacher[:2, :6]

    def loss(z):
        return loss_of(z.log_softmax(-1).gather(-1, ids[..., None])[..., 0], b, Config())

    b.logps = b.old
    adv = reference(b, Config())[2]
    hot = torch.nn.functional.one_hot(ids, 4)
    expected = -(adv / b.mask.sum() * b.mask)[..., None] * (hot - z.softmax(-1))
    torch.testing.assert_close(gradient(loss, z)[1], expected, rtol=1e-7, atol=1e-12)


def test_6_hand_case_the_cap_is_on_the_result_and_not_inside_the_product():
    d, there = f64([[1, 0.2, 0.5, 2]]), torch.ones(1, 4, dtype=torch.bool)
    none = ~there
    assert step_weights(d, there, none, Config())[0].tolist() == pytest.approx([1, 1.2, 1.2, 0.5], abs=1e-5)
    unclipped = step_weights(d, there, none, Config(weighting="unclipped"))[0].tolist()
    assert unclipped == pytest.approx([1, 5, 2, 0.5], abs=1e-4)
    mean = step_weights(d, there, none, Config(ref_step="mean", weighting="unclipped"))[0].tolist()
    assert mean == pytest.approx([1, 5, 0.6 / 0.5, (1.7 / 3) / 2], abs=1e-4)
    floor = step_weights(f64([[0.0, 0.2, 2.0]]), there[:, :3], none[:, :3], Config(d_floor=0.05))[0].tolist()
    assert floor == pytest.approx([1, 0.05 / 0.25, 0.05 / 2.05])


def test_6_hand_case_of_the_weights_by_failure():
    """Turn 2 of 5 fails first, turn 4 again; the other row never fails."""
    d, there = torch.ones(2, 5).double(), torch.ones(2, 5, dtype=torch.bool)
    failed = torch.tensor([[False, True, False, True, False], [False] * 5])
    ours = step_weights(d, there, failed, Config(weighting="heuristic"))
    torch.testing.assert_close(ours, f64([[1, 1, 0.9, 0.81, 0.729], [1] * 5]))
    assert step_weights(d, there, failed, Config(weighting="mask_after_error")).tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert step_weights(d, there, failed, Config(weighting="uniform")).tolist() == [[1] * 5] * 2


def test_7_hand_case_of_the_clipped_loss():
    logps, adv = f64([[2, 2, 4, 0.5]]).log(), f64([[1, -1, -1, 1]])
    old, mask = torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    loss, ratio = policy_token_loss(logps, old, adv, Config())
    assert loss[0].tolist() == pytest.approx([-1.28, 2, 3, -0.5]) and ratio[0].tolist() == pytest.approx([2, 2, 4, 0.5])

    def total(x):
        return (policy_token_loss(x, old, adv, Config())[0] * row_weights(mask, "token")[:, None]).sum()

    value, grad = gradient(total, logps)
    assert value.item() == pytest.approx(0.805) and grad[0].tolist() == pytest.approx([0, 0.5, 0, -0.125])
    free = policy_token_loss(logps, old, adv, Config(dual_clip=0))[0][0].tolist()
    assert free == pytest.approx([-1.28, 2, 4, -0.5])


def test_8_the_mean_gradient_over_samples_is_that_of_the_reverse_divergence():
    z, teacher = f64([0.3, -1.0, 0.8, 0.1]), f64([1.0, 0.2, -0.5, 0.0]).log_softmax(-1)
    p = z.softmax(-1)
    gap = p.log() - teacher
    exact = p * (gap - (p * gap).sum())  # p (l - KL)
    config, n = Config(adv_grpo=0), 2**16
    samples = p.multinomial(n, replacement=True, generator=torch.Generator().manual_seed(0))

    def loss(z, ids):
        logps = z.log_softmax(-1)[ids][:, None]
        ones = torch.ones_like(logps)
        signal = token_advantages(ones[:, 0], ones, logps.detach(), teacher[ids][:, None], ones, config)
        return policy_token_loss(logps, logps.detach(), signal, config)[0] * row_weights(ones, "token")[:, None]

    found = gradient(lambda z: loss(z, samples), z)[1]
    each = torch.stack([gradient(lambda z, y=y: loss(z, torch.tensor([y])), z)[1] for y in range(4)])  # [token, logit]
    torch.testing.assert_close((p[:, None] * each).sum(0), exact, rtol=1e-6, atol=1e-12)
    error = ((p[:, None] * each**2).sum(0) - exact**2).sqrt() / math.sqrt(n)
    assert ((found - exact).abs() < 5 * error).all() and (exact.abs() > 20 * error).any()
    assert ((found + exact).abs() > 20 * error).any(), "the sign would show"


# --- edge cases, section 8


def test_a_single_turn_has_weight_1_and_equals_uniform_weights():
    b = random_batch(9)
    b.turn = torch.where(b.turn >= 0, 0, -1)
    for flags in ({}, {"weighting": "unclipped"}, {"ref_step": "mean"}, {"d_floor": 0.3}):
        ours, uniform = signal_of(b, Config(**flags)), signal_of(b, Config(weighting="uniform"))
        assert torch.equal(ours[-1], uniform[-1]) and (ours[2] == 1).all() and ours[-1].any()


def test_a_first_turn_on_which_both_agree_silences_the_others_unless_the_floor_holds_them():
    b = random_batch(10)
    b.teacher = torch.where(b.turn == 0, b.old, b.teacher)
    later = b.turn >= 1
    later[2:3] = False  # its first turn is another
    later &= (b.turn == 0).any(1, keepdim=True)
    assert signal_of(b, Config())[3][later].max() < 1e-4
    assert signal_of(b, Config(d_floor=0.05))[3][later].min() > 0.01


def test_a_group_of_equal_rewards_still_distils():
    b = random_batch(11)
    for value in (0.0, 1.0, 0.1):  # 0.1 five times has a mean that rounds
        b.reward[:] = value
        advantages, _, _, weights, signal = signal_of(b, Config())
        assert not advantages.any()
        torch.testing.assert_close(signal, weights * (b.teacher - b.old))


def test_a_row_without_tokens_and_a_batch_without_any_contribute_nothing():
    b = random_batch(12)
    assert not b.mask[3].any()
    for flags in ({}, {"loss_agg": "seq"}, {"weighting": "gated"}, {"ref_step": "mean"}):
        grad = gradient(lambda x, f=flags: loss_of(x, b, Config(**f)), b.logps)[1]
        assert grad.isfinite().all() and not grad[3].any()
    b.turn[:], b.mask = -1, b.mask * 0
    for flags in ({}, {"loss_agg": "seq"}, {"weighting": "gated"}):
        value, grad = gradient(lambda x, f=flags: loss_of(x, b, Config(**f)), b.logps)
        assert value == 0 and not grad.any() and grad.isfinite().all()


def test_a_turn_that_lost_its_tokens_drops_out_of_the_sequence_of_turns():
    b = random_batch(13)
    i = 1
    assert b.turn[i].unique().tolist()[:3] == [-1, 0, 2] or 1 not in b.turn[i]
    closed = SimpleNamespace(**{**vars(b), "turn": b.turn.clone(), "failed": b.failed.clone()})
    ks = [k for k in b.turn[i].unique().tolist() if k >= 0]
    for new, k in enumerate(ks):
        closed.turn[i][b.turn[i] == k] = new
        closed.failed[i, new] = b.failed[i, k]
    for flags in ({}, {"ref_step": "mean"}, {"weighting": "unclipped"}):
        ours, theirs = (signal_of(x, Config(**flags))[-1][i] for x in (b, closed))
        assert torch.equal(ours, theirs)


def test_two_turns_without_an_observation_between_stay_two():
    old, teacher = f64([[0, -1.0, -1, -1, -1]]), f64([[0, -1.5, -1.5, -3, -3]])
    d, there = step_divergence(old, teacher, torch.tensor([[-1, 0, 0, 1, 1]]))
    assert d.tolist() == [[0.5, 2.0]] and there.all()


def test_divergence_is_the_mean_absolute_and_not_the_signed_or_squared_gap():
    old, teacher = f64([[0, -1.0, -1, -1]]), f64([[9, -1.5, -0.5, -4]])
    d, there = step_divergence(old, teacher, torch.tensor([[-1, 0, 0, 2]]))
    assert d.tolist() == [[0.5, 0.0, 3.0]] and there.tolist() == [[True, False, True]]


def test_a_reward_that_cannot_be_scored_is_left_out_and_still_distils():
    reward, group = f64([1, 0, NAN, 1, NAN, NAN, 0.25, NAN]), torch.tensor([7, 7, 7, 7, 3, 3, 5, 5])
    for ddof, eps in ((1, 1e-6), (0, 0.1)):
        ours = group_advantages(reward, group, eps, ddof)
        assert ours[:4].tolist() == pytest.approx(advantages_by_loop(reward[:4].tolist(), [7] * 4, eps, ddof))
        assert ours[4:].tolist() == [0, 0, 0, 0]
    b = random_batch(14)
    row = int(b.reward.isnan().nonzero())
    for flags in ({}, {"tool_bonus": True}):
        advantages, _, _, weights, signal = signal_of(b, Config(**flags))
        assert advantages[row] == 0
        torch.testing.assert_close(signal[row], (weights * (b.teacher - b.old))[row])


def test_shaped_rewards_by_hand():
    """n = turns of model and tool, plus 1: 2, 4, 6, 16, 18, 20, 40 for 1, 2, 3, 8, 9, 10, 20 turns of the model."""
    turns = f64([1, 2, 3, 8, 9, 10, 20, 1, 9, 4])
    reward = f64([0, 0, 0, 0, 0, 0, 0, 1, 1, NAN])
    ours = shaped_reward(reward, turns).tolist()
    assert ours[:9] == pytest.approx([-1, -0.9, -0.8, -0.6, -0.6, -0.6, -0.6, 1, 1]) and math.isnan(ours[9])
    assert shaped_reward(f64([0.5, 0.999]), f64([1, 2])).tolist() == pytest.approx([-1, -0.9])


# --- properties of the code


def test_weights_and_advantages_carry_no_gradient():
    b = random_batch(15)
    b.old.requires_grad_(), b.teacher.requires_grad_()
    for weighting, ref_step in itertools.product(("sod", "unclipped", "gated", "uniform"), ("first", "mean")):
        _, _, w, _, signal = signal_of(b, Config(weighting=weighting, ref_step=ref_step))
        assert not w.requires_grad and not signal.requires_grad


@pytest.mark.parametrize(
    "flags", [{}, {"loss_agg": "seq"}, {"weighting": "heuristic"}, {"ref_step": "mean"}], ids=named
)
def test_row_order_padding_and_the_split_into_micro_batches_change_nothing(flags):
    b, config = random_batch(16, drift=0.4), Config(**flags)
    value, grad = gradient(lambda x: loss_of(x, b, config), b.logps)
    order = torch.randperm(len(b.group), generator=torch.Generator().manual_seed(1))
    moved = SimpleNamespace(**{key: x[order] for key, x in vars(b).items()})
    other = gradient(lambda x: loss_of(x, moved, config), moved.logps)
    torch.testing.assert_close(other[0], value)
    torch.testing.assert_close(other[1], grad[order])
    wide = SimpleNamespace(**vars(b))
    for key in ("logps", "old", "teacher", "mask"):
        setattr(wide, key, nn.functional.pad(getattr(b, key), (0, 3)))
    wide.turn, wide.failed = nn.functional.pad(b.turn, (0, 3), value=-1), nn.functional.pad(b.failed, (0, 2))
    torch.testing.assert_close(loss_of(wide.logps, wide, config), value)
    c, signal = row_weights(b.mask, config.loss_agg)[:, None], signal_of(b, config)[-1]  # fixed before the split
    total = sum(
        (policy_token_loss(b.logps[rows], b.old[rows], signal[rows], config)[0] * b.mask[rows] * c[rows]).sum()
        for rows in torch.arange(len(b.group)).split(3)
    )
    torch.testing.assert_close(total, value)


def test_row_weights_by_hand():
    mask = f64([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert row_weights(mask, "token").tolist() == pytest.approx([1 / 6] * 4)
    assert row_weights(mask, "seq").tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 4, 1 / 12])
    assert row_weights(mask * 0, "token").isfinite().all() and row_weights(mask * 0, "seq").isfinite().all()


def test_inputs_stay_as_they_were():
    b = random_batch(17, drift=0.3)
    before = {key: x.clone() for key, x in vars(b).items()}
    for flags in FLAGS:
        loss_of(b.logps, b, Config(**flags))
    _, d, w, _, _ = signal_of(b, Config())
    there = step_divergence(b.old, b.teacher, b.turn)[1]
    kept = [x.clone() for x in (d, w, there, b.failed)]
    step_metrics(d, w, there, there, b.failed)
    assert all(torch.equal(x, y) for x, y in zip((d, w, there, b.failed), kept, strict=True))
    assert all(torch.equal(x.nan_to_num(9), before[key].nan_to_num(9)) for key, x in vars(b).items())


def test_extreme_gaps_stay_finite_in_fp32():
    old, teacher = torch.tensor([[-1e-7, -900.0, -1e-7, -80.0]]), torch.tensor([[-1e-7, -1e-7, -900.0, -81.0]])
    turn, mask = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4)
    d, there = step_divergence(old, teacher, turn)
    for weighting, ref_step in itertools.product(("sod", "unclipped"), ("first", "mean")):
        config = Config(weighting=weighting, ref_step=ref_step)
        w = step_weights(d, there, ~there, config)
        signal = token_advantages(torch.zeros(1), w, old, teacher, mask, config)
        loss, grad = gradient(
            lambda x, s=signal, c=config: policy_token_loss(x, old, s, c)[0].sum(),
            old + torch.tensor([0.0, 500, -500, 1]),
        )
        assert w.isfinite().all() and loss.isfinite() and grad.isfinite().all()


# --- metrics


def test_calls_are_what_the_environment_answered_or_called_a_failure():
    episodes = [
        Episode([Turn("a", "x"), Turn("b", "y", True), Turn("c")]),
        Episode([Turn("a", "", True)], "turns"),
        Episode([Turn("a", "x"), Turn("cut")], "tokens"),
    ]
    rollout = assemble([[5]] * 3, [[6]] * 3, 0, episodes=episodes)
    called, failed = calls(rollout, 3)
    assert called.tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert failed.tolist() == [[False, True, False], [True, False, False], [False] * 3]


def test_metrics_by_hand():
    d = f64([[0.01, 2.0, 0.0], [0.5, 0.25, 1.0], [0.3, 0.0, 0.0]])
    w = f64([[1, 0.25, 9], [1, 1.2, 0.5], [1, 9, 9]])
    there = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]) > 0
    failed = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0]]) > 0
    called = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]]) > 0
    ours = step_metrics(d, w, there, called, failed)
    expected = {
        "tool_calls": 1.0, "failed_calls": 1 / 3, "first_small": 1 / 3, "d_failed_1": 0.01, "d_failed_2": 2.0,
        "w_failed_1": 1.0, "w_failed_2": 0.25, "w_failed": 0.625, "d_clean_1": 0.4, "d_clean_2": 0.25,
        "d_clean_3": 1.0, "w_clean_1": 1.0, "w_clean_2": 1.2, "w_clean_3": 0.5, "w_clean": 3.7 / 4,
    }  # fmt: skip
    zero = {f"{x}_{name}_{k}": 0.0 for x in "dw" for name in ("failed", "clean") for k in range(1, 5)}
    assert ours == pytest.approx({f"sod/{key}": value for key, value in {**zero, **expected}.items()})
    nothing = step_metrics(d[:, :1], w[:, :1], there[:, :1], ~there[:, :1], ~there[:, :1])
    assert nothing.keys() == ours.keys(), "the same keys however many turns a batch has"
    assert nothing["sod/failed_calls"] == nothing["sod/w_failed"] == 0


# --- main


def test_ten_steps_of_the_default_keep_to_the_cap_and_trust_episodes_with_failed_calls_less(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)
    small = {"steps": 10, "prompts_per_step": 8, "eval_every": 0, "eval_problems": 4, "eval_samples": 1}
    sod.main(Config(**small, out=str(tmp_path / "run")))
    rows = lines(tmp_path / "run")[1:]
    assert len(rows) == 10 and all(math.isfinite(x) for row in rows for x in row.values())
    assert all(row["optim/skipped"] == 0 and row["engine/logp_gap"] < 1e-4 for row in rows)
    assert all(0 < row["sod/w_failed"] < row["sod/w_clean"] <= 1.2 for row in rows)
    assert sum(row["sod/d_failed_3"] for row in rows) > 2 * sum(row["sod/d_clean_3"] for row in rows)
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        for weight, k in zip(row["weight"], row["turn"], strict=True):
            assert (0 <= weight <= 1.2) if k > 0 else weight == k + 1


ECHO = """
class Echo:
    stops = ("=", "+")
    turn_tokens = 5

    def __init__(self):
        self.said = []

    def reset(self, example):
        self.number = sum(map(ord, example.prompt[-1]["content"]))
        return example.prompt

    def step(self, text):
        self.said.append(text)
        right = float(len("".join(self.said)) % 2)
        return "(" + text[-2:] + ")", len(self.said) > self.number % 4, right, "3" in text
"""
SMALL = {
    "steps": 1, "prompts_per_step": 4, "group_size": 4, "eval_problems": 2, "eval_samples": 1, "eval_every": 0,
    "minibatches": 1, "max_new_tokens": 30, "model": "addition-student", "teacher": "addition-teacher",
    "task": "addition",
}  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def spy(monkeypatch, tmp_path):
    """Runs main on an environment that echoes, and returns the rollout, every step's gradients and every loss call."""
    (tmp_path / "echo.py").write_text(ECHO)

    def start(out, **flags):
        seen = {"gradients": [], "losses": []}

        class Recorder(sod.Optimizer):
            def step(self, step):
                seen["gradients"].append([p.grad.clone() for p in self.weights])
                return super().step(step)

        metrics, loss = sod.rollout_metrics, policy_token_loss

        def recorded(logps, old_logps, advantages, config):
            seen["losses"].append((logps.detach().clone(), old_logps.clone(), advantages.clone()))
            return loss(logps, old_logps, advantages, config)

        monkeypatch.setattr(sod, "Optimizer", Recorder)
        monkeypatch.setattr(sod, "policy_token_loss", recorded)
        monkeypatch.setattr(sod, "rollout_metrics", lambda r, *rest: seen.update(rollout=r) or metrics(r, *rest))
        monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)
        given = {**SMALL, "environment": f"{tmp_path}/echo.py:Echo", **flags}
        sod.main(Config(**given, out=str(out)))
        return seen

    return start


def scored_in_float64(rollout, temperature=1.0):
    """Log-probs of the sampled tokens under student and teacher from whole logits, the student's with gradient."""
    found = []
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(TINY / f"addition-{name}", dtype=torch.float64)
        logits = model(rollout.tokens).logits
        logits = torch.cat([logits[:, :1] * 0, logits[:, :-1]], 1) / temperature
        found += [model, logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]]
    student, logps, _, teacher = found
    return student, logps, teacher.detach()


@pytest.mark.parametrize(
    "flags",
    [{}, {"weighting": "gated"}, {"weighting": "mask_after_error", "loss_agg": "seq"}, {"temperature": 0.8},
     {"tool_bonus": True, "opd_clip": 0.5}, {"micro_batch_tokens": 70, "ref_step": "mean", "d_floor": 0.05},
     {"adv_grpo": 0.0, "weighting": "heuristic"}],
    ids=named,
)  # fmt: skip
def test_the_first_step_of_a_run_equals_a_float64_reference_from_whole_logits(flags, spy, tmp_path):
    config, got = Config(**{**SMALL, **flags}), spy(tmp_path / "run", **flags)
    r, row = got["rollout"], lines(tmp_path / "run")[1]
    assert r.turn.max() >= 3 and r.turn.amax(1).unique().numel() >= 3 and {0.0, 1.0} == set(r.reward.tolist())
    student, logps, teacher = scored_in_float64(r, config.temperature)
    failed = torch.zeros(len(r), int(r.turn.max()) + 1, dtype=torch.bool)
    for i, episode in enumerate(r.episodes):
        for k, turn in enumerate(episode.turns):
            failed[i, k] = turn.failed
    b = SimpleNamespace(
        logps=logps.detach(), old=logps.detach(), teacher=teacher, mask=r.loss_mask.double(), turn=r.turn,
        failed=failed, reward=r.reward.double(), group=r.group,
    )  # fmt: skip
    assert failed.any() and not failed.any(1).all()
    value, slope, adv, ws = reference(b, config)
    (logps * slope).sum().backward()
    expected = [p.grad for p in student.parameters()]
    scale = max(g.abs().max().item() for g in expected)
    for mine, theirs in zip(got["gradients"][0], expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=2e-5 * scale)
    assert row["loss/total"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    gap = torch.where(b.mask > 0, b.old - b.teacher, 0)
    n = b.mask.sum().item()
    assert row["teacher/kl"] == pytest.approx(gap.sum().item() / n, rel=1e-4, abs=1e-6)
    assert row["teacher/kl_abs"] == pytest.approx(gap.abs().sum().item() / n, rel=1e-4)
    assert row["engine/logp_gap"] < 1e-5 and abs(row["engine/ratio_max"] - 1) < 1e-4
    assert row["sod/tool_calls"] == pytest.approx(sum(len(e.turns) for e in r.episodes) / len(r))  # all are answered
    bad = failed.any(1).tolist()
    if config.weighting != "gated":
        assert row["sod/w_failed"] == pytest.approx(_mean(w for w, x in zip(ws, bad, strict=True) if x), rel=1e-4)
        assert row["sod/w_clean"] == pytest.approx(_mean(w for w, x in zip(ws, bad, strict=True) if not x), rel=1e-4)
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    i = next(i for i in range(len(r)) if r.tokens[i, : len(sample["ids"])].tolist() == sample["ids"])
    assert sample["advantage"] == pytest.approx(adv[i, : len(sample["ids"])].tolist(), abs=2e-4)


def _mean(rows):
    values = list(itertools.chain(*rows))
    return sum(values) / len(values)


def test_all_mini_batches_keep_the_first_log_probs_and_advantages(spy, tmp_path):
    got = spy(tmp_path / "run", minibatches=4, lr=1e-2, micro_batch_tokens=10**6)
    r = got["rollout"]
    _, logps, teacher = scored_in_float64(r)
    assert len(got["losses"]) == len(got["gradients"]) == 4
    seen, moved = [], 0.0
    for new, old, adv in got["losses"]:
        for x, y, a in zip(new, old, adv, strict=True):
            left = (i for i in range(len(r)) if i not in dict(seen))  # two rows may be the same
            row = next(i for i in left if torch.allclose(y.double(), logps[i] * r.loss_mask[i], atol=1e-4))
            seen.append((row, a))
            moved = max(moved, (x - y).abs().max().item())
    assert sorted(row for row, _ in seen) == list(range(16)) and moved > 0.05
    failed = calls(r, int(r.turn.max()) + 1)[1]
    b = SimpleNamespace(
        logps=logps.detach(), old=logps.detach(), teacher=teacher, mask=r.loss_mask.double(), turn=r.turn,
        failed=failed, reward=r.reward.double(), group=r.group,
    )  # fmt: skip
    expected = reference(b, Config())[2]
    for row, a in seen:
        torch.testing.assert_close(a.double(), expected[row], atol=1e-3, rtol=1e-3)
    assert lines(tmp_path / "run")[1]["policy/kl_old"] != 0


def test_clip_fractions_count_the_side_that_clips(spy, tmp_path):
    got = spy(tmp_path / "run", minibatches=8, lr=2e-2, micro_batch_tokens=10**6, clip_low=0.05, clip_high=0.02)
    row, mask = lines(tmp_path / "run")[1], got["rollout"].loss_mask
    low = high = 0
    for new, old, adv in got["losses"]:
        ratio = (new - old).exp()
        low += ((adv < 0) & (ratio < 0.95)).sum().item()
        high += ((adv > 0) & (ratio > 1.02)).sum().item()
    assert row["policy/clip_low"] == pytest.approx(low / mask.sum().item()) and low > 0
    assert row["policy/clip_high"] == pytest.approx(high / mask.sum().item()) and high > 0


def test_a_reward_of_ones_own_replaces_the_environments(spy, tmp_path):
    (tmp_path / "mine.py").write_text("def f(e, text):\n    return len(text) / 100\n")
    r = spy(tmp_path / "run", reward=f"{tmp_path}/mine.py:f")["rollout"]
    assert r.reward.tolist() == pytest.approx([len(text) / 100 for text in r.texts]) and r.reward.max() > 0.1


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_one_line(bad, spy, tmp_path, monkeypatch):
    score, calls_ = sod.score, itertools.count()

    def broken(model, rollout, *rest):
        logps, entropy = score(model, rollout, *rest)
        place = rollout.loss_mask.nonzero()[-1]
        logps[tuple(place)] = bad if next(calls_) == 1 else logps[tuple(place)]  # the teacher's, on one token
        return logps, entropy

    monkeypatch.setattr(sod, "score", broken)
    with pytest.raises(UserError, match=r"step 1: .*not finite"):
        spy(tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [{"group_size": 1}, {"temperature": 0.0}, {"clip_low": 1.5}, {"dual_clip": 0.5}, {"dual_clip": 1.0},
     {"eps": 0.0}, {"adv_eps": 0.0}],
    ids=named,
)  # fmt: skip
def test_combinations_without_meaning_are_refused(flags):
    with pytest.raises(UserError, match="--"):
        check(Config(**flags))
    check(Config())


def test_defaults_are_the_papers_where_the_sheet_says_so():
    c = Config()
    assert (c.eps, c.delta, c.coef, c.clip_low, c.clip_high, c.dual_clip) == (1e-6, 0.2, 1.0, 0.2, 0.28, 3.0)
    assert (c.beta_min, c.beta_max, c.gate_gamma, c.weighting, c.loss_agg) == (0.0, 0.1, 1.0, "sod", "token")
    assert (c.lr, c.prompts_per_step, c.group_size, c.minibatches, c.max_turns, c.max_new_tokens, c.steps) == (
        2e-4, 16, 8, 2, 10, 120, 100,
    )  # fmt: skip
