"""methods/rltf.py against plain float64 references, written from the equations of the method's sheet."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from posttrain.common.cli import UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.environments.critics import BLANK, criticise, is_model, tells
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import Sampling, assemble, encode
from posttrain.common.tasks import Example, make_task
from posttrain.common.training import Optimizer, evaluate
from posttrain.methods import grpo, rltf
from posttrain.methods.rltf import Config, Term, centred, distilled, normaliser, policy_token_loss, prompt_of

NAN = math.nan


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def batch(seed, n=6, t=7, spread=0.6):
    """logps, old [n, t] float64, mask with an empty and a full row, weight [n]."""
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(n, t, generator=g).double()
    old = logps + spread * torch.randn(n, t, generator=g).double()
    mask = (torch.arange(t) < torch.randint(1, t, (n, 1), generator=g)).double()
    mask[0], mask[1] = 1, 0
    return logps, old, mask, torch.randn(n, generator=g).double()


def gradient(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def advantages(r0, r1, group, two=None, **flags):
    """Lists in, lists out; r1 None where there is no second try."""
    two = torch.tensor([x is not None for x in r1]) if two is None else two
    later = f64([123.0 if x is None else x for x in r1])  # junk where there is none
    return [x.tolist() for x in rltf.turn_advantages(f64(r0), later, torch.tensor(group), two, Config(**flags))]


def reference(r0, r1, group, gamma=0.1):
    """Loops over rows and groups: A0, A1, A_SD of the first and of the second baseline."""
    out = []
    for i in range(len(r0)):
        mates = [j for j in range(len(r0)) if group[j] == group[i]]
        again = [j for j in mates if r1[j] is not None]
        returns = {j: r0[j] + gamma * (r1[j] or 0.0) for j in mates}
        a0 = returns[i] - sum(returns.values()) / len(mates)
        if r1[i] is None:
            out.append((a0, 0.0, 0.0, 0.0))
            continue
        mean1 = sum(r1[j] for j in again) / len(again)
        out.append((a0, r1[i] - mean1, r1[i] - sum(r0[j] for j in mates) / len(mates), r1[i] - mean1))
    return [list(column) for column in zip(*out, strict=True)]


def random_tries(seed, groups=4, size=5):
    g = torch.Generator().manual_seed(seed)
    r0 = torch.tensor([1.0, 0.0, -0.1])[torch.randint(0, 3, (groups * size,), generator=g)].tolist()
    r1 = torch.tensor([1.0, 0.0, -0.1])[torch.randint(0, 3, (groups * size,), generator=g)].tolist()
    return r0, [None if a == 1 else b for a, b in zip(r0, r1, strict=True)], [i // size for i in range(groups * size)]


# --- Eq. 1 and the baseline of Eq. 3: invariants 2, 6, 7, 8


def test_hand_example_of_the_sheet():
    a0, a1, sd = advantages([1, 0, 0, -0.1], [None, 1, 0, 1], [0] * 4)
    assert a0 == pytest.approx([0.725, -0.175, -0.275, -0.275], abs=1e-12)
    assert a1 == pytest.approx([0, 1 / 3, -2 / 3, 1 / 3], abs=1e-12)
    assert sd == pytest.approx([0, 0.775, -0.225, 0.775], abs=1e-12)
    assert [0.1 * x for x in sd] == pytest.approx([0, 0.0775, -0.0225, 0.0775], abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_advantages_equal_the_loops(seed):
    r0, r1, group = random_tries(seed)
    expected = reference(r0, r1, group)
    for baseline, column in (("first", 2), ("second", 3)):
        a0, a1, sd = advantages(r0, r1, group, sd_baseline=baseline)
        assert a0 == pytest.approx(expected[0], abs=1e-12) and a1 == pytest.approx(expected[1], abs=1e-12)
        assert sd == pytest.approx(expected[column], abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gamma_is_the_share_of_the_second_reward_in_the_first_return(gamma):
    r0, r1, group = random_tries(0)
    assert advantages(r0, r1, group, gamma=gamma)[0] == pytest.approx(reference(r0, r1, group, gamma)[0], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_sums_over_a_group(seed):
    r0, r1, group = random_tries(seed)
    a0, a1, sd = advantages(r0, r1, group)
    for g in set(group):
        rows = [i for i in range(len(r0)) if group[i] == g]
        again = [i for i in rows if r1[i] is not None]
        assert sum(a0[i] for i in rows) == pytest.approx(0, abs=1e-12)
        assert sum(a1[i] for i in again) == pytest.approx(0, abs=1e-12)
        b = sum(r0[i] for i in rows) / len(rows)
        if again:
            mean1 = sum(r1[i] for i in again) / len(again)
            assert sum(sd[i] for i in again) == pytest.approx(len(again) * (mean1 - b), abs=1e-12)


def test_collapse_of_the_second_baseline_by_counting_every_outcome():
    p, n = 0.99, 8
    signal = {"first": 0.0, "second": 0.0}
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if r else 1 - p for r in outcome)
        for baseline in signal:
            signal[baseline] += chance * any(advantages([0.0] * n, outcome, [0] * n, sd_baseline=baseline)[2])
    assert signal["second"] == pytest.approx(1 - 0.99**8 - 0.01**8, abs=1e-12)
    assert signal["second"] == pytest.approx(0.0773, abs=1e-4)
    assert signal["first"] == pytest.approx(1 - 0.01**8, abs=1e-12)


@pytest.mark.parametrize("baseline", ["first", "second"])
def test_rows_twice_change_no_advantage(baseline):
    r0, r1, group = random_tries(3)
    once = advantages(r0, r1, group, sd_baseline=baseline)
    for x, y in zip(once, advantages(r0 * 2, r1 * 2, group * 2, sd_baseline=baseline), strict=True):
        assert y == pytest.approx(x * 2, abs=1e-12)


# --- edge cases of the sheet


def test_all_right_at_once_is_no_signal():
    assert advantages([1.0] * 3, [None] * 3, [0] * 3) == [[0.0] * 3] * 3


def test_all_wrong_then_all_right_is_the_case_that_sd_exists_for():
    a0, a1, sd = advantages([0.0] * 7, [1.0] * 7, [0] * 7, gamma=0.1)
    assert a0 == [0.0] * 7 and a1 == [0.0] * 7 and sd == [1.0] * 7  # zeros without rounding


def test_a_lone_second_try_has_no_advantage_of_its_own_yet_one_to_distil():
    _, a1, sd = advantages([1, 1, 0], [None, None, 1], [0] * 3)
    assert a1 == [0, 0, 0] and sd == pytest.approx([0, 0, 1 / 3])


def test_unparsable_first_tries_lower_the_baseline_below_0():
    assert advantages([-0.1, -0.1], [1, 0], [0, 0])[2] == pytest.approx([1.1, 0.1])


def test_what_cannot_be_scored_is_left_out():
    a0, a1, sd = advantages([1.0, NAN, 0.0, 0.0], [None, None, 1.0, NAN], [0] * 4)
    assert a0 == pytest.approx([2 / 3 - 0.1 / 3, 0, 0.1 - 1.1 / 3, -1.1 / 3]) and a1 == [0] * 4
    assert sd == pytest.approx([0, 0, 2 / 3, 0])


def test_means_are_over_the_rows_named_and_groups_may_have_any_number():
    found = centred(f64([1, 3, 5, 7, 2]), torch.tensor([9, 9, 9, 4, 4]), torch.tensor([1, 1, 0, 1, 0]).bool())
    assert found.tolist() == [-1, 1, 0, 0, 0]
    assert centred(f64([0.1] * 3), torch.tensor([0] * 3), torch.ones(3).bool()).tolist() == [0, 0, 0]


# --- the losses


@pytest.mark.parametrize("form", ["importance_sampling", "ppo", "cispo", "nll"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_the_loops(seed, form):
    logps, old, mask, weight = batch(seed)
    config = Config(eps_lo=0.15, eps_hi=0.3)
    value, grad = gradient(lambda x: (policy_token_loss(x, old, weight, mask, form, config) * mask).sum(), logps)
    loss, slope = 0.0, torch.zeros_like(logps)
    for i, t in mask.nonzero().tolist():
        a, rho = float(weight[i]), math.exp(float(logps[i, t] - old[i, t]))
        bounded = min(max(rho, 0.85), 1.3)
        if form == "importance_sampling":
            loss, slope[i, t] = loss - rho * a, -rho * a
        elif form == "ppo":
            loss = loss - min(rho * a, bounded * a)
            slope[i, t] = -rho * a if rho * a <= bounded * a else 0.0
        elif form == "cispo":
            loss, slope[i, t] = loss - bounded * a * float(logps[i, t]), -bounded * a
        else:
            loss, slope[i, t] = loss - a * float(logps[i, t]), -a
    assert value.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(grad, slope, atol=1e-12, rtol=0)


def test_clips_by_hand():
    logps, old, mask = f64([[math.log(1.5), math.log(0.5)]]), f64([[0.0, 0.0]]), f64([[1, 1]])
    for weight, value, slope in ((1.0, -1.7, [0, -0.5]), (-1.0, 2.3, [1.5, 0])):
        found = gradient(lambda x, a=weight: policy_token_loss(x, old, f64([a]), mask, "ppo", Config()).sum(), logps)
        assert found[0].item() == pytest.approx(value) and found[1].tolist()[0] == pytest.approx(slope)
    _, slope = gradient(lambda x: policy_token_loss(x, old, f64([1.0]), mask, "cispo", Config()).sum(), logps)
    assert slope.tolist()[0] == pytest.approx([-1.2, -0.8])


@pytest.mark.parametrize("form", ["importance_sampling", "ppo", "cispo", "nll"])
def test_values_where_the_mask_is_0_change_nothing(form):
    logps, old, mask, weight = batch(1)

    def loss(x, y):
        return torch.where(mask > 0, policy_token_loss(x, y, weight, mask, form, Config()), 0).sum()

    value, slope = gradient(lambda x: loss(x, old), logps)
    for junk in (math.inf, -math.inf, NAN):
        x, y = (torch.where(mask > 0, v, junk) for v in (logps, old))
        found = gradient(lambda z, y=y: loss(z, y), x)
        assert torch.equal(found[0], value) and torch.equal(found[1], slope)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_second_try_it_is_grpo_without_std_and_clip(seed):
    """Invariant 1."""
    logps, _, mask, _ = batch(seed)
    group, reward = torch.tensor([0, 0, 0, 1, 1, 1]), f64([1, 0, -0.1, 0, 0, 1])
    a0, a1, sd = rltf.turn_advantages(reward, f64([9.0] * 6), group, torch.zeros(6).bool(), Config(gamma=0.7))
    torch.testing.assert_close(a0, grpo.group_advantages(reward, group, "center"), atol=0, rtol=0)
    assert not a1.any() and not sd.any()
    ones = torch.ones_like(logps)
    theirs = grpo.Config(loss="reinforce")
    for form in ("importance_sampling", "ppo", "cispo"):  # all of them at the first step
        ours = gradient(lambda x, f=form: (policy_token_loss(x, logps, a0, mask, f, Config()) * mask).sum(), logps)[1]
        other = gradient(lambda x: (grpo.policy_token_loss(x, ones, a0, theirs) * mask).sum(), logps)[1]
        torch.testing.assert_close(ours, other, atol=1e-15, rtol=0)


def test_gradient_of_the_critique_for_the_logits():
    """Invariant 9, on a row with two tokens of prompt."""
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(1, 5, 6, generator=g).double(), torch.randint(0, 6, (1, 5), generator=g)
    mask = f64([[0, 0, 1, 1, 1]])

    def loss(z):
        logps = z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return (policy_token_loss(logps, logps.detach(), f64([0.1]), mask, "nll", Config()) * mask / 8).sum()

    expected = 0.1 * (logits.softmax(-1) - torch.nn.functional.one_hot(ids, 6)) / 8 * mask[..., None]
    found = gradient(loss, logits)[1]
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=0)
    assert (found[0, :2] == 0).all()


# --- Eq. 3


def bare_rows(read, lengths, rewards=None):
    """y1 behind x0: rows of one prompt token; read [n][t] are the log-probs at which y1 was sampled."""
    rows = assemble([[1]] * len(lengths), [[2] * k for k in lengths], 0, logps=read)
    exact = torch.zeros_like(rows.behaviour_logps).double()
    for i, row in enumerate(read):
        exact[i, 1 : 1 + len(row)] = f64(row)
    rows = replace(rows, behaviour_logps=exact, loss_mask=rows.loss_mask.double())
    return replace(rows, reward=f64(rewards)) if rewards else rows


READ, BARE = [[-0.2, -0.5, -1.0], [-0.3, -0.1], [-2.0]], [[-0.7, -6.0, -1.5], [-0.2, -4.9], [-5.1]]
SEEN = f64([[0, -0.7, -6.0, -1.5], [0, -0.2, -4.9, 0], [0, -5.1, 0, 0]])  # BARE in its places
ASD = [0.75, -0.25, 0.5]


def sd_gradient(logps, **flags):
    config = Config(**flags)
    rows = bare_rows(READ, [3, 2, 1])
    term = distilled(rows, SEEN, f64(ASD), torch.arange(3), config.sd_coef, config)
    m = term.rows.loss_mask

    def loss(x):
        return (policy_token_loss(x, term.rows.behaviour_logps, term.weight, m, term.form, config) * m).sum()

    return gradient(loss, logps)


def in_places(values):
    out = torch.zeros(3, 4).double()
    for i, row in enumerate(values):
        out[i, 1 : 1 + len(row)] = f64(row)
    return out


def test_sd_gradient_is_that_of_the_advantage_weighted_regression():
    """Invariant 3: coef A keep (-logp), nothing below the floor, whatever the sampler's log-probs."""
    keep = [[1, 0, 1], [1, 1], [0]]
    expected = in_places([[-0.1 * a * k for k in row] for a, row in zip(ASD, keep, strict=True)])
    for loss in ("importance_sampling", "ppo", "cispo"):
        torch.testing.assert_close(sd_gradient(SEEN, loss=loss)[1], expected, atol=1e-15, rtol=0)
    unfloored = in_places([[-0.1 * a] * len(row) for a, row in zip(ASD, keep, strict=True)])
    torch.testing.assert_close(sd_gradient(SEEN, sd_floor=0.0)[1], unfloored, atol=1e-15, rtol=0)
    higher = in_places([[-0.1 * 0.75, 0, 0], [0.1 * 0.25, 0], [0]])
    torch.testing.assert_close(sd_gradient(SEEN, sd_floor=1.0)[1], higher, atol=1e-15, rtol=0)
    torch.testing.assert_close(sd_gradient(SEEN, sd_coef=1.0)[1], 10 * expected, atol=1e-14, rtol=0)


