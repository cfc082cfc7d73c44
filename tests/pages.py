"""The documentation in parts, for the tests of its commands and of its figures."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.scripts import equations

ROOT = equations.ROOT
RESULTS = ROOT / "scripts" / "results"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


@dataclass
class Section:
    """A whole page of a method, or what stands under one heading `## ...` elsewhere."""

    page: Path
    text: str

    @property
    def prose(self) -> str:
        return FENCE.sub("", self.text)

    @property
    def studies(self) -> list[str]:
        """The stored results that the section names: `--study S`, a file or a plot, a plain reproduce.py."""
        found = [a or b for a, b in re.findall(r"--study ([\w-]+)|results/([\w-]+)\.(?:json|png)", self.text)]
        found += ["addition"] * bool(re.search(r"reproduce\.py(?![^`\n]*--study)", self.text))
        return [name for name in dict.fromkeys(found) if (RESULTS / f"{name}.json").exists()]


def sections_of(page: Path, text: str) -> list[Section]:
    if page.parent.name == "methods":
        return [Section(page, text)]
    hidden = FENCE.sub(lambda fence: re.sub(r"[^\n]", "x", fence[0]), text)  # `## ` is a comment in there
    cuts = [0, *(match.start() for match in re.finditer(r"^## ", hidden, re.M)), len(text)]
    return [Section(page, text[a:b]) for a, b in itertools.pairwise(cuts)]


def everything() -> Iterator[Section]:
    for page in equations.documents():
        yield from sections_of(page, page.read_text())
