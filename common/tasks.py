"""Tasks: where problems come from, and how an answer to one is graded.

task.draw(n, *key)              n training problems, a pure function of integers such as (seed, step)
task.heldout(n)                 the first n held-out problems, never drawn; fewer if there are fewer
task.grade(example, text)       in [0, 1]; CORRECT or less
task.demonstrate(example, rng)  a correct response, written out where the task knows how
"""

import difflib
import importlib.util
import inspect
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from posttrain.common.cli import UserError, first_line, require
from posttrain.common.machines import distributed

CORRECT = 1.0  # the only grade that counts as correct, in rewards, accuracy and Pass@k alike: reward == CORRECT


@dataclass
class Example:
    prompt: list[dict[str, str]]  # chat messages
    answer: str
    fields: dict = field(default_factory=dict)  # the data's other columns


def text_of(example: Example) -> str:
    return "\n".join(message["content"] for message in example.prompt)


def stable_hash(*texts: str) -> int:
    return int.from_bytes(blake2b("\0".join(texts).encode(), digest_size=8).digest())


def parse_options(owner: str, options: list[str], known: Any) -> dict[str, Any]:
    """["key=value", ...] of a task's name, values read as YAML."""
    values = {}
    for option in options:
        key, _, value = option.partition("=")
        require(key in known, f"{owner} has no option {key!r}{near(key, known)}")
        values[key] = yaml.safe_load(value)
    return values


class Procedural:
    """Endless problems from self.problem(rng). A tenth of all prompts, by hash, is held out."""

    def stream(self, rng: random.Random, heldout: bool, n: int) -> Iterator[Example]:
        for _ in range(1000 + 100 * n):  # then the generator counts as exhausted
            example = self.problem(rng)
            if (stable_hash(text_of(example)) % 10 == 0) == heldout:
                yield example

    def draw(self, n: int, *key: int) -> list[Example]:
        out = list(itertools.islice(self.stream(random.Random(repr(key)), False, n), n))
        require(len(out) == n, f"task {self.name!r} has too few different problems to train on; widen its options")
        return out

    def heldout(self, n: int) -> list[Example]:
        out: dict[str, Example] = {}
        for example in self.stream(random.Random("held out"), True, n):
            out.setdefault(text_of(example), example)
            if len(out) == n:
                break
        require(bool(out), f"task {self.name!r} has too few different problems to hold any out; widen its options")
        return list(out.values())


Task = Any  # Procedural, or Rows of common/families/rows.py
# name -> module of common/families and class in it, which takes the spec and, by keyword, its options
FAMILIES = {"addition": "arithmetic:Arithmetic", "arithmetic": "arithmetic:Arithmetic", "chain": "chain:Chain"}
FAMILIES |= {"lookup": "lookup:Lookup", "sokoban": "sokoban:Sokoban", "steps": "steps:Steps", "mnns": "mnns:mnns"}
FAMILIES |= {"reasoning_gym": "gym:ReasoningGym", "prosqa": "reach:reach", "prontoqa": "reach:reach"}


def make_task(spec: str, prompt_column: str = "prompt", answer_column: str = "answer") -> Task:
    """A name in FAMILIES | reasoning_gym:NAME[,option=value,...] | gsm8k | file.jsonl, ... | DATASET[:config]"""
    name, _, options = spec.partition(":")
    if name in FAMILIES:
        module, _, family = FAMILIES[name].partition(":")
        family = getattr(importlib.import_module(f"posttrain.common.families.{module}"), family)
        known = [key for key, p in inspect.signature(family).parameters.items() if p.kind is p.KEYWORD_ONLY]
        options = options.split(",") if options and name != "reasoning_gym" else []  # that one reads its own
        return family(spec, **parse_options(f"task {name!r}", options, known))
    from posttrain.common.families.rows import Rows, load_rows

    if spec == "gsm8k":
        return Rows(spec, *load_rows("openai/gsm8k:main"), "question", "answer")
    return Rows(spec, *load_rows(spec), prompt_column, answer_column)


def make_reward(spec: str, task: Task) -> Callable[[Example, str], float]:
    """task = the task's grade | random = a coin thrown by hash, the no-signal control | path/to/file.py:function"""
    if spec == "task":
        return task.grade
    if spec == "random":
        return lambda example, completion: float(stable_hash(text_of(example), completion) % 2)
    return from_file(spec, "--reward", "task, random, or path/to/file.py:function")


def from_file(spec: str, flag: str, known: str) -> Callable:
    """What a user's path/to/file.py:name holds, a function or a class."""
    path, _, name = spec.rpartition(":")
    found = path.endswith(".py") and Path(path).is_file()
    require(found, f"{flag} {spec!r}: give {known} (no such file in {Path.cwd()})")
    named = "user_" + flag.strip("-")
    file = importlib.util.spec_from_file_location(named, path)
    module = sys.modules[named] = importlib.util.module_from_spec(file)
    sys.path.append(str(Path(path).resolve().parent))  # for what the file imports from beside it
    try:
        file.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag}: {path} cannot be imported ({type(error).__name__}: {first_line(error)})") from None
    require(callable(getattr(module, name, None)), f"{flag}: {path} has no {known.rpartition(':')[2]} {name!r}")
    return getattr(module, name)


def grade_all(reward: Callable[[Example, str], float], examples: list[Example], completions: list[str]) -> list[float]:
    """A reward for each row; NaN (unscorable, left out of the update) where the function raises or has no number."""
    mine, out, cause = distributed.part(len(examples)), [], None
    for example, completion in zip(examples[mine], completions[mine], strict=True):
        try:
            value = float(reward(example, completion))
            require(math.isfinite(value), f"it returned {value}")
        except (Exception, SystemExit) as error:
            value, cause = math.nan, cause or f"{type(error).__name__}: {first_line(error)}"
        out.append(value)
    out, reason = distributed.gather(out), next(filter(None, distributed.gather([cause])), "")
    if out and all(math.isnan(value) for value in out):
        raise UserError(f"the reward function scored none of {len(out)} completions; the first failed with {reason}")
    return out


def near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
    return f"; near: {', '.join(close)}" if close else f"; it has: {', '.join(sorted(known)[:12])}, ..."
