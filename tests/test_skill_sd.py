"""methods/skill_sd.py against plain float64 references, written from the equations of the method's sheet."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.common.engines.hf import HFEngine
from posttrain.common.environments.episodes import Episode, Episodes, Turn
from posttrain.common.environments.summaries import (
    best_rows,
    fit_skill,
    parse_summary,
    room,
    skill_text,
    summarise,
    with_skill,
)
from posttrain.common.families.sokoban import without_oldest
from posttrain.common.machines import checkpoint
from posttrain.common.models import TINY, load_model, load_tokenizer
from posttrain.common.rollout import Sampling, assemble, encode, under_prompts
from posttrain.common.scoring import carry, score, score_within
from posttrain.common.tasks import Example, make_task
from posttrain.methods import grpo, skill_sd
from posttrain.methods.skill_sd import (
    Config,
    choose,
    full_divergence,
    group_advantages,
    keep,
    policy_token_loss,
    sdl_token_loss,
)

LN2 = math.log(2)


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def batch(seed, n=6, t=7, spread=0.6):
    """logps, old, teacher [n, t] float64, mask with an empty and a full row, h [n]."""
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(n, t, generator=g).double()
    old, teacher = logps + spread * torch.randn(2, n, t, generator=g).double()
    mask = (torch.arange(t) < torch.randint(1, t, (n, 1), generator=g)).double()
    mask[0], mask[1] = 1, 0
    return logps, old, teacher, mask, f64([1, 1, 0, 1, 0, 1])


def sdl(logps, old, teacher, mask, h, config):
    """Eq. 3 as main adds it up."""
    on = mask * h[:, None]
    return (sdl_token_loss(logps, old, teacher, on, config) * on).sum() / mask.sum()


def gradient(function, x, *rest):
    x = x.clone().requires_grad_()
    value = function(x, *rest)
    return value.detach(), torch.autograd.grad(value, x)[0]


def reference(logps, old, teacher, mask, h, est="iw_k3"):
    """Loops over rows and tokens: loss and d loss / d logps."""
    n = float(mask.sum())
    loss, grad = 0.0, torch.zeros_like(logps)
    for i in range(len(logps)):
        for t in range(logps.shape[1]):
            if not mask[i, t] or not h[i]:
                continue
            s, o, q = (float(x[i, t]) for x in (logps, old, teacher))
            ell, rho = s - q, math.exp(s - o)
            k3 = math.exp(-ell) - 1 + ell
            value, slope = {
                "iw_k3": (rho * k3, rho * ell),
                "k3": (k3, 1 - math.exp(-ell)),
                "iw_k3_detached": (rho * k3, rho * (1 - math.exp(-ell))),
                "pg": (rho * ell, rho * ell),
            }[est]
            loss += value / n
            grad[i, t] = slope / n
    return loss, grad


# --- invariant 1: without Eq. 3 it is GRPO


@pytest.mark.parametrize("seed", range(4))
def test_the_policy_loss_is_grpos_bit_for_bit(seed):
    logps, old, _, mask, _ = batch(seed)
    group, reward = torch.tensor([0, 0, 1, 1, 2, 2]), f64([1, 0, 0, 0, 0.5, 1])
    ours, theirs = Config(), grpo.Config(eps_hi=0.28)
    a = group_advantages(reward, group, 1e-6)
    assert torch.equal(a, grpo.group_advantages(reward, group, "group_std", 1e-6))
    c = grpo.row_weights(mask, group, "token", 0)[:, None]

    def mine(x):
        return (policy_token_loss(x, old, a, mask, ours) * mask * (1 / mask.sum())).sum()

    def other(x):
        return (grpo.policy_token_loss(x, grpo.importance_ratio(x, old, mask, "token"), a, theirs) * mask * c).sum()

    for x, y in zip(gradient(mine, logps), gradient(other, logps), strict=True):
        assert torch.equal(x, y)


def test_advantages_by_hand():
    a = group_advantages(f64([1, 0, 0, 1, 0.5, 0.5, math.nan, 1]), torch.tensor([3, 3, 3, 3, 1, 1, 2, 2]), 1e-6)
    std = math.sqrt(4 * 0.25 / 3)
    expected = [0.5 / (std + 1e-6) * sign for sign in (1, -1, -1, 1)]
    assert a.tolist() == pytest.approx([*expected, 0, 0, 0, 0], abs=1e-12) and (a[4:] == 0).all()


def test_clip_by_hand():
    logps, old = f64([[LN2, -LN2, LN2, -LN2]]), f64([[0.0, 0, 0, 0]])
    mask = torch.ones_like(logps)
    config = Config()
    up, g_up = gradient(lambda x: policy_token_loss(x, old, f64([1.0]), mask, config).sum(), logps)
    down, g_down = gradient(lambda x: policy_token_loss(x, old, f64([-1.0]), mask, config).sum(), logps)
    assert up.item() == pytest.approx(-2 * (1.28 + 0.5)) and g_up.tolist() == [[0, -0.5, 0, -0.5]]
    assert down.item() == pytest.approx(2 * (2 + 0.8)) and g_down.tolist() == [[2, 0, 2, 0]]


# --- invariants 2, 3, 5, 6


@pytest.mark.parametrize("seed", range(4))
def test_a_teacher_that_agrees_gives_no_loss_and_exactly_no_gradient(seed):
    logps, old, _, mask, h = batch(seed)
    value, grad = gradient(lambda x: sdl(x, old, logps, mask, h, Config()), logps)
    assert value == 0 and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("est", ["iw_k3", "k3", "iw_k3_detached", "pg"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_the_loops(seed, est):
    logps, old, teacher, mask, h = batch(seed)
    value, grad = gradient(lambda x: sdl(x, old, teacher, mask, h, Config(est=est)), logps)
    expected, slope = reference(logps, old, teacher, mask, h, est)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(grad, slope, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_gradient_for_the_logits_is_rho_ell_times_onehot_minus_softmax(seed):
    _, old, teacher, mask, h = batch(seed)
    g = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(6, 7, 5, generator=g).double(), torch.randint(0, 5, (6, 7), generator=g)

    def loss(z):
        return sdl(z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1), old, teacher, mask, h, Config())

    s = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    weight = mask * h[:, None] * (s - old).exp() * (s - teacher) / mask.sum()
    expected = weight[..., None] * (torch.nn.functional.one_hot(ids, 5) - logits.softmax(-1))
    torch.testing.assert_close(gradient(loss, logits)[1], expected, atol=1e-12, rtol=0)


def test_hand_case_of_three_tokens():
    ell, rho, mask = f64([[LN2, -LN2, 0.0]]), f64([[1.0, 2.0, 0.5]]), torch.ones(1, 3).double()
    logps = f64([[-1.0, -1.5, -2.0]])
    old, teacher = logps - rho.log(), logps - ell
    tokens = sdl_token_loss(logps, old, teacher, mask, Config())
    assert tokens.tolist()[0] == pytest.approx([0.193147, 0.613706, 0], abs=1e-6)
    value, grad = gradient(lambda x: sdl(x, old, teacher, mask, f64([1]), Config()), logps)
    assert value.item() == pytest.approx(0.268951, abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([0.231049, -0.462098, 0], abs=1e-6)


@pytest.mark.parametrize("est", ["iw_k3", "k3", "iw_k3_detached"])
def test_the_weighted_k3_is_never_negative(est):
    for seed in range(20):
        logps, old, teacher, mask, _ = batch(seed, spread=3.0)
        assert (sdl_token_loss(logps, old, teacher, mask, Config(est=est)) >= 0).all()


def test_clamps_bound_the_loss_where_a_log_ratio_explodes():
    one = torch.ones(1, 1)
    value, grad = gradient(
        lambda x: sdl_token_loss(x, f64([[-60.0]]), f64([[0.0]]), one, Config()).sum(), f64([[-30.0]])
    )
    assert value.item() == pytest.approx(math.exp(10) * (math.exp(20) - 1 - 30)) and grad.isfinite().all()


def test_values_where_the_mask_is_0_change_nothing():
    logps, old, teacher, mask, h = batch(0)
    on = mask * h[:, None]

    def loss(x, y, z):
        return torch.where(on > 0, sdl_token_loss(x, y, z, on, Config()), 0).sum()

    value, slope = gradient(loss, logps, old, teacher)
    for junk in (math.inf, -math.inf, 1e30):
        x, y, z = (torch.where(on > 0, v, junk) for v in (logps, old, teacher))
        assert sdl_token_loss(x, y, z, on, Config()).isfinite().all()
        found = gradient(loss, x, y, z)
        assert torch.equal(found[0], value) and torch.equal(found[1], slope)


@pytest.mark.parametrize("est", ["iw_k3", "k3", "iw_k3_detached", "pg"])
def test_inputs_are_left_alone(est):
    parts = batch(0)
    before = [x.clone() for x in parts]
    sdl_token_loss(*parts[:4], Config(est=est))
    policy_token_loss(parts[0], parts[1], parts[4], parts[3], Config())
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))


# --- invariant 4: what the estimators estimate, by exact expectation over a vocabulary of 4


def expected_gradient(student, behaviour, teacher, est):
    """E over tokens drawn from behaviour of the loss's gradient for the student's logits, in float64."""
    total, value = torch.zeros(4).double(), 0.0
    probs = behaviour.softmax(-1)
    for y in range(4):
        z = student.clone().requires_grad_()
        s, o, q = z.log_softmax(-1)[y], behaviour.log_softmax(-1)[y], teacher.log_softmax(-1)[y]
        shaped = [x.view(1, 1) for x in (s, o, q)]
        loss = sdl_token_loss(*shaped, torch.ones(1, 1), Config(est=est)).sum()
        total += probs[y] * torch.autograd.grad(loss, z)[0]
        value += probs[y] * loss.detach()
    return value, total


def kl(a, b, z):
    """KL(a || b) and its gradient for z, on which a or b depends."""
    value = (a.exp() * (a - b)).sum()
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_loss_has_value_and_gradient_of_the_reverse_kl_even_off_policy(seed):
    g = torch.Generator().manual_seed(seed)
    student, behaviour, teacher = torch.randn(3, 4, generator=g).double()
    z = student.clone().requires_grad_()
    reverse, slope = kl(z.log_softmax(-1), teacher.log_softmax(-1), z)
    value, grad = expected_gradient(student, behaviour, teacher, "iw_k3")
    torch.testing.assert_close(value, reverse, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, slope, atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient(student, behaviour, teacher, "pg")[1], slope, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("est", ["k3", "iw_k3_detached"])
def test_without_the_weights_gradient_it_is_the_forward_kls(seed, est):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 4, generator=g).double()
    z = student.clone().requires_grad_()
    _, forward = kl(teacher.log_softmax(-1), z.log_softmax(-1), z)
    z = student.clone().requires_grad_()
    _, reverse = kl(z.log_softmax(-1), teacher.log_softmax(-1), z)
    _, grad = expected_gradient(student, student, teacher, est)  # on-policy: r is 1
    torch.testing.assert_close(grad, forward, atol=1e-12, rtol=0)
    assert (grad - reverse).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_detached_weight_is_the_forward_kl_off_policy_too(seed):
    g = torch.Generator().manual_seed(seed)
    student, behaviour, teacher = torch.randn(3, 4, generator=g).double()
    z = student.clone().requires_grad_()
    _, forward = kl(teacher.log_softmax(-1), z.log_softmax(-1), z)
    _, grad = expected_gradient(student, behaviour, teacher, "iw_k3_detached")
    torch.testing.assert_close(grad, forward, atol=1e-12, rtol=0)


# --- invariant 8, and the bank


def skill(n, reward_sum, text="x"):
    return {"text": text, "reward": 0.0, "n": n, "reward_sum": reward_sum}


def test_an_empty_bank_gives_no_skill():
    assert choose([], 1.0) is None


def test_untried_skills_come_first_the_oldest_of_them():
    assert choose([skill(3, 3.0), skill(0, 0.0), skill(0, 0.0)], 1.0) == 1
    assert choose([skill(0, 0.0), skill(9, 9.0)], 0.0) == 0


def test_without_exploration_the_best_mean_wins_and_ties_go_to_the_oldest():
    assert choose([skill(4, 1.0), skill(2, 1.0), skill(10, 5.0)], 0.0) == 1
    assert choose([skill(2, 1.0), skill(4, 2.0)], 0.0) == 0


def test_the_logarithm_of_one_trial_is_0():
    assert choose([skill(1, 0.25)], 1e9) == 0


def test_exploration_by_hand():
    bank = [skill(8, 4.0), skill(2, 0.6)]
    bonus = [math.sqrt(math.log(10) / n) for n in (8, 2)]
    for c in (0.0, 0.1, 0.3, 1.0):
        values = [0.5 + c * bonus[0], 0.3 + c * bonus[1]]
        assert choose(bank, c) == values.index(max(values))
    assert choose(bank, 0.0) == 0 and choose(bank, 1.0) == 1


def test_the_bank_keeps_the_newest_without_duplicates_or_empty_skills():
    bank = []
    for text in ("a", "b", "", "a", "c", "d"):
        keep(bank, text, 1.0, 3)
    assert [s["text"] for s in bank] == ["b", "c", "d"] and all(s["n"] == 0 == s["reward_sum"] for s in bank)
    bank[0]["n"] = 5
    keep(bank, "b", 0.0, 3)
    assert [s["n"] for s in bank] == [5, 0, 0] and bank[0]["reward"] == 1.0


# --- prompts and summaries


def test_the_skill_stands_once_before_the_task_in_a_message_that_is_there():
    user = [{"role": "user", "content": "go"}]
    assert with_skill(user, "") == user
    assert with_skill(user, "S ") == [{"role": "user", "content": "S go"}]
    system = [{"role": "system", "content": "rules"}, *user]
    assert with_skill(system, "S ") == [{"role": "system", "content": "S rules"}, *user]
    assert system[0]["content"] == "rules" and with_skill(system, "") == system and user[0]["content"] == "go"
    shown = [{"role": "assistant", "content": "hello"}, *user, *user]
    assert with_skill(shown, "S ") == [shown[0], {"role": "user", "content": "S go"}, *user]
    tokenizer = load_tokenizer("sokoban-student")  # the tokens of a skill in a system message, as in pretraining
    behind = [{"role": "system", "content": "[aB>+]"}, {"role": "user", "content": "?mbG"}]
    assert encode(tokenizer, behind) == encode(tokenizer, with_skill([{"role": "user", "content": "?mbG"}], "[aB>+]"))


def test_a_skill_that_does_not_fit_loses_its_oldest_entries_or_is_left_out():
    task, tokenizer = make_task("sokoban"), load_tokenizer("sokoban-student")
    prompt, text = [{"role": "user", "content": "?mbG"}], "[aB>+cD<-eF^+]"  # 4 + 14 tokens
    fitted = {most: fit_skill(text, prompt, most, tokenizer, task)[0] for most in (math.inf, 18, 17, 14, 13, 9, 3)}
    assert list(fitted.values()) == [text, text, "[cD<-eF^+]", "[cD<-eF^+]", "[eF^+]", "", ""]
    assert fit_skill(text, prompt, 17, tokenizer, task)[1] == with_skill(prompt, "[cD<-eF^+]")
    assert fit_skill(text, prompt, 17, tokenizer, object()) == ("", prompt)  # no entries: all of it
    assert fit_skill(text, prompt, 18, tokenizer, object()) == (text, with_skill(prompt, text))
    assert without_oldest("[eF^+]") == "" == without_oldest("")


SUMMARY = {"success_analysis": "up is free", "mistake_analysis": "left is a trap", "golden_workflow": "up, right"}


@pytest.mark.parametrize(
    "text",
    [
        '{"success_analysis": "up is free", "mistake_analysis": "left is a trap", "golden_workflow": "up, right"}',
        'Sure!\n```json\n{\n "golden_workflow" : "up, right",\n "success_analysis":"up is free", '
        '"mistake_analysis": "left is a trap",\n}\n``` I hope {this} helps',
        '{"success_analysis": "...", "mistake_analysis": "...", "golden_workflow": "..."}\nNow: {"success_analysis": '
        '"up is free", "mistake_analysis": "left is a trap", "golden_workflow": "up, right"',
    ],
)
def test_summaries_are_found_in_sloppy_answers(text):
    assert parse_summary(text) == SUMMARY


def test_summaries_with_quotes_lines_and_missing_parts():
    found = parse_summary('{"golden_workflow": "say \\"up\\"\\nthen stop", "mistake_analysis": 3}')
    assert found == {"success_analysis": "", "mistake_analysis": "", "golden_workflow": 'say "up"\nthen stop'}


@pytest.mark.parametrize(
    ("text", "workflow"),
    [
        ('{"golden_workflow": "up, ri', "up, ri"),
        (r'{"golden_workflow": "up' + "\\", "up"),  # cut in an escape
        (r'{"golden_workflow": "up \u00e', r"up \u00e"),
        (r'{"golden_workflow": "up \u00e9\t\\ \"now\"", "x": 1}', 'up é\t\\ "now"'),
        (r'{"golden_workflow": "it\'s C:\dir"}', r"it\'s C:\dir"),  # no escapes of JSON
        (r'{"golden_workflow": "up \ud83d', "up"),  # half an emoji
        ('{"golden_workflow": "up"} {"golden_workflow": "', "up"),
        ('{"golden_workflow": "up\nright"}', "up\nright"),
    ],
)
def test_cut_summaries_and_escapes(text, workflow):
    found = parse_summary(text)["golden_workflow"]
    assert found == workflow and found.encode()


@pytest.mark.parametrize("text", ["", "up", "{}", "[1]", '{"golden_workflow": ""}', '{"a": "b"}', "{" * 5000,
                                  '{"success_analysis": "...", "golden_workflow": "..."}'])  # fmt: skip
def test_no_summary_is_none(text):
    assert parse_summary(text) is None


def test_which_parts_of_a_summary_are_kept():
    bare = object()
    parts = ["success analysis: up is free", "mistake analysis: left is a trap", "golden workflow: up, right", ""]
    assert skill_text(SUMMARY, "both", bare).split("\n\n") == parts
    assert skill_text(SUMMARY, "mistakes", bare) == "mistake analysis: left is a trap\n\n"
    assert "trap" not in skill_text(SUMMARY, "workflow", bare) and skill_text(SUMMARY, "none", bare) == ""
    task = make_task("sokoban")
    compact = {**SUMMARY, "golden_workflow": "aB>+", "mistake_analysis": "cD<-"}
    assert [skill_text(compact, kind, task) for kind in ("both", "workflow", "mistakes", "none")] == [
        "[aB>+cD<-]", "[aB>+]", "[cD<-]", ""]  # fmt: skip


def graded(rewards, turns, group):
    n = len(rewards)
    episodes = [Episode([Turn("x") for _ in range(k)]) for k in turns]
    rest = {"reward": torch.tensor(rewards), "episodes": episodes, "group": torch.tensor(group)}
    return assemble([[1]] * n, [[2]] * n, 0, examples=[Example([{"role": "user", "content": "t"}], "")] * n, **rest)


def test_the_best_row_of_a_group_has_the_highest_reward_then_fewest_turns():
    rollout = graded([0.0, 1.0, 1.0, 0.5, 0.0, 0.0], [1, 5, 4, 2, 7, 7], [0, 0, 0, 1, 1, 2])
    assert best_rows(rollout) == [2, 3, 5]


def test_a_row_without_a_reward_is_chosen_last():
    nan = math.nan
    rollout = graded([nan, 0.0, 1.0, nan, nan, nan], [1, 9, 1, 1, 3, 2], [0, 0, 1, 1, 2, 2])
    assert best_rows(rollout) == [1, 2, 5]


def test_a_failed_episode_never_makes_a_workflow():
    class Told:
        def summarise(self, example, episode):
            return dict(SUMMARY)

    rollout = graded([1.0, 0.99], [2, 2], [0, 1])
    won, lost = summarise(rollout, [0, 1], Told(), None, Sampling(), (0,))
    assert won == SUMMARY and lost == {**SUMMARY, "success_analysis": "", "golden_workflow": ""}


class Writer:
    """A model that answers what it is told to, with so many positions."""

    tokenizer = load_tokenizer("sokoban-student")

    def __init__(self, positions, texts):
        self.model = torch.nn.Module()
        self.model.config = Qwen3Config(max_position_embeddings=positions)
        self.texts, self.asked = texts, []

    def generate(self, asked, n, sampling, key):
        self.asked = [example.prompt[0]["content"] for example in asked]
        assert all(len(encode(self.tokenizer, e.prompt)) + sampling.max_new_tokens <= room(self, 0) for e in asked)
        return type("Answer", (), {"texts": self.texts[: len(asked)]})


def test_a_model_that_sums_up_reads_task_attempt_and_reward_and_begins_with_the_workflow():
    rollout = graded([1.0, 0.0], [1, 1], [0, 1])
    writer = Writer(4096, ["nothing", '{"golden_workflow": "up", "mistake_analysis": "down"}'])
    rollout.texts = ["my first try", "my second try"]
    first, second = summarise(rollout, [0, 1], None, writer, Sampling(), (0,))
    assert first is None and second["golden_workflow"] == "" and second["mistake_analysis"] == "down"
    assert "my first try" in writer.asked[0] and "1.00" in writer.asked[0] and "my second try" in writer.asked[1]
    assert "0.00" in writer.asked[1] and len({writer.asked[0].index(part) for part in SUMMARY}) == 3
    assert min(SUMMARY, key=writer.asked[0].index) == "golden_workflow"


def test_a_summary_of_an_attempt_that_is_too_long_is_of_its_end_and_of_none_if_the_task_is():
    rollout = graded([1.0, 1.0, 1.0], [1, 1, 1], [0, 1, 2])
    rollout.texts = ["x" * 300 + "the end", "short", "short"]
    rollout.examples[2] = Example([{"role": "user", "content": "t" * 500}], "")
    answer = '{"golden_workflow": "%s"}'
    writer = Writer(300, [answer % "a", answer % "b"])
    found = summarise(rollout, [0, 1, 2], None, writer, Sampling(1.0, 40), (0,))
    assert [s and s["golden_workflow"] for s in found] == ["a", "b", None]
    assert "xxthe end\nReward" in writer.asked[0] and "x" * 300 not in writer.asked[0] and len(writer.asked) == 2
    assert len(encode(writer.tokenizer, [{"content": writer.asked[0]}])) == 260  # as much as fits


# --- the teacher's view


@pytest.fixture(scope="module")
def played():
    task, tokenizer = make_task("sokoban"), load_tokenizer("sokoban-student")
    model = load_model("sokoban-student", torch.device("cpu"), train=False)
    engine = Episodes(HFEngine(model, tokenizer), task.environment, 12)
    return task, tokenizer, model, engine.generate(task.train[:6], 2, Sampling(1.0, 36), (0, 0))


def logps_by_hand(model, ids):
    """log p(ids[t] | ids[<t]) of one row by plain transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [0.0] + [logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(1, len(ids))]


