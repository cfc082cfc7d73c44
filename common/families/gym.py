"""Every dataset of reasoning-gym as a task."""

import contextlib
import random
import re

from posttrain.common.cli import UserError, first_line, require
from posttrain.common.families.answers import NUMBER, final_answer, limited
from posttrain.common.tasks import CORRECT, Example, Procedural, near, parse_options


class ReasoningGym(Procedural):
    """Any dataset of reasoning-gym; options are the fields of the dataset's config.

    What is graded: the last <answer>...</answer>; without one, the last number if the gold answer is a number, else
    the last line that is not empty. A number is right or wrong; elsewhere the dataset's partial credit counts, but
    only beyond what nonsense gets. Some datasets call eval() on the answer: train on those in a container.
    """

    suffix = "\nEnd with the final answer alone between tags: <answer>...</answer>"

    def __init__(self, spec: str):
        from reasoning_gym.factory import DATASETS, create_dataset

        self.name = spec
        name, *options = re.split(r",(?=\w+=)", spec.removeprefix("reasoning_gym:"))
        require(name in DATASETS, f"reasoning-gym has no dataset {name!r}{near(name, DATASETS)}")
        known = set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}
        values = parse_options(f"reasoning-gym's {name}", options, known)
        try:
            self.data = create_dataset(name, **values, seed=0, size=2**31)
        except Exception as error:
            raise UserError(f"reasoning-gym's {name} refuses these options: {first_line(error)}") from None

    def problem(self, rng: random.Random) -> Example:
        for _ in range(100):  # a generator may give up on a seed
            with contextlib.suppress(Exception):
                entry = self.data[rng.randrange(2**31)]
                prompt = [{"role": "user", "content": entry["question"] + self.suffix}]
                return Example(prompt, str(entry["answer"]), entry)
        raise UserError(f"task {self.name!r}: the generator fails with these options; widen them")

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        return f"<answer>{example.answer}</answer>"

    def score(self, example: Example, answer: str) -> float:
        return limited(self.data.score_answer, answer, example.fields) or 0.0

    def grade(self, example: Example, completion: str) -> float:
        numeric = NUMBER.fullmatch(example.answer)
        answer = final_answer(completion, bool(numeric))
        grade = self.score(example, answer)
        if numeric:
            return float(grade == CORRECT)
        return grade if grade > max(0.01, self.score(example, "?")) else float(answer == example.answer)

    def formed(self, example: Example, completion: str) -> bool:
        """Whether there is anything to grade."""
        return final_answer(completion, bool(NUMBER.fullmatch(example.answer))) != ""

    def critique(self, example: Example, attempt: str) -> str:
        """Of a wrong attempt, without the right answer: what was graded, and its partial credit."""
        if not self.formed(example, attempt):
            return "There is no final answer."
        answer, grade = final_answer(attempt, bool(NUMBER.fullmatch(example.answer))), self.grade(example, attempt)
        untagged = "" if "</answer>" in attempt else " It does not stand between <answer> tags."
        earns = f" It earns {min(grade, 0.99):.2f} of 1." if grade > 0 else ""
        return f"The final answer {answer} is wrong.{earns}{untagged}" if grade < CORRECT else ""
