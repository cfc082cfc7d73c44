"""methods/uni_opd.py against plain loops in float64, written from the equations of the method's sheet."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from posttrain.common.cli import UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.rollout import assemble
from posttrain.common.scoring import sampled_hidden, token_logps
from posttrain.methods import grpo, opd, uni_opd
from posttrain.methods.uni_opd import (
    Config,
    balance,
    clipped_loss,
    domain_scales,
    margin_mask,
    margin_shift,
    margins,
    order_metrics,
    row_weights,
    task_advantages,
    teacher_names,
)

INF, NAN = math.inf, math.nan
MODES, DIRECTIONS = ("mean", "minmax"), ("both", "correct_up", "incorrect_down")


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def random_groups(seed, p=9, g=6):
    """returns, correct, incorrect, group; a third of the rows unknown in some groups, group 0 and 1 of one side."""
    noise = torch.Generator().manual_seed(seed)
    n = p * g
    kind = torch.randint(0, 3, (n,), generator=noise)
    kind[2 * g : 5 * g] %= 2  # groups without unknown rows
    kind[:g], kind[g : 2 * g] = 0, 1
    returns = torch.randn(n, generator=noise).double()
    return returns, kind == 0, kind == 1, torch.arange(n) // g


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- references, row by row


def margin_by_loop(plus, minus, mode):
    if mode == "mean":
        return sum(plus) / len(plus) - sum(minus) / len(minus)
    return min(plus) - max(minus)


def sides_of(g, returns, correct, incorrect, group):
    rows = [i for i in range(len(group)) if group[i] == g]
    return [i for i in rows if correct[i]], [i for i in rows if incorrect[i]]


def shift_by_loop(returns, correct, incorrect, group, delta, mode, direction):
    value, out = returns.tolist(), [0.0] * len(returns)
    for g in sorted(set(group.tolist())):
        plus, minus = sides_of(g, returns, correct, incorrect, group)
        if not plus or not minus:
            continue
        m = margin_by_loop([value[i] for i in plus], [value[i] for i in minus], mode)
        lam = delta - m if m < delta else 0.0
        up = {"both": lam / 2, "correct_up": lam, "incorrect_down": 0.0}[direction]
        for i in plus:
            out[i] = up
        for i in minus:
            out[i] = up - lam
    return f64(out)


def mask_by_loop(returns, correct, incorrect, group, delta, mode, retain):
    value, dropped = returns.tolist(), set()
    for g in sorted(set(group.tolist())):
        plus, minus = sides_of(g, returns, correct, incorrect, group)
        if not plus or not minus:
            continue
        keep_plus, keep_minus = max(1, int(retain * len(plus))), max(1, int(retain * len(minus)))

        def m(plus, minus):
            return margin_by_loop([value[i] for i in plus], [value[i] for i in minus], mode)

        while m(plus, minus) < delta:
            worst_plus, worst_minus = min(plus, key=value.__getitem__), max(minus, key=value.__getitem__)
            gains = {}
            if len(plus) > keep_plus:
                gains[worst_plus] = m([i for i in plus if i != worst_plus], minus)
            if len(minus) > keep_minus:
                gains[worst_minus] = m(plus, [i for i in minus if i != worst_minus])
            best = max(gains, key=gains.get, default=None)
            if best is None or gains[best] <= m(plus, minus):
                break
            dropped.add(best)
            plus, minus = [i for i in plus if i != best], [i for i in minus if i != best]
    return [i not in dropped for i in range(len(value))]


def goals_by_rule(plus, minus, q):
    """How many correct and incorrect rows stay (5.2)."""
    if q == 0:
        return 0, minus
    if q == INF:
        return plus, 0
    if not plus or not minus:
        return plus, minus
    d_plus, d_minus = math.floor(minus * q), math.floor(plus / q)
    if plus > d_plus >= 1:
        return d_plus, minus
    if minus > d_minus >= 1:
        return plus, d_minus
    return plus, minus


# --- margins and the shift


def test_hand_numbers_of_margin_shift_and_mask():
    returns, group = f64([-0.32, -0.10, -0.05, -0.25]), torch.zeros(4, dtype=torch.long)
    correct = torch.tensor([True, True, False, False])
    sides = (correct, ~correct, group)
    mean, minmax = (margins(returns, *sides, mode) for mode in MODES)
    assert mean.item() == pytest.approx(-0.06) and minmax.item() == pytest.approx(-0.27)
    shift = margin_shift(mean, *sides, 0.4, "both")
    torch.testing.assert_close(shift, f64([0.23, 0.23, -0.23, -0.23]))
    moved = returns + shift
    assert moved[:2].mean().item() == pytest.approx(0.02) and moved[2:].mean().item() == pytest.approx(-0.38)
    assert margin_shift(minmax, *sides, 0.4, "correct_up").tolist() == pytest.approx([0.67, 0.67, 0, 0])
    assert margin_mask(returns, *sides, 0.1, "minmax", 0.25).tolist() == [False, True, False, True]
    assert margin_mask(returns, *sides, -0.06, "minmax", 0.25).tolist() == [False, True, True, True]


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_margins_equal_the_loop_and_are_nan_where_a_side_is_empty(mode, scope):
    for seed in range(5):
        returns, correct, incorrect, group = random_groups(seed)
        group = group if scope == "group" else group * 0
        ours = margins(returns, correct, incorrect, group, mode)
        for g, m in enumerate(ours.tolist()):
            plus, minus = sides_of(g, returns, correct, incorrect, group)
            if not plus or not minus:
                assert math.isnan(m)
                continue
            assert m == pytest.approx(margin_by_loop(returns[plus].tolist(), returns[minus].tolist(), mode), rel=1e-12)
        assert scope == "global" or (ours[:2].isnan().all() and ours[2:5].isfinite().any())


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_after_the_shift_the_margin_is_the_larger_of_itself_and_delta(mode, direction, scope):
    for seed, delta in enumerate([-0.5, 0.0, 0.4, 4.0, -INF]):
        returns, correct, incorrect, group = random_groups(seed)
        sides = (correct, incorrect, group if scope == "group" else group * 0)
        margin = margins(returns, *sides, mode)
        shift = margin_shift(margin, *sides, delta, direction)
        torch.testing.assert_close(shift, shift_by_loop(returns, *sides, delta, mode, direction), rtol=0, atol=1e-12)
        after = margins(returns + shift, *sides, mode)
        two = ~margin.isnan()
        torch.testing.assert_close(after[two], margin[two].clamp(min=delta), rtol=0, atol=1e-12)
        unknown = ~(correct | incorrect)
        assert unknown.any() and not shift[unknown].any() and not shift[~two[sides[2]]].any()


@pytest.mark.parametrize("mode", MODES)
def test_directions_move_the_side_they_name_and_both_splits_lambda_evenly(mode):
    returns, correct, incorrect, group = random_groups(3)
    margin = margins(returns, correct, incorrect, group, mode)
    both, up, down = (margin_shift(margin, correct, incorrect, group, 4.0, direction) for direction in DIRECTIONS)
    assert not up[incorrect].any() and not down[correct].any() and (up >= 0).all() and (down <= 0).all()
    torch.testing.assert_close(both, (up + down) / 2)
    equal = torch.tensor([1, 1, 0, 0], dtype=torch.bool)  # as many on each side: the shifts cancel
    sides = (equal, ~equal, torch.zeros(4, dtype=torch.long))
    assert margin_shift(margins(returns[:4], *sides, mode), *sides, 9.0, "both").sum().abs() < 1e-12


def test_order_of_rows_does_not_matter_and_inputs_stay():
    returns, correct, incorrect, group = random_groups(4)
    order = torch.randperm(len(group), generator=generator())
    before = [x.clone() for x in (returns, correct, incorrect, group)]
    for mode in MODES:
        margin = margins(returns, correct, incorrect, group, mode)
        moved = margins(*(x[order] for x in (returns, correct, incorrect, group)), mode)
        torch.testing.assert_close(margin, moved, equal_nan=True)
        use = margin_mask(returns, correct, incorrect, group, 1.0, mode, 0.25)
        other = margin_mask(*(x[order] for x in (returns, correct, incorrect, group)), 1.0, mode, 0.25)
        assert torch.equal(use[order], other)
    assert all(torch.equal(a, b) for a, b in zip(before, (returns, correct, incorrect, group), strict=True))


# --- the mask


@pytest.mark.parametrize("retain", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_margin_mask_equals_the_loop_and_leaves_the_share_to_retain(mode, retain):
    for seed, delta in [(0, 0.0), (1, 0.4), (2, 4.0), (3, 1.0)]:
        returns, correct, incorrect, group = random_groups(seed)
        use = margin_mask(returns, correct, incorrect, group, delta, mode, retain)
        assert use.tolist() == mask_by_loop(returns, correct, incorrect, group, delta, mode, retain)
        for g in range(9):
            for side in (correct, incorrect):
                rows = (group == g) & side
                least = max(1, math.floor(retain * int(rows.sum())))
                assert int((rows & use).sum()) >= min(least, int(rows.sum()))
        assert use[~(correct | incorrect)].all() and use[:12].all()
        assert retain == 1 or not use.all()


def test_margin_mask_breaks_a_tie_for_the_correct_side_and_stops_where_nothing_helps():
    group, correct = torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, False])
    tie = f64([0.0, 1.0, 1.0, 0.0])  # dropping either head gives a margin of 0
    assert margin_mask(tie, correct, ~correct, group, -0.5, "minmax", 0.25).tolist() == [False, True, True, True]
    flat = f64([1.0, 1.0, 2.0, 2.0])  # every drop leaves minmax at -1
    assert margin_mask(flat, correct, ~correct, group, 5.0, "minmax", 0.25).all()


# --- online balance


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("q", [0.0, 0.5, 0.75, 1.0, 1.2, 1.5, 2.0, INF])
def test_balance_keeps_the_numbers_of_the_rule(q, scope):
    for seed in range(20):
        noise = generator(seed)
        group = torch.arange(40) // 8
        correct = torch.rand(40, generator=noise) < torch.rand(5, generator=noise)[group]
        correct[:8], correct[8:16] = True, False
        scoped = group if scope == "group" else group * 0
        keep = balance(correct, scoped, q, noise)
        for g in scoped.unique():
            rows = scoped == g
            numbers = [int((rows & side).sum()) for side in (correct, ~correct)]
            kept = [int((rows & side & keep).sum()) for side in (correct, ~correct)]
            assert kept == list(goals_by_rule(*numbers, q))


def test_balance_at_one_evens_two_sided_groups_and_never_touches_the_minority():
    group = torch.arange(64) // 8
    for seed in range(20):
        correct = torch.rand(64, generator=generator(seed)) < 0.3
        keep = balance(correct, group, 1.0, generator(seed))
        for g in range(8):
            plus, minus = (group == g) & correct, (group == g) & ~correct
            if plus.any() and minus.any():
                assert (plus & keep).sum() == (minus & keep).sum() == min(plus.sum(), minus.sum())
                small = plus if plus.sum() <= minus.sum() else minus
                assert keep[small].all()
            else:
                assert keep[group == g].all()


def test_balance_drops_nothing_where_the_ratio_rounds_to_zero():
    correct = torch.tensor([True] + [False] * 7)
    assert balance(correct, torch.zeros(8), 2.0, generator()).all()  # floor(1 / 2) = 0 incorrect rows is no goal


def test_balance_draws_the_dropped_rows_evenly_and_reproducibly():
    correct, group = torch.tensor([True, False, False, False, False]), torch.zeros(5)
    seen = torch.stack([balance(correct, group, 1.0, generator(seed)) for seed in range(400)]).double().mean(0)
    assert seen[0] == 1 and ((seen[1:] - 0.25).abs() < 0.09).all()  # four standard deviations
    assert torch.equal(*(balance(correct, group, 1.0, generator(7)) for _ in range(2)))


# --- the loss


def batch_of(seed, n=6, t=5):
    """logps, old, teacher, advantages, mask, keep: beyond every clip and gap, an empty row, a hole."""
    noise = generator(seed)
    logps, old, teacher, advantages = torch.randn(4, n, t, generator=noise).double()
    teacher[0, :2] += 12
    mask = (torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=noise)).double()
    mask[0], mask[1] = 1, 0
    mask[2] = f64([0, 1, 0, 1, 0])
    keep = torch.tensor([True, True, True, False, True, True])
    return logps, old, teacher, advantages, mask, keep


def loss_by_loop(logps, old, teacher, advantages, mask, keep, config):
    """Eq. of 5.6 and its derivative for logp, row by row and token by token."""
    rows, loss, grad = len(logps), 0.0, torch.zeros_like(logps)
    b = rows if config.denominator == "generated" else max(1, int(keep.sum()))
    for i in range(rows):
        length = max(1, int(mask[i].sum()))
        for t in range(logps.shape[1]):
            x, a = float(logps[i, t]), float(advantages[i, t])
            far = config.gap_mask and abs(x - float(teacher[i, t])) >= config.gap_mask
            if not mask[i, t] or not keep[i] or far:
                continue
            rho = math.exp(x - float(old[i, t]))
            clipped = min(max(rho, 1 - config.eps_lo), 1 + config.eps_hi)
            loss += max(-a * rho, -a * clipped) / (length * b)
            inside = 1 - config.eps_lo < rho < 1 + config.eps_hi
            flows = inside or -a * rho > -a * clipped
            grad[i, t] = -a * rho * flows / (length * b)
    return loss, grad


def total_loss(logps, old, teacher, advantages, mask, keep, config):
    token_loss, _ = clipped_loss(logps, old, teacher, advantages, config)
    return (token_loss * mask * row_weights(mask, keep, config.denominator)[:, None]).sum()


@pytest.mark.parametrize("denominator", ["generated", "kept"])
@pytest.mark.parametrize("gap", [0.0, 1.0, 10.0])
def test_loss_and_gradient_equal_the_loop(gap, denominator):
    config = Config(gap_mask=gap, denominator=denominator, eps_lo=0.3, eps_hi=0.5)
    clipped = 0
    for seed in range(8):
        logps, *rest = batch_of(seed)
        x = logps.clone().requires_grad_()
        value = total_loss(x, *rest, config)
        (grad,) = torch.autograd.grad(value, x)
        expected, slope = loss_by_loop(logps, *rest, config)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-12)
        clipped += int(((slope == 0) & (rest[3] > 0) & rest[4][:, None]).sum())
    assert clipped > 5


def test_on_policy_gradient_is_minus_advantage_over_length_and_rows():
    logps, _, teacher, advantages, mask, keep = batch_of(0)
    x = logps.clone().requires_grad_()
    total_loss(x, logps, teacher, advantages, mask, keep, Config()).backward()
    near = (logps - teacher).abs() < 10
    expected = -advantages * mask * keep[:, None] * near / (mask.sum(1, keepdim=True).clamp(min=1) * 6)
    torch.testing.assert_close(x.grad, expected)


def test_a_token_at_the_gap_has_no_gradient_but_counts_in_the_length():
    logps = f64([[-12.0, -1.0, -1.0]]).requires_grad_()
    teacher, mask = f64([[-2.0, -1.0, -1.0]]), torch.ones(1, 3).double()
    total_loss(logps, logps.detach(), teacher, mask * 2, mask, torch.tensor([True]), Config()).backward()
    torch.testing.assert_close(logps.grad, f64([[0, -2 / 3, -2 / 3]]))
    loss, far = clipped_loss(f64([[0.0, 0.0]]), f64([[0.0, 0.0]]), f64([[-9.99, -10.0]]), f64([[1, 1]]), Config())
    assert loss.tolist() == [[-1, 0]] and far.tolist() == [[0, 1]]


def test_dropping_rows_shrinks_the_step_unless_the_denominator_is_kept():
    mask, keep = torch.ones(4, 2).double(), torch.tensor([True, False, False, True])
    assert row_weights(mask, keep, "generated").tolist() == [1 / 8, 0, 0, 1 / 8]
    assert row_weights(mask, keep, "kept").tolist() == [1 / 4, 0, 0, 1 / 4]
    assert row_weights(mask * 0, keep & False, "kept").tolist() == [0, 0, 0, 0]


def test_without_calibration_it_is_the_sampled_token_opd_of_the_neighbour():
    """m >= delta everywhere, no balance: the gradient of opd.py --est k1_pg --agg seq."""
    logps, _, teacher, _, mask, keep = batch_of(1)
    teacher[0] = logps[0] + 1
    x = logps.clone().requires_grad_()
    total_loss(x, logps, teacher, (teacher - logps) * mask, mask, keep | True, Config(gap_mask=0)).backward()
    y = logps.clone().requires_grad_()
    advantages = opd.distillation_advantages(logps - teacher, mask)
    (-(y - logps).exp() * advantages * mask * opd.row_weights(mask, "seq", 9)[:, None]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_control_term_is_grpo_s():
    reward, group = f64([1, 0, 0, 0, NAN, 1, 1, 0.5]), torch.arange(8) // 4
    expected = grpo.group_advantages(reward, group, "group_std")
    torch.testing.assert_close(task_advantages(reward, group), expected, rtol=1e-9, atol=0)


# --- domains and metrics


def test_domain_weights_make_the_loss_a_weighted_sum_of_the_domains_means():
    domains, values = ["a", "b", "a", "a"], f64([1, 10, 2, 3])
    scales = f64(domain_scales(domains, {"a": 3.0, "b": 1.0}))
    assert (values * scales).mean().item() == pytest.approx(0.75 * 2 + 0.25 * 10)
    assert domain_scales(domains, {"a": 3, "b": 1}) == [1, 1, 1, 1]  # the data's own shares
    assert domain_scales(["a"], {"a": 1.0, "b": 1.0}) == [0.5]  # an absent domain's share is lost, not given away


def test_teacher_names_are_read():
    assert teacher_names("one") == {"": "one"} and teacher_names("add=x,mul=y/z=1") == {"add": "x", "mul": "y/z=1"}


def test_order_metrics_of_a_hand_case():
    returns, group = f64([1, 3, 2, 0, 5, 4, 7]), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    correct = torch.tensor([1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    found = {k: v.double().mean().item() for k, v in order_metrics(returns, correct, ~correct, group, "x").items()}
    assert found["violations_x"] == 0.5  # of the two mixed groups
    assert found["inversions_x"] == pytest.approx(1 / 5)  # 1 < 2; not 1 > 0, 3 > 2, 3 > 0, 5 > 4
    assert found["return_correct_x"] == 4 and found["return_incorrect_x"] == 2


# --- the whole loop, one step of it taken apart

SMALL = {"steps": 1, "prompts_per_step": 12, "group_size": 8, "eval_problems": 2, "eval_samples": 1, "eval_every": 0}
SMALL |= {"warmup": 0, "lr": 1e-3}


@pytest.fixture
def taken_apart(tmp_path, monkeypatch):
    """run(flags, reward function, change of teacher log-probs) -> what the update of its last step was made from."""
    n = iter(range(100))

    def run(reward=None, scored=None, **given):
        seen = SimpleNamespace(scored=[], batch=None)
        real = {name: getattr(uni_opd, name) for name in ("clipped_loss", "row_weights", "token_logps", "score")}

        def token_logps(model, batch, *args):
            seen.batch = batch
            return real["token_logps"](model, batch, *args)

        def row_weights(mask, keep, denominator):
            seen.keep = keep
            return real["row_weights"](mask, keep, denominator)

        def clipped_loss(logps, old, teacher, advantages, config):
            seen.old, seen.teacher, seen.advantages = old, teacher, advantages
            return real["clipped_loss"](logps, old, teacher, advantages, config)

        def score(model, rollout, *args):
            logps, entropy = real["score"](model, rollout, *args)
            seen.scored.append((model, len(rollout)))
            return (scored(model, rollout, logps) if scored and len(seen.scored) > 1 else logps), entropy

        for name, fake in (("clipped_loss", clipped_loss), ("row_weights", row_weights), ("score", score)):
            monkeypatch.setattr(uni_opd, name, fake)
        monkeypatch.setattr(uni_opd, "token_logps", token_logps)
        monkeypatch.setattr(uni_opd, "micro_batches", lambda rollout, limit: [torch.arange(len(rollout))])
        monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)
        if reward:
            monkeypatch.setattr(uni_opd, "grade_all", lambda function, examples, texts: reward(examples, texts))
        out = tmp_path / f"run{next(n)}"
        uni_opd.main(Config(**{**SMALL, **given}, out=str(out)))
        seen.metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        monkeypatch.undo()
        return seen

    return run


def weighed_by_loop(seen, config):
    """keep is the run's (it is random); returns, sides and advantages from the batch alone."""
    mask, reward = seen.batch.loss_mask.double(), seen.batch.reward
    r = (seen.teacher.double() - seen.old.double()) * mask
    returns = r.sum(1) / mask.sum(1)
    correct, incorrect = reward == 1, reward < 1
    if config.margin_stats == "kept":
        correct, incorrect = correct & seen.keep, incorrect & seen.keep
    scope = seen.batch.group if config.margin_scope == "group" else seen.batch.group * 0
    shift = shift_by_loop(
        returns, correct, incorrect, scope, config.margin_delta, config.margin_mode, config.margin_direction
    )
    return (r + shift[:, None]) * mask, returns, correct, incorrect, scope


