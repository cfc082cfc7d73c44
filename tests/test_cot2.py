"""methods/cot2.py and its tasks against plain float64 loops, written from the equations of the method's sheet."""

import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.common.cli import UserError, cli
from posttrain.common.families import mnns, reach
from posttrain.common.families.traces import ARROW, BOS, EOS, make_model
from posttrain.common.tasks import make_task
from posttrain.common.training import batch_of
from posttrain.methods import cot2, grpo
from posttrain.methods.cot2 import Config

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TASK = "mnns:digits=3,high=4"  # 64 problems, 13 of them held out
SHAPE = {"width": 16, "layers": 1, "heads": 2}
SMALL = {"task": TASK, "steps": 4, "eval_problems": 64, "prompts_per_step": 8, "eval_every": 2, "save_every": 2}
SMALL |= {"group_size": 4, "eval_draws": 3}


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(*shape, seed=0, spread=1.5):
    return (spread * torch.randn(*shape, generator=seeded(seed))).double()


def gradient(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def close(ours, expected, tolerance=1e-10):
    expected = expected if torch.is_tensor(expected) else f64(expected)
    torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def task():
    """Four digits from 1 to 9: the paper's."""
    return make_task("mnns")


@pytest.fixture(scope="module")
def small():
    return make_task(TASK)


# --- minimum non-negative sum: invariants 3, 8, 9


def signed(digits):
    """Each choice of signs of the digits with its sums so far, - before +."""
    for signs in itertools.product((-1, 1), repeat=len(digits)):
        yield signs, [sum(s * d for s, d in zip(signs[:t], digits, strict=False)) for t in range(1, len(digits) + 1)]


def digits_of(task, every=1):
    return [[int(task.vocabulary[i].removeprefix("D")) for i in row[1:]] for row in task.prompts[::every].tolist()]


def sums_of(task, ids):
    return [int(task.vocabulary[i].removeprefix("S")) for i in ids]


def test_vocabulary_has_the_ids_of_the_sheet(task):
    words = task.vocabulary
    assert len(words) == 89 and words[:6] == ["<pad>", "<bos>", "<eos>", "->", "+", "-"]
    assert words[6:16] == [f"D{i}" for i in range(10)] and words[16:] == [f"S{i}" for i in range(-36, 37)]
    assert words.index("S0") == 52 and task.prompts.shape == (6561, 5) and (task.prompts[:, 0] == BOS).all()


def test_problems_are_all_tuples_and_those_with_equal_digits_are_on_one_side(task):
    problems = digits_of(task)
    assert len(set(map(tuple, problems))) == 9**4 == len(problems)
    assert task.n_train == 5253 and len(problems) - task.n_train == 1308
    groups = [{tuple(sorted(p)) for p in part} for part in (problems[:5253], problems[5253:])]
    assert [len(part) for part in groups] == [396, 99] and not groups[0] & groups[1]


def test_split_does_not_depend_on_the_state_of_random(task):
    import random

    random.seed(5)
    random.random()
    assert torch.equal(mnns.mnns("again", digits=3, high=4).prompts, make_task(TASK).prompts)


def test_answers_equal_brute_force_and_have_the_counts_of_the_sheet(task):
    totals = torch.tensor(digits_of(task)) @ torch.tensor(list(itertools.product((-1, 1), repeat=4))).T
    best = totals.masked_fill(totals < 0, 99).amin(1).tolist()
    for ends in (task.paths[:, 0, -1], task.chains[:, -1]):
        assert sums_of(task, ends.tolist()) == best
    assert dict(Counter(best).most_common(5)) == {1: 2444, 0: 1569, 2: 1324, 3: 664, 4: 320}
    held_out = Counter(best[task.n_train :])
    assert held_out.most_common(1)[0][0] == 1 and round(100 * held_out[1] / 1308, 1) == 34.3  # the majority's answer


@pytest.mark.parametrize("spec", ["mnns", "mnns:digits=3,low=0,high=4", "mnns:digits=5,low=2,high=3", "mnns:digits=1"])
def test_paths_are_all_choices_of_signs_in_the_order_of_the_budget(spec, task):
    task = task if spec == "mnns" else make_task(spec)
    for digits, paths in zip(digits_of(task, 5), task.paths[::5].tolist(), strict=True):
        order = sorted(signed(digits), key=lambda x: (abs(x[1][-1]), x[1][-1] < 0, x[1][-1], x[0]))
        assert [sums_of(task, path) for path in paths] == [path for _, path in order]


def test_discrete_label_is_the_first_best_with_plus_before_minus_from_the_left(task):
    differs = 0
    labels, ones = (x[::5].tolist() for x in (task.chains, task.paths[:, 0]))
    for digits, label, one in zip(digits_of(task, 5), labels, ones, strict=True):
        plus_first = [path for _, path in reversed(list(signed(digits)))]
        best = min(path[-1] for path in plus_first if path[-1] >= 0)
        assert sums_of(task, label) == next(path for path in plus_first if path[-1] == best)
        assert label[-1] == one[-1]
        differs += label != one
    assert differs  # a budget of one trace takes - before +


def test_order_of_one_example_by_hand():
    every = mnns.ways((1, 3))
    assert every == [[1, 4], [1, -2], [-1, 2], [-1, -4]]
    assert mnns.nearest_first(every) == [[-1, 2], [1, -2], [1, 4], [-1, -4]]
    ties = mnns.ways((2, 2))  # + - and - + both reach 0
    assert mnns.nearest_first(ties)[0] == [-2, 0] and mnns.least_total(ties) == [2, 0]


@pytest.mark.parametrize("options", [(3, 1, 12), (2, 0, 99), (3, 3, 5), (1, 1, 9), (2, 11, 13)])
def test_vocabulary_holds_every_sum_and_digit(options):
    digits, low, high = options
    task = make_task(f"mnns:digits={digits},low={low},high={high}")
    most = digits * max(high, 9)
    assert task.vocabulary[6 : 7 + max(high, 9)] == [f"D{i}" for i in range(max(high, 9) + 1)]
    assert task.vocabulary[7 + max(high, 9) :] == [f"S{i}" for i in range(-most, most + 1)]
    sums = {s for path in task.paths.flatten(0, 1).tolist() for s in sums_of(task, path)}
    assert max(sums) == digits * high == -min(sums)
    assert len(task.prompts) == (high - low + 1) ** digits and {d for p in digits_of(task) for d in p} == {
        *range(low, high + 1)
    }


# --- reachability


def graph_of(task, i):
    """Edges as {node: children}, root, what is asked; nodes as numbers."""
    nodes = [int(task.vocabulary[j].removeprefix("N")) for j in task.prompts[i, 1:].tolist()]
    asked = 2 if task.name.startswith("prosqa") else 1
    edges, root = nodes[: -asked - 1], nodes[-asked - 1]
    children = {}
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        children.setdefault(a, set()).add(b)
    return children, root, nodes[-asked:], list(zip(edges[::2], edges[1::2], strict=True))


def last_layer_from(children, root, depth):
    seen = {root}
    for _ in range(depth):
        seen = {child for node in seen for child in children[node]}
    return seen


@pytest.fixture(scope="module", params=["prosqa:problems=300", "prontoqa:problems=300", "prosqa:width=8,depth=2"])
def graphs(request):
    spec = request.param if "problems" in request.param else request.param + ",problems=200"
    return make_task(spec), *((8, 2) if "width" in spec else (6, 3))


def test_graphs_are_layered_with_two_children_and_two_parents(graphs):
    task, width, depth = graphs
    orders = set()
    for i in range(len(task.prompts)):
        children, root, asked, edges = graph_of(task, i)
        assert len(set(edges)) == len(edges) == 2 * width * depth and 0 <= root < width
        assert set(children) == set(range(width * depth)) and all(len(two) == 2 for two in children.values())
        assert set(Counter(b for _, b in edges).values()) == {2}
        assert all(b // width == a // width + 1 for a, b in edges)
        assert all(node // width == depth for node in asked)
        orders.add(tuple(a for a, _ in edges))
    assert len(orders) > len(task.prompts) * 0.9, "the edges are not in random order"


def test_walks_follow_edges_and_are_all_of_them(graphs):
    task, _, depth = graphs
    first = task.vocabulary.index("N0")
    for i in range(len(task.prompts)):
        children, root, _, _ = graph_of(task, i)
        every = [[root]]
        for _ in range(depth):
            every = [[*walk, child] for walk in every for child in children[walk[-1]]]
        ours = [[j - first for j in path[:-1]] for path in task.paths[i].tolist()]
        assert sorted(ours) == sorted(walk[1:] for walk in every)
        assert len(set(task.paths[i, :, -1].tolist())) == 1 and task.chains[i].tolist() == task.paths[i, 0].tolist()


def test_answers_equal_a_breadth_first_search_and_kept_walks_get_there(graphs):
    task, _, depth = graphs
    sides = []
    for i in range(len(task.prompts)):
        children, root, asked, _ = graph_of(task, i)
        reached = last_layer_from(children, root, depth)
        answer, ends = task.vocabulary[task.chains[i, -1]], [task.vocabulary[j] for j in task.paths[i, :, -2].tolist()]
        if len(asked) == 2:
            there = [node in reached for node in asked]
            assert sorted(there) == [False, True] and answer == f"N{asked[there.index(True)]}"
            sides.append(there[0])
        else:
            assert answer == ("yes" if asked[0] in reached else "no")
            sides.append(answer == "yes")
        if len(asked) == 2 or answer == "yes":
            goal = f"N{asked[0] if asked[0] in reached else asked[1]}"
            hits = [end == goal for end in ends]
            assert hits == sorted(hits, reverse=True) and hits[0], "a budget must keep the walks that get there"
    spread = 4.5 * math.sqrt(len(sides)) / 2
    assert abs(sum(sides) - len(sides) / 2) < spread, "the answer stands first, or is yes, too often or too seldom"


def test_no_graph_twice_and_the_last_twentieth_is_held_out(graphs):
    task, *_ = graphs
    n = len(task.prompts)
    assert len(set(map(tuple, task.prompts.tolist()))) == n and task.n_train == n - n // 20
    again = make_task(task.name)
    assert torch.equal(task.prompts, again.prompts) and torch.equal(task.paths, again.paths)


def test_at_most_a_thousand_graphs_are_held_out_and_repeats_do_not_end_it():
    task = reach.reach("prontoqa", width=3, depth=1, problems=40)
    assert task.n_train == 38 and len(set(map(tuple, task.prompts.tolist()))) == 40
    assert 20_600 - reach.reach("prosqa", width=4, depth=1, problems=20_600).n_train == 1000


# --- Eq. 2: invariants 1 and 2


def prefix_shares(digits):
    """alpha*_t of the full budget at each step, as {sum: count of sign prefixes / 2^t}."""
    out = []
    for t in range(1, len(digits) + 1):
        counts = Counter(path[-1] for _, path in signed(digits[:t]))
        out.append({s: c / 2**t for s, c in counts.items()})
    return out


def as_sums(task, row):
    return {int(task.vocabulary[j].removeprefix("S")): row[j].item() for j in row.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("budget", [0, 1, 2, 4, 5, 16, 99])
def test_targets_are_shares_and_the_answer_does_not_depend_on_the_budget(task, budget):
    target = cot2.soft_targets(task.paths, budget, 89)
    assert target.shape == (6561, 4, 89) and (target >= 0).all()
    torch.testing.assert_close(target.sum(-1), torch.ones(6561, 4), rtol=0, atol=1e-6)
    assert torch.equal(target[:, -1], torch.nn.functional.one_hot(task.chains[:, -1], 89).float())
    kept = min(budget or 16, 16)
    problems = digits_of(task)
    for i in range(0, 6561, 500):
        best = sorted(signed(problems[i]), key=lambda x: (abs(x[1][-1]), x[1][-1] < 0, x[0]))[:kept]
        for t in range(3):
            shares = Counter(path[t] for _, path in best)
            assert as_sums(task, target[i, t]) == pytest.approx({s: c / kept for s, c in shares.items()}, abs=1e-6)


def test_full_budget_is_symmetric_has_the_parity_of_the_digits_and_equals_prefix_counts(task):
    target = cot2.soft_targets(task.paths, 0, 89)
    sums = target[:, :-1, 16:]
    torch.testing.assert_close(sums, sums.flip(-1), rtol=0, atol=1e-6)
    assert not target[:, :-1, :16].any()
    problems = digits_of(task)
    parity = torch.tensor(problems).cumsum(1)[:, :-1] % 2  # [problems, 3]
    odd = torch.arange(-36, 37) % 2
    assert not (sums * (odd != parity[..., None])).any()
    for i in range(0, 6561, 300):
        for t, shares in enumerate(prefix_shares(problems[i])[:-1]):
            assert as_sums(task, target[i, t]) == pytest.approx(shares, abs=1e-6)


def test_all_traces_equal_the_full_budget_and_more_are_clamped(task):
    full = cot2.soft_targets(task.paths, 0, 89)
    for budget in (16, 17, 10**6):
        assert torch.equal(cot2.soft_targets(task.paths, budget, 89), full)


def test_hand_example_of_targets_two_one():
    paths = (torch.tensor(mnns.nearest_first(mnns.ways((2, 1)))) + 5)[None]

    def shares(budget, t):
        row = cot2.soft_targets(paths, budget, 11)[0, t]
        return {j - 5: row[j].item() for j in row.nonzero()[:, 0].tolist()}

    assert shares(0, 0) == {-2: 0.5, 2: 0.5} == shares(2, 0) and shares(1, 0) == {2: 1.0}
    assert shares(0, 1) == shares(1, 1) == shares(2, 1) == {1: 1.0}
    every = torch.cat([paths, paths[:, :, -1:]], 2)  # a step more, so that step 2 is not the answer's
    row = cot2.soft_targets(every, 0, 11)[0, 1]
    assert {j - 5: row[j].item() for j in row.nonzero()[:, 0].tolist()} == {-3: 0.25, -1: 0.25, 1: 0.25, 3: 0.25}


def test_equal_states_accumulate_and_one_step_is_the_answer_alone():
    paths = torch.tensor([[[3, 1], [3, 4], [2, 4], [3, 4]]])
    close(cot2.soft_targets(paths, 0, 5)[0], [[0, 0, 0.25, 0.75, 0], [0, 1, 0, 0, 0]])
    close(cot2.soft_targets(paths, 3, 5)[0, 0], [0, 0, 1 / 3, 2 / 3, 0], 1e-6)
    close(cot2.soft_targets(torch.tensor([[[2], [4]]]), 0, 5)[0], [[0, 0, 1, 0, 0]])


def test_targets_of_reachability_count_the_walks_through_each_node(graphs):
    task, _, depth = graphs
    target, first = cot2.soft_targets(task.paths, 0, len(task.vocabulary)), task.vocabulary.index("N0")
    for i in range(0, len(task.prompts), 17):
        children, root, _, _ = graph_of(task, i)
        shares = {root: 1.0}
        for t in range(depth):
            shares = Counter(c for node, share in shares.items() for c in children[node] for _ in range(int(share)))
            total = sum(shares.values())
            row = {j - first: w.item() for j, w in enumerate(target[i, t]) if w}
            assert row == pytest.approx({node: count / total for node, count in shares.items()})


# --- Eq. 3: invariant 7


def csft_reference(logits, target):
    """Sheet section 5 by loops: KL of the steps before m, summed; cross entropy of m; means over problems."""
    kl = answer = 0.0
    for rows, goals in zip(logits.tolist(), target.tolist(), strict=True):
        for t, (row, goal) in enumerate(zip(rows, goals, strict=True)):
            total = math.log(sum(math.exp(x) for x in row))
            value = sum(a * (math.log(a) - (x - total)) for x, a in zip(row, goal, strict=True) if a > 0)
            kl, answer = (kl + value, answer) if t < len(rows) - 1 else (kl, answer + value)
    return kl / len(logits), answer / len(logits)


def random_targets(n, m, v, seed=0):
    paths = torch.randint(0, v, (n, 6, m), generator=seeded(seed))
    return cot2.soft_targets(paths, 0, v).double()


@pytest.mark.parametrize("shape", [(3, 4, 7), (1, 2, 3), (5, 1, 6), (2, 5, 89)])
def test_csft_loss_equals_the_loop(shape):
    for seed in range(4):
        logits, target = random_logits(*shape, seed=seed, spread=3.0), random_targets(*shape, seed)
        close(torch.stack(cot2.csft_loss(logits, target)), csft_reference(logits, target), 1e-7)


def test_csft_gradient_is_the_gap_of_the_shares_over_the_problems_with_unit_weight_on_every_step():
    logits, target = random_logits(3, 4, 9), random_targets(3, 4, 9)
    _, grad = gradient(lambda x: sum(cot2.csft_loss(x, target)), logits)
    close(grad, (logits.softmax(-1) - target) / 3, 1e-7)  # targets sum to 1 in fp32
    _, answer = gradient(lambda x: cot2.csft_loss(x, target)[1], logits)
    assert not answer[:, :-1].any()
    close(answer[:, -1], grad[:, -1], 1e-12)


def test_csft_loss_is_zero_at_the_target_and_the_answer_is_a_cross_entropy():
    target = random_targets(3, 4, 9)
    kl, answer = cot2.csft_loss((target + 1e-30).log(), target)
    assert abs(kl.item()) < 1e-6 and abs(answer.item()) < 1e-6
    logits = random_logits(3, 4, 9)
    nll = torch.nn.functional.cross_entropy(logits[:, -1], target[:, -1].argmax(-1))
    close(cot2.csft_loss(logits, target)[1], nll)


def test_csft_loss_with_a_logit_of_minus_infinity_where_the_target_is_zero():
    logits, target = random_logits(2, 3, 5), random_targets(2, 3, 5)
    low = torch.where(target > 0, logits, -torch.inf)
    value, grad = gradient(lambda x: sum(cot2.csft_loss(x, target)), low)
    close(value, sum(csft_reference(low, target)), 1e-7)
    assert grad.isfinite().all()


# --- Eq. 4: invariant 10


def test_base_thought_is_the_average_embedding_under_the_softmax():
    table, logits = random_logits(7, 5, seed=1), random_logits(3, 7)
    expected = [[sum(a * table[v, j].item() for v, a in enumerate(row)) for j in range(5)] for row in
                logits.softmax(-1).tolist()]  # fmt: skip
    close(cot2.as_inputs(table, logits.log_softmax(-1)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_many_draws_approach_the_base_thought(seed):
    table, logits = random_logits(89, 32, seed=seed + 10), random_logits(4, 89, seed=seed)
    drawn = cot2.draw_thought(logits, Config(k=20000), seeded(seed))
    assert drawn.shape == (4, 20000)
    base = cot2.as_inputs(table, logits.log_softmax(-1))
    error = (cot2.as_inputs(table, drawn) - base).norm(dim=1)
    assert (error < 0.02 * table.norm(dim=1).mean()).all()  # E is on the scale of its rows; so is the noise


def test_one_draw_is_the_embedding_of_the_token_and_several_are_their_mean():
    table, logits = random_logits(9, 4, seed=1), random_logits(6, 9)
    one = cot2.draw_thought(logits, Config(k=1), seeded())
    assert torch.equal(cot2.as_inputs(table, one), table[one[:, 0]])
    three = torch.tensor([[1, 1, 4]])
    close(cot2.as_inputs(table, three), ((2 * table[1] + table[4]) / 3)[None])


def frequencies_fit(ids, p):
    """Whether counts of n draws lie within 5 standard deviations of n p."""
    n = ids.numel()
    return bool(((ids.flatten().bincount(minlength=len(p)) - n * p).abs() < 5 * (n * p * (1 - p)).sqrt() + 1).all())


@pytest.mark.parametrize(
    ("flags", "divided"),
    [({"k": 3}, 1), ({"k": 3, "normalise_sampling": True}, 3), ({"k": 3, "temperature": 0.5}, 0.5),
     ({"k": 2, "temperature": 2.0, "normalise_sampling": True}, 4), ({"k": 1, "normalise_sampling": True}, 1)],
)  # fmt: skip
def test_draws_have_the_frequencies_of_the_flattened_softmax(flags, divided):
    logits = random_logits(1, 8, spread=2.0)
    drawn = cot2.draw_thought(logits.expand(20000, -1), Config(**flags), seeded())
    right = (logits[0] / divided).softmax(-1)
    assert frequencies_fit(drawn, right)
    for other in {1, 3, 0.5, 4} - {divided}:
        assert not frequencies_fit(drawn, (logits[0] / other).softmax(-1))
    if flags["k"] > 1:  # with replacement, independent: pairs are as often equal as the product says
        equal, chance = (drawn[:, 0] == drawn[:, 1]).sum(), right.square().sum()
        assert abs(equal - 20000 * chance) < 5 * (20000 * chance * (1 - chance)).sqrt()


def test_any_token_has_the_frequencies_of_its_temperature():
    logits = random_logits(1, 8).expand(20000, -1)
    for temperature in (1.0, 0.5):
        drawn = cot2.any_token(logits, temperature, seeded())
        assert drawn.shape == (20000, 1) and frequencies_fit(drawn, (logits[0] / temperature).softmax(-1))


# --- Eq. 5, sampled tokens: invariants 4 and 5


def random_steps(n=5, m=4, v=7, k=3, seed=0):
    """new and old logits [n, m, v], drawn ids, answers."""
    g = seeded(seed)
    new, old = random_logits(2, n, m, v, seed=seed)
    return new, old, torch.randint(0, v, (n, m - 1, k), generator=g), torch.randint(0, v, (n,), generator=g)


def log_p(row, i, divided):
    return row[i] / divided - math.log(sum(math.exp(x / divided) for x in row))


def ratios_by_loop(new, old, drawn, answer, k, normalised, temperature=1.0):
    divided = temperature * (k if normalised else 1)
    out = []
    for n, (x, y) in enumerate(zip(new.tolist(), old.tolist(), strict=True)):
        row = []
        for t in range(len(x) - 1):
            terms = [log_p(x[t], i, divided) - log_p(y[t], i, divided) for i in drawn[n, t].tolist()]
            row.append(sum(terms) if normalised else sum(terms) / k)
        out.append([*row, log_p(x[-1], answer[n].item(), 1) - log_p(y[-1], answer[n].item(), 1)])
    return f64(out)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_log_ratios_equal_the_loop(k, normalised, temperature):
    for seed in range(3):
        new, old, drawn, answer = random_steps(k=k, seed=seed)
        config = Config(k=k, normalise_sampling=normalised, temperature=temperature)
        expected = ratios_by_loop(new, old, drawn, answer, k, normalised, temperature)
        close(cot2.log_ratios(new, old, drawn, answer, config), expected)


def test_both_ratios_are_equal_at_one_draw_and_differ_by_the_normalisers_else():
    new, old, drawn, answer = random_steps(k=1)
    ratio = [cot2.log_ratios(new, old, drawn, answer, Config(k=1, normalise_sampling=b)) for b in (False, True)]
    assert torch.equal(*ratio)
    new, old, drawn, answer = random_steps(k=3)
    a, b = (cot2.log_ratios(new, old, drawn, answer, Config(k=3, normalise_sampling=x)) for x in (False, True))
    z_new, z_old = ((x[:, :-1].softmax(-1) ** (1 / 3)).sum(-1).log() for x in (new, old))
    close(b[:, :-1], a[:, :-1] + 3 * (z_old - z_new))
    close(b[:, -1], a[:, -1])


def test_normalised_ratio_is_unbiased_and_the_geometric_mean_is_not():
    new, old = random_logits(2, 1, 1, 4, spread=1.0)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))[:, None]  # [64, 1, 3]
    for normalised, flat in ((True, 3), (False, 1)):
        chance = (old[0, 0] / flat).softmax(-1)[every[:, 0]].prod(-1)
        config = Config(k=3, normalise_sampling=normalised)
        r = cot2.thought_log_ratio(new.expand(64, 1, 4), old.expand(64, 1, 4), every, config)[:, 0].exp()
        assert ((chance * r).sum().item() == pytest.approx(1, abs=1e-12)) == normalised


@pytest.mark.parametrize("flags", [{}, {"normalise_sampling": True}, {"sampling": "dirichlet"}])
def test_equal_models_give_ratios_of_exactly_one_and_a_loss_of_minus_the_mean_advantage(flags):
    config = Config(**flags)
    logits, _, drawn, answer = random_steps()
    if config.sampling == "dirichlet":
        drawn = torch.stack([cot2.draw_thought(logits[:, t], config, seeded(t)) for t in range(3)], 1)
    ratio = cot2.log_ratios(logits, logits.clone(), drawn, answer, config)
    assert not ratio.any() and ratio.shape == (5, 4)
    a = f64([0.3, -1.2, 2.0, 0.0, 0.7])
    close(cot2.policy_loss(ratio, a, 0.1), -a.mean())
    assert cot2.policy_loss(ratio, f64([1, -1, 0.5, -0.5, 0]), 0.1).item() == pytest.approx(0, abs=1e-15)
    assert cot2.kl_penalty(ratio, False).item() == 0


def test_gradient_of_the_log_ratio_reaches_the_new_model_only():
    new, old, drawn, answer = random_steps()
    for flags in ({}, {"normalise_sampling": True}):
        config = Config(**flags)
        _, grad = gradient(lambda x, c=config: cot2.log_ratios(x, old, drawn, answer, c).sum(), new)
        flat, scale = (3, 1) if config.normalise_sampling else (1, 1 / 3)
        counts = torch.nn.functional.one_hot(drawn, 7).sum(2)
        close(grad[:, :-1], scale * (counts - 3 * (new[:, :-1] / flat).softmax(-1)) / flat)
        close(grad[:, -1], torch.nn.functional.one_hot(answer, 7) - new[:, -1].softmax(-1))


# --- Eq. 6 and 7


def test_hand_example_of_advantages():
    close(cot2.group_advantages(f64([[1, 0, 0, 0]])), [[1.7321, -0.5774, -0.5774, -0.5774]], 1e-4)


def test_advantages_equal_the_loop_and_groups_of_equal_rewards_or_one_have_exactly_none():
    for rows in ([[1, 0, 0, 1], [0, 0, 1, 0]], [[0.1, 0.1, 0.1], [0, 1, 1]], [[1.0], [0.0]]):
        ours = cot2.group_advantages(f64(rows))
        for row, got in zip(rows, ours.tolist(), strict=True):
            mean = sum(row) / len(row)
            std = math.sqrt(sum((r - mean) ** 2 for r in row) / len(row))
            assert got == pytest.approx([(r - mean) / std if len(set(row)) > 1 else 0.0 for r in row], abs=1e-12)
        close(ours.sum(1), torch.zeros(len(rows)))
    assert not cot2.group_advantages(torch.full((2, 7), 0.1)).any()  # fp32's mean of seven 0.1 is not 0.1


def loss_by_loop(log_ratio, advantages, eps):
    total = 0.0
    for row, a in zip(log_ratio.tolist(), advantages.tolist(), strict=True):
        for x in row:
            r = math.exp(x)
            total += min(r * a, min(max(r, 1 - eps), 1 + eps) * a)
    return -total / log_ratio.numel()


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_policy_loss_equals_the_loop(eps):
    for seed in range(4):
        x, a = random_logits(6, 4, seed=seed, spread=0.4), random_logits(6, seed=seed + 50)
        assert cot2.policy_loss(x, a, eps).item() == pytest.approx(loss_by_loop(x, a, eps), abs=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_acts_on_each_step_by_itself_on_the_side_that_the_advantage_pushes_to(sign):
    ratios, a = f64([[1.05, 1.2, 0.8, 0.95]]), f64([sign])
    _, grad = gradient(lambda x: cot2.policy_loss(x, a, 0.1), ratios.log())
    flows = f64([[1, 0, 1, 1]]) if sign > 0 else f64([[1, 1, 0, 1]])
    close(grad, -sign * ratios * flows / 4)


def test_loss_is_divided_by_all_steps_of_all_rollouts_those_of_equal_rewards_included():
    reward = f64([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    a = cot2.group_advantages(reward).flatten()
    x = random_logits(12, 5, spread=0.02)
    value, grad = gradient(lambda x: cot2.policy_loss(x, a, 0.1), x)
    close(value, -(x.exp() * a[:, None]).sum() / 60)
    close(grad, -x.exp() * a[:, None] / 60)
    assert not grad[4:].any()


@pytest.mark.parametrize("agg", ["token", "seq", "const", "token_group"])
def test_one_draw_reduces_to_grpo_on_tokens(agg):
    """Invariant 4: --k 1 against methods/grpo.py, value and gradient."""
    new, old, drawn, answer = random_steps(n=8, k=1)
    ids, mask = torch.cat([drawn[..., 0], answer[:, None]], 1), torch.ones(8, 4).double()
    reward, group = f64([[1, 0, 0, 1], [0, 1, 1, 1]]), torch.arange(8) // 4
    a = cot2.group_advantages(reward).flatten()
    close(a, grpo.group_advantages(reward.flatten(), group, "group_std", 0.0, 0))

    def theirs(x):
        logps, old_logps = (y.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for y in (x, old))
        ratio = grpo.importance_ratio(logps, old_logps, mask, "token")
        loss = grpo.policy_token_loss(logps, ratio, a, grpo.Config(eps_lo=0.1, eps_hi=0.1))
        return (loss * grpo.row_weights(mask, group, agg, 4)[:, None]).sum()

    def ours(x):
        return cot2.policy_loss(cot2.log_ratios(x, old, drawn, answer, Config(k=1)), a, 0.1)

    expected, got = gradient(theirs, new), gradient(ours, new)
    close(got[0], expected[0])
    close(got[1], expected[1])


@pytest.mark.parametrize("detached", [False, True])
def test_kl_is_k3_of_the_reference_over_the_new_model(detached):
    d = random_logits(5, 4, spread=0.7)
    value, grad = gradient(lambda x: cot2.kl_penalty(x, detached), d)
    close(value, sum(math.exp(x) - x - 1 for x in d.flatten().tolist()) / 20)
    expected = (d.exp() - 1) / 20
    expected[:, -1] *= not detached
    close(grad, expected)
    close(cot2.kl_penalty(d, detached), grpo.kl_token_penalty(-d, torch.zeros_like(d), torch.ones(1), "k3").mean())


def test_kl_and_its_gradient_are_zero_where_the_models_agree_and_bounded_on_one_side():
    for detached in (False, True):
        value, grad = gradient(lambda x: cot2.kl_penalty(x, detached), torch.zeros(2, 3).double())
        assert value == 0 and not grad.any()
    value, grad = gradient(lambda x: cot2.kl_penalty(x, False), f64([[500.0, -500.0]]))
    close(value, (math.exp(20) - 501 + 499) / 2)  # exp is clamped, the linear part is not
    close(grad, [[-0.5, -0.5]])
    assert cot2.policy_loss(f64([[900.0]]), f64([-1.0]), 0.1).item() == pytest.approx(math.exp(20))


# --- Dirichlet


@pytest.mark.parametrize("gamma", [0.5, 1.0, 20.0, 300.0])
def test_dirichlet_draws_have_the_mean_and_the_variance(gamma):
    logits = random_logits(1, 5)
    alpha, n = logits[0].softmax(-1), 40000
    a = cot2.draw_thought(logits.expand(n, -1), Config(sampling="dirichlet", gamma=gamma), seeded()).exp()
    torch.testing.assert_close(a.sum(1), torch.ones(n).double())
    var = alpha * (1 - alpha) / (gamma + 1)
    assert ((a.mean(0) - alpha).abs() < 5 * (var / n).sqrt()).all()
    squares = (a - alpha).square()
    assert ((squares.mean(0) - var).abs() < 5 * squares.std(0) / n**0.5).all()


def test_dirichlet_draws_follow_the_temperature():
    logits = random_logits(1, 5)
    config = Config(sampling="dirichlet", gamma=300.0, temperature=0.5)
    a = cot2.draw_thought(logits.expand(20000, -1), config, seeded()).exp()
    torch.testing.assert_close(a.mean(0), (logits[0] / 0.5).softmax(-1), rtol=0, atol=0.002)


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 20.0, 1000.0])
def test_dirichlet_weights_are_finite_down_to_shares_of_1e_30(gamma):
    logits = torch.tensor([[0.0, -20.0, -40.0, -69.1], [0.0, 0.0, 0.0, 0.0]]).repeat(500, 1)
    config = Config(sampling="dirichlet", gamma=gamma)
    log_a = cot2.draw_thought(logits, config, seeded())
    assert log_a.isfinite().all() and log_a.dtype == torch.float64
    close(log_a.exp().sum(1), torch.ones(1000))
    new = (logits + 0.1 * torch.randn(logits.shape, generator=seeded(1))).double()[:, None]
    for floor in (0.0, 1e-3):
        config.dirichlet_floor = floor
        value, grad = gradient(
            lambda x: cot2.thought_log_ratio(x, logits[:, None], log_a[:, None], config).clamp(max=20).exp().sum(), new
        )
        assert value.isfinite() and grad.isfinite().all()


def test_dirichlet_density_equals_torch():
    for seed, gamma in itertools.product(range(3), (1.0, 7.5, 1000.0)):
        config = Config(mode="grpo", sampling="dirichlet", gamma=gamma, dirichlet_floor=0.0)
        new, old = random_logits(4, 3, 6, seed=seed), random_logits(4, 3, 6, seed=seed + 9)
        a = torch.distributions.Dirichlet(5 * old.softmax(-1)).sample()
        densities = [torch.distributions.Dirichlet(gamma * x.softmax(-1)).log_prob(a) for x in (new, old)]
        close(cot2.thought_log_ratio(new, old, a.log(), config), densities[0] - densities[1], 1e-8)


def dirichlet_ratio_by_loop(new, old, log_a, gamma, floor):
    """Sheet section 5: ids with a share of at least floor in either model, clamped, renormalised, and a on them."""
    out = []
    for p, q, a in zip(new.softmax(-1).tolist(), old.softmax(-1).tolist(), log_a, strict=True):
        kept = [v for v in range(len(p)) if max(p[v], q[v]) >= floor]
        on, densities = a[kept].log_softmax(0).tolist(), []
        for share in (p, q):
            c = [max(share[v], floor) for v in kept]
            c = [gamma * x / sum(c) for x in c]
            densities.append(
                math.lgamma(sum(c)) + sum((x - 1) * y - math.lgamma(x) for x, y in zip(c, on, strict=True))
            )
        out.append(densities[0] - densities[1])
    return f64(out)


@pytest.mark.parametrize("floor", [1e-3, 0.05, 0.2])
@pytest.mark.parametrize("gamma", [1.0, 20.0])
def test_dirichlet_ratio_is_of_densities_on_the_kept_tokens(gamma, floor):
    new, old = random_logits(2, 40, 8, spread=2.0)
    config = Config(sampling="dirichlet", gamma=gamma, dirichlet_floor=floor)
    log_a = cot2.draw_thought(old, Config(sampling="dirichlet", gamma=50.0), seeded())
    ours = cot2.thought_log_ratio(new[:, None], old[:, None], log_a[:, None], config)[:, 0]
    close(ours, dirichlet_ratio_by_loop(new, old, log_a, gamma, floor), 1e-8)
    shares = torch.stack([new, old]).softmax(-1)
    below = shares < floor
    assert below.all(0).any() and (below.any(0) & ~below.all(0)).any(), "some tokens must be dropped, some clamped"


@pytest.mark.parametrize("seed", range(3))
def test_dirichlet_ratio_has_the_mean_one_without_a_floor(seed):
    old = random_logits(1, 5, seed=seed, spread=0.7)
    new = old + 0.2 * random_logits(1, 5, seed=seed + 9)
    config, n = Config(sampling="dirichlet", gamma=10.0, dirichlet_floor=0.0), 50000
    log_a = cot2.draw_thought(old.expand(n, -1), config, seeded(seed))
    ratio = cot2.thought_log_ratio(new.expand(n, 1, -1), old.expand(n, 1, -1), log_a[:, None], config)[:, 0].exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / n**0.5 and ratio.std() > 0.05


def test_dirichlet_ratio_takes_the_temperature_of_the_draw():
    new, old = random_logits(2, 30, 6)
    log_a = cot2.draw_thought(old, Config(sampling="dirichlet"), seeded())[:, None]
    hot = Config(sampling="dirichlet", temperature=2.0)
    halved = cot2.thought_log_ratio(new[:, None] / 2, old[:, None] / 2, log_a, Config(sampling="dirichlet"))
    close(cot2.thought_log_ratio(new[:, None], old[:, None], log_a, hot), halved)


# --- think and score: invariant 6


def lively(model, seed=0):
    """Weights large enough that softmaxes are far from uniform; eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(small):
    return lively(make_model(Config(**{**SHAPE, "layers": 2}, task=TASK), small, CPU))


THOUGHTS = {
    "base": lambda: partial(torch.log_softmax, dim=-1),
    "mts": lambda: partial(cot2.draw_thought, config=Config(k=3), generator=seeded()),
    "normalised": lambda: partial(cot2.draw_thought, config=Config(normalise_sampling=True), generator=seeded()),
    "dirichlet": lambda: partial(cot2.draw_thought, config=Config(sampling="dirichlet"), generator=seeded()),
    "discrete": lambda: partial(torch.argmax, dim=-1, keepdim=True),
}


def naive(model, prompts, steps, thought):
    """Without a cache, thoughts written out; through the model's own forward. -> logits [N, steps, V]"""
    table = model.get_input_embeddings().weight
    inputs, out = model.get_input_embeddings()(prompts), []
    for _ in range(steps):
        out.append(model(inputs_embeds=inputs).logits[:, -1])
        z = thought(out[-1])
        z = z.exp().float() @ table if z.is_floating_point() else torch.stack([table[i].mean(0) for i in z])
        inputs = torch.cat([inputs, z[:, None]], 1)
    return torch.stack(out, 1)


@pytest.mark.parametrize("kind", THOUGHTS)
@torch.no_grad()
def test_cached_decode_equals_one_parallel_pass_and_a_naive_loop(model, small, kind):
    prompts = small.prompts[:20]
    logits, drawn = cot2.think(model, prompts, 4, THOUGHTS[kind]())
    assert logits.shape == (20, 4, len(small.vocabulary)) and drawn.shape[:2] == (20, 3)
    close(cot2.score(model, prompts, drawn), logits, 1e-5)
    close(naive(model, prompts, 4, THOUGHTS[kind]()), logits, 1e-5)
    assert logits.softmax(-1).amax(-1).std() > 0.05, "the model is too dull to show a difference"


@pytest.mark.parametrize("kind", THOUGHTS)
@torch.no_grad()
def test_one_step_has_no_thoughts(model, small, kind):
    logits, drawn = cot2.think(model, small.prompts[:5], 1, THOUGHTS[kind]())
    assert logits.shape[1] == 1 and drawn.shape[:2] == (5, 0)
    close(logits[:, 0], model(small.prompts[:5]).logits[:, -1], 1e-5)
    config, answer = Config(sampling="dirichlet" if kind == "dirichlet" else "mts"), torch.zeros(5, dtype=torch.long)
    close(cot2.score(model, small.prompts[:5], drawn), logits, 1e-5)
    assert cot2.log_ratios(logits, logits, drawn, answer, config).shape == (5, 1)


@torch.no_grad()
def test_greedy_tokens_equal_a_decode_of_ids(model, small):
    prompts = small.prompts[:20]
    _, drawn = cot2.think(model, prompts, 4, THOUGHTS["discrete"]())
    ids = prompts
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(drawn[..., 0], ids[:, prompts.shape[1] :])


@torch.no_grad()
def test_read_starts_where_it_is_told_and_continues_a_cache(model, small):
    table, ids = cot2.embeddings(model), small.prompts[:3]
    close(cot2.read(model, table[ids], 2), model(ids).logits[:, 2:], 1e-5)
    cache = DynamicCache(config=model.config)
    first, second = cot2.read(model, table[ids[:, :2]], 0, cache), cot2.read(model, table[ids[:, 2:]], 0, cache)
    close(torch.cat([first, second], 1), model(ids).logits, 1e-5)


def test_gradient_flows_through_the_new_embeddings_in_the_thoughts_and_equals_finite_differences(small):
    """With a head of its own, the row of a token that is only in thoughts moves the loss through them alone."""
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": len(small.vocabulary)}
    own = lively(GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False))).double()
    own.autocast_dtype = None
    prompts, g = small.prompts[:4], seeded(3)
    drawn = torch.randint(20, 40, (4, 2, 3), generator=g)  # sums: never in a prompt
    old, answer = random_logits(4, 3, len(small.vocabulary)), torch.tensor([41, 42, 43, 44])
    weight, a = own.transformer.wte.weight, f64([1.0, -1.0, 0.5, 2.0])

    def loss():
        log_ratio = cot2.log_ratios(cot2.score(own, prompts, drawn), old, drawn, answer, Config())
        return (log_ratio.double() * a[:, None]).sum()

    grad = torch.autograd.grad(loss(), weight)[0]
    token = drawn[0, 0, 0].item()
    assert grad[token].norm() > 0.01 and not grad[50].any()
    for j in range(0, 16, 5):
        values = []
        for shift in (1e-3, -1e-3):
            with torch.no_grad():
                weight[token, j] += shift
                values.append(loss().item())
                weight[token, j] -= shift
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(grad[token, j].item(), abs=2e-3, rel=2e-3)


def test_sampling_leaves_no_graph_and_inputs_as_they_were(model, small):
    prompts = small.prompts[:4].clone()
    logits, drawn = cot2.think(model, prompts, 3, THOUGHTS["dirichlet"]())
    assert not logits.requires_grad and not drawn.requires_grad and torch.equal(prompts, small.prompts[:4])
    assert cot2.score(model, prompts, drawn).requires_grad


# --- whole runs


@pytest.fixture(autouse=True, scope="module")
def no_plots():
    """A run's curve takes longer than its four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.common.run.plot", lambda *_: None)
        yield


def run(out, **given):
    values = {**SMALL, **({} if "model" in given else SHAPE), **given}
    if values.get("mode", "csft") not in ("csft", "discrete", "none"):
        values.setdefault("lr", 1e-3)
    else:
        values.pop("group_size", None)
    if values.get("mode") not in ("grpo", "discrete"):
        values.pop("eval_draws", None)
    cot2.main(Config(**values, out=str(out)))
    return out


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def results(out):
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines(out)]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(a, b):
    assert results(a) == results(b) and lines(a, "samples.jsonl") == lines(b, "samples.jsonl")
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cot2")


@pytest.fixture(scope="module")
def start(folder):
    """mode -> model/ of a run that has learned something, so that rewards differ."""

    @functools.cache
    def get(mode, **more):
        out = run(folder / "-".join(["start", mode, *map(str, more.values())]), mode=mode, steps=80, lr=1e-2, **{
            "eval_every": 0, "save_every": 0, "dropout": 0.0, **more})  # fmt: skip
        return str(out / "model")

    return get


ARROWS = {"csft": 0, "discrete": 1, "none": 3}
KINDS = {
    "csft": {},
    "csft self": {"feed": "self"},
    "csft budget": {"budget": 2},
    "discrete": {"mode": "discrete"},
    "discrete full": {"mode": "discrete", "discrete_loss": "full"},
    "discrete every 2": {"mode": "discrete", "keep_every": 2},
    "none": {"mode": "none"},
    "none full": {"mode": "none", "discrete_loss": "full"},
    "grpo": {"mode": "grpo"},
    "grpo of csft": {"mode": "grpo"},
    "grpo normalised": {"mode": "grpo", "normalise_sampling": True, "temperature": 0.8},
    "grpo all": {"mode": "grpo", "epochs": 3, "beta": 0.5, "k": 2, "lr": 1e-2},
    "grpo normalised, all": {"mode": "grpo", "epochs": 3, "beta": 0.5, "normalise_sampling": True, "lr": 1e-2},
    "grpo kl detached": {"mode": "grpo", "epochs": 2, "beta": 2.0, "kl_answer_detached": True, "lr": 1e-2},
    "grpo dirichlet": {"mode": "grpo", "sampling": "dirichlet", "epochs": 2, "beta": 0.1, "lr": 3e-3},
}


def settings(kind, start):
    given = dict(KINDS[kind])
    if given.get("mode") == "grpo":
        given["model"] = start("csft" if kind == "grpo of csft" else "discrete")
    return given


@pytest.fixture(scope="module")
def finished(folder, start):
    """kind -> the folder of its run."""
    return functools.cache(lambda kind: run(folder / kind.replace(", ", "-"), **settings(kind, start)))


ALWAYS = {"step", "loss/total", "train/accuracy", "train/entropy", "optim/lr", "optim/grad_norm", "optim/skipped",
          "time/sample", "time/score", "time/update", "time/tokens_per_second", "memory/peak_gib"}  # fmt: skip
OWN = {
    "csft": {"loss/kl", "loss/answer"},
    "discrete": {"loss/nll"},
    "none": {"loss/nll"},
    "grpo": {"loss/policy", "policy/kl_old", "policy/clipped", "train/reward", "train/zero_signal"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_have_the_keys_of_their_mode(finished, small, kind):
    out, given = finished(kind), KINDS[kind]
    mode, rows = given.get("mode", "csft"), lines(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    steps = {"none": 1, "discrete": 2 if "keep_every" in given else 3}.get(mode, 3)
    evaluated = {"eval/accuracy", "eval/accuracy_se", *(f"cot2/entropy/{t + 1}" for t in range(steps))}
    evaluated |= {f"eval/pass_at/{k}" for k in (1, 2, 3)} if mode in ("grpo", "discrete") else set()
    own = ALWAYS | OWN[mode] | ({"loss/kl"} if "beta" in given else set())
    assert rows[0].keys() == evaluated | {"step"}
    for row in rows[1:]:
        assert row.keys() == own | (evaluated if row["step"] % 2 == 0 else set())
        assert all(map(math.isfinite, row.values()))
        parts = [value for key, value in row.items() if key.startswith("loss/") and key != "loss/total"]
        assert row["loss/total"] == pytest.approx(sum(parts), abs=1e-6)
    assert {row["kind"] for row in lines(out, "samples.jsonl")} == {"best", "worst", "other"}
    assert json.loads((out / "model" / "config.json").read_text())["symbols"] == small.vocabulary


# --- training, step by step, against a plain loop


class Watch:
    """What a run samples: rows of think and any_token, in order of the calls."""

    def __init__(self, patch):
        self.thought, self.said, self.heat = [], [], []
        think, token = cot2.think, cot2.any_token

        def thinking(*args):
            self.thought.append(think(*args))
            return self.thought[-1]

        def saying(logits, temperature, generator):
            self.heat.append(temperature)
            self.said.append(token(logits, temperature, generator))
            return self.said[-1]

        patch.setattr(cot2, "think", thinking)
        patch.setattr(cot2, "any_token", saying)


def forward(model, vectors):
    return model(inputs_embeds=vectors).logits.double()


def plain_loss(model, reference, task, rows, config, sampled):
    """Sheet sections 4 and 5, a problem at a time, in the order of the text. -> loss, reward"""
    table, m = model.get_input_embeddings().weight, 3
    total, mode = 0.0, config.mode
    n = len(rows)
    if mode in ("discrete", "none"):
        terms = []
        for i in rows:
            chain = task.chains[i].tolist()
            kept = [chain[-1]] if mode == "none" else [s for t, s in enumerate(chain, 1) if t == m or
                                                       t % config.keep_every == 0]  # fmt: skip
            asked = [*task.prompts[i].tolist(), *[ARROW] * ARROWS[mode]]
            line = [*asked, *kept, EOS]
            logits = model(torch.tensor([line])).logits[0].double().log_softmax(-1)
            first = 1 if config.discrete_loss == "full" else len(asked)
            terms += [-logits[t - 1, line[t]] for t in range(first, len(line))]
        return sum(terms) / len(terms)
    if mode == "csft":
        for i in rows:
            problem, kept = task.prompts[i].tolist(), task.paths[i].tolist()[: config.budget or None]
            vectors, goals = [table[j] for j in problem], []
            for t in range(m):
                alpha = torch.zeros(len(table))
                for path in kept if t < m - 1 else kept[:1]:
                    alpha[path[t]] += 1 / len(kept) if t < m - 1 else 1.0
                if t == m - 1:
                    logits = forward(model, torch.stack(vectors)[None])[0]
                    for s, goal in enumerate((*goals, alpha)):
                        at = logits[len(problem) - 1 + s].log_softmax(-1)
                        total = total + sum(a * (a.log() - at[v]) for v, a in enumerate(goal.double()) if a > 0) / n
                    break
                goals.append(alpha)
                own = forward(model, torch.stack(vectors)[None])[0, -1].softmax(-1).float()
                vectors.append((own if config.feed == "self" else alpha) @ table)
        return total
    (old, drawn), said = sampled
    reward = (said[:, 0] == task.chains[rows, -1]).double().view(-1, config.group_size)
    std = reward.std(1, correction=0, keepdim=True)
    advantages = ((reward - reward.mean(1, keepdim=True)) / std.clamp(min=1e-12)).flatten().tolist()
    arrows = torch.full((n, config.arrows), ARROW)

    def logits_of(model):
        table = model.get_input_embeddings().weight
        weighed = drawn.exp().float() @ table if drawn.is_floating_point() else table[drawn].mean(2)
        prompts = torch.cat([task.prompts[rows], arrows], 1)
        return forward(model, torch.cat([table[prompts], weighed], 1))[:, prompts.shape[1] - 1 :]

    def scaled(a, b, i, t):
        """log r of a over b"""
        if t == m - 1:
            return a[i, t].log_softmax(-1)[said[i, 0]] - b[i, t].log_softmax(-1)[said[i, 0]]
        if config.sampling == "dirichlet":
            p, q = a[i, t].softmax(-1), b[i, t].softmax(-1)
            kept = torch.maximum(p, q) >= config.dirichlet_floor
            c, d = (x[kept].clamp(min=config.dirichlet_floor) for x in (p, q))
            c, d = config.gamma * c / c.sum(), config.gamma * d / d.sum()
            on = drawn[i, t][kept].log_softmax(0)
            return ((c - d) * on - torch.lgamma(c) + torch.lgamma(d)).sum()
        flat = config.temperature * (config.k if config.normalise_sampling else 1)
        a, b = ((x[i, t] / flat).log_softmax(-1)[drawn[i, t]] for x in (a, b))
        return (a - b).sum() if config.normalise_sampling else (a - b).mean()

    new, old = logits_of(model), old.double()
    ref = logits_of(reference).detach()
    for i, a in enumerate(advantages):
        for t in range(m):
            r = scaled(new, old, i, t).exp()
            total = total - torch.minimum(r * a, r.clamp(1 - config.clip, 1 + config.clip) * a) / (n * m)
            if config.beta:
                d = scaled(ref, new, i, t)
                d = d.detach() if config.kl_answer_detached and t == m - 1 else d
                total = total + config.beta * (d.exp() - d - 1) / (n * m)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_equal_a_plain_loop(small, start, tmp_path, kind, monkeypatch):
    """Loss, gradient norm and weights, with AdamW written out anew; what is sampled is taken from the run."""
    given = {**settings(kind, start), "steps": 2, "prompts_per_step": 3, "eval_every": 0, "max_grad_norm": 0.5}
    given |= {} if "model" in given else {"dropout": 0.0}
    watch = Watch(monkeypatch)
    out = run(tmp_path / "run", **given)
    config = Config(**{**SMALL, **SHAPE, **given})
    torch.manual_seed(0)
    if "model" in given:
        model = AutoModelForCausalLM.from_pretrained(given["model"]).eval()
    else:
        model = make_model(Config(**SHAPE, dropout=0.0, task=TASK), small, CPU).eval()
    reference, config.arrows = copy.deepcopy(model), getattr(model.config, "arrows", 0)
    adamw = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    # evaluation thinks once, and eval_draws times more if it samples, before step 1 and after the last
    at = 1 + config.eval_draws
    rows_of = lines(out)
    for step in (1, 2):
        rows = batch_of(51, 3, 0, step)
        sampled = None
        if config.mode == "grpo":
            rows = rows.repeat_interleave(4)
            sampled = watch.thought[at + step - 1], watch.said[step - 1]
            assert watch.heat[step - 1] == 1.0, "the answer is drawn at temperature 1 whatever the thoughts' is"
            right = (watch.said[step - 1][:, 0] == small.chains[rows, -1]).double().view(3, 4).mean(1)
            assert rows_of[step]["train/reward"] == pytest.approx(right.mean().item())
            same = ((right == 0) | (right == 1)).double().mean().item()
            assert rows_of[step]["train/zero_signal"] == pytest.approx(same)
            if config.epochs == 1:  # the scored logits are the sampled ones
                p = sampled[0][0].double().softmax(-1)
                entropy = -(p * p.log()).sum(-1).mean().item()
                assert rows_of[step]["train/entropy"] == pytest.approx(entropy, abs=1e-4)
                likeliest = (p[:, -1].argmax(-1) == small.chains[rows, -1]).double().mean().item()
                assert rows_of[step]["train/accuracy"] == pytest.approx(likeliest)
        for _ in range(config.epochs):
            loss = plain_loss(model, reference, small, rows, config, sampled)
            adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            adamw.step()
        assert rows_of[step]["loss/total"] == pytest.approx(loss.item(), abs=2e-5, rel=1e-4)
        assert rows_of[step]["optim/grad_norm"] == pytest.approx(norm.item(), abs=1e-5, rel=2e-3)
    if config.mode == "grpo":
        assert norm > 0.01, "a batch without a signal tests nothing"
    ours, theirs = weights(out), model.state_dict()
    for name, value in ours.items():
        gap = (value - theirs[name]).abs()
        if name.endswith("c_attn.bias"):
            gap[16:32] = 0  # a bias of all keys alike changes nothing: its gradient is noise, which Adam scales up
        assert gap.mean() < 0.02 * config.lr, name


# --- evaluation, and what a run hands to the next


def asked(small, arrows, tokenizer):
    """The held-out problems as text, through the tokenizer of the run."""
    words = [" ".join([small.vocabulary[j] for j in row] + ["->"] * arrows) for row in small.prompts[51:].tolist()]
    return tokenizer(words, return_tensors="pt", add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", ["csft", "csft self", "discrete", "discrete every 2", "none"])
def test_accuracy_equals_that_of_the_saved_model_decoded_by_hand(finished, start, small, kind, tmp_path):
    mode = KINDS[kind].get("mode", "csft")
    out = finished(kind)
    if kind in ("csft", "discrete", "none"):  # one that has learned something
        out = run(tmp_path / "run", mode=mode, steps=60, lr=1e-2, eval_every=0)
    model, tokenizer = (c.from_pretrained(out / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    inputs = asked(small, ARROWS[mode], tokenizer)
    assert torch.equal(inputs[:, :4], small.prompts[51:]) and model.config.arrows == ARROWS[mode]
    steps = {"none": 1, "discrete": 2 if "every" in kind else 3}.get(mode, 3)
    with torch.no_grad():
        logits = naive(model.eval(), inputs, steps, THOUGHTS["base" if mode == "csft" else "discrete"]())
    right = (logits[:, -1].argmax(-1) == small.chains[51:, -1]).double()
    last = lines(out)[-1]
    assert last["eval/accuracy"] == pytest.approx(right.mean().item())
    assert last["eval/accuracy_se"] == pytest.approx(right.std().item() / 13**0.5)
    for t, step in enumerate(logits.double().softmax(-1).unbind(1)):
        assert last[f"cot2/entropy/{t + 1}"] == pytest.approx(-(step * step.log()).sum(-1).mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [{"k": 1}, {"k": 3}, {"normalise_sampling": True}, {"sampling": "dirichlet"}, {"mode": "discrete", "k": 1},
     {"mode": "discrete", "temperature": 0.5}],
)  # fmt: skip
def test_pass_at_k_counts_the_draws_of_the_modes_own_inference(start, small, tmp_path, flags, monkeypatch):
    """Accuracy and Pass@k from the logits that think gave: the answer's argmax in grpo, a sample in discrete."""
    flags = {"mode": "grpo", **flags}
    flags = {key: value for key, value in flags.items() if flags["mode"] == "grpo" or key != "k"}
    taught = start("discrete")  # before the watch begins
    watch = Watch(monkeypatch)
    out = run(tmp_path / "run", model=taught, steps=1, eval_draws=4, **flags)
    row, truth = lines(out)[0], small.chains[51:, -1]
    thoughts = watch.thought[:5]
    if flags["mode"] == "grpo":
        said = torch.stack([logits[:, -1].argmax(-1) for logits, _ in thoughts[1:]], 1)
        config = Config(**flags)
        for logits, drawn in thoughts[1:]:  # what was read is what was drawn
            assert drawn.shape[-1] == (len(small.vocabulary) if config.sampling == "dirichlet" else config.k)
            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(taught).eval()
                model.autocast_dtype = None
                prompts = torch.nn.functional.pad(small.prompts[51:], (0, 1), value=ARROW)
                close(cot2.score(model, prompts, drawn), logits, 1e-4)
    else:
        said = torch.cat(watch.said[8:12], 1)  # after 4 draws of 2 thoughts
    right = said == truth[:, None]
    draws = range(4)
    for k in (1, 2, 4):
        chance = [right[:, list(chosen)].any(1) for chosen in itertools.combinations(draws, k)]
        assert row[f"eval/pass_at/{k}"] == pytest.approx(torch.stack(chance).double().mean().item())
    assert row["eval/pass_at/1"] <= row["eval/pass_at/2"] <= row["eval/pass_at/4"]
    assert not {"eval/pass_at/3", "eval/pass_at/8"} & row.keys()
    if flags["mode"] == "grpo":
        assert row["eval/accuracy"] == pytest.approx(right.double().mean().item())
        assert row["eval/accuracy_se"] == pytest.approx(right.double().mean(1).std().item() / 13**0.5)


@pytest.mark.parametrize("mode", ["discrete", "csft"])
def test_grpo_asks_as_the_model_was_taught_after_saving_twice_too(start, tmp_path, mode, monkeypatch):
    taught, asked_for, think = start(mode), [], cot2.think
    monkeypatch.setattr(
        cot2, "think", lambda model, prompts, *a: asked_for.append(prompts) or think(model, prompts, *a)
    )
    first = run(tmp_path / "a", mode="grpo", model=taught, steps=1)
    run(tmp_path / "b", mode="grpo", model=str(first / "model"), steps=1)
    width = 5 if mode == "discrete" else 4
    assert len(asked_for) > 8 and all(prompts.shape[1] == width for prompts in asked_for)
    assert all((prompts[:, -1] == ARROW).all() == (mode == "discrete") for prompts in asked_for)


def test_a_model_taught_in_one_mode_is_asked_as_the_next_mode_says(start, tmp_path):
    for mode, arrows in ARROWS.items():
        out = run(tmp_path / mode, mode=mode, model=start("discrete" if mode == "csft" else "csft"), steps=1)
        assert AutoModelForCausalLM.from_pretrained(out / "model").config.arrows == arrows


def test_the_first_evaluation_of_a_loaded_model_is_the_last_of_the_run_that_made_it(start, tmp_path):
    for mode in ("csft", "discrete"):
        out = run(tmp_path / f"a {mode}", mode=mode, steps=30, lr=1e-2)
        again = run(tmp_path / f"b {mode}", mode=mode, model=str(out / "model"), steps=1)
        old, new = lines(out)[-1], lines(again)[0]
        assert all(old[key] == pytest.approx(new[key], abs=1e-6) for key in new if key != "step")


# --- resume, seeds, dropout


@pytest.mark.parametrize("kind", ["csft", "csft self", "discrete", "grpo all", "grpo dirichlet"])
def test_interrupt_and_resume_give_the_uninterrupted_run_bit_for_bit(finished, start, tmp_path, kind, monkeypatch):
    """Stopped in step 4, whose checkpoint is of step 2: line 3 of the log must go."""
    out, batch = tmp_path / "run", cot2.batch_of

    def stopping(n, size, seed, step):
        if step == 4:
            raise KeyboardInterrupt
        return batch(n, size, seed, step)

    monkeypatch.setattr(cot2, "batch_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(out, **settings(kind, start))
    monkeypatch.setattr(cot2, "batch_of", batch)
    assert [row["step"] for row in lines(out)] == [0, 1, 2, 3] and not (out / "model").exists()
    run(out, **settings(kind, start), resume=True)
    assert_same_run(out, finished(kind))


@pytest.mark.parametrize("kind", ["csft", "discrete", "grpo", "grpo dirichlet"])
def test_same_seed_same_run_and_another_seed_another(finished, start, tmp_path, kind):
    assert_same_run(run(tmp_path / "a", **settings(kind, start)), finished(kind))
    other = run(tmp_path / "b", **settings(kind, start), seed=1)
    assert all(x != y for x, y in zip(results(other)[1:], results(finished(kind))[1:], strict=True))


def test_the_first_rollouts_are_on_policy_and_later_epochs_or_dropout_are_not(start, tmp_path):
    def drift(name, **given):
        given = {"model": start("discrete", dropout=0.1), "mode": "grpo", "lr": 1e-2, **given}
        return [abs(row["policy/kl_old"]) for row in lines(run(tmp_path / name, **given))[1:]]

    assert max(drift("once")) < 1e-6 and max(drift("normalised", normalise_sampling=True)) < 1e-5
    assert max(drift("dirichlet", sampling="dirichlet")) < 1e-4
    assert min(drift("dropout", grpo_dropout=True, lr=1e-9)) > 1e-4
    assert max(drift("epochs", epochs=3)) > 1e-3
    clipped = {name: [row["policy/clipped"] for row in lines(tmp_path / name)[1:]] for name in ("once", "epochs")}
    assert max(clipped["once"]) == 0 and 0 < max(clipped["epochs"]) < 1
    base = weights(run(tmp_path / "still", mode="grpo", model=start("discrete", dropout=0.1), lr=1e-9))
    saved = load_file(Path(start("discrete", dropout=0.1)) / "model.safetensors")
    assert all((base[name] - saved[name]).abs().max() < 1e-6 for name in base)


def test_kl_old_is_how_much_less_likely_the_rollouts_have_become(start, tmp_path, monkeypatch):
    seen, plain = [], cot2.log_ratios
    monkeypatch.setattr(cot2, "log_ratios", lambda *given: seen.append(plain(*given)) or seen[-1])
    rows = lines(run(tmp_path / "run", mode="grpo", model=start("discrete"), lr=1e-2, epochs=3, steps=1))
    assert rows[1]["policy/kl_old"] == pytest.approx(-seen[2].mean().item(), rel=1e-6) and abs(seen[2].mean()) > 1e-4


def test_grpo_refuses_a_model_that_was_taught_fewer_steps(start, tmp_path):
    with pytest.raises(UserError, match="taught 2 of 3 steps"):
        run(tmp_path / "kept", mode="grpo", model=start("discrete", keep_every=2))
    with pytest.raises(UserError, match="taught 1 of 3 steps"):
        run(tmp_path / "none", mode="grpo", model=start("none"))


def test_more_problems_than_are_held_out_are_not_counted(tmp_path, capsys):
    out = run(tmp_path / "few", eval_problems=64, steps=1)
    assert json.loads((out / "config.json").read_text())["flags"]["eval_problems"] == 13
    assert "13 held-out problems" in " ".join(capsys.readouterr().out.split())


def test_dropout_acts_in_training_and_not_in_evaluation(tmp_path):
    rows = {d: results(run(tmp_path / str(d), dropout=d, steps=1, eval_every=1)) for d in (0.0, 0.5)}
    assert rows[0.0][0] == rows[0.5][0] and rows[0.0][1]["loss/total"] != rows[0.5][1]["loss/total"]


ACTING = {  # flag -> [kind of run, another value]
    "budget": ("csft", 1), "feed": ("csft", "self"), "dropout": ("csft", 0.3), "width": ("csft", 8),
    "layers": ("csft", 2), "heads": ("csft", 4), "discrete_loss": ("discrete", "full"), "keep_every": ("discrete", 2),
    "temperature": ("grpo", 0.5), "k": ("grpo", 2), "normalise_sampling": ("grpo", True), "beta": ("grpo all", 0.1),
    "sampling": ("grpo", "dirichlet"), "gamma": ("grpo dirichlet", 3.0), "dirichlet_floor": ("grpo dirichlet", 0.1),
    "clip": ("grpo all", 0.01), "kl_answer_detached": ("grpo all", True), "epochs": ("grpo", 2),
    "eval_draws": ("grpo", 4), "group_size": ("grpo", 3), "schedule": ("csft", "linear"), "warmup": ("csft", 2),
    "max_grad_norm": ("csft", 0.01), "weight_decay": ("csft", 5.0), "lr": ("csft", 1e-2), "dtype": ("csft", "bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("flag", ACTING)
def test_every_flag_acts(finished, start, tmp_path, flag):
    kind, value = ACTING[flag]
    out = run(tmp_path / "run", **{**settings(kind, start), flag: value})
    assert results(out)[-1] != results(finished(kind))[-1]


@pytest.mark.parametrize("kind", ["csft self", "discrete", "grpo all", "grpo dirichlet"])
def test_bfloat16_trains_and_keeps_fp32_weights(start, tmp_path, kind):
    out = run(tmp_path / "run", **settings(kind, start), dtype="bfloat16")
    assert all(map(math.isfinite, results(out)[-1].values()))
    assert all(value.dtype == torch.float32 for value in weights(out).values())


def test_one_digit_has_an_answer_and_no_thoughts(tmp_path):
    one = {"task": "mnns:digits=1", "eval_problems": 2}
    for mode in ("csft", "discrete", "none"):
        out = run(tmp_path / mode, mode=mode, **one)
        assert results(out)[-1].keys() >= {"cot2/entropy/1"} and "cot2/entropy/2" not in results(out)[-1]
        assert results(out)[-1].get("loss/kl", 0) == 0
    for sampling in ("mts", "dirichlet"):
        out = run(tmp_path / sampling, mode="grpo", model=str(tmp_path / "csft" / "model"), sampling=sampling, **one)
        assert math.isfinite(results(out)[-1]["optim/grad_norm"])


@pytest.mark.parametrize("name", ["prosqa", "prontoqa"])
def test_reachability_trains_in_every_mode(tmp_path, name):
    given = {"task": f"{name}:problems=60,width=4,depth=2", "eval_problems": 3, "steps": 2}
    for mode in ("csft", "discrete", "none"):
        assert math.isfinite(results(run(tmp_path / mode, mode=mode, **given))[-1]["loss/total"])
    run(tmp_path / "grpo", mode="grpo", model=str(tmp_path / "csft" / "model"), **given)


# --- bodies with another vocabulary


def body(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": 0, "eos_token_id": 250, "bos_token_id": 251}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind.startswith("qwen3"):
            return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings="tied" in kind.split()))
        if kind == "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=8))
        gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 40}
        return GPT2LMHeadModel(GPT2Config(**gpt2, bos_token_id=39, eos_token_id=39))


BODIES = ["qwen3 tied", "qwen3 own", "gpt2", "gemma3"]


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_with_another_vocabulary_trains_and_is_stored_with_the_symbols(small, tmp_path, kind):
    body(kind).save_pretrained(tmp_path / "body")
    out = run(tmp_path / "run", model=str(tmp_path / "body"), steps=2)
    assert math.isfinite(lines(out)[-1]["loss/total"]) and lines(out)[-1]["optim/grad_norm"] > 0
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    size = len(small.vocabulary)
    assert model.config.symbols == small.vocabulary and model.config.vocab_size == size
    for held in (model.config, model.generation_config):
        assert (held.pad_token_id, held.bos_token_id, held.eos_token_id) == (0, 1, 2)
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert tables[0].shape == tables[1].shape == (size, 16)
    assert (tables[0].data_ptr() == tables[1].data_ptr()) == (kind != "qwen3 own")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert [tokenizer.convert_tokens_to_ids(word) for word in small.vocabulary] == list(range(size))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    again = run(tmp_path / "again", model=str(out / "model"), steps=2)  # known symbols: nothing is drawn anew
    old, new = lines(out)[-1], lines(again)[0]
    assert all(old[key] == pytest.approx(new[key], abs=1e-6) for key in new if key != "step")
    run(tmp_path / "grpo", mode="grpo", model=str(out / "model"), steps=2)


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_keeps_nothing_of_its_own_vocabulary(small, tmp_path, kind):
    """Rows that meant other symbols are drawn anew, with one spread; and the row of a former padding learns, too."""
    foreign = body(kind)
    for table in {foreign.get_input_embeddings(), foreign.get_output_embeddings()}:
        nn.init.constant_(table.weight, 3.0)
    foreign.config.pad_token_id = foreign.generation_config.pad_token_id = 7
    foreign.save_pretrained(tmp_path / "body")
    model = make_model(Config(model=str(tmp_path / "body"), task=TASK), small, CPU)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.2) and table.weight.abs().max() < 0.2
    cot2.embeddings(model).sum().backward()
    assert (model.get_input_embeddings().weight.grad != 0).all()


@pytest.mark.parametrize("kind", BODIES)
@torch.no_grad()
def test_embeddings_are_what_the_model_reads_for_ids(small, kind):
    model = lively(body(kind))
    model.autocast_dtype = None
    ids, table = small.prompts[:6], cot2.embeddings(model)
    close(cot2.read(model, table[ids], 0), model(ids).logits, 1e-5)
    _, drawn = cot2.think(model, ids, 4, THOUGHTS["discrete"]())
    together = model(torch.cat([ids, drawn[..., 0]], 1)).logits[:, 3:]
    close(cot2.score(model, ids, drawn), together, 1e-5)


# --- the paper's theory: one layer that holds every partial sum at once


def codes(frequencies, modulus=73, least=-36):
    """cos and sin of each sum -36..36 at frequencies 2 pi f / 73.  -> [73, 2 F], a point of a circle per frequency"""
    angle = 2 * math.pi / modulus * torch.outer(torch.arange(modulus) + least, f64(frequencies))
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(1)


def turned(code, digit, frequencies, modulus=73):
    """The codes of s + digit from those of s: a rotation of each circle, linear, so that averages stay averages."""
    pairs = code.unflatten(-1, (-1, 2))
    angle = 2 * math.pi / modulus * digit[:, None] * f64(frequencies)
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * pairs[..., 0] - s * pairs[..., 1], s * pairs[..., 0] + c * pairs[..., 1]], -1).flatten(1)


def superposed(digits, frequencies):
    """The thoughts of all steps, each from the one before and one digit alone.  [N, m] -> m of [N, 2 F]"""
    code = codes(frequencies)[36].expand(len(digits), -1)  # of the sum 0
    for digit in digits.double().unbind(1):
        code = (turned(code, digit, frequencies) + turned(code, -digit, frequencies)) / 2
        yield code


def decoded(code, frequencies):
    """The least-norm weights of the sums that have this code.  -> [N, 73]"""
    return code @ torch.linalg.pinv(codes(frequencies))


def prefix_target(digits, t):
    """Counts of the sums of all sign prefixes of length t, over 2^t.  -> [N, 73]"""
    signs = torch.tensor(list(itertools.product((-1, 1), repeat=t)))
    sums = digits[:, :t] @ signs.T + 36
    return torch.zeros(len(digits), 73).double().scatter_add_(1, sums, torch.full(sums.shape, 2.0**-t).double())


def test_one_layer_construction_follows_all_traces_of_all_problems_at_once(task):
    digits, full = torch.tensor(digits_of(task)), range(37)  # the constant and 36 circles: 73 numbers for 73 sums
    assert torch.linalg.matrix_rank(codes(full)) == 73
    target = cot2.soft_targets(task.paths, 0, 89)
    for t, code in enumerate(superposed(digits, full), 1):
        shares = prefix_target(digits, t)
        close(code, shares @ codes(full), 1e-9)  # the average of the next states' codes
        weight = decoded(code, full)
        close(weight, shares, 1e-9)
        if t < 4:
            close(weight, target[:, t - 1, 16:], 1e-6)
    there = (weight > 2.0**-5) & (torch.arange(-36, 37) >= 0)  # the last step: the least that is not negative
    assert torch.equal(there.int().argmax(1) + 16, task.chains[:, -1])


def test_one_layer_construction_needs_more_numbers_the_more_states_it_holds(task):
    """One trace can be read from a single circle; sixteen need many, and the more circles the fewer mistakes."""
    digits = torch.tensor(digits_of(task, 7))
    one = [1]
    single = codes(one)
    assert torch.equal((single @ single.T).argmax(1), torch.arange(73))
    wrong = {}
    for circles in (1, 4, 12, 24, 36):
        code = list(superposed(digits, range(circles + 1)))[-1]
        weight, shares = decoded(code, range(circles + 1)), prefix_target(digits, 4)
        wrong[circles] = ((weight > 2.0**-5) != (shares > 0)).any(1).double().mean().item()
    assert wrong[36] == 0 and wrong[1] > 0.9 and wrong[4] > 0.9 and wrong[12] > 0
    assert list(wrong.values()) == sorted(wrong.values(), reverse=True)


# --- learning


@pytest.mark.parametrize("seed", range(2))
def test_csft_learns_more_than_the_majority_in_150_steps(tmp_path, seed):
    given = {
        "task": "mnns:digits=2,high=5",
        "steps": 150,
        "lr": 1e-2,
        "prompts_per_step": 16,
        "dropout": 0.0,
        "eval_every": 0,
        "seed": seed,
    }
    out = run(tmp_path / "run", **given)
    accuracy = sum(row["train/accuracy"] for row in lines(out)[-10:]) / 10
    task = make_task(given["task"])
    majority = Counter(task.chains[: task.n_train, -1].tolist()).most_common(1)[0][1] / task.n_train
    assert accuracy > majority + 0.4, (accuracy, majority)


def test_thirty_steps_of_grpo_raise_the_reward(start, tmp_path):
    gains = []
    for seed in range(3):
        given = {"mode": "grpo", "model": start("discrete"), "steps": 30, "eval_every": 0, "prompts_per_step": 16}
        rows = lines(run(tmp_path / str(seed), **given, group_size=8, lr=3e-3, seed=seed))[1:]
        rewards = [row["train/reward"] for row in rows]
        gains.append(sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5)
    assert min(gains) > 0.05 and sum(gains) / 3 > 0.1, gains


# --- bad input


BAD = {  # [flags, words that the line must hold]; MODEL stands for a trained model
    "grpo from scratch": ({"mode": "grpo"}, ["--mode grpo", "--model F/model", "--mode csft"]),
    "group of one": ({"mode": "grpo", "model": "MODEL", "group_size": 1}, ["--group-size", "at least 2"]),
    "temperature 0": ({"mode": "discrete", "temperature": 0.0}, ["--temperature"]),
    "clip 1": ({"mode": "grpo", "model": "MODEL", "clip": 1.0}, ["--clip"]),
    "dropout 1": ({"dropout": 1.0}, ["--dropout"]),
    "no traces": ({"task": "addition"}, ["addition", "no traces", "mnns"]),
    "width and heads": ({"width": 10, "heads": 4}, ["--width", "--heads"]),
    "no such model": ({"model": "no/such"}, ["no/such"]),
    "other symbols": ({"mode": "grpo", "model": "MODEL", "task": "mnns:digits=2"}, ["symbols", "mnns:digits=2"]),
    "other symbols, too long": ({"mode": "grpo", "model": "MODEL", "task": "mnns"}, ["positions"]),
    "a body too short": ({"model": "MODEL", "task": "mnns"}, ["positions", "15", "12"]),
    "no digits": ({"task": "mnns:digits=0"}, ["digits from 1 to 8"]),
    "nine digits": ({"task": "mnns:digits=9"}, ["digits from 1 to 8"]),
    "low above high": ({"task": "mnns:low=5,high=4"}, ["low <= high"]),
    "high 100": ({"task": "mnns:digits=2,high=100"}, ["high <= 99"]),
    "half a digit": ({"task": "mnns:digits=2.5"}, ["digits"]),
    "a digit in words": ({"task": "mnns:digits=two"}, ["digits"]),
    "too many problems": ({"task": "mnns:digits=7"}, ["memory", "fewer digits"]),
    "one problem": ({"task": "mnns:digits=3,low=4,high=4"}, ["hold any out"]),
    "unknown option": ({"task": "mnns:digit=3"}, ["digit", "digits"]),
    "narrow": ({"task": "prosqa:width=2"}, ["width 3 to 32"]),
    "deep": ({"task": "prontoqa:depth=7"}, ["depth 1 to 6"]),
    "few": ({"task": "prosqa:problems=39"}, ["problems 40"]),
    "reaching all": ({"task": "prosqa:width=3,depth=4,problems=40"}, ["reach every node", "wider"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_flag_and_leaves_no_run(name, start, tmp_path):
    given, words = BAD[name]
    given = {key: start("csft") if value == "MODEL" else value for key, value in given.items()}
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", **given)
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    for word in words:
        assert word in said, said
    assert not (tmp_path / "run").exists()


OTHER = {  # flag -> a value that is not the default, and the modes in which the flag acts
    "feed": ("self", "csft"), "budget": (2, "csft"), "keep_every": (2, "discrete"),
    "temperature": (0.5, "grpo discrete"), "discrete_loss": ("full", "discrete none"),
    "eval_draws": (2, "grpo discrete"), "k": (2, "grpo"), "normalise_sampling": (True, "grpo"),
    "beta": (0.1, "grpo"), "sampling": ("dirichlet", "grpo"), "epochs": (2, "grpo"), "grpo_dropout": (True, "grpo"),
    "group_size": (4, "grpo"), "dropout": (0.2, "csft discrete none"), "width": (16, "csft discrete none"),
    "layers": (1, "csft discrete none"), "heads": (1, "csft discrete none"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["csft", "discrete", "none", "grpo"])
def test_a_flag_that_has_nothing_to_act_on_is_refused_and_others_are_not(mode):
    for flag, (value, modes) in OTHER.items():
        config = Config(mode=mode, model="x" if mode == "grpo" else "scratch", **{flag: value})
        if mode in modes.split():
            cot2.check(config)
        else:
            with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}.* has nothing to act on"):
                cot2.check(config)


@pytest.mark.parametrize(
    "flags",
    [{"gamma": 3.0}, {"dirichlet_floor": 0.0}, {"sampling": "dirichlet", "k": 2}, {"kl_answer_detached": True},
     {"sampling": "dirichlet", "normalise_sampling": True}, {"clip": 0.2}],
)  # fmt: skip
def test_flags_of_the_other_sampling_or_of_no_kl_are_refused(flags):
    cot2.check(Config(mode="grpo", model="x"))
    cot2.check(Config(mode="grpo", model="x", clip=0.2, epochs=2))
    cot2.check(Config(mode="grpo", model="x", clip=0.2, grpo_dropout=True))
    with pytest.raises(UserError, match=list(flags)[-1].replace("_", "-") + ".* has nothing to act on"):
        cot2.check(Config(mode="grpo", model="x", **flags))
    cot2.check(Config(mode="grpo", model="x", sampling="dirichlet", gamma=3.0, dirichlet_floor=0.0))
    cot2.check(Config(mode="grpo", model="x", beta=0.1, kl_answer_detached=True))


@pytest.mark.parametrize("flags", [{"width": 16}, {"layers": 1}, {"heads": 1}, {"dropout": 0.2}])
def test_the_shape_of_a_loaded_model_cannot_be_chosen(flags):
    with pytest.raises(UserError, match="nothing to act on"):
        cot2.check(Config(model="x", **flags))


@pytest.mark.parametrize("preset", ["none", "grpo", "paper"])
def test_presets_are_values_of_flags_that_pass_the_checks(preset):
    values = cot2.PRESETS[preset]
    config = Config(preset=preset, model="x" if values.get("mode") == "grpo" else "scratch", **values)
    cot2.check(config)
    if preset == "paper":  # sheet section 6: 1000 epochs of 328
        assert (config.lr, config.prompts_per_step, config.steps, config.dropout) == (1e-4, 16, 328_000, 0.1)
        assert config.weight_decay == 0.01 and config.width == 32 and config.layers == config.heads == 2
    if preset == "grpo":
        assert (config.group_size, config.k, config.clip, config.beta, config.epochs) == (8, 3, 0.1, 0.0, 1)


@pytest.mark.parametrize("flag", ["--k=0", "--gamma=0", "--keep-every=0", "--eval-draws=0", "--width=0", "--budget=-1"])
def test_numbers_out_of_range_are_one_line_with_exit_code_2(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cot2.py", flag])
    with pytest.raises(SystemExit) as stop:
        cli(cot2.main, Config, cot2.PRESETS)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and flag.split("=")[0] in said


def test_a_process_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "methods" / "cot2.py"), "--preset", "grpo"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --mode grpo") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