def test_sd_ratios_by_hand():
    ratio = [[math.exp(b - r) for b, r in zip(*rows, strict=True)] for rows in zip(BARE, READ, strict=True)]
    token = in_places([[-0.1 * a * rho for rho in row] for a, row in zip(ASD, ratio, strict=True)])
    keep = in_places([[1, 0, 1], [1, 1], [0]])
    torch.testing.assert_close(sd_gradient(SEEN, sd_ratio="token")[1], token * keep, atol=1e-15, rtol=0)
    clipped = in_places([[-0.1 * a * min(max(rho, 0.8), 1.2) for rho in row]
                         for a, row in zip(ASD, ratio, strict=True)])  # fmt: skip
    torch.testing.assert_close(sd_gradient(SEEN, sd_ratio="token_cispo")[1], clipped * keep, atol=1e-15, rtol=0)
    one_sided = in_places([[0 if (rho > 1.2 and a > 0) or (rho < 0.8 and a < 0) else -0.1 * a * rho for rho in row]
                           for a, row in zip(ASD, ratio, strict=True)])  # fmt: skip
    torch.testing.assert_close(sd_gradient(SEEN, sd_ratio="token_ppo")[1], one_sided * keep, atol=1e-15, rtol=0)
    whole = in_places([[-0.1 * a * math.prod(row)] * len(row) for a, row in zip(ASD, ratio, strict=True)])
    torch.testing.assert_close(sd_gradient(SEEN, sd_ratio="sequence")[1], whole * keep, atol=1e-15, rtol=0)


