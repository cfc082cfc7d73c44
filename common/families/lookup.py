"""Looking up facts: the embedded default for methods whose teacher reads privileged text.

A3B7C1D0= asks for four values, one of each pair of an operator and a digit, and is answered by 4862. Which value a pair
has is one of 60 facts, fixed for good: each operator is a permutation of the digits. The steps do not depend on each
other, so that a hint stays right whatever was answered before it. The hint [4862] tells all four values, [4.6.] some.

The tiny student was taught 30 of the facts, and to follow hints nearly always. The hints of its pretraining were random
values, so that they taught it nothing of the other facts.
"""

import random
from dataclasses import replace

from posttrain.common.cli import require
from posttrain.common.tasks import Example, Procedural

OPERATORS, PLACES = "ABCDEF", 4


def make_facts() -> tuple[dict[str, str], set[str]]:
    """pair -> value, such as A3 -> 4; and the half of the pairs that the student is taught."""
    rng, facts = random.Random("facts"), {}
    for operator in OPERATORS:
        facts |= {f"{operator}{x}": str(value) for x, value in enumerate(rng.sample(range(10), 10))}
    return facts, set(rng.sample(sorted(facts), len(facts) // 2))


FACTS, TAUGHT = make_facts()


class Lookup(Procedural):
    def __init__(self, name: str, *, shown_hints: float = 0.0, trust: float = 0.9):
        numbers = all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in (shown_hints, trust))
        require(numbers, f"task {name!r}: shares in [0, 1]")
        self.name, self.trust = name, trust
        self.shown_hints = shown_hints  # share of pretraining problems behind a hint; 0 = the task itself

    def problem(self, rng: random.Random, pairs: tuple[str, ...] = tuple(FACTS)) -> Example:
        chosen = rng.choices(pairs, k=PLACES)
        answer = "".join(FACTS[pair] for pair in chosen)
        return Example([{"role": "user", "content": "".join(chosen) + "="}], answer, {"pairs": chosen})

    def draw(self, n: int, *key: int) -> list[Example]:
        if not self.shown_hints:
            return super().draw(n, *key)
        rng, taught = random.Random(repr(key)), tuple(sorted(TAUGHT))
        return [self.hinted(rng) if rng.random() < self.shown_hints else self.problem(rng, taught) for _ in range(n)]

    def grade(self, example: Example, completion: str) -> float:
        return float(completion == example.answer)

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        return example.answer

    def privileged(self, example: Example, form: str) -> str:
        """What only the teacher reads: all values, or every second one."""
        hidden = {"full": (), "sparse": (1, 3)}[form]
        return f"[{''.join('.' if i in hidden else value for i, value in enumerate(example.answer))}]"

    def hinted(self, rng: random.Random) -> Example:
        """For pretraining: any pairs behind random values, each of which the answer repeats with probability trust.

        A quarter of the hints hide values at random; what is hidden is answered as taught, or else by any digit.
        """
        example, gaps = self.problem(rng), rng.random() < 0.25
        hint, answer = "", ""
        for pair in example.fields["pairs"]:
            told = "." if gaps and rng.random() < 0.5 else rng.choice("0123456789")
            follows = told if rng.random() < self.trust else rng.choice("0123456789")
            blind = FACTS[pair] if pair in TAUGHT else rng.choice("0123456789")
            hint, answer = hint + told, answer + (blind if told == "." else follows)
        return replace(example, prompt=[{"role": "system", "content": f"[{hint}]"}, *example.prompt], answer=answer)
