"""The figures of the documentation follow from what is stored.

In a section that names studies (`--study S`, a file or a plot of scripts/results) each row of a table must come from
one arm of one study, and each column must be one quantity: a mean over seeds with its standard deviation, a difference
of two arms seed by seed, steps to the target, ... Rows that name a built-in model come from its training.json.
"""

import functools
import itertools
import json
import random
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from posttrain.scripts.reproduce import paired, spread
from posttrain.tests.pages import RESULTS, ROOT, Section, everything, sections_of

# Tables of figures that nothing stored can be compared with: beginning of the header -> why
UNSTORED_TABLES = {
    "| case | plain PyTorch": "milliseconds of one machine, printed by scripts/bench_kernels.py",
    "| method | task | lines": "scripts/results/methods.txt, as tests/test_reproduce.py checks",
    "| model, work | ours": "seconds of one machine, printed by scripts/bench_rollout.py",
    "| quartile of teacher perplexity": "printed by the command beside it, --recovery-probe",
}
LABELS = {"thoughts", "run", "paper"}  # columns that name a row, or quote a publication
UNSTORED_COLUMNS = {"nats at steps 1 to 4, before": "entropies at step 0 are in the runs' folders only"}
SAME = {"--cold-start-steps 160": "--cold-start-steps 1000000"}  # in a run of 160 steps
UNSTORED = {  # why -> figures in sentences
    "SmolLM2 on a CPU, whose run is not kept": "0.068 ± 0.019, 0.443 ± 0.066",
    "points of curves, which the JSON files do not hold": "0.035, 0.237, 0.448, 0.398, 0.307, 0.238, 0.198, 0.284",
    "other learning rates of SCOPE": "0.452, 0.476, 0.478",
    "other seeds of the pretraining": "0.248, 0.148, 0.703, 0.582",
    "two routes of the start and of its teacher": "0.212, 0.428",
    "the chain's teacher under the study's own failures": "0.996",
}
FREE = {figure for figures in UNSTORED.values() for figure in figures.split(", ")}


def leaves(tree, path=()) -> Iterator[tuple[tuple, float]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, key), value


@dataclass(frozen=True)
class Quantity:
    """What was measured: a mean over seeds with its spread (None: not stored), a number, or a median with its range."""

    centre: float
    width: float | None = None
    seeds: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()


@functools.cache
def half_width(n: int) -> float:
    """Of the 95% interval of a mean of n values with standard deviation 1, as scripts/reproduce.py has it."""
    values = [float(i) for i in range(n)]
    return paired(values)["t_half"] / spread(values) if n > 1 else 0.0


def differences(ours: list[float], theirs: list[float]) -> dict[str, Quantity]:
    """Seed by seed: their mean with their standard deviation, and with half of its 95% interval."""
    gaps = np.subtract(*(np.array(values[: min(len(ours), len(theirs))]) for values in (ours, theirs)))
    mean, deviation = gaps.mean().item(), gaps.std(ddof=1).item() if len(gaps) > 1 else 0.0
    interval = Quantity(mean, deviation * half_width(len(gaps)))
    return {"deviation": Quantity(mean, deviation, tuple(gaps.tolist())), "interval": interval}


@functools.cache
def evidence(name: str) -> dict[str, dict[tuple, Quantity]]:
    """Arm (or side, or built-in model) -> {what: Quantity}, from a stored file."""
    if name == "tiny models":
        files = {path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("common/tiny/*/training.json")}
        files = {arm: file | {"seed": int(file["command"].split("--seed ")[1])} for arm, file in files.items()}
        return {arm: {path: Quantity(value) for path, value in leaves(file)} for arm, file in files.items()}
    found, stored = {}, json.loads((RESULTS / f"{name}.json").read_text())
    for beta, sides in stored.get("results", {}).items():  # bench_step
        for side, tree in sides.items():
            flat, mine = dict(leaves(tree)), found.setdefault(side, {})
            for path in (path[:-1] for path in flat if path[-1] == "median"):
                mine[beta, *path] = Quantity(flat[*path, "median"], ends=(flat[*path, "min"], flat[*path, "max"]))
    runs_of = {arm: {key: seeds for key, seeds in values["runs"].items() if set(map(type, seeds)) <= {int, float}}
               for arm, values in stored.get("methods", {}).items()}  # fmt: skip
    for arm, runs in runs_of.items():
        values = stored["methods"][arm]
        mine = {path: Quantity(value) for path, value in leaves(values) if path[0] not in runs}
        mine |= {(key,): Quantity(statistics.mean(seeds), spread(seeds), tuple(seeds)) for key, seeds in runs.items()}
        for other, key in itertools.product(set(runs_of) - {arm}, runs):
            if key in runs_of[other]:
                gaps = differences(runs[key], runs_of[other][key])
                mine |= {("minus", key, other, width): gap for width, gap in gaps.items()}
        if "before" in runs:
            mine["gain",] = differences(runs["eval/accuracy"], runs["before"])["deviation"]
        elif "eval/accuracy" in runs:  # the spreads of both are not stored
            mine["gain",] = Quantity(mine["eval/accuracy",].centre - values["before"])
        found[arm] = mine
    return found