def test_teacher_log_probs_are_those_of_skill_prompt_and_the_very_same_tokens(played):
    task, tokenizer, model, rollout = played
    prompts = [encode(tokenizer, with_skill(e.prompt, task.skill_text(task.oracle(e)))) for e in rollout.examples]
    seen = under_prompts(rollout, prompts, tokenizer.pad_token_id)
    q, held = score_within(model, seen, rollout, 4096)
    assert torch.equal(held, rollout.loss_mask)
    for i in range(len(rollout)):
        length = int(rollout.attention_mask[i].sum())
        plain_length = len(encode(tokenizer, rollout.examples[i].prompt))
        ids = prompts[i] + rollout.tokens[i, plain_length:length].tolist()
        by_hand = logps_by_hand(model, ids)[len(prompts[i]) :]
        mask = rollout.loss_mask[i, plain_length:length]
        expected = torch.tensor(by_hand) * mask
        torch.testing.assert_close(q[i, plain_length:length].double(), expected.double(), atol=1e-4, rtol=0)
        assert (q[i, :plain_length] == 0).all() and (q[i, length:] == 0).all()


def test_without_a_skill_the_teacher_with_the_same_weights_agrees_exactly_with_the_student(played):
    _, tokenizer, model, rollout = played
    prompts = [encode(tokenizer, with_skill(e.prompt, "")) for e in rollout.examples]
    seen = under_prompts(rollout, prompts, tokenizer.pad_token_id)
    q, _ = score_within(model, seen, rollout, 4096)
    assert torch.equal(q, score(model, rollout, 4096)[0])


