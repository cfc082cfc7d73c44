"""Chained sums modulo 100 with a calculator that sometimes fails: the embedded default for tool use.

35*6-7-5? is worked out strictly from left to right, one call a turn: the model writes <35*6>, reads (10), writes
<10-7>, and so on; its last turn is the answer, =98;. A valid call fails with probability `fault`, a malformed one
always: the answer is then (X, ten random characters, and ). Only the final answer is graded.
"""

import random
import re

from posttrain.common.environments.episodes import Environment, Step
from posttrain.common.tasks import Example, Procedural, require

CALL = re.compile(r"<(\d{1,2})([+*-])(\d{1,2})>")
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Chain(Procedural):
    def __init__(self, name: str, *, fault: float = 0.15, shown_fault: float = 0.0):
        share = isinstance(fault, (int, float)) and isinstance(shown_fault, (int, float))
        require(
            share and 0 <= min(fault, shown_fault) <= max(fault, shown_fault) < 1, f"task {name!r}: shares in [0, 1)"
        )
        self.name, self.fault = name, fault
        self.shown_fault = shown_fault  # share of failed calls in demonstrations, each then made again

    def problem(self, rng: random.Random) -> Example:
        value = rng.randint(1, 99)
        text, steps = str(value), []
        for _ in range(rng.randint(2, 4)):
            sign, operand = rng.choice("+-*"), rng.randint(1, 9)
            steps.append(f"{value}{sign}{operand}")
            value = SIGNS[sign](value, operand) % 100
            text += f"{sign}{operand}"
        return Example([{"role": "user", "content": text + "?"}], str(value), {"steps": steps})

    def environment(self, example: Example, seed: int) -> Environment:
        return Calls(self, seed)

    def grade(self, example: Example, completion: str) -> float:
        """Of a whole transcript: what its last turn answers."""
        found = re.search(r"(?:^|\))=(\d{1,2});$", completion)
        return float(found is not None and found[1] == example.answer)

    def demonstrate(self, example: Example, rng: random.Random) -> list[tuple[str, str]]:
        """Turns and what they are answered, the last without an answer."""
        turns = []
        for step in example.fields["steps"]:
            while rng.random() < self.shown_fault:
                turns.append((f"<{step}>", failure(rng)))
            turns.append((f"<{step}>", result(f"<{step}>")))
        return [*turns, (f"={example.answer};", "")]


def result(call: str) -> str:
    """What the calculator says; ValueError on a malformed call."""
    found = CALL.fullmatch(call)
    if not found:
        raise ValueError(call)
    return f"({SIGNS[found[2]](int(found[1]), int(found[3])) % 100})"


def failure(rng: random.Random) -> str:
    return "(X" + "".join(rng.choices("0123456789eX|", k=10)) + ")"


class Calls(Environment):
    stops = (">", ";")
    turn_tokens = 14

    def __init__(self, task: Chain, seed: int):
        self.task, self.rng = task, random.Random(seed)

    def reset(self, example: Example) -> list[dict[str, str]]:
        self.example = example
        return example.prompt

    def step(self, text: str) -> Step:
        if not text.endswith(">"):  # no complete call: the final turn
            return Step(done=True, reward=self.task.grade(self.example, text))
        flaky = self.rng.random() < self.task.fault
        if flaky or not CALL.fullmatch(text):
            return Step(failure(self.rng), failed=True)
        return Step(result(text))
