"""Critiques of wrong attempts: by a task's own rules, from a column of the data, or by a language model."""

import difflib
import math
import re
from dataclasses import replace
from typing import Any

from posttrain.common.cli import require
from posttrain.common.models import plain
from posttrain.common.rollout import Engine, Sampling, encode
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
    known = ("task", "correctness", "self")
    meant = [word for word in difflib.get_close_matches(spec, known, 1, 0.8) if word != spec]
    require(not meant, f"--critic {spec!r}: none of {', '.join(known)}, column:NAME or a model; near: {meant}")
    return spec not in known and column == spec


def ask(writer: Engine, asked: list[Example], brief: Sampling, key: tuple) -> list[str]:
    """What the writer's model says to each; "" where its context does not hold the prompt and `brief`."""
    context = getattr(plain(writer.model).config, "max_position_embeddings", None) or math.inf
    fits = [len(encode(writer.tokenizer, each.prompt)) + brief.max_new_tokens <= context for each in asked]
    held = [each for each, fit in zip(asked, fits, strict=True) if fit]
    said = iter(writer.generate(held, 1, brief, key).texts if held else [])
    return [next(said).strip() if fit else "" for fit in fits]


def criticise(
    spec: str, writer: Engine | None, task: Any, examples: list, attempts: list, brief: Sampling, key: tuple
) -> list[str]:
    """A critique of each attempt, maybe empty. A judge's is what stands behind its last marker, "" without one."""
    pairs, column = list(zip(examples, attempts, strict=True)), spec.removeprefix("column:")
    if not writer and column != spec:
        found = [example.fields[column] for example in examples]
        return ["" if each is None else str(each).strip() for each in found]
    if not writer:
        return [BLANK if spec == "correctness" else task.critique(*pair).strip() for pair in pairs]
    if hasattr(task, "critic_prompt"):
        return ask(writer, [replace(e, prompt=task.critic_prompt(e, y)) for e, y in pairs], brief, key)
    judge = lambda e, y: [{"role": "user", "content": JUDGE.format(task=text_of(e), attempt=y)}]  # noqa: E731
    texts = ask(writer, [replace(e, prompt=judge(e, y)) for e, y in pairs], brief, key)
    return [text.rpartition("Critique:")[2].strip() if "Critique:" in text else "" for text in texts]


def tells(example: Example, critique: str) -> bool:
    """Whether a critique holds, as a word of its own, the field `reveals` of its problem, or else the answer."""
    secret = str(example.fields.get("reveals") or example.answer).strip()
    return bool(secret) and re.search(rf"(?<![\w.]){re.escape(secret)}(?!\w|\.\w)", critique) is not None