def test_the_weight_of_a_sequence_is_bounded():
    """A second try that the bare prompt makes e^30 times as likely counts e^10 times."""
    rows, config = bare_rows([[-31.0, -1.0]], [2]), Config(sd_ratio="sequence", sd_floor=0.0)
    term = distilled(rows, f64([[0, -1.0, -1.0]]), f64([2.0]), torch.tensor([0]), 1.0, config)
    assert term.weight.item() == pytest.approx(2 * math.exp(10))


def test_sequence_weight_makes_the_expectation_that_of_the_bare_policy():
    """Over all answers of two tokens from a vocabulary of 3: E_x1[w A grad logp_x0] = E_x0[A grad logp_x0]."""
    g = torch.Generator().manual_seed(0)
    bare, read = torch.randn(2, 3, 4, 3, generator=g).double()  # logits of the first token, then behind each
    found, expected, biased = (torch.zeros_like(bare) for _ in range(3))
    for y in itertools.product(range(3), repeat=2):
        a = f64([math.sin(1 + 3 * y[0] + y[1])])

        def logps(z, y=y):
            table = z.log_softmax(-1)[0]
            return torch.stack([torch.zeros(()).double(), table[0, y[0]], table[1 + y[0], y[1]]])[None]

        rows = bare_rows([logps(read)[0, 1:].tolist()], [2])
        rows = replace(rows, behaviour_logps=logps(read))
        for ratio, total in (("sequence", found), ("none", biased)):
            config = Config(sd_ratio=ratio, sd_coef=1.0, sd_floor=0.0)
            term = distilled(rows, logps(bare), a, torch.arange(1), 1.0, config)
            m = term.rows.loss_mask

            def loss(z, term=term, m=m, config=config, logps=logps):
                old = term.rows.behaviour_logps
                return (policy_token_loss(logps(z), old, term.weight, m, term.form, config) * m).sum()

            total += logps(read).sum().exp() * gradient(loss, bare)[1]
        expected += logps(bare).sum().exp() * gradient(lambda z, a=a, logps=logps: -(a * logps(z)).sum(), bare)[1]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert (biased - expected).abs().max() > 1e-2


@pytest.mark.parametrize("ratio", ["none", "token", "sequence"])
def test_with_nothing_to_read_all_ratios_agree(ratio):
    """Invariant 4."""
    config = Config(sd_ratio=ratio)
    rows = bare_rows(BARE, [3, 2, 1])
    term = distilled(rows, SEEN, f64(ASD), torch.arange(3), 0.1, config)
    m = term.rows.loss_mask
    loss = lambda x: (policy_token_loss(x, term.rows.behaviour_logps, term.weight, m, term.form, config) * m).sum()  # noqa: E731
    expected = in_places([[-0.075, 0, -0.075], [0.025, 0.025], [0]])
    torch.testing.assert_close(gradient(loss, SEEN)[1], expected, atol=1e-12, rtol=0)


