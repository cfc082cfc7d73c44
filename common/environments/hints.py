"""Privileged text about a problem: a solution, less of it, a column of the data, or a model's own words."""

import random
from typing import Any

from posttrain.common.cli import require
from posttrain.common.environments.critics import ask
from posttrain.common.rollout import Engine, Sampling, seed_of
from posttrain.common.tasks import Example, text_of

ASK = "Task:\n{}\n\nA solution of it:\n{}\n\nWrite a short hint that helps to solve the task."


def hint_texts(
    problems: list[Example], task: Any, config: Any, writer: Engine, brief: Sampling, key: tuple
) -> list[str]:
    """What may be read of each problem, worded by --hint-text around {hint}; "" = nothing.

    --hint full is the task's own hint, else --hint-column of the data, else a demonstration; sparse is the task's
    shorter hint, else the final answer; self is written by the writer's model, which reads what full gives.
    """
    form, column = config.hint, config.hint_column
    if form in ("full", "sparse") and hasattr(task, "privileged"):
        require(column == "hint", f"--hint-column {column!r}: task {task.name!r} has hints of its own")
        return [task.privileged(example, form) for example in problems]
    rng, known = random.Random(seed_of(*key)), []
    for example in problems:
        there = column in example.fields
        require(there or column == "hint", f"--hint-column {column!r}: the data has {', '.join(example.fields)}")
        full = example.fields[column] if there else task.demonstrate(example, rng)
        told = {"none": None, "sparse": example.answer}.get(form, full)
        known.append("" if told is None else str(told).strip())
    if form == "self":
        asks = [ASK.format(text_of(example), told) for example, told in zip(problems, known, strict=True)]
        asked = [Example([{"role": "user", "content": text}], "") for text in asks]
        known = ask(writer, asked, brief, key)
    return [told and config.hint_text.replace("{hint}", told) for told in known]