def test_a_context_too_short_for_skill_and_episode_scores_what_it_holds():
    config = Qwen3Config(vocab_size=98, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=32,
                         num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=10)  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    model.autocast_dtype = None
    rollout = assemble([[5, 6], [5, 7]], [[8, 9, 10, 11], [8, 9]], 0, turns=[[0, -1, -1, 1], [0, -1]])
    seen = under_prompts(rollout, [[20] * 8 + [5, 6], [20] * 4 + [5, 7]], 0)  # first row: all of it lies beyond
    q, held = score_within(model, seen, rollout, 4096)
    assert held.tolist() == [[0] * 6, [0, 0, 1, 0, 0, 0]]
    q2, held2 = score_within(model, under_prompts(rollout, [[20] * 6, [20] * 6], 0), rollout, 4096)
    assert held2.tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]
    assert q2[0, 2] == pytest.approx(logps_by_hand(model, [20] * 6 + [8])[-1], abs=1e-5)
    assert q[0].abs().sum() == 0 and q[1, 2] == pytest.approx(logps_by_hand(model, [20] * 4 + [5, 7, 8])[-1], abs=1e-5)


def test_full_divergence_is_the_reverse_kl_at_the_chosen_tokens(played):
    task, tokenizer, model, rollout = played
    prompts = [encode(tokenizer, with_skill(e.prompt, task.skill_text(task.oracle(e)))) for e in rollout.examples]
    seen = under_prompts(rollout, prompts, tokenizer.pad_token_id)
    chosen = torch.tensor([1, 4, 5])
    on = torch.zeros_like(rollout.loss_mask).index_fill(0, chosen, 1) * rollout.loss_mask
    on = on * (torch.rand(on.shape, generator=torch.Generator().manual_seed(0)) < 0.6)  # as if the rest did not fit
    seen.loss_mask = carry(on, rollout, seen)
    hidden = skill_sd.sampled_hidden(model, rollout)
    found = full_divergence(model, hidden, model, seen[chosen], rollout.loss_mask, on, 0.7)
    assert (found[on == 0] == 0).all() and 0 < on.sum() < rollout.loss_mask[chosen].sum()
    for i in chosen.tolist():
        for t in on[i].nonzero().squeeze(1).tolist():
            plain_length = len(encode(tokenizer, rollout.examples[i].prompt))
            ids = prompts[i] + rollout.tokens[i, plain_length:t].tolist()
            with torch.no_grad():
                p = (model(rollout.tokens[i : i + 1, :t]).logits[0, -1].double() / 0.7).log_softmax(-1)
                r = (model(torch.tensor([ids])).logits[0, -1].double() / 0.7).log_softmax(-1)
            assert found[i, t].item() == pytest.approx((p.exp() * (p - r)).sum().item(), abs=2e-5)