def test_sft_is_the_right_second_tries_alone_with_one_weight():
    rows = bare_rows(READ, [3, 2, 1], [1.0, 0.0, 1.0])
    term = distilled(rows, SEEN, f64(ASD), torch.arange(3), 0.1, Config(mode="sft"))
    m = term.rows.loss_mask
    _, slope = gradient(lambda x: (policy_token_loss(x, SEEN, term.weight, m, term.form, Config()) * m).sum(), SEEN)
    torch.testing.assert_close(slope, in_places([[-0.1] * 3, [0, 0], [-0.1]]), atol=1e-9, rtol=0)


def test_inputs_are_left_alone():
    rows = bare_rows(READ, [3, 2, 1])
    before = [rows.loss_mask.clone(), rows.behaviour_logps.clone(), SEEN.clone()]
    distilled(rows, SEEN, f64(ASD), torch.arange(3), 0.1, Config(sd_ratio="sequence"))
    for x, y in zip(before, (rows.loss_mask, rows.behaviour_logps, SEEN), strict=True):
        assert torch.equal(x, y)


def test_what_the_loss_is_divided_by():
    first, second = bare_rows(READ, [3, 2, 1]), bare_rows(READ[1:], [2, 1])
    terms = [Term("rl", first, torch.tensor([0, 1, 2]), f64([1] * 3), "nll"),
             Term("sd", second, torch.tensor([1, 2]), f64([1] * 2), "nll")]  # fmt: skip
    for part, tokens in (([0, 1, 2], 9), ([1], 4), ([0], 3), ([2, 0], 5)):
        found = [normaliser(terms, torch.tensor(part), kind) for kind in ("batch", "sum", "token")]
        assert found == [len(part), 1, tokens]


# --- prompts and critics


