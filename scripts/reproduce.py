"""Methods against each other on the embedded default, with several seeds; the stored results come from here.

Each run is a process of its own with a run folder of its own, so that a stopped call goes on where it was. The table
and the plot are made from the runs' metrics.jsonl and summary.json and nothing else.

Run: python scripts/reproduce.py --seeds 3            (about 1 minute a run on one core)
"""

import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from posttrain.common.cli import cli, require
from posttrain.common.run import EVAL_KEYS, RESULTS, versions, write_atomically

METHODS = Path(__file__).resolve().parents[1] / "methods"
ARMS = {
    "grpo": ["grpo.py"],
    "opd": ["opd.py"],
    "opd-k1": ["opd.py", "--est", "k1_pg", "--lr", "3e-4"],
    "sft-teacher": ["opd.py", "--cold-start-steps", "1000000", "--lr", "1e-3"],
    "grpo-random": ["grpo.py", "--reward", "random"],
}


@dataclass
class Config:
    task: str = "addition"  # the embedded default to run on
    only: tuple[str, ...] = tuple(ARMS)  # arms to run
    seeds: int = 3  # runs of each arm, seeds 0, 1, ...
    jobs: int = 2  # runs at a time, one thread each
    eval_every: int = 10  # steps between points of the curves
    target: float = 0.45  # held-out accuracy whose first step is reported
    folder: str = "runs/reproduce"  # of the run folders
    out: str = str(RESULTS)  # folder of the stored results


def run(config: Config, arm: str, seed: int) -> Path:
    """One training run, skipped if it is complete and continued if it was stopped."""
    folder = Path(config.folder) / f"{config.task}-{arm}-{seed}"
    if not (folder / "summary.json").exists():
        script, *flags = ARMS[arm]
        flags += ["--seed", str(seed), "--eval-every", str(config.eval_every), "--out", str(folder)]
        flags += ["--resume"] if (folder / "config.json").exists() else []
        done = subprocess.run(
            [sys.executable, str(METHODS / script), "--task", config.task, *flags], capture_output=True, text=True
        )
        require(done.returncode == 0, f"{arm} with seed {seed} failed: {done.stderr.strip()[-300:]}")
    return folder


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot(path: Path, title: str, curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    """Held-out accuracy over the steps, one colour an arm, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (arm, seeds) in enumerate(curves.items()):
        for j, points in enumerate(seeds):
            axis.plot(*zip(*points, strict=True), color=f"C{i}", alpha=0.8, label=arm if j == 0 else None)
    axis.set(xlabel="step", ylabel="held-out accuracy", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: Config) -> None:
    unknown = [arm for arm in config.only if arm not in ARMS]
    require(not unknown, f"--only {unknown} is not known; choose from {', '.join(ARMS)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    pairs = [(arm, seed) for seed in range(config.seeds) for arm in config.only]
    with ThreadPoolExecutor(config.jobs) as pool:
        jobs = [pool.submit(run, config, *pair) for pair in pairs]
        folders = {pair: job.result() for pair, job in zip(pairs, track(jobs, "runs", console=console), strict=True)}

    methods, curves = {}, {}
    table = Table(title=f"{config.task}: mean ± standard deviation over {config.seeds} seeds")
    for column in ("", "Avg@k before", "Avg@k after", "Pass@k", "greedy", f"steps to {config.target}", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for arm in config.only:
        mine = [folders[arm, seed] for seed in range(config.seeds)]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in mine]
        lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in mine]
        points = [[(line["step"], line["eval/accuracy"]) for line in each if "eval/accuracy" in line] for each in lines]
        reached = [next((step for step, accuracy in each if accuracy >= config.target), math.inf) for each in points]
        after = {key: [summary["after"][key] for summary in summaries] for key in EVAL_KEYS}
        before = statistics.mean(summary["accuracy_before"] for summary in summaries)
        seconds = statistics.mean(summary["seconds"] for summary in summaries)
        methods[arm] = {key: statistics.mean(values) for key, values in after.items()}
        methods[arm] |= {"eval/accuracy_se": spread(after["eval/accuracy"]), "seeds": config.seeds, "before": before}
        methods[arm] |= {"runs": after, "steps_to_target": [None if math.isinf(step) else step for step in reached]}
        methods[arm] |= {"seconds": seconds, "command": " ".join(["python", f"methods/{ARMS[arm][0]}", *ARMS[arm][1:]])}
        curves[arm] = points
        figures = [
            f"{statistics.mean(values):.3f} ± {spread(values):.3f}"
            for key, values in after.items()
            if not key.endswith("_se")
        ]
        steps = ", ".join("never" if math.isinf(step) else str(step) for step in reached)
        table.add_row(arm, f"{before:.3f}", *figures, steps, f"{seconds:.0f}")
    console.print(table)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    command = "python scripts/reproduce.py " + " ".join(sys.argv[1:])
    stored = {"command": command.strip(), "versions": versions(), "target": config.target, "methods": methods}
    write_atomically(out / f"{config.task}.json", json.dumps(stored, indent=1) + "\n")
    plot(out / f"{config.task}.png", f"{config.task}: held-out Avg@k, each line one seed", curves)
    console.print(f"stored in {out / config.task}.json, plotted in {out / config.task}.png")


if __name__ == "__main__":
    cli(main, Config)
