"""Flags of a method against each other: every combination of the given values, several seeds, one table and one plot.

Each run is a process of its own with a folder of its own under --out: a stopped call goes on where it was, and a grid
that grows later trains only what is new. All combinations are checked before the first run starts. Differences are to
the first combination, seed by seed, with a bootstrap interval (see reproduce.py).

Run: python scripts/ablate.py methods/scope_opd.py --grid tau=0.5,1,2 weighting=paper,none --seeds 3
     python scripts/ablate.py methods/opd.py --grid est=full,k1_pg lr=3e-4,5e-4 --fixed steps=80 --seeds 5
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from rich.console import Console

from posttrain.common.cli import check_ranges, cli, parse, require
from posttrain.common.run import versions, write_atomically
from posttrain.scripts.reproduce import METHODS, against, headline, plot, run_all, summary_of, table


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


def flag(setting: str) -> list[str]:
    """ "tau=0.5" -> ["--tau", "0.5"]; "share_prompts=true" -> ["--share-prompts"]"""
    name, _, value = setting.partition("=")
    name = name.lstrip("-").replace("_", "-")
    return {"true": [f"--{name}"], "false": [f"--no-{name}"]}.get(value.lower(), [f"--{name}", value])


def combinations(grid: tuple[str, ...]) -> list[tuple[str, ...]]:
    """("tau=1,2", "kl=a,b") -> [("tau=1", "kl=a"), ("tau=1", "kl=b"), ...], the last flag fastest."""
    axes = []
    for axis in grid:
        name, is_given, values = axis.partition("=")
        values = values.split(",")
        require(name and is_given and all(values), f"--grid {axis!r} is not flag=value,value,...")
        require(len(values) == len(set(values)), f"--grid {axis!r} names a value twice")
        axes.append([f"{name}={value}" for value in values])
    names = [axis[0].split("=")[0].lstrip("-").replace("_", "-") for axis in axes]
    require(len(names) == len(set(names)), "--grid names a flag twice")
    return list(itertools.product(*axes))


def check(method: Path, commands: list[list[str]]) -> None:
    """Parse every combination by the method's own Config, so that a wrong one ends before anything is trained."""
    name = f"{method} is no method's file; name one, such as methods/opd.py"
    require(method.is_file() and method.suffix == ".py", name)
    spec = spec_from_file_location(method.stem, method)
    module = sys.modules[method.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "Config"), name)
    for flags in commands:
        with patch.object(sys, "argv", [str(method), *flags]):
            check_ranges(parse(module.Config, getattr(module, "PRESETS", {})))


def main(config: Config) -> None:
    method, console = Path(config.method).resolve(), Console(width=None if sys.stdout.isatty() else 160)
    out = Path(config.out or f"runs/ablate-{method.stem}")
    script = method.name if method.parent == METHODS else str(method)
    arms = {", ".join(each) or "default": each for each in combinations(config.grid)}
    arms = {arm: [script, *itertools.chain(*map(flag, (*config.fixed, *each)))] for arm, each in arms.items()}
    check(method, [flags for _, *flags in arms.values()])
    torch.set_num_threads(1)
    # a folder's name holds all flags, so that another --fixed or --grid never meets another command's runs
    names = {arm: re.sub(r"[^\w.=,-]+", "_", ",".join((*config.fixed, arm))) for arm in arms}
    require(
        len(set(names.values())) == len(names),
        "two combinations would share a folder: their values differ in signs only",
    )
    runs = run_all({names[arm]: flags for arm, flags in arms.items()}, config.seeds, config.jobs, config.eval_every,
                   str(out), console)  # fmt: skip
    records, first = {arm: runs[names[arm]] for arm in arms}, next(iter(arms))
    results = {arm: summary_of(each, config.target) for arm, each in records.items()}
    for arm, each in results.items():
        each["against"] = {} if arm == first else {"the first": against(records, arm, first)}
    title = f"{method.stem}: mean ± standard deviation over {config.seeds} seeds"
    console.print(table(title, results, config.target or None))
    command = {"command": " ".join(["python", "scripts/ablate.py", *sys.argv[1:]]), "versions": versions()}
    write_atomically(out / "ablation.json", json.dumps(command | {"methods": results}, indent=1) + "\n")
    plot(out / "ablation.png", title, records, headline(script))
    console.print(f"stored in {out / 'ablation.json'}, plotted in {out / 'ablation.png'}")


if __name__ == "__main__":
    cli(main, Config)
