"""Reachability in random layered graphs, after ProsQA and ProntoQA: the other two of CoT2's tasks.

Nodes lie in layers; each has two children in the next layer and, so that counting arrows tells nothing, two parents. A
problem is <bos>, all edges as pairs of nodes in random order, a root of the first layer, and

    prosqa     two nodes of the last layer, of which the root reaches one: the answer
    prontoqa   one node of the last layer: does the root reach it, yes or no?

Each step of a search moves one edge down, so that a state is a node; the step after the last layer is the answer. Both
tasks are ours, since the paper's data is not released in a form that runs. With layers of five nodes and four steps
down a root would reach nearly every node of the last layer.
"""

import random

import torch

from posttrain.common.cli import require
from posttrain.common.families.traces import BOS, SPECIAL, Traces


def layers(rng: random.Random, width: int, depth: int) -> list[list[tuple[int, int]]]:
    """children[node] of all but the last layer's nodes; two different permutations between neighbours."""
    children = []
    for layer in range(depth):
        below = range(width * (layer + 1), width * (layer + 2))
        while True:
            one, two = rng.sample(below, width), rng.sample(below, width)
            if all(a != b for a, b in zip(one, two, strict=True)):
                break
        children += zip(one, two, strict=True)
    return children


def walks(children: list[tuple[int, int]], root: int, depth: int) -> list[list[int]]:
    """The nodes after the root on each of the 2^depth walks; nodes met more than once are counted so often."""
    paths = [[root]]
    for _ in range(depth):
        paths = [[*path, child] for path in paths for child in children[path[-1]]]
    return [path[1:] for path in paths]


def reach(name: str, *, width: int = 6, depth: int = 3, problems: int = 20000) -> Traces:
    """The last twentieth of the problems is held out, 1,000 at most."""
    whole = all(type(x) is int for x in (width, depth, problems)) and 3 <= width <= 32 and 1 <= depth <= 6
    require(whole and 40 <= problems <= 10**6, f"task {name!r}: width 3 to 32, depth 1 to 6, problems 40 to a million")
    pros, rng = name.startswith("prosqa"), random.Random(repr(("graphs", width, depth, problems)))
    vocabulary = [*SPECIAL, "yes", "no", *(f"N{i}" for i in range(width * (depth + 1)))]
    first = len(SPECIAL) + 2
    last, prompts, paths, chains = range(width * depth, width * (depth + 1)), {}, [], []
    for _ in range(100 * problems):
        children, root = layers(rng, width, depth), rng.randrange(width)
        ways = walks(children, root, depth)
        reached = sorted({way[-1] for way in ways})
        missed = [node for node in last if node not in reached]
        if not missed:
            continue
        good, bad = rng.choice(reached), rng.choice(missed)
        right = pros or rng.random() < 0.5
        asked = rng.sample((good, bad), 2) if pros else [good if right else bad]
        edges = [(node, child) for node, pair in enumerate(children) for child in pair]
        rng.shuffle(edges)
        prompt = tuple(first + node for node in (*(node for edge in edges for node in edge), root, *asked))
        if prompt in prompts:
            continue
        prompts[prompt] = None
        answer = first + good if pros else len(SPECIAL) + (not right)
        rng.shuffle(ways)
        ways.sort(key=lambda way: way[-1] != good)  # budgets keep walks to a node that is reached
        paths.append([[*(first + node for node in way), answer] for way in ways])
        chains.append(paths[-1][0])
        if len(prompts) == problems:
            break
    require(len(prompts) == problems, f"task {name!r}: roots reach every node too often; make it wider or less deep")
    return Traces(
        name=name,
        vocabulary=vocabulary,
        prompts=torch.tensor([[BOS, *prompt] for prompt in prompts]),
        paths=torch.tensor(paths),
        chains=torch.tensor(chains),
        n_train=problems - min(1000, problems // 20),
    )
