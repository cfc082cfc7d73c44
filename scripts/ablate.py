"""Flags of a method against each other: every combination of the given values, several seeds, one table and one plot.

Each run is a process of its own with a folder of its own under --out: a stopped call goes on where it was, and a grid
that grows later trains only what is new, as long as the method's file stays as it was. All combinations are checked
before the first run starts: a wrong flag or value ends the call, and those that the method's own check refuses are left
out, a line each. Differences are to the first combination, seed by seed, with a bootstrap interval (reproduce.py's).

Run: python scripts/ablate.py methods/scope_opd.py --grid tau=0.5,1,2 weighting=perplexity,none --seeds 3
     python scripts/ablate.py methods/opd.py --grid est=full,k1_pg lr=3e-4,5e-4 --fixed steps=80 --seeds 5
"""

import hashlib
import itertools
import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import tyro
from rich.console import Console

from posttrain.common.cli import UserError, check_ranges, cli, parse, require, writable
from posttrain.common.run import Run, versions, write_atomically
from posttrain.scripts.explain import load
from posttrain.scripts.reproduce import METHODS, against, headline, plot, run_all, summary_of, table

OURS = {  # flags that no combination may set -> what to do instead
    "seed": "--seeds N runs seeds 0 to N - 1",
    "out": "ablate.py's own --out is the folder of all runs",
    "eval-every": "give ablate.py's own --eval-every",
    "resume": "a stopped call goes on without it",
    "dry-run": "leave it out, it trains nothing",
}


@dataclass
class Config:
    method: tyro.conf.Positional[str]  # a method's file, such as methods/scope_opd.py, or one of yours
    grid: tuple[str, ...] = ()  # flag=value,value,...; true and false switch a flag; several multiply
    fixed: tuple[str, ...] = ()  # flag=value of all runs
    seeds: int = 3  # runs of each combination, seeds 0, 1, ...
    jobs: int = 2  # runs at a time, one thread each
    eval_every: int = 0  # steps between points of the curves; 0 = a few in a run
    target: float = 0.0  # value of the headline whose first step is reported; 0 = not
    out: str = ""  # folder of runs, table and plot; empty = runs/ablate-METHOD


def name_of(setting: str) -> str:
    return setting.partition("=")[0].lstrip("-").replace("_", "-")


def flag(setting: str) -> list[str]:
    """ "tau=0.5" -> ["--tau", "0.5"]; "share_prompts=true" -> ["--share-prompts"]"""
    name, value = name_of(setting), setting.partition("=")[2]
    return {"true": [f"--{name}"], "false": [f"--no-{name}"]}.get(value.lower(), [f"--{name}", value])


def combinations(grid: tuple[str, ...], fixed: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """("tau=1,2", "kl=a,b") -> [("tau=1", "kl=a"), ("tau=1", "kl=b"), ...], the last flag fastest."""
    axes = []
    for axis in grid:
        name, is_given, values = axis.partition("=")
        values = values.split(",")
        require(name and is_given and all(values), f"--grid {axis!r} is not flag=value,value,...")
        require(len(values) == len(set(values)), f"--grid {axis!r} names a value twice")
        axes.append([f"{name}={value}" for value in values])
    for each in fixed:
        require(name_of(each) and "=" in each, f"--fixed {each!r} is not flag=value")
    names = [name_of(each).removeprefix("no-") for each in (*fixed, *grid)]
    for name in names:
        require(names.count(name) == 1, f"--fixed and --grid name a flag twice: give --{name} once")
        require(name not in OURS, f"--fixed and --grid cannot set --{name}: {OURS.get(name)}")
    return list(itertools.product(*axes))


def refusal(module: ModuleType, config: Any) -> str:
    """What the method's own check says against the config, by its own main, which goes no further than that."""

    class Passed(BaseException):
        pass

    def passed(*_: Any) -> None:
        raise Passed

    def checked(*args: Any) -> None:
        check(*args)
        passed()

    check = getattr(module, "check", lambda *_: None)
    # Run for a main that calls no check: nothing is to be trained or written here
    with patch.object(module, "check", checked, create=True), patch.object(Run, "__init__", passed), suppress(Passed):
        try:
            module.main(config)
        except UserError as error:
            return str(error)
    return ""


def plan(config: Config) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Check all that is asked for. -> combination: its flags; combination that the method refuses: why"""
    method, arms, left_out = Path(config.method), {}, {}
    require(min(config.seeds, config.jobs) > 0, "--seeds and --jobs must be at least 1")
    is_file = method.is_file() and method.suffix == ".py"
    require(is_file, f"{method} is no method's file; name one, such as methods/opd.py")
    chosen, module = combinations(config.grid, config.fixed), load(method)
    for each in chosen:
        arm, flags = ", ".join(each) or "default", [*itertools.chain(*map(flag, (*config.fixed, *each)))]
        with patch.object(sys, "argv", [str(method), *flags]):
            parsed = parse(module.Config, getattr(module, "PRESETS", {}))
        check_ranges(parsed)
        why = refusal(module, parsed)
        (left_out if why else arms)[arm] = why or flags
    require(arms, f"{method.name} refuses every combination: {next(iter(left_out.values()), '')}")
    return arms, left_out


def folder_name(settings: tuple[str, ...]) -> str:
    """Of all flags, so that no other --fixed or --grid meets these runs; with a hash where the name cannot say them."""
    said = ",".join(settings)
    name = re.sub(r"[^\w.+=,-]+", "_", said)[:120]
    return name if name == said else f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def same_method(out: Path, method: Path) -> None:
    """Keep the method's text beside the runs; refuse a folder that holds runs of another text."""
    kept, text = out / "method.py", method.read_bytes()
    if not (kept.is_file() and kept.read_bytes() == text):
        others = any(path.stat().st_size for path in out.glob("*/metrics.jsonl"))
        said = f"{out} holds runs that were not made with {method} as it is now" + f" (see {kept})" * kept.is_file()
        require(not others, f"{said}: choose another --out, or delete that folder")
        kept.write_bytes(text)


def main(config: Config) -> None:
    arms, left_out = plan(config)
    method, console = Path(config.method).resolve(), Console(width=None if sys.stdout.isatty() else 160)
    out = writable(Path(config.out or f"runs/ablate-{method.stem}"), "choose another --out", make=True)
    same_method(out, method)
    for arm, why in left_out.items():
        print(f"left out: {arm}: {why}")
    torch.set_num_threads(1)
    script = method.name if method.parent == METHODS else str(method)
    names = {arm: folder_name((*config.fixed, *arm.split(", "))) for arm in arms}
    runs = run_all({names[arm]: [script, *flags] for arm, flags in arms.items()}, config.seeds, config.jobs,
                   config.eval_every, str(out), console)  # fmt: skip
    records, first = {arm: runs[names[arm]] for arm in arms}, next(iter(arms))
    results = {arm: summary_of(each, config.target) for arm, each in records.items()}
    for arm, each in results.items():
        each["against"] = {} if arm == first else {"the first": against(records, arm, first)}
    title = f"{method.stem}: mean ± standard deviation over {config.seeds} seeds"
    console.print(table(title, results, config.target or None))
    command = {"command": " ".join(["python", "scripts/ablate.py", *sys.argv[1:]]), "versions": versions()}
    command |= {"left out": left_out} if left_out else {}
    write_atomically(out / "ablation.json", json.dumps(command | {"methods": results}, indent=1) + "\n")
    plot(out / "ablation.png", title, records, headline(script))
    console.print(f"stored in {out / 'ablation.json'}, plotted in {out / 'ablation.png'}")


if __name__ == "__main__":
    cli(main, Config)