FLAGS = [{}, {"margin_delta": 0.4}, {"margin_delta": -0.1, "margin_mode": "minmax"}, {"margin_scope": "global"}]
FLAGS += [{"margin_direction": direction, "margin_mode": "minmax"} for direction in DIRECTIONS]
FLAGS += [{"margin_stats": "kept"}, {"denominator": "kept"}, {"online_balance": "global"}, {"balance_ratio": 0.5}]
FLAGS += [{"balance_ratio": INF}, {"balance_ratio": 0.0}, {"gap_mask": 1.5}, {"online_balance": "none"}]
FLAGS += [{"domain_weights": "3,1"}]


@pytest.mark.parametrize("given", FLAGS, ids=lambda given: ",".join(f"{k}={v}" for k, v in given.items()) or "default")
def test_the_step_is_made_from_the_equations_with_every_flag(taken_apart, given):
    config = Config(**{**SMALL, **given})
    seen = taken_apart(**given)
    advantages = weighed_by_loop(seen, config)[0]
    torch.testing.assert_close(seen.advantages.double(), advantages, rtol=1e-4, atol=1e-4)
    mask, group = seen.batch.loss_mask.double(), seen.batch.group
    right = seen.batch.reward == 1
    scope = group * 0 if config.online_balance == "global" else group
    for g in scope.unique():
        numbers = [int(((scope == g) & side).sum()) for side in (right, ~right)]
        kept = [int(((scope == g) & side & seen.keep).sum()) for side in (right, ~right)]
        goals = numbers if config.online_balance == "none" else goals_by_rule(*numbers, config.balance_ratio)
        assert kept == list(goals)
    loss = 0.0
    domains = [example.fields["domain"] for example in seen.batch.examples]
    b = len(mask) if config.denominator == "generated" else int(seen.keep.sum())
    weights = {"add": 0.75, "mul": 0.25} if config.domain_weights else None
    for i in range(len(mask)):
        share = weights[domains[i]] * len(domains) / domains.count(domains[i]) if weights else 1.0
        near = (seen.old[i] - seen.teacher[i]).abs() < config.gap_mask
        loss -= share * float(seen.keep[i]) * float((advantages[i] * near).sum()) / (float(mask[i].sum()) * b)
    assert seen.metrics["loss/total"] == pytest.approx(loss, rel=1e-3, abs=1e-5)


