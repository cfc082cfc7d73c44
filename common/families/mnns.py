"""Minimum non-negative sum (MNNS), CoT2's task: sign the digits so that their total is the least that is not negative.

Vocabulary: <pad> <bos> <eos> -> + - D0..D9 and S-36..S36, more with more or higher digits. A problem is
<bos> D5 D1 D4 D2; a state is the sum so far, such as S5 S4 S0 S2; the answer is the last. All tuples of digits are
problems. Those with the same digits in another order are on the same side of the split.
"""

import itertools
import random

import torch

from posttrain.common.cli import require
from posttrain.common.families.traces import BOS, SPECIAL, Traces

D0 = len(SPECIAL) + 2  # id of digit 0
SPLIT = 42  # the released code's seed, for every run: a split by the run's seed would leak from one stage to the next


def ways(digits: tuple[int, ...]) -> list[list[int]]:
    """The partial sums of each choice of signs, + before - from the left: (1, 3) -> 1 4, 1 -2, -1 2, -1 -4"""
    signs = itertools.product((1, -1), repeat=len(digits))
    return [list(itertools.accumulate(s * d for s, d in zip(chosen, digits, strict=True))) for chosen in signs]


def nearest_first(paths: list[list[int]]) -> list[list[int]]:
    """By |total|, then the non-negative one; ties with - before + from the left, the order that budgets take."""
    minus_first = reversed(list(enumerate(paths)))
    return [path for _, path in sorted(minus_first, key=lambda each: (abs(each[1][-1]), each[1][-1] < 0, -each[0]))]


def least_total(paths: list[list[int]]) -> list[int]:
    """The first way, + before - from the left, that reaches the answer: what a discrete chain is taught."""
    return min(paths, key=lambda path: (path[-1] < 0, path[-1]))


def mnns(name: str, *, digits: int = 4, low: int = 1, high: int = 9) -> Traces:
    whole = all(type(x) is int for x in (digits, low, high)) and 1 <= digits <= 8 and 0 <= low <= high <= 99
    require(whole, f"task {name!r}: digits from 1 to 8, and 0 <= low <= high <= 99, all whole numbers")
    size = (high - low + 1) ** digits
    require(size * 2**digits <= 4e6, f"task {name!r}: {size} problems are more than memory holds; use fewer digits")
    vocabulary = [*SPECIAL, "+", "-", *(f"D{i}" for i in range(max(high, 9) + 1))]
    most = digits * max(high, 9)
    zero = len(vocabulary) + most  # id of S0
    vocabulary += [f"S{i}" for i in range(-most, most + 1)]

    groups: dict[tuple[int, ...], list] = {}
    for problem in itertools.product(range(low, high + 1), repeat=digits):
        groups.setdefault(tuple(sorted(problem)), []).append(problem)
    keys = list(groups)
    random.Random(SPLIT).shuffle(keys)
    n_groups = int(0.8 * len(keys))
    require(0 < n_groups < len(keys), f"task {name!r}: too few different problems to hold any out; widen its options")
    train, test = ([p for key in part for p in groups[key]] for part in (keys[:n_groups], keys[n_groups:]))
    problems = train + test
    every = [ways(problem) for problem in problems]
    return Traces(
        name=name,
        vocabulary=vocabulary,
        prompts=torch.tensor([[BOS, *(D0 + d for d in problem)] for problem in problems]),
        paths=torch.tensor([nearest_first(paths) for paths in every]) + zero,
        chains=torch.tensor([least_total(paths) for paths in every]) + zero,
        n_train=len(train),
    )