# --- invariants 7 and 9, in whole runs

SMALL = {"steps": 3, "prompts_per_step": 12, "group_size": 4, "eval_problems": 4, "eval_samples": 1, "eval_every": 0}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Spy:
    """What a run sampled, read and kept, step by step."""

    def __init__(self, patch, tmp_path: Path, skill=None, **given):
        self.rollouts, self.seen, self.scored, self.used, self.events = [], [], [], [], []
        generate, within, pick, keep_ = Episodes.generate, skill_sd.score_within, skill_sd.choose, skill_sd.keep

        def generates(engine, *args, **kwargs):
            self.rollouts.append(generate(engine, *args, **kwargs))
            self.events.append("sample")
            return self.rollouts[-1]

        def scores(model, seen, *rest):
            self.seen.append(seen)
            self.scored.append((self.rollouts[-1], rest[0], within(model, seen, *rest)[0]))
            return within(model, seen, *rest)

        def chooses(bank, c):
            i = pick(bank, c)
            self.used.append(None if i is None else bank[i]["text"])
            self.events.append(("use", self.used[-1]))
            return i

        def keeps(bank, text, reward, size):
            self.events.append(("keep", skill or text))
            return keep_(bank, skill or text, reward, size)

        patch.setattr(Episodes, "generate", generates)
        patch.setattr(skill_sd, "score_within", scores)
        patch.setattr(skill_sd, "choose", chooses)
        patch.setattr(skill_sd, "keep", keeps)
        skill_sd.main(Config(**{**SMALL, **given, "out": str(tmp_path)}))
        patch.undo()