def test_the_metrics_of_a_step_equal_the_loop(taken_apart):
    seen = taken_apart()
    advantages, returns, correct, incorrect, group = weighed_by_loop(seen, Config(**SMALL))
    moved = advantages.sum(1) / seen.batch.loss_mask.sum(1)
    domains = [example.fields["domain"] for example in seen.batch.examples]
    expected = {"correct_share": correct.double().mean(), "correct_share_kept": correct[seen.keep].double().mean()}
    for when, values in (("before", returns), ("after", moved)):
        violated, inverted, pairs, margin = [], 0, 0, []
        for g in range(12):
            plus, minus = sides_of(g, values, correct, incorrect, group)
            if plus and minus:
                violated.append(float(values[plus].min() < values[minus].max()))
                margin.append(float(values[plus].mean() - values[minus].mean()))
            inverted += sum(float(values[i]) < float(values[j]) for i in plus for j in minus)
            pairs += len(plus) * len(minus)
        expected |= {f"violations_{when}": sum(violated) / len(violated), f"inversions_{when}": inverted / pairs}
        expected |= {f"return_correct_{when}": values[correct].mean()}
        expected |= {f"return_incorrect_{when}": values[incorrect].mean()}
        if when == "before":
            lam = [max(0.0, 4 - m) for m in margin]
            expected |= {"mixed_groups": len(lam) / 12, "lambda": sum(lam) / len(lam)}
            expected |= {"shifted_groups": sum(x > 0 for x in lam) / len(lam), "unscored": 0.0}
    for domain in ("add", "mul"):
        rows = [i for i, d in enumerate(domains) if d == domain]
        expected[f"accuracy/{domain}"] = correct[rows].double().mean()
    for key, value in expected.items():
        assert seen.metrics[f"uni/{key}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), key
    assert seen.metrics["uni/violations_before"] > 0 and seen.metrics["uni/inversions_before"] > 0
    assert expected["correct_share_kept"] > expected["correct_share"]


def test_the_shift_is_one_number_a_row_and_zero_on_padding(taken_apart):
    seen = taken_apart()
    mask = seen.batch.loss_mask > 0
    shift = seen.advantages - (seen.teacher - seen.old)
    assert not seen.advantages[~mask].any() and (~mask).any()
    for row, m in zip(shift, mask, strict=True):
        assert (row[m] - row[m][0]).abs().max() < 1e-5
    assert shift[mask].abs().max() > 0.5


@pytest.mark.parametrize("given", [{"margin": "none"}, {"margin_delta": -INF}])
def test_without_margin_the_advantage_is_the_token_reward(taken_apart, given):
    seen = taken_apart(online_balance="none", **given)
    assert torch.equal(seen.advantages, (seen.teacher - seen.old) * seen.batch.loss_mask) and seen.keep.all()


def test_a_teacher_equal_to_the_student_leaves_the_outcome_alone(taken_apart):
    seen = taken_apart(teacher="arithmetic-student", margin_delta=0.6)
    mixed = 0
    for g in seen.batch.group.unique():
        rows = seen.batch.group == g
        correct = rows & (seen.batch.reward == 1)
        two_sided = correct.any() and (rows & ~correct).any()
        for side, sign in ((correct, 1), (rows & ~correct, -1)):
            tokens = seen.advantages[side][seen.batch.loss_mask[side] > 0]
            torch.testing.assert_close(
                tokens, torch.full_like(tokens, sign * 0.3 if two_sided else 0.0), atol=1e-5, rtol=0
            )
        mixed += bool(two_sided)
    assert 0 < mixed < 12


@pytest.mark.parametrize("mode", MODES)
def test_masked_rows_have_no_loss_and_the_others_plain_opd(taken_apart, mode):
    flags = {"margin": "mask", "margin_mode": mode, "margin_delta": 0.5, "online_balance": "none"}
    seen = taken_apart(**flags)
    _, returns, correct, incorrect, group = weighed_by_loop(seen, Config(**SMALL))
    use = mask_by_loop(returns, correct, incorrect, group, 0.5, mode, 0.25)
    assert seen.keep.all() and not all(use)  # A = 0, but they stay in the balance's count
    used = torch.tensor(use)[:, None]
    assert torch.equal(seen.advantages, (seen.teacher - seen.old) * seen.batch.loss_mask * used)


def test_changing_one_teacher_changes_nothing_on_the_other_domain(taken_apart):
    first = taken_apart()
    other = taken_apart(teacher="add=arithmetic-add-teacher,mul=arithmetic-student")
    rows = torch.tensor([example.fields["domain"] == "add" for example in first.batch.examples])
    for name in ("teacher", "advantages", "keep"):
        assert torch.equal(getattr(first, name)[rows], getattr(other, name)[rows])
    assert not torch.allclose(first.teacher[~rows], other.teacher[~rows])


def test_every_row_is_scored_once_by_its_own_teacher_and_an_unused_teacher_never(taken_apart):
    seen = taken_apart()
    (_, n), *teachers = seen.scored
    domains = [example.fields["domain"] for example in seen.batch.examples]
    assert n == 96 and [m for _, m in teachers] == [domains.count("add"), domains.count("mul")]
    assert len({id(model) for model, _ in seen.scored}) == 3
    seen = taken_apart(teacher="add=arithmetic-add-teacher,mul=arithmetic-mul-teacher,code=arithmetic-student")
    assert len(seen.scored) == 3
    seen = taken_apart(teacher="add=arithmetic-add-teacher,mul=arithmetic-add-teacher")
    assert [n for _, n in seen.scored] == [96, 96]  # two domains, one model, one pass


def test_averaged_routing_scores_every_row_by_all_teachers(taken_apart):
    each = [taken_apart(teacher=f"arithmetic-{name}-teacher").teacher for name in ("add", "mul")]
    both = taken_apart(routing="average")
    torch.testing.assert_close(both.teacher, (each[0] + each[1]) / 2)


def test_a_row_that_the_teacher_cannot_score_is_out_of_statistics_and_loss(taken_apart):
    """The released code fills it with a sentinel, and it enters the margin as G = 0."""

    def fail(model, rollout, logps):
        logps = logps.clone()
        bad = (rollout.reward == 1).nonzero()[:1]
        logps[bad, rollout.loss_mask[bad[0, 0]].argmax()] = -INF
        return logps

    seen = taken_apart(scored=fail, online_balance="none")
    assert seen.metrics["uni/unscored"] == pytest.approx((~seen.keep).double().mean().item()) and not seen.keep.all()
    assert seen.advantages.isfinite().all() and math.isfinite(seen.metrics["loss/total"])
    mask, reward, group = seen.batch.loss_mask.double(), seen.batch.reward, seen.batch.group
    r = (seen.teacher - seen.old).double() * mask
    sides = ((reward == 1) & seen.keep, (reward < 1) & seen.keep, group)
    shift = shift_by_loop(r.sum(1) / mask.sum(1), *sides, 4.0, "mean", "both")
    torch.testing.assert_close(seen.advantages.double(), (r + shift[:, None]) * mask, rtol=1e-4, atol=1e-4)


def test_a_correct_row_that_the_teacher_cannot_score_does_not_tip_the_balance(taken_apart):
    def fail(model, rollout, logps):
        logps = logps.clone()
        rows = ((rollout.reward == 1) & (rollout.group == rollout.group[rollout.reward == 1][0])).nonzero()[:1]
        logps[rows, rollout.loss_mask[rows[0, 0]].argmax()] = -INF
        return logps

    def reward(examples, texts):
        return [float(i % 8 < 3) for i in range(len(texts))]  # 3 correct, 5 not

    seen = taken_apart(scored=fail, reward=reward)
    for g in range(12):
        kept = seen.batch.reward[(seen.batch.group == g) & seen.keep]
        assert (kept == 1).sum() == (kept == 0).sum() >= 2
    assert (~seen.keep & (seen.batch.reward == 1)).any()


def test_a_teacher_that_scores_nothing_ends_the_run(taken_apart):
    with pytest.raises(UserError, match="scores nothing"):
        taken_apart(scored=lambda model, rollout, logps: logps.masked_fill(rollout.loss_mask > 0, -INF))


def test_a_row_without_grade_is_on_neither_side_and_incorrect_for_the_balance(taken_apart):
    def reward(examples, texts):
        return [NAN if i % 8 < 3 else float(i % 8 < 5) for i in range(len(texts))]  # 3 unknown, 2 correct, 3 not

    seen = taken_apart(reward=reward)
    unknown = seen.batch.reward.isnan()
    r = (seen.teacher - seen.old) * seen.batch.loss_mask
    assert torch.equal(seen.advantages[unknown], r[unknown]) and unknown.sum() == 36
    for g in range(12):
        rows = seen.batch.group == g
        assert seen.keep[rows & (seen.batch.reward == 1)].all() and int((rows & seen.keep).sum()) == 4


def test_a_group_of_one_row_is_plain_opd(taken_apart):
    seen = taken_apart(group_size=1)
    assert seen.keep.all() and torch.equal(seen.advantages, (seen.teacher - seen.old) * seen.batch.loss_mask)
    assert seen.metrics["uni/mixed_groups"] == 0 == seen.metrics["uni/lambda"]


def test_empty_responses_are_out_of_the_statistics(taken_apart, monkeypatch):
    """Nothing here samples none; a sampler of another kind may."""
    generate = HFEngine.generate

    def cut(self, examples, n, sampling, key):
        rollout = generate(self, examples, n, sampling, key)
        if n == 8 and len(examples) == 12:
            rollout.loss_mask[::8] = 0
        return rollout

    monkeypatch.setattr(HFEngine, "generate", cut)
    seen = taken_apart(online_balance="none")
    empty = seen.batch.loss_mask.sum(1) == 0
    assert empty.sum() == 12 and not seen.keep[empty].any() and math.isfinite(seen.metrics["loss/total"])


def test_a_whole_run_without_calibration_is_that_of_the_neighbour(tmp_path):
    """One teacher, no balance, no margin, no gap mask: opd.py --est k1_pg --agg seq, step by step."""
    shared = {**SMALL, "steps": 3, "model": "addition-student", "teacher": "addition-teacher", "task": "addition"}
    flags = {"margin": "none", "online_balance": "none", "gap_mask": 0.0, "eps_lo": 1.0, "eps_hi": 9.0}
    uni_opd.main(Config(**shared, **flags, out=str(tmp_path / "uni")))
    opd.main(opd.Config(**shared, est="k1_pg", agg="seq", adv_clamp=0.0, out=str(tmp_path / "opd")))
    a, b = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("uni", "opd"))
    for x, y in zip(map(json.loads, a), map(json.loads, b), strict=True):
        for key in x.keys() & y.keys():
            if key.startswith(("loss", "optim", "train", "eval", "teacher")):
                assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-5), key


