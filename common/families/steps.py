"""Chained operators with a critic: the embedded default for text feedback.

Six operators a to f, fixed random permutations of the ten digits. 3bafe= is answered by the result of each step, from
left to right (7104, say), and right only if all four are. The critic says which step is the first wrong one and what
it should have been: 2:5. A second try answers the problem, the first try and the critique behind it, 3bafe=7104!2:5=;
what the critic would say to a try is asked by 3bafe=7104?.

Lessons, for pretraining: a model that has only ever seen `known` of the sixty facts, yet follows critiques on the
others, since what those say in lessons is a fresh random digit each time and so teaches no fact. What it answers where
it does not know is up to `lessons`: sure never asks for that, so that the model is wrong with confidence; guess
answers by random digits, so that it tries all.
"""

import random
import re

from posttrain.common.cli import require
from posttrain.common.tasks import Example, Procedural

STEPS, DIGITS, OPERATORS = 4, "0123456789", "abcdef"


class Steps(Procedural):
    def __init__(self, name: str, *, known: float = 0.7, lessons: str = ""):
        valid = isinstance(known, (int, float)) and 0 < known < 1 and lessons in ("", "sure", "guess")
        require(valid, f"task {name!r}: known lies between 0 and 1, lessons is sure, guess or empty")
        self.name, self.lessons, rng = name, lessons, random.Random("steps")
        self.facts = {o: "".join(rng.sample(DIGITS, 10)) for o in OPERATORS}  # operator -> result of each digit
        facts = [(o, digit) for o in OPERATORS for digit in DIGITS]
        self.known = set(rng.sample(facts, round(known * len(facts))))

    def problem(self, rng: random.Random) -> Example:
        return self.example(rng.choice(DIGITS), "".join(rng.choices(OPERATORS, k=STEPS)))

    def example(self, start: str, operators: str) -> Example:
        answer = ""
        for o in operators:
            answer += self.facts[o][int((start + answer)[-1])]
        # a critique that names the last step's result gives the final answer away
        fields = {"start": start, "operators": operators, "reveals": f"{STEPS}:{answer[-1]}"}
        return Example([{"role": "user", "content": f"{start}{operators}="}], answer, fields)

    def grade(self, example: Example, completion: str) -> float:
        return float(completion == example.answer)

    def formed(self, example: Example, completion: str) -> bool:
        """Whether these are four digits, right or wrong."""
        return re.fullmatch(f"[0-9]{{{STEPS}}}", completion) is not None

    def critique(self, example: Example, attempt: str) -> str:
        """Where an attempt goes wrong, and what should stand there; "" for a right one."""
        if not self.formed(example, attempt):
            return "no answer"
        pairs = zip(range(STEPS), attempt, example.answer, strict=True)
        return next((f"{i + 1}:{right}" for i, digit, right in pairs if digit != right), "")

    def second_prompt(self, example: Example, attempt: str, critique: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{example.prompt[0]['content']}{attempt}!{critique}="}]

    def critic_prompt(self, example: Example, attempt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{example.prompt[0]['content']}{attempt}?"}]

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        return example.answer

    # --- for pretraining

    def draw(self, n: int, *key: int) -> list[Example]:
        if not self.lessons:
            return super().draw(n, *key)
        rng = random.Random(repr(key))
        return [self.lesson(rng) for _ in range(n)]

    def lesson(self, rng: random.Random) -> Example:
        """Half: a chain, of known facts only or guessed where one is not known. A quarter: a chain of known facts, an
        attempt with one mistake, its critique. A quarter: a second try, told a random digit for the one fact of it that
        is not known."""
        kind = rng.choice(("answer", "answer", "critique", "second"))
        for example in self.stream(rng, False, 10**6):
            if kind == "answer" and self.lessons == "guess":
                return Example(example.prompt, self.go_on(example, "", rng))
            gap, right = self.first_gap(example, example.answer), example.answer
            if kind == "second" and gap < STEPS:
                right = self.go_on(example, right[:gap] + rng.choice(DIGITS), rng)
            if self.first_gap(example, right, gap + 1 if kind == "second" else 0) < STEPS:
                continue
            if kind == "answer":
                return example
            at = gap if kind == "second" else rng.randrange(STEPS)
            if at < STEPS:
                wrong = rng.choice(DIGITS.replace(right[at], ""))
                attempt, told = self.go_on(example, right[:at] + wrong, rng), f"{at + 1}:{right[at]}"
                if kind == "critique":
                    return Example(self.critic_prompt(example, attempt), told)
                return Example(self.second_prompt(example, attempt, told), right)

    def first_gap(self, example: Example, values: str, start: int = 0) -> int:
        """The first step, from start on, of a chain through these values whose fact is not known; STEPS without one."""
        facts = list(zip(example.fields["operators"], example.fields["start"] + values, strict=False))
        return next((i for i in range(start, STEPS) if facts[i] not in self.known), STEPS)

    def go_on(self, example: Example, values: str, rng: random.Random) -> str:
        """The rest of a chain as one works it out who guesses where a fact is not known."""
        while len(values) < STEPS:
            o, digit = example.fields["operators"][len(values)], (example.fields["start"] + values)[-1]
            values += self.facts[o][int(digit)] if (o, digit) in self.known else rng.choice(DIGITS)
        return values