@pytest.mark.parametrize("agg", ["token", "seq_sum"])
def test_the_logged_loss_is_eq_3_over_all_sampled_tokens_of_the_batch(monkeypatch, tmp_path, agg):
    spy = Spy(monkeypatch, tmp_path / "run", steps=4, prompts_per_step=36, sdl_agg=agg)
    logged = [row for row in metrics(tmp_path / "run")[1:] if row["skill/told"]]
    assert len(logged) == len(spy.scored) > 1
    for row, (rollout, told, q) in zip(logged, spy.scored, strict=True):
        n = float(rollout.loss_mask.sum()) if agg == "token" else len(rollout)
        ell = (told.behaviour_logps - q)[told.loss_mask > 0].double()  # r is 1
        assert len(told) < len(rollout) and ell.abs().max() > 0.1
        assert row["loss/sdl"] == pytest.approx(((-ell).exp() - 1 + ell).sum().item() / n, rel=1e-3)
        assert row["loss/total"] == pytest.approx(row["loss/grpo"] + 0.1 * row["loss/sdl"], rel=1e-3, abs=1e-6)


def test_another_skill_changes_what_the_teacher_reads_and_nothing_that_the_student_does(monkeypatch, tmp_path):
    """The learning rate is 0, so that the student stays the same whatever the teacher says."""
    given = {"lr": 1e-30, "steps": 4, "prompts_per_step": 36}
    a = Spy(monkeypatch, tmp_path / "a", skill="[aB>+]", **given)
    b = Spy(monkeypatch, tmp_path / "b", skill="[xY^-wX<+]", **given)
    opening = load_tokenizer("sokoban-student").get_vocab()["["]
    # the teacher's evaluations read skills; what is left is the student's
    own = [[r for r in spy.rollouts if not (r.tokens[:, 0] == opening).any()] for spy in (a, b)]
    assert len(own[0]) == len(own[1]) >= 8 and a.seen and len(a.seen) == len(b.seen)
    compared = 0
    for x, y in zip(*own, strict=True):
        if x.tokens.shape == y.tokens.shape and torch.equal(x.tokens, y.tokens):
            assert torch.equal(x.loss_mask, y.loss_mask) and torch.equal(x.behaviour_logps, y.behaviour_logps)
            compared += 1
    assert compared == len(own[0])
    for x, y in zip(a.seen, b.seen, strict=True):
        assert (x.tokens[:, 0] == opening).all() and (y.tokens[:, 0] == opening).all()
        assert x.tokens.shape[1] != y.tokens.shape[1] or not torch.equal(x.tokens, y.tokens)
        for i in range(len(x)):  # the same sampled tokens behind another prompt
            assert torch.equal(x.tokens[i][x.loss_mask[i] > 0], y.tokens[i][y.loss_mask[i] > 0])