def prints(value: float, text: str) -> bool:
    """Is text the value, rounded as printed?"""
    if "." not in text and abs(value) < 10:  # a count
        return value == int(text)
    return float(f"{value:.{len(text.partition('.')[2])}f}") == float(text)


ATOM = re.compile(
    r"(?P<pm>[+-]?\d+\.\d+ ± \d+\.\d+)(?: \((?P<seeds>\d\.\d+(?:, \d\.\d+)+)\))?"
    r"|(?P<range>\d+\.\d+ \(\d+\.\d+-\d+\.\d+\))|(?P<thousands>\d+)k|(?P<percent>\d+)%|(?P<number>[+-]?\d+(?:\.\d+)?)"
)
STEPS = re.compile(r"(?:(?:never|\d+)(?:, |$))+|(\d+) in all|(\d+) with the (first|second|third|fourth|last) seed")
WORDS = re.compile(r"[ ,]|greedy|of correct responses|more|none")


def steps_of(cell: str, n: int) -> list:
    match = STEPS.fullmatch(cell)
    if match[1] or cell == "never":
        return [int(match[1]) if match[1] else "never"] * n
    if match[2]:
        place = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": n - 1}[match[3]]
        return [int(match[2]) if i == place else "never" for i in range(n)]
    return [int(step) if step.isdigit() else step for step in cell.split(", ")]


def explained(atom: re.Match, values: dict[tuple, Quantity]) -> set[tuple]:
    """What of an arm the figure can be."""

    def fits(what: tuple, x: Quantity) -> bool:
        if atom["pm"]:
            centre, width = atom["pm"].split(" ± ")
            unknown = what in (("before",), ("gain",)) and x.width is None
            seeds = atom["seeds"].split(", ") if atom["seeds"] else []
            fit = prints(x.centre, centre) and (unknown or (x.width is not None and prints(x.width, width)))
            return fit and (not seeds or (len(seeds) == len(x.seeds) and all(map(prints, x.seeds, seeds))))
        if atom["range"]:
            return bool(x.ends) and all(map(prints, (x.centre, *x.ends), re.findall(r"[\d.]+", atom["range"])))
        shown = atom["thousands"] or atom["percent"] or atom["number"]
        return prints(x.centre * (1e-3 if atom["thousands"] else 100 if atom["percent"] else 1), shown)

    return {what for what, x in values.items() if fits(what, x)}


def tables(section: Section) -> Iterator[tuple[list[str], list[list[str]], str]]:
    """(header's cells, rows of cells, header's line) of each table of figures: every row has a cell that is one."""
    for block in re.findall(r"(?:^\|.*\n?)+", section.prose, re.M):
        header, _, *lines = block.splitlines()
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        rows = [[re.sub(r"<!--.*?-->", "", cell).strip() for cell in row] for row in rows]
        if rows and all(any(re.match(r"[+-]?\d|never", cell) for cell in row[1:]) for row in rows):
            yield [cell.strip() for cell in header.split("|")[1:-1]], rows, header


@functools.cache
def stored(name: str) -> dict:
    """target of a study, and its arms' commands and steps to it."""
    file = json.loads((RESULTS / f"{name}.json").read_text()) if name != "tiny models" else {}
    return {"target": file.get("target")} | file.get("methods", {})


def groups(label: str, name: str) -> list[list[str]]:
    """Arms that may have made a row: each whose command has the label's flags; in a row named n all of that size."""
    if label.isdigit():
        return [[arm for arm in evidence(name) if arm.endswith(f"-n{label}")]]
    arms, side = list(evidence(name)), label.split(" (")[0]
    named = [arm for arm in arms if f"`{arm}`" in label or arm == side] or arms
    flags = re.findall(r"--[\w-]+(?: [^\s-]\S*)?", " ".join(re.findall(r"`([^`]+)`", label)))
    commands = {arm: stored(name).get(arm, {}).get("command", "") + " " for arm in named}
    return [[arm] for arm in named if all(f"{SAME.get(flag, flag)} " in commands[arm] for flag in flags)]


