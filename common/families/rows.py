"""Tasks from tables: JSONL, JSON, CSV or Parquet files, folders of them, and names that `datasets` knows."""

import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.common.cli import UserError, first_line, require
from posttrain.common.families.answers import final_answer, limited, same_mathematics
from posttrain.common.tasks import Example, stable_hash, text_of


def rows_of(name: str, table: Any) -> Iterator[tuple[int, dict]]:
    """Rows by number. Texts are decoded as they are read, not when the file is loaded."""
    i = -1
    try:
        for i, row in enumerate(table):
            yield i, row
    except Exception as error:
        cause = f"a row behind row {i} cannot be read ({first_line(error)})"
        raise UserError(f"task {name!r}: {cause}; mend it, such as by saving the file as UTF-8") from None


class Rows:
    """A finite table. Rows of its test or validation split are held out, else the tenth of prompts with the lowest
    hashes; the others train, each as often as it stands there. Correct is what math-verify finds equal to the gold
    answer (its part behind "####", if any), or is its very text.
    """

    def __init__(self, name: str, train: Any, heldout: Any, prompt_column: str, answer_column: str):
        self.name = name
        examples = self.read(train, prompt_column, answer_column)
        if heldout is not None:
            self.test = self.read(heldout, prompt_column, answer_column)
        else:
            unique = {text_of(example): example for example in reversed(examples)}
            self.test = [unique[text] for text in sorted(unique, key=stable_hash)[: math.ceil(len(unique) / 10)]]
        seen = {text_of(example) for example in self.test}
        self.train = [example for example in examples if text_of(example) not in seen]
        require(self.train and self.test, f"task {name!r}: {len(examples)} rows are too few to train on and hold out")

    def read(self, table: Any, prompt_column: str, answer_column: str) -> list[Example]:
        there = table.column_names
        for column, flag in ((prompt_column, "--prompt-column"), (answer_column, "--answer-column")):
            lacks = f"task {self.name!r} has no column {column!r}; {flag} can be one of: {', '.join(there)}"
            require(column in there, lacks)
        out = []
        for i, row in rows_of(self.name, table):
            prompt, answer = row.pop(prompt_column), row[answer_column]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
            turns = messages if isinstance(messages, list) else []
            texts = [turn.get("content") if isinstance(turn, dict) else None for turn in turns]
            wrong = f"task {self.name!r}: row {i} lacks an answer, or its prompt is neither text nor chat messages"
            require(texts and all(type(t) is str and t for t in texts) and answer is not None, wrong)
            out.append(Example(messages, str(answer).split("####")[-1].strip(), {"solution": str(answer)} | row))
        return out

    def draw(self, n: int, *key: int) -> list[Example]:
        rng, out = random.Random(repr(key)), []
        while len(out) < n:
            out += rng.sample(self.train, min(n - len(out), len(self.train)))
        return out

    def heldout(self, n: int) -> list[Example]:
        return self.test[:n]

    def grade(self, example: Example, completion: str) -> float:
        literal = final_answer(completion, numeric=False) == example.answer
        return float(literal or bool(limited(same_mathematics, example.answer, completion)))

    def demonstrate(self, example: Example, rng: random.Random) -> str:
        return str(example.fields["solution"])

    def size(self, split: str) -> int:
        return len(getattr(self, split))

    def describe(self, split: str, row: int) -> str:
        return text_of(getattr(self, split)[row])


class LabelledRows(Rows):
    """Texts, or pairs of texts, with a class. Classes are numbered as the column's ClassLabel has them, else sorted."""

    def __init__(self, name: str, train: Any, heldout: Any, text_column: str, pair_column: str, label_column: str):
        columns = {"--text-column": text_column, "--text-pair-column": pair_column, "--label-column": label_column}
        self.columns = {flag: column for flag, column in columns.items() if column}
        super().__init__(name, train, heldout, "", "")
        known = getattr(train.features[label_column], "names", None)
        found = sorted({e.answer for e in self.train + self.test}, key=lambda x: (str(type(x)), x))
        self.names = known or [*map(str, found)]
        self.number = {value: i for i, value in enumerate(range(len(known)) if known else found)}
        require(len(self.names) > 1, f"task {name!r} has one class only, {self.names[0]!r}: nothing to learn")

    def read(self, table: Any, *_: str) -> list[Example]:
        there, out = table.column_names, []
        for flag, column in self.columns.items():
            lacks = f"task {self.name!r} has no column {column!r}; {flag} can be one of: {', '.join(there)}"
            require(column in there, lacks)
        for i, row in rows_of(self.name, table):
            *texts, label = (row[column] for column in self.columns.values())
            bad = f"task {self.name!r}: row {i} lacks a text or a class (a word, or a number from 0)"
            require(all(type(text) is str and text for text in texts), bad)
            require(type(label) is str or (type(label) in (int, bool) and label >= 0), bad)
            out.append(Example([{"role": "user", "content": text} for text in texts], label))
        return out


def load_rows(spec: str, heldout: tuple[str, ...] = ("test", "validation")) -> tuple[Any, Any]:
    """Training rows and the first split of heldout that is there, else None."""
    import datasets

    path, kind = Path(spec), {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    require(path.suffix not in kind or path.is_file(), f"task {spec!r}: no such file in {Path.cwd()}")
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    empty = f"task {spec!r} is empty; give a file with at least two rows"
    require(path.suffix not in kind or path.stat().st_size, empty)
    try:
        name, _, config = spec.partition(":")
        file = {"path": kind.get(path.suffix), "data_files": str(path)}
        splits = datasets.load_dataset(**file if path.suffix in kind else {"path": name, "name": config or None})
    except Exception as error:
        require("corresponds to no data" not in str(error), empty)
        known = "addition, arithmetic, reasoning_gym:NAME, gsm8k, a data file or folder, or a name on the hub"
        cause = first_line(error.__cause__ or error)
        raise UserError(f"task {spec!r} cannot be loaded ({cause}); give {known}") from None
    own = next((s for s in heldout if s in splits), None)
    train = next((s for s in ("train", *splits) if s in splits and s != own), own)
    require(len(splits[train]) > 0, empty)
    return splits[train], None if own in (None, train) else splits[own]