def test_a_teacher_that_reads_nothing_agrees_with_a_student_that_has_not_moved(tmp_path):
    given = {**SMALL, "steps": 3, "prompts_per_step": 36, "lr": 1e-30, "teacher_sync": "frozen"}
    skill_sd.main(Config(**given, skill_to="nobody", out=str(tmp_path / "a")))
    skill_sd.main(Config(**given, out=str(tmp_path / "b")))
    blind, reading = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert blind[3]["skill/told"] == reading[3]["skill/told"] > 0
    assert blind[3]["teacher/kl_abs"] < 1e-5 and blind[3]["loss/sdl"] < 1e-9 and reading[3]["teacher/kl_abs"] > 0.01


def test_the_student_never_reads_a_skill_in_training_or_evaluation(monkeypatch, tmp_path):
    policies = []
    generate = Episodes.generate

    def watch(engine, examples, n, sampling, key, starts=()):
        out = generate(engine, examples, n, sampling, key, starts)
        policies.append((engine.model, "[" in "".join(engine.tokenizer.decode(row) for row in out.tokens[:, :1]), key))
        return out

    monkeypatch.setattr(Episodes, "generate", watch)
    skill_sd.main(Config(**{**SMALL, "steps": 5, "prompts_per_step": 36, "out": str(tmp_path / "run")}))
    student = policies[0][0]
    assert not any(skilled for model, skilled, _ in policies if model is student)
    assert any(skilled for model, skilled, _ in policies if model is not student)  # the teacher does


def test_a_skill_is_used_only_after_the_step_that_made_it(monkeypatch, tmp_path):
    spy = Spy(monkeypatch, tmp_path / "run", steps=6, prompts_per_step=36)
    per_step, at = [], 0
    rows = [e for e in spy.events if e != "sample"]
    while at < len(rows):
        uses_now, keeps_now = [], []
        while at < len(rows) and rows[at][0] == "use":
            uses_now.append(rows[at][1])
            at += 1
        while at < len(rows) and rows[at][0] == "keep":
            keeps_now.append(rows[at][1])
            at += 1
        per_step.append((set(uses_now) - {None}, set(keeps_now)))
    known = set()
    for used, kept in per_step:
        assert used <= known
        known |= kept
    assert sum(len(used) for used, _ in per_step) > 10 and len(per_step) >= 6


def test_rows_without_a_skill_carry_no_distillation_and_step_1_is_grpo(monkeypatch, tmp_path):
    given = {**SMALL, "steps": 2, "prompts_per_step": 24, "teacher_sync": "live"}
    for name, more in (("sd", {}), ("grpo", {"sdl_coef": 0.0})):
        skill_sd.main(Config(**given, **more, out=str(tmp_path / name)))
    a, b = metrics(tmp_path / "sd"), metrics(tmp_path / "grpo")
    assert a[1]["skill/told"] == 0 == a[1]["loss/sdl"]
    for key in ("loss/total", "optim/grad_norm", "train/entropy", "train/reward"):
        assert a[1][key] == b[1][key]


def test_lambda_0_is_the_run_of_grpo_bit_for_bit(tmp_path, monkeypatch):
    small = {**SMALL, "steps": 4, "prompts_per_step": 36}
    skill_sd.main(Config(**small, sdl_coef=0.0, out=str(tmp_path / "a")))
    same = {"model": "sokoban-student", "task": "sokoban", "max_new_tokens": 36, "lr": 5e-4, "warmup": 0,
            "schedule": "constant", "adv_eps": 1e-6, "eps_hi": 0.28}  # fmt: skip
    play = make_task("sokoban").environment
    monkeypatch.setattr(grpo, "make_engine", lambda *args: Episodes(HFEngine(*args[:2]), play, 12))
    grpo.main(grpo.Config(**small, **same, out=str(tmp_path / "b")))
    x, y = (load_model(str(tmp_path / name / "model"), torch.device("cpu")).state_dict() for name in "ab")
    start = load_model("sokoban-student", torch.device("cpu")).state_dict()
    assert all(torch.equal(x[key], y[key]) for key in x) and any(not torch.equal(x[key], start[key]) for key in x)


def test_the_sampled_log_probs_are_the_skilled_ones_when_the_teacher_plays(monkeypatch, tmp_path):
    spy = Spy(monkeypatch, tmp_path / "run", sampler="teacher", teacher_sync="frozen", steps=5, prompts_per_step=36)
    model = load_model("sokoban-student", torch.device("cpu"), train=False)
    pad, checked = load_tokenizer("sokoban-student").pad_token_id, 0
    for seen in spy.seen:
        q, _ = score(model, seen, 8192)
        assert (q - seen.behaviour_logps).abs().max() < 1e-4  # o = q: the teacher itself wrote the tokens
        checked += int((seen.tokens != pad).any())
    assert checked
    rows = metrics(tmp_path / "run")[1:]
    assert any(abs(row["policy/kl_old"]) > 1e-3 for row in rows if row["skill/told"])  # o is the teacher's
    assert all(row["engine/logp_gap"] == 0 for row in rows)


def test_ema_moves_the_teacher_by_its_share(tmp_path):
    out = tmp_path / "run"
    skill_sd.main(
        Config(**{**SMALL, "steps": 1, "prompts_per_step": 36}, ema=0.25, lr=1e-2, out=str(out), save_every=1)
    )
    saved = checkpoint.read(out / "checkpoint")
    start = load_model("sokoban-student", torch.device("cpu")).state_dict()
    moved = 0
    for key, old in start.items():
        new, slow = saved["policy"][key], saved["teacher"][key]
        torch.testing.assert_close(slow, old + 0.25 * (new - old), atol=1e-7, rtol=1e-5)
        moved += int(not torch.equal(old, new))
    assert moved


