"""Critiques of wrong attempts: by a task's own rules, from a column of the data, or by a language model."""

from dataclasses import replace
from typing import Any

from posttrain.common.cli import require
from posttrain.common.rollout import HFEngine, Sampling
from posttrain.common.tasks import Example, text_of

BLANK = "incorrect"  # what a critique says that says nothing
JUDGE = """{task}\n\nThis attempt at the task above is wrong:\n{attempt}\n
Name its first mistake in fewer than 50 words without giving the solution away. End with one line: Critique: ..."""


def is_model(spec: str, task: Any) -> bool:
    """Whether a critic is a model: not task (its own), correctness or column:NAME. Raises UserError on what is none."""
    own = f"task {task.name!r} has no critic of its own; set --critic correctness, column:NAME, self or a model"
    require(spec != "task" or hasattr(task, "critique"), own)
    column = spec.removeprefix("column:")
    there = task.draw(1, 0)[0].fields if column != spec else [column]
    require(column in there, f"--critic {spec!r}: task {task.name!r} has no such column, but {', '.join(there)}")
    return spec not in ("task", "correctness", "self") and column == spec


def criticise(
    spec: str, writer: HFEngine | None, task: Any, examples: list, attempts: list, brief: Sampling, key: tuple
) -> list[str]:
    """A critique of each attempt, maybe empty; by the writer's model, if any: what stands behind its last marker."""
    pairs, column = list(zip(examples, attempts, strict=True)), spec.removeprefix("column:")
    if not writer and column != spec:
        return [str(example.fields[column] or "").strip() for example in examples]
    if not writer:
        return [BLANK if spec == "correctness" else task.critique(*pair).strip() for pair in pairs]

    def judge(example: Example, attempt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": JUDGE.format(task=text_of(example), attempt=attempt)}]

    prompt = getattr(task, "critic_prompt", judge)
    asked = [replace(example, prompt=prompt(example, attempt)) for example, attempt in pairs]
    texts = writer.generate(asked, 1, brief, key).texts if asked else []
    return [text.rpartition("Critique:")[2].strip() for text in texts]
