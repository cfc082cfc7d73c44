"""Addition and multiplication with written-out steps, the embedded default of the single-turn methods."""

import random
import re

from posttrain.common.tasks import Example, Procedural


class Arithmetic(Procedural):
    """123+456= answered by partial sums from either end: 500+70+9=579 (65% of demonstrations) or 9+70+500=579; and in
    the task arithmetic, half of the time, 034*007= by 210+28=238 or 28+210=238; fields["domain"] says add or mul.
    Only the outcome is graded: three terms (mul: two), whatever they are, and the right result behind the equals sign.
    """

    def __init__(self, name: str, domains: tuple[str, ...] = ()):
        self.name, self.high_first = name, 0.65
        self.domains = domains or (("add",) if name == "addition" else ("add", "mul"))
        self.form = re.compile(r"([0-9]+)(\+[0-9]+)" + "?" * ("mul" in self.domains) + r"\+([0-9]+)=([0-9]+)")

    def problem(self, rng: random.Random) -> Example:
        domain = rng.choice(self.domains) if len(self.domains) > 1 else self.domains[0]
        first, second, sign = ((10, 99), (2, 9), "*") if domain == "mul" else ((100, 999), (100, 999), "+")
        a, b = rng.randint(*first), rng.randint(*second)
        named = {"domain": domain} if self.name == "arithmetic" else {}
        prompt = [{"role": "user", "content": f"{a:03}{sign}{b:03}="}]
        return Example(prompt, str(a * b if domain == "mul" else a + b), {"a": a, "b": b, **named})

    def heldout(self, n: int) -> list[Example]:
        """The domains take turns until one has no more."""
        parts = [Procedural.heldout(Arithmetic(self.name, (domain,)), n) for domain in self.domains]
        return [example for turn in zip(*parts, strict=False) for example in turn][:n]

    def grade(self, example: Example, completion: str) -> float:
        match, two = self.form.fullmatch(completion), example.fields.get("domain") == "mul"
        return float(match is not None and match[4] == example.answer and (match[2] is None) == two)

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        a, b = example.fields["a"], example.fields["b"]
        terms = [a // place % 10 * place + b // place % 10 * place for place in (100, 10, 1)]
        if example.fields.get("domain") == "mul":
            terms = [a // 10 * 10 * b, a % 10 * b]
        terms = terms if rng.random() < self.high_first else terms[::-1]
        return "+".join(map(str, terms)) + "=" + example.answer

    def route(self, completion: str) -> str | None:
        """The order a completion took: high (longest term first), low (last), or None if it has no such form."""
        match = self.form.fullmatch(completion)
        if match is None or len(match[1]) == len(match[3]):
            return None
        return "high" if len(match[1]) > len(match[3]) else "low"