def test_the_bank_is_in_the_checkpoint_with_its_counts(tmp_path):
    out = tmp_path / "run"
    skill_sd.main(Config(**{**SMALL, "steps": 8, "prompts_per_step": 36}, out=str(out), save_every=8))
    state = checkpoint.read(out / "checkpoint")["state"]
    skills = [s for bank in state["bank"].values() for s in bank]
    assert skills and any(s["n"] > 0 for s in skills) and all(0 <= s["reward_sum"] <= s["n"] for s in skills)
    known = {(e.prompt[0]["content"], e.answer) for e in make_task("sokoban").train}
    assert set(state["bank"]) <= known and all(state["bank"].values())  # none is empty
    assert set(state["solved"]) <= set(state["bank"]) and all(1 <= step <= 8 for step in state["solved"].values())
    assert all(len(bank) <= 6 and len({s["text"] for s in bank}) == len(bank) for bank in state["bank"].values())


# --- whole runs: mixed batches, teachers, contexts that are too small, rewards that are missing


class Losses:
    """What a run's losses were made of, micro-batch by micro-batch."""

    def __init__(self, patch, out: Path, **given):
        self.tokens, self.scored, self.batches = [], [], []
        loss, within, advantages = skill_sd.sdl_token_loss, skill_sd.score_within, skill_sd.group_advantages

        def token_loss(logps, old, teacher, mask, config):
            value = loss(logps, old, teacher, mask, config)
            self.tokens[-1].append([x.detach().clone() for x in (logps, old, teacher, mask, value)])
            return value

        def scores(*args):
            self.scored.append(within(*args))
            return self.scored[-1]

        def weigh(reward, group, *rest):
            self.tokens.append([])
            self.batches.append((reward, group))
            return advantages(reward, group, *rest)

        patch.setattr(skill_sd, "sdl_token_loss", token_loss)
        patch.setattr(skill_sd, "score_within", scores)
        patch.setattr(skill_sd, "group_advantages", weigh)
        skill_sd.main(Config(**{**SMALL, **given, "out": str(out)}))
        patch.undo()
        self.rows = metrics(out)[1:]


@pytest.mark.parametrize("agg", ["token", "seq_sum"])
def test_in_a_mixed_batch_only_rows_with_a_skill_count_and_the_denominator_is_all_of_them(monkeypatch, tmp_path, agg):
    given = {"sdl_agg": agg, "steps": 4, "prompts_per_step": 24, "micro_batch_tokens": 10**6}
    run, mixed = Losses(monkeypatch, tmp_path / "run", **given), 0
    for row, calls, (reward, _) in zip(run.rows, run.tokens, run.batches, strict=True):
        assert len(calls) == (row["skill/told"] > 0)
        for logps, old, teacher, mask, _ in calls:
            ell = torch.where(mask > 0, logps - teacher, 0).double()
            k3 = (torch.where(mask > 0, logps - old, 0).double().exp() * ((-ell).exp() - 1 + ell)).sum().item()
            with_skill_ = (mask.sum(1) > 0).sum().item()
            assert with_skill_ == pytest.approx(row["skill/told"] * len(reward))
            n = len(reward) * (row["train/length"] if agg == "token" else 1)
            assert row["loss/sdl"] == pytest.approx(k3 / n, rel=1e-4, abs=1e-9)
            mixed += 0 < with_skill_ < len(reward)
    assert mixed


def test_a_frozen_teacher_stays_as_it_was_while_the_student_moves_beyond_the_clip(monkeypatch, tmp_path):
    given = {"teacher_sync": "frozen", "minibatches": 3, "steps": 4, "prompts_per_step": 36, "lr": 1e-2}
    start, teachers, within = load_model("sokoban-student", torch.device("cpu")).state_dict(), [], skill_sd.score_within

    def watch(teacher, *rest):
        teachers.append(teacher)
        return within(teacher, *rest)

    monkeypatch.setattr(skill_sd, "score_within", watch)
    run = Losses(monkeypatch, tmp_path / "run", **given)
    assert teachers and all(torch.equal(value, start[key]) for key, value in teachers[-1].state_dict().items())
    trained = load_model(str(tmp_path / "run" / "model"), torch.device("cpu")).state_dict()
    assert any(not torch.equal(trained[key], start[key]) for key in start)
    assert any(row["policy/clip_low"] + row["policy/clip_high"] > 0 for row in run.rows)


def test_live_minibatches_are_scored_once_by_the_teacher_of_the_steps_start(monkeypatch, tmp_path):
    given = {"teacher_sync": "live", "minibatches": 3, "steps": 4, "prompts_per_step": 36, "lr": 1e-2}
    run, compared, at = Losses(monkeypatch, tmp_path / "run", **given), 0, 0
    for calls in run.tokens:
        if not calls:
            continue
        q, mask = run.scored[at]
        at += 1
        kept = torch.cat([teacher[m > 0] for _, _, teacher, m, _ in calls]).sort().values
        torch.testing.assert_close(kept, q[mask > 0].sort().values, atol=0, rtol=0)
        moved = max((logps - old)[m > 0].abs().max().item() for logps, old, _, m, _ in calls if m.any())
        compared += moved > 1e-3  # the student did move, q did not
    assert compared and at == len(run.scored)