# --- other modalities


def test_one_step_of_a_vision_language_student_with_images_in_the_prompt():
    """Eq. 1-6 of a tiny random Qwen2-VL: finite gradients that reach the vision tower, and none in the teacher."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    image, start, end = 30, 31, 32
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    special = {"image_token_id": image, "vision_start_token_id": start, "vision_end_token_id": end}
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **special, tie_word_embeddings=False)
        models.append(Qwen2VLForConditionalGeneration(config).eval())
        models[-1].autocast_dtype = None
    student, teacher = models
    teacher.requires_grad_(False)
    prompts = [[start, image, image, image, image, end, 5, 6]] * 4  # 4 x 4 patches, 2 x 2 of them a token
    rollout = assemble(prompts, [[7, 8, 9], [10, 1], [11, 12, 13, 14], [15, 1]], pad=0)
    images = {"pixel_values": torch.randn(64, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 4)}
    images["mm_token_type_ids"] = (rollout.tokens == image).int()
    with torch.no_grad():
        old, seen = (token_logps(m, rollout, hidden=sampled_hidden(m, rollout, **images))[0] for m in models)
        blind, _ = token_logps(student, rollout)
    assert (old - blind).abs().max() > 1e-4  # the pictures are seen
    correct, group, mask = torch.tensor([True, False, True, False]), torch.arange(4) // 2, rollout.loss_mask
    reward = (seen - old) * mask
    sides = (correct, ~correct, group)
    shift = margin_shift(margins(reward.sum(1) / mask.sum(1), *sides, "mean"), *sides, 4.0, "both")
    logps, _ = token_logps(student, rollout, hidden=sampled_hidden(student, rollout, **images))
    token_loss, _ = clipped_loss(logps, old, seen, (reward + shift[:, None]) * mask, Config())
    (
        token_loss * mask * row_weights(mask, balance(*sides[::2], 1.0, generator()), "generated")[:, None]
    ).sum().backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any("visual" in name and grad.any() for name, grad in grads.items())
    assert any("language_model" in name and grad.any() for name, grad in grads.items())