def explain(header: list[str], row: list[str], name: str, arms: list[str]) -> tuple[dict, str]:
    """{(column, place in the cell): what it can be} of a row, if these arms of a study explain all; else the cell."""
    found = {}
    for j, (head, cell) in enumerate(zip(header, row, strict=True)):
        if j == 0 or not cell or head in LABELS | set(UNSTORED_COLUMNS):
            continue
        if head.startswith("steps to"):
            steps = ["never" if step is None else step for step in stored(name)[arms[0]]["steps_to_target"]]
            same = stored(name)["target"] == float(re.search(r"\d\.\d+", head)[0])  # else the curves would be needed
            if not STEPS.fullmatch(cell) or (same and steps_of(cell, len(steps)) != steps):
                return {}, cell
            continue
        if WORDS.sub("", ATOM.sub("", cell)):
            return {}, f"{cell} (cannot be read as a figure)"
        for place, atom in enumerate(ATOM.finditer(cell)):
            kinds = {tuple(re.sub(r"-n\d+$", "", str(part)) for part in (len(arms) > 1 and arm, *what))
                     for arm in arms for what in explained(atom, evidence(name)[arm])}  # fmt: skip
            if not kinds:
                return {}, cell
            found[j, place] = kinds
    return found, ""


def wrong_table(section: Section, header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """What in a table does not follow from the stored results: rows of no arm, columns of no single quantity."""
    tiny = any(f"`{arm}`" in row[0] for row in rows for arm in evidence("tiny models"))
    names, columns = ["tiny models"] if tiny else section.studies, {}
    n_labels, above = 1 + sum(name in LABELS - {"paper"} for name in header[1:3]), ""
    for row in rows:
        above = row[0] or above
        if above == "paper":
            continue
        label = "; ".join([above, *row[1:n_labels]])
        answers = [explain(header, row, name, arms) for name in names for arms in groups(label, name)]
        good = [found for found, _ in answers if found]
        if not good:
            cells = dict.fromkeys(cell for _, cell in answers)
            yield f"row {label!r}: {', '.join(cells) or 'no arm has these flags'}"
        for key in set().union(*good):
            columns.setdefault(key, []).append(set().union(*(found.get(key, set()) for found in good)))
    for (j, _), kinds in sorted(columns.items()):
        if not set.intersection(*kinds):
            yield f"column {header[j]!r}: not one quantity in all rows"


def wrong_sentences(section: Section) -> Iterator[str]:
    """`x ± y` and figures with three decimals outside tables that no named study or built-in model has."""
    files = [*section.studies, "tiny models"]
    arms = [values for name in files for values in evidence(name).values()]
    known = {f"{abs(value):.3f}" for values in arms for x in values.values() for value in (x.centre, *x.seeds, *x.ends)}
    text = re.sub(r"^\|.*|`[^`]*`|\]\([^)]*\)", "", section.prose, flags=re.M)
    for atom in ATOM.finditer(text):
        if atom["pm"]:
            good = atom["pm"] in FREE or any(explained(atom, values) for values in arms)
        else:
            good = not re.fullmatch(r"\d\.\d{3}", atom[0]) or not section.studies or atom[0] in known | FREE
        if not good:
            yield f"{section.page.name}: {atom[0]} is no figure of {files}"


def wrong_figures(section: Section) -> list[str]:
    found = [f"{section.page.name}, {line[:60]}: {each}" for header, rows, line in tables(section)
             if not line.startswith(tuple(UNSTORED_TABLES)) for each in wrong_table(section, header, rows)]  # fmt: skip
    return found + list(wrong_sentences(section))


# --- tests


def test_figures_follow_from_the_stored_results():
    assert not [line for section in everything() for line in wrong_figures(section)]


def test_a_wrong_figure_of_a_sentence_is_found():
    text = "## A\n`--study scope`: +0.085 ± 0.013, +0.085 ± 0.014, 0.464, 0.465\n## B\n0.464 ± 0.016\n"
    found = [line for section in sections_of(ROOT / "README.md", text) for line in wrong_figures(section)]
    assert [line.split(" is ")[0] for line in found] == [
        f"README.md: {x}" for x in ("+0.085 ± 0.014", "0.465", "0.464 ± 0.016")
    ]


def test_a_changed_digit_of_a_table_is_found():
    """Six digits of each table of results, but for what is stored without its spread, or for another target."""
    rng, n, missed = random.Random(0), 0, []
    free = LABELS | set(UNSTORED_COLUMNS) | {"before", "gain, seed by seed", "seed"}
    for section in everything():
        for header, rows, line in tables(section):
            cells = [(i, j, k) for i, row in enumerate(rows) for j, cell in enumerate(row) for k in range(len(cell))
                     if j and header[j] not in free and not header[j].startswith("steps to 0.8")
                     and row[0] != "paper" and cell[k].isdigit()]  # fmt: skip
            known = set(wrong_table(section, header, rows))
            for i, j, k in rng.sample(cells, 6) if not line.startswith(tuple(UNSTORED_TABLES)) else ():
                copy, digit = [list(row) for row in rows], (int(rows[i][j][k]) + rng.randint(1, 9)) % 10
                copy[i][j], n = rows[i][j][:k] + str(digit) + rows[i][j][k + 1 :], n + 1
                missed += [f"{rows[i][j]} -> {copy[i][j]}"] if set(wrong_table(section, header, copy)) <= known else []
    assert n > 60 and not missed