def small_context(tmp_path: Path, positions: int) -> str:
    folder = tmp_path / f"positions-{positions}"
    shutil.copytree(TINY / "sokoban-student", folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("positions", [40, 47, 55])  # no room for a skill, for one entry, for three
@pytest.mark.parametrize("given", [{}, {"sampler": "teacher"}, {"skill_to": "student"}, {"est": "full"}])
def test_skills_beyond_the_context_never_end_a_run(tmp_path, positions, given):
    model = small_context(tmp_path, positions)
    small = {**SMALL, "steps": 4, "prompts_per_step": 36, "eval_every": 2, "model": model}
    skill_sd.main(Config(**small, **given, out=str(tmp_path / "run")))
    read = {row["skill"] for row in samples(tmp_path / "run")} - {""}
    assert all(4 + len(text) + 36 <= positions for text in read) and bool(read) == (positions > 40)
    told = [row["skill/told"] > 0 for row in metrics(tmp_path / "run")[1:]]
    assert any(told) == (positions > 40)


def test_a_skill_without_entries_is_scored_as_far_as_the_context_goes(monkeypatch, tmp_path):
    long = {"success_analysis": "", "mistake_analysis": "up" * 10, "golden_workflow": "up" * 10}
    task = type(make_task("sokoban"))
    monkeypatch.setattr(task, "summarise", lambda *args: dict(long))
    start = task.__init__

    def bare(self, *args, **kwargs):
        start(self, *args, **kwargs)
        del self.skill_text, self.shorten
        monkeypatch.setattr(task, "oracle", lambda self, example: dict.fromkeys(long, ""), raising=False)

    monkeypatch.setattr(task, "__init__", bare)
    for est in ("iw_k3", "full"):
        small = {**SMALL, "steps": 3, "prompts_per_step": 36, "model": small_context(tmp_path / est, 60), "est": est}
        masks, loss = [], skill_sd.score_within

        def watch(*args, masks=masks, loss=loss):
            masks.append((args[2].loss_mask, loss(*args)))
            return masks[-1][1]

        with monkeypatch.context() as patch:
            patch.setattr(skill_sd, "score_within", watch)
            skill_sd.main(Config(**small, out=str(tmp_path / est / "run")))
        assert masks and all(0 < held.sum() < whole.sum() for whole, (_, held) in masks)
        assert all(math.isfinite(row["loss/sdl"]) for row in metrics(tmp_path / est / "run")[1:])


def test_the_gap_of_a_playing_teacher_is_the_students_minus_the_teachers(tmp_path):
    given = {"sampler": "teacher", "teacher_sync": "frozen", "steps": 4, "prompts_per_step": 36}
    skill_sd.main(Config(**{**SMALL, **given, "out": str(tmp_path / "run")}))
    rows = [row for row in metrics(tmp_path / "run")[1:] if row["skill/told"]]
    assert rows and all(row["teacher/kl_abs"] > 0.01 for row in rows)  # o - q would be 0
    assert all("policy/clip_high" in row for row in rows)


def test_rows_that_the_reward_cannot_score_leave_the_credit_alone_and_solved_is_the_environments(tmp_path):
    user = tmp_path / "mine.py"
    user.write_text("def reward(example, text):\n    return float('nan') if len(text) % 2 else 0.25\n")
    given = {**SMALL, "steps": 6, "prompts_per_step": 36, "save_every": 6, "reward": f"{user}:reward"}
    skill_sd.main(Config(**given, out=str(tmp_path / "run")))
    state = checkpoint.read(tmp_path / "run" / "checkpoint")["state"]
    used = [s for bank in state["bank"].values() for s in bank if s["n"]]
    assert used and all(s["reward_sum"] == pytest.approx(0.25 * s["n"]) for s in used)
    assert state["solved"] and any(s["reward"] == 1.0 for bank in state["bank"].values() for s in bank)


def test_samples_tell_the_skill_and_a_page_shows_it(monkeypatch, tmp_path):
    out, told = tmp_path / "run", {"success_analysis": "", "mistake_analysis": "aB>-", "golden_workflow": ""}
    monkeypatch.setattr(type(make_task("sokoban")), "summarise", lambda *args: dict(told))
    given = {**SMALL, "steps": 3, "prompts_per_step": 36}
    skill_sd.main(Config(**given, out=str(out)))
    rows = samples(out)
    assert [row["skill"] for row in rows] == [""] * 3 + ["[aB>-]"] * 6  # a skill is read from the next step on
    shown = rows[-1]
    assert len(shown["gap"]) == len(shown["ids"]) and any(shown["gap"])
    script, page = Path(skill_sd.__file__).parents[1] / "scripts" / "explain.py", tmp_path / "page.html"
    subprocess.run([sys.executable, str(script), str(out), "--html", str(page)], check=True)
    assert "skill <b>[aB&gt;-]</b>" in page.read_text() and 'id="row-2"' in page.read_text()
    skill_sd.main(Config(**given, skill_to="nobody", out=str(tmp_path / "blind")))
    assert not any(row["skill"] for row in samples(tmp_path / "blind"))


def test_tasks_that_never_return_are_named_once_and_leave_no_empty_bank(tmp_path, capsys):
    given = {**SMALL, "steps": 22, "prompts_per_step": 2, "group_size": 2, "task": "sokoban:levels=0", "save_every": 22}
    skill_sd.main(Config(**given, out=str(tmp_path / "run")))
    assert capsys.readouterr().out.count("has returned") == 1
    state = checkpoint.read(tmp_path / "run" / "checkpoint")["state"]
    assert len(state["bank"]) < 44 and all(state["bank"].values())


def test_evaluations_show_the_student_beside_its_teacher_with_skills(monkeypatch, tmp_path, capsys):
    generate = Episodes.generate

    def fails(engine, examples, n, sampling, key, starts=()):
        out = generate(engine, examples, n, sampling, key, starts)
        if key[1] == 0 and key[2] in (3, 4):
            out.reward = torch.full_like(out.reward, float(key[2] == 3))
        return out

    monkeypatch.setattr(Episodes, "generate", fails)
    skill_sd.main(Config(**{**SMALL, "prompts_per_step": 36, "out": str(tmp_path / "run")}))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("policy 1.000, its teacher with skills 0.000") == 2  # before and after
    assert [row["skill/teacher_success"] for row in metrics(tmp_path / "run") if "skill/teacher_success" in row] == [
        0,
        0,
    ]


def test_one_prompt_with_two_answers_has_two_banks(monkeypatch, tmp_path):
    task = type(make_task("sokoban"))
    draw = task.draw

    def twins(self, n, *key):
        first = draw(self, 1, 0)[0]
        return [Example(first.prompt, answer, first.fields) for answer in (first.answer, first.answer + "^")] * (n // 2)

    monkeypatch.setattr(task, "draw", twins)
    monkeypatch.setattr(task, "summarise", lambda self, example, episode: task.oracle(self, example))
    monkeypatch.setattr(task, "oracle", lambda self, example: {"success_analysis": "", "mistake_analysis": "aB>-",
                                                               "golden_workflow": ""})  # fmt: skip
    small = {**SMALL, "prompts_per_step": 2, "save_every": 3}
    skill_sd.main(Config(**small, out=str(tmp_path / "run")))
    state = checkpoint.read(tmp_path / "run" / "checkpoint")["state"]
    assert len(state["bank"]) == 2 and len({text for text, _ in state["bank"]}) == 1