def test_templates_hold_all_of_it_once_and_fresh():
    example = Example([{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+{2}?"}], "4")
    x1 = prompt_of("second_prompt", object(), example, attempt="it is {5}", critique="too large")
    assert x1[0] == example.prompt[0] and len(x1) == 2 and x1[1]["role"] == "user"
    text = x1[1]["content"]
    assert [text.count(word) for word in ("2+{2}?", "it is {5}", "too large")] == [1, 1, 1]
    assert "neither the attempt nor the critique" in text
    f = prompt_of("critic_prompt", object(), example, attempt="it is {5}")
    assert (
        f[1]["content"] == "2+{2}?\n\nAn attempt:\nit is {5}\n\nCritique:" and example.prompt[1]["content"] == "2+{2}?"
    )
    task = make_task("steps")
    example = Example([{"role": "user", "content": "3abcd="}], "1234")
    assert prompt_of("second_prompt", task, example, attempt="12", critique="x")[0]["content"] == "3abcd=12!x="
    assert prompt_of("critic_prompt", task, example, attempt="12")[0]["content"] == "3abcd=12?"


class Writer:
    model, tokenizer = load_model("steps-guesser", torch.device("cpu")), load_tokenizer("steps-guesser")

    def __init__(self, *texts):
        self.texts = texts

    def generate(self, asked, n, sampling, key):
        self.asked, self.n, self.sampling, self.key = asked, n, sampling, key
        return type("Written", (), {"texts": list(self.texts)})


class Bare:
    """A task without words of its own."""

    name = "bare"

    def draw(self, n, *key):
        return [Example([{"role": "user", "content": "1+1="}], "2", {"hint": " carry "})] * n


def test_critics_of_every_kind():
    task, brief = Bare(), Sampling(0.7, 9)
    examples, attempts = task.draw(2), ["3", "4"]
    rest = (task, examples, attempts, brief, (1, 2))
    assert criticise("correctness", None, *rest) == [BLANK] * 2 == ["incorrect"] * 2
    assert criticise("column:hint", None, *rest) == ["carry"] * 2
    writer = Writer("Let me see. Critique: wrong.\nCritique: too large \n", "no marker")
    assert criticise("self", writer, *rest) == ["too large", ""]  # nothing without the marker
    assert (writer.n, writer.sampling, writer.key) == (1, brief, (1, 2))
    for example, attempt in zip(writer.asked, attempts, strict=True):
        text = example.prompt[0]["content"]
        assert "1+1=" in text and attempt in text and "50 words" in text and "Critique:" in text
        assert "2" not in text.replace("1+1=", "")  # a judge that does not see the answer
    assert criticise("self", Writer(), task, [], [], brief, (0,)) == []
    steps = make_task("steps")
    example = steps.heldout(1)[0]
    writer = Writer("1:2")
    assert criticise("self", writer, steps, [example], ["9999"], brief, (0,)) == ["1:2"]
    assert writer.asked[0].prompt == steps.critic_prompt(example, "9999")


def test_what_a_critic_cannot_read_in_its_context_has_no_critique():
    task, said = Bare(), Writer("Critique: so")
    examples, attempts = task.draw(2), ["3", "4 " * 300]
    found = criticise("self", said, task, examples, attempts, Sampling(0.7, 9), (1, 2))
    assert found == ["so", ""] and len(said.asked) == 1


def test_what_holds_the_answer_gives_it_away():
    def held(critique, answer="12", **fields):
        return tells(Example([], answer, fields), critique)

    assert held("it is 12.") and held("12") and held("(12)") and held("x", "x")
    for other in ("it is 112", "0.12", "12.5", "-", "", "1 2", "12a"):
        assert not held(other)
    assert not held("", "") and not held("any", "")
    assert held("2:5", "7154", reveals="2:5") and not held("7154", "7154", reveals="2:5")
    assert held("so 7", "9", reveals=7) and held("9", "9", reveals=None)


def test_a_column_of_critiques_may_have_gaps():
    rows = [Example([], "1", {"hint": value}) for value in (None, "", "  ", 0, " no ")]
    found = criticise("column:hint", None, Bare(), rows, ["x"] * 5, Sampling(1.0, 4), (0,))
    assert found == ["", "", "", "0", "no"]


def test_which_critics_are_models():
    steps, bare = make_task("steps"), Bare()
    assert not any(is_model(spec, steps) for spec in ("task", "correctness", "self", "column:start"))
    assert is_model("some/model", bare) and not is_model("column:hint", bare)
    for spec, word in (("task", "no critic of its own"), ("column:hnt", "hint")):
        with pytest.raises(UserError, match=word):
            is_model(spec, bare)


def test_reasoning_gym_says_what_it_graded_and_never_the_answer():
    task = make_task("reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=3,max_digits=3")
    example = task.heldout(1)[0]
    wrong = str(int(example.answer) + 1)
    said = task.critique(example, f"I think <answer>{wrong}</answer>")
    assert wrong in said and "wrong" in said and "tags" not in said and example.answer not in said.split()
    assert "tags" in task.critique(example, f"it is {wrong}") and "no final answer" in task.critique(example, "hm")
    assert task.critique(example, f"<answer>{example.answer}</answer>") == ""
    assert "tags" in task.critique(example, f"<answer>{wrong}")  # never closed
    assert task.formed(example, wrong) and not task.formed(example, "hm")
    task = make_task("reasoning_gym:countdown")
    example = task.heldout(1)[0]
    said = task.critique(example, "<answer>1+</answer>")
    assert "1+" in said and example.answer not in said and not task.formed(example, " \n")


# --- whole runs

SMALL = {"model": "steps-guesser", "steps": 1, "prompts_per_step": 12, "group_size": 4, "eval_problems": 6,
         "eval_samples": 1, "eval_every": 0}  # fmt: skip


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)  # half of a short run's time


class Spy:
    """A run's samples by key, the rows that carried a loss, and the first gradient."""

    def __init__(self, patch, out, **given):
        self.rollouts, self.rows, self.scores, self.grads, self.steps = [], [], [], None, 0
        spy, step_, logps_ = self, Optimizer.step, rltf.token_logps

        class Engine(HFEngine):
            def generate(self, examples, n, sampling, key, starts=()):
                rollout = super().generate(examples, n, sampling, key, starts)
                spy.rollouts.append((key, sampling, rollout))
                return rollout

        def step(optimizer, n):
            spy.steps += 1
            spy.grads = spy.grads or [None if p.grad is None else p.grad.clone() for p in optimizer.weights]
            return step_(optimizer, n)

        def token_logps(model, rows, *rest):
            spy.rows.append(rows)
            found = logps_(model, rows, *rest)
            spy.scores.append(found[0].detach().clone())
            return found

        patch.setattr(rltf, "make_engine", lambda model, tokenizer, config=None: Engine(model, tokenizer))
        patch.setattr(Optimizer, "step", step)
        patch.setattr(rltf, "token_logps", token_logps)
        rltf.main(Config(**{**SMALL, **given, "out": str(out)}))
        patch.undo()
        self.first, self.second = (next((r for k, _, r in self.rollouts if k == (0, 1, i)), None) for i in (0, 2))
        self.lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def pieces(rollout, i):
    """A row's prompt ids and response ids."""
    ids = rollout.tokens[i, : int(rollout.attention_mask[i].sum())].tolist()
    start = int((rollout.loss_mask[i] > 0).nonzero()[0])
    return ids[:start], ids[start:]


def logps_by_hand(model, prompt, response, temperature=1.0):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def loss_by_hand(spy, model, mode, coef=0.1, lam=0.1, gamma=0.1, floor=-5.0, norm="batch", temperature=1.0):
    """The whole of Eq. 1 to 5 in loops, from what was sampled."""
    task, tokenizer = make_task("steps"), load_tokenizer("steps-guesser")
    first, second = spy.first, spy.second

    def reward(rollout, i):
        text, answer = rollout.texts[i], rollout.examples[i].answer
        formed = len(text) == 4 and text.isdigit() and bool(rollout.finished[i])
        return (1.0 if text == answer else 0.0) if formed else -0.1

    r0 = [reward(first, i) for i in range(len(first))]
    again = [i for i in range(len(first)) if r0[i] < 1] if mode != "single" else []
    assert len(again) == (0 if second is None else len(second))
    r1 = [None] * len(first)
    for j, i in enumerate(again):
        r1[i] = reward(second, j)
    group = first.group.tolist()
    a0, a1, sd, _ = reference(r0, r1, group, gamma)
    loss, tokens = 0.0, 0
    for i in range(len(first)):
        x0, y0 = pieces(first, i)
        loss, tokens = loss - a0[i] * logps_by_hand(model, x0, y0, temperature).sum(), tokens + len(y0)
        if r1[i] is None:
            continue
        x1, y1 = pieces(second, again.index(i))
        critique = task.critique(first.examples[i], first.texts[i])
        assert tokenizer.decode(x1) == first.examples[i].prompt[0]["content"] + f"{first.texts[i]}!{critique}="
        loss, tokens = loss - a1[i] * logps_by_hand(model, x1, y1, temperature).sum(), tokens + len(y1)
        if mode in ("sd", "both"):
            bare = logps_by_hand(model, x0, y1, temperature)
            kept = bare.detach() >= floor
            loss, tokens = loss - coef * sd[i] * bare[kept].sum(), tokens + int(kept.sum())
        if mode == "sft":
            loss = loss - coef * (r1[i] == 1) * logps_by_hand(model, x0, y1, temperature).sum()
        if mode in ("fm", "both"):
            f = encode(tokenizer, [{"role": "user", "content": tokenizer.decode(x0) + first.texts[i] + "?"}])
            target = [*encode(tokenizer, [{"role": "user", "content": critique}]), tokenizer.eos_token_id]
            loss, tokens = loss - lam * logps_by_hand(model, f, target, temperature).sum(), tokens + len(target)
    return loss / {"batch": len(first), "sum": 1, "token": tokens}[norm]


CASES = {
    "sd": ({}, {}), "fm": ({"mode": "fm"}, {}), "none": ({"mode": "none"}, {}), "single": ({"mode": "single"}, {}),
    "both": ({"mode": "both"}, {}), "sft": ({"mode": "sft"}, {}),
    "weights": ({"mode": "both", "sd_coef": 0.7, "fm_lambda": 0.3, "gamma": 0.6, "sd_floor": 2.0},
                {"coef": 0.7, "lam": 0.3, "gamma": 0.6, "floor": -2.0}),
    "sum": ({"loss_norm": "sum", "sd_floor": 1e9}, {"norm": "sum", "floor": -1e9}),
    "token": ({"mode": "both", "loss_norm": "token", "temperature": 1.4}, {"norm": "token", "temperature": 1.4}),
    "no floor": ({"sd_floor": 0.0, "loss": "ppo"}, {"floor": -1e9}),
}  # fmt: skip


@pytest.mark.parametrize(("given", "known"), CASES.values(), ids=CASES.keys())
def test_the_first_gradient_of_a_run_is_that_of_the_loops(given, known, tmp_path, monkeypatch):
    spy = Spy(monkeypatch, tmp_path / "run", **given)
    model = load_model("steps-guesser", torch.device("cpu")).double()
    loss = loss_by_hand(spy, model, given.get("mode", "sd"), **known)
    loss.backward()
    assert 0 < sum(r == 1 for r in spy.first.reward.tolist()) < len(spy.first)
    scale = max(p.grad.abs().max() for p in model.parameters())
    for p, found in zip(model.parameters(), spy.grads, strict=True):
        assert (p.grad - found).abs().max() < 1e-4 * scale
    row = spy.lines[1]
    assert row["loss/total"] == pytest.approx(sum(row[f"loss/{k}"] for k in ("rl", "sd", "fm")), abs=1e-5)
    assert (row["loss/sd"] != 0) == (given.get("mode", "sd") in ("sd", "both", "sft"))
    assert (row["loss/fm"] != 0) == (given.get("mode") in ("fm", "both"))


NOTHING = {"sd_coef": 0.0, "fm_lambda": 0.0}


@pytest.mark.parametrize(("mode", "zero"), [("fm", {"fm_lambda": 0.0}), ("sd", {"sd_coef": 0.0}), ("both", NOTHING),
                                            ("both", {**NOTHING, "loss_norm": "token"})])  # fmt: skip
def test_with_weight_0_the_run_is_that_without_bit_for_bit(mode, zero, tmp_path):
    """Invariant 5."""
    rltf.main(Config(**{**SMALL, "steps": 3}, mode=mode, **zero, out=str(tmp_path / "a")))
    rltf.main(
        Config(**{**SMALL, "steps": 3}, mode="none", loss_norm=zero.get("loss_norm", "batch"), out=str(tmp_path / "b"))
    )
    x, y = (load_model(str(tmp_path / name / "model"), torch.device("cpu")).state_dict() for name in "ab")
    start = load_model("steps-guesser", torch.device("cpu")).state_dict()
    assert all(torch.equal(x[key], y[key]) for key in x) and any(not torch.equal(x[key], start[key]) for key in x)


def test_the_student_never_reads_attempt_or_critique_where_it_is_measured(tmp_path, monkeypatch):
    """On the level of tokens: first tries in training and evaluation, and what Eq. 3 trains."""
    spy = Spy(monkeypatch, tmp_path / "run", steps=3, mode="both", eval_every=1)
    tokenizer = load_tokenizer("steps-guesser")
    plain = [r for _, _, r in spy.rollouts if len(r.examples[0].prompt[0]["content"]) == 6 and
             len(pieces(r, 0)[0]) == 6]  # fmt: skip
    assert len(plain) >= 3 + 4 * 3  # a training batch a step; samples, greedy and greedy again at four evaluations
    marks = {tokenizer.get_vocab()[c] for c in "!?:"}
    for rollout in plain:
        for i in range(len(rollout)):
            prompt = pieces(rollout, i)[0]
            assert prompt == encode(tokenizer, rollout.examples[i].prompt) and not marks & set(prompt)
    kinds = {"bare": 0, "second": 0, "critique": 0}
    sampled = {tuple(pieces(r, i)[1]) for key, _, r in spy.rollouts if key[2] == 2 for i in range(len(r))}
    for rows in spy.rows:
        for i in range(len(rows)):
            ids = rows.tokens[i, : int(rows.attention_mask[i].sum())].tolist()
            text, trained = tokenizer.decode(ids), rows.loss_mask[i, : len(ids)].tolist()
            if "?" in text:  # the critique alone is trained, behind the attempt
                at = text.index("?") + 1
                kinds["critique"] += 1
            elif "!" in text:  # the second try, behind the critique
                at = text.index("=", 6) + 1
                kinds["second"] += 1
            else:  # a first try, or a second one behind the bare prompt
                at = 6
                kinds["bare"] += 1
                assert not marks & set(ids) or tuple(ids[6:]) in sampled
            assert not any(trained[:at])
    assert min(kinds.values()) > 5


def test_reported_accuracy_is_of_first_tries_without_any_critique(tmp_path):
    rltf.main(Config(**{**SMALL, "eval_problems": 40}, out=str(tmp_path / "run")))
    task, model = make_task("steps"), load_model(str(tmp_path / "run" / "model"), torch.device("cpu"), train=False)
    engine = HFEngine(model, load_tokenizer("steps-guesser"))
    metrics, _ = evaluate(engine, task, task.heldout(40), 1, Sampling(1.0, 5), 0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["eval/accuracy"] == metrics["eval/accuracy"]
    assert summary["after"]["eval/greedy"] == metrics["eval/greedy"]


def test_only_wrong_first_tries_get_a_second_and_its_figures_are_logged(tmp_path, monkeypatch):
    spy = Spy(monkeypatch, tmp_path / "run", prompts_per_step=24)
    task, row = make_task("steps"), spy.lines[1]
    wrong = [i for i in range(len(spy.first)) if spy.first.texts[i] != spy.first.examples[i].answer]
    assert len(spy.second) == len(wrong) and row["rltf/second_share"] == len(wrong) / len(spy.first)
    assert [e.answer for e in spy.second.examples] == [spy.first.examples[i].answer for i in wrong]
    right = [e.answer == text for e, text in zip(spy.second.examples, spy.second.texts, strict=True)]
    assert row["rltf/second_accuracy"] == pytest.approx(sum(right) / len(right))
    told = [task.critique(spy.first.examples[i], spy.first.texts[i]) for i in wrong]
    assert row["rltf/leaked"] == pytest.approx(sum(c[:1] == "4" for c in told) / len(told)) and row["rltf/dropped"] == 0
    sampled = spy.first.loss_mask.sum() + spy.second.loss_mask.sum()
    assert row["rltf/tokens"] == int(sampled)
    assert row["train/accuracy"] == pytest.approx(1 - len(wrong) / len(spy.first))


def test_the_ramp_lets_the_weight_grow_from_0(tmp_path, monkeypatch):
    seen, original = [], rltf.distilled

    def watch(bare, logps, advantage, owner, coef, config):
        seen.append(coef)
        return original(bare, logps, advantage, owner, coef, config)

    monkeypatch.setattr(rltf, "distilled", watch)
    for ramp, expected in ((5, [0.1, 0.2, 0.3, 0.4]), (3, [0.2, 0.4, 0.4, 0.4]), (1, [0.4] * 4), (0, [0.4] * 5)):
        seen.clear()
        rltf.main(Config(**{**SMALL, "steps": 5, "sd_coef": 0.4, "sd_ramp": ramp}, out=str(tmp_path / f"{ramp}")))
        assert seen == pytest.approx(expected)


def test_a_second_prompt_beyond_the_context_is_dropped_and_counted(tmp_path, monkeypatch):
    long = make_task("steps").__class__
    told = long.critique
    monkeypatch.setattr(long, "critique", lambda self, e, y: "9" * 600 if y[0] in "02468" else told(self, e, y))
    seen, original = [], rltf.turn_advantages
    monkeypatch.setattr(rltf, "turn_advantages", lambda *facts: seen.append(facts) or original(*facts))
    spy = Spy(monkeypatch, tmp_path / "run", prompts_per_step=12, mode="both")
    row, (_, _, _, two, _) = spy.lines[1], seen[0]
    assert two.sum() == len(spy.second)  # those dropped count neither in a return nor in the mean of second rewards
    wrong = [t for e, t in zip(spy.first.examples, spy.first.texts, strict=True) if t != e.answer]
    assert row["rltf/dropped"] == sum(t[0] in "02468" for t in wrong) > 0 and len(spy.second) > 0
    assert row["rltf/second_share"] == len(spy.second) / len(spy.first)
    assert all(int(r.attention_mask.sum(1).max()) <= 512 for r in spy.rows)


def test_a_fine_for_form_is_taken_off_what_a_reward_of_ones_own_gives(tmp_path, monkeypatch):
    code = "def f(example, text):\n    assert text[:1] not in '01'\n    return 1.0 if text[:1] in '23' else -1.0\n"
    (tmp_path / "mine.py").write_text(code)
    own = {"reward": f"{tmp_path}/mine.py:f", "prompts_per_step": 24, "format_coef": 0.25}
    for limit, lost in ((5, False), (3, True)):
        spy = Spy(monkeypatch, tmp_path / f"{limit}", max_new_tokens=limit, **own)
        seen = set()
        for text, finished, reward in zip(spy.first.texts, spy.first.finished, spy.first.reward, strict=True):
            if text[:1] in "01":
                assert math.isnan(reward)
                continue
            earned = 1.0 if text[:1] in "23" else -1.0
            whole = bool(finished) and len(text) == 4
            assert float(reward) == (earned if whole else min(earned, 0) - 0.25)
            seen.add((earned, whole))
        assert {(1.0, not lost), (-1.0, not lost)} <= seen


def test_a_batch_is_split_into_as_many_optimizer_steps_as_asked_for(tmp_path, monkeypatch):
    for asked in (1, 5, 48):
        assert Spy(monkeypatch, tmp_path / f"{asked}", minibatches=asked).steps == asked
    with pytest.raises(UserError, match="--minibatches"):
        rltf.check(Config(**SMALL, minibatches=49))


def test_accuracy_in_training_is_the_tasks_also_where_form_is_fined(tmp_path, monkeypatch):
    spy = Spy(monkeypatch, tmp_path / "run", max_new_tokens=4, mode="single", prompts_per_step=24)
    right = [e.answer == text for e, text in zip(spy.first.examples, spy.first.texts, strict=True)]
    assert spy.lines[1]["train/accuracy"] == pytest.approx(sum(right) / len(right)) and sum(right) > 0
    assert spy.first.reward.tolist() == pytest.approx([-0.1] * 96)


def test_rounds_ask_what_feedback_modelling_trains(tmp_path, monkeypatch):
    """On a task without words of its own for it: Eq. 4's template, not the judge's."""
    spy = Spy(monkeypatch, tmp_path / "run", model="addition-student", task="addition", critic="correctness",
              max_new_tokens=16, mode="fm", eval_rounds=1, critique_tokens=3)  # fmt: skip
    tokenizer = load_tokenizer("addition-student")
    asked = {tokenizer.decode(pieces(r, 0)[0]) for key, _, r in spy.rollouts if key == (0, 0, 4)}
    assert asked and all(text.endswith("Critique:") and "An attempt:" in text for text in asked)
    trained = [tokenizer.decode(rows.tokens[0].tolist()) for rows in spy.rows]
    assert any("An attempt:" in text and "Critique:incorrect" in text for text in trained)


def test_accuracy_of_second_tries_on_held_out_problems(tmp_path, monkeypatch):
    spy = Spy(monkeypatch, tmp_path / "run", eval_problems=30)
    greedy = next(r for key, s, r in spy.rollouts if key == (0, 0, 2) and s.temperature == 0)
    wrong = [e for e, text in zip(greedy.examples, greedy.texts, strict=True) if text != e.answer]
    tried = [r for key, _, r in spy.rollouts if key == (0, 0, 1)][1]
    assert len(tried) == len(wrong) and [e.answer for e in tried.examples] == [e.answer for e in wrong]
    right = [e.answer == text for e, text in zip(tried.examples, tried.texts, strict=True)]
    assert any(right) and spy.lines[0]["rltf/second_heldout"] == pytest.approx(sum(right) / len(right))


def test_partial_credit_is_wrong_and_not_imitated(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def f(e, text): return 1.0 if text == e.answer else 0.5 * (text[:1] in '01234')\n"
    )
    terms, original = [], rltf.distilled
    monkeypatch.setattr(rltf, "distilled", lambda *facts: terms.append(original(*facts)) or terms[-1])
    spy = Spy(monkeypatch, tmp_path / "run", reward=f"{tmp_path}/mine.py:f", mode="sft")
    wrong = [e.answer != text for e, text in zip(spy.first.examples, spy.first.texts, strict=True)]
    assert len(spy.second) == sum(wrong) and {0.0, 0.5} <= set(spy.first.reward.tolist())
    right = [e.answer == text for e, text in zip(spy.second.examples, spy.second.texts, strict=True)]
    assert {0.5, 1.0} <= set(spy.second.reward.tolist())
    assert terms[0].weight.tolist() == pytest.approx([0.1 * each for each in right])


def test_what_is_logged_of_several_optimizer_steps(tmp_path, monkeypatch):
    """Losses are means over the steps on a batch; policy/kl_old is the mean of old - new over sampled tokens."""
    one = Spy(monkeypatch, tmp_path / "one", mode="both", lr=1e-12).lines[1]
    three = Spy(monkeypatch, tmp_path / "three", mode="both", lr=1e-12, minibatches=3).lines[1]
    for key in ("total", "rl", "sd", "fm"):
        assert three[f"loss/{key}"] == pytest.approx(one[f"loss/{key}"], rel=1e-4, abs=1e-6)
    spy = Spy(monkeypatch, tmp_path / "moved", mode="none", lr=0.02, minibatches=3)
    pairs = [(r.loss_mask, r.behaviour_logps - new) for r, new in zip(spy.rows, spy.scores, strict=True)]
    mean = sum((m * gap).sum() for m, gap in pairs) / sum(m.sum() for m, _ in pairs)
    assert abs(mean) > 1e-3 and spy.lines[1]["policy/kl_old"] == pytest.approx(float(mean), rel=1e-4)
    engine = max(float((m * gap).abs().max()) for m, gap in pairs)
    assert spy.lines[1]["engine/ratio_max"] < 1.01 < math.exp(engine)  # of the first step, before anything moved


def test_the_share_of_tokens_under_the_floor(tmp_path, monkeypatch):
    terms, original = [], rltf.distilled
    monkeypatch.setattr(rltf, "distilled", lambda *facts: terms.append((facts[0], original(*facts))) or terms[-1][1])
    row = Spy(monkeypatch, tmp_path / "run", sd_floor=2.0).lines[1]
    (bare, term), *_ = terms
    share = 1 - float(term.rows.loss_mask.sum() / bare.loss_mask.sum())
    assert 0.02 < share < 0.4 and row["rltf/floored"] == pytest.approx(share, abs=1e-6)


def test_a_second_prompt_that_just_fits_is_kept(tmp_path, monkeypatch):
    """512 positions hold 3bafe=7104! and =, a critique of 495 tokens and a try of 5."""
    for length, kept in ((495, True), (496, False)):
        monkeypatch.setattr(make_task("steps").__class__, "critique", lambda self, e, y, n=length: "9" * n)
        spy = Spy(monkeypatch, tmp_path / f"{length}")
        assert (spy.second is not None) == kept and (spy.lines[1]["rltf/dropped"] == 0) == kept
        if kept:
            assert len(pieces(spy.second, 0)[0]) == 507


def test_an_empty_critique_says_incorrect_and_predicts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(make_task("steps").__class__, "critique", lambda self, e, y: " ")
    spy = Spy(monkeypatch, tmp_path / "run", mode="fm")
    text = load_tokenizer("steps-guesser").decode(pieces(spy.second, 0)[0])
    assert text.endswith("!incorrect=") and spy.lines[1]["loss/fm"] == 0


def test_a_try_cut_short_is_unparsable_and_still_tried_again(tmp_path, monkeypatch):
    spy = Spy(monkeypatch, tmp_path / "run", max_new_tokens=3)
    assert spy.first.reward.tolist() == pytest.approx([-0.1] * len(spy.first))
    assert len(spy.second) == len(spy.first) and spy.second.reward.tolist() == pytest.approx([-0.1] * len(spy.first))
    assert spy.lines[1]["rltf/sd_advantage"] == pytest.approx(0, abs=1e-6)  # b is -0.1, too
    spy = Spy(monkeypatch, tmp_path / "off", max_new_tokens=3, format_coef=0.0)
    assert spy.first.reward.tolist() == [0.0] * len(spy.first)


@pytest.mark.parametrize("mode", ["sd", "fm", "both", "sft", "none"])
def test_a_batch_without_a_wrong_try_trains_nothing(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(rltf, "grade_all", lambda reward, examples, texts: [1.0] * len(examples))
    rltf.main(Config(**SMALL, mode=mode, format_coef=0.0, out=str(tmp_path / "run")))
    start = load_model("steps-guesser", torch.device("cpu")).state_dict()
    model = load_model(str(tmp_path / "run" / "model"), torch.device("cpu")).state_dict()
    assert all(torch.equal(model[key], start[key]) for key in start)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["rltf/second_share"] == row["loss/sd"] == row["loss/fm"] == row["optim/grad_norm"] == 0


def test_second_tries_that_nobody_can_score_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "seen = []\ndef f(example, text):\n    seen.append(1)\n    assert len(seen) <= 48\n"
        "    return text == example.answer\n"
    )
    spy = Spy(monkeypatch, tmp_path / "run", reward=f"{tmp_path}/mine.py:f", format_coef=0.0)
    assert spy.second.reward.isnan().all() and spy.lines[1]["rltf/sd_advantage"] == 0 == spy.lines[1]["loss/sd"]
    assert all(math.isfinite(value) for value in spy.lines[1].values()) and spy.lines[1]["optim/grad_norm"] > 0


@pytest.mark.parametrize("critic", ["correctness", "self", "steps-guesser", "column:start"])
def test_every_critic_runs(tmp_path, monkeypatch, critic):
    spy = Spy(monkeypatch, tmp_path / "run", critic=critic, mode="both", critique_tokens=4, temperature=1.3)
    tokenizer = load_tokenizer("steps-guesser")
    for j in range(len(spy.second)):
        prompt, example = tokenizer.decode(pieces(spy.second, j)[0]), spy.second.examples[j]
        said = prompt.partition("!")[2].removesuffix("=")
        assert said == {"correctness": BLANK, "column:start": example.fields["start"]}.get(critic, said)
    judged = [r for key, _, r in spy.rollouts if key == (0, 1, 1)]
    assert all(s == Sampling(1.3, 4) for key, s, _ in spy.rollouts if key == (0, 1, 1))
    assert len(judged) == (critic in ("self", "steps-guesser"))
    for rollout in judged:
        assert all(tokenizer.decode(pieces(rollout, i)[0]).endswith("?") for i in range(len(rollout)))
    assert spy.lines[1]["loss/fm"] > 0


def test_rounds_of_self_correction_are_measured_on_all_problems(tmp_path, monkeypatch):
    spy = Spy(monkeypatch, tmp_path / "run", eval_rounds=2, eval_problems=12)
    problems = make_task("steps").heldout(12)
    for line in spy.lines:
        assert 0 <= line["rltf/round_1"] <= 1 and 0 <= line["rltf/round_2"] <= 1
    tokenizer, rounds = load_tokenizer("steps-guesser"), []
    for key, sampling, rollout in spy.rollouts:
        if len(rollout) == 12 and sampling.temperature == 0 and "!" in tokenizer.decode(pieces(rollout, 0)[0]):
            right = [e.answer == t for e, t in zip(problems, rollout.texts, strict=True)]
            rounds.append(sum(right) / 12)
            assert key == (0, 0, 2)
    logged = [line[f"rltf/round_{k}"] for line in spy.lines for k in (1, 2)]
    assert len(rounds) >= 4 and [r for r in rounds if r in logged] and logged == pytest.approx(rounds[-4:])


@pytest.mark.parametrize("flags", [
    {"group_size": 1}, {"temperature": 0.0}, {"mode": "fm", "sd_ratio": "token"}, {"mode": "fm", "sd_coef": 0.2},
    {"mode": "none", "sd_baseline": "second"}, {"mode": "none", "sd_ramp": 3}, {"mode": "sft", "sd_floor": 1.0},
    {"mode": "sd", "fm_lambda": 1.0}, {"mode": "single", "gamma": 0.5}], ids=str)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(flags):
    with pytest.raises(UserError, match="--"):
        rltf.check(Config(**flags))
