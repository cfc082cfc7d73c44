"""Methods against each other on the embedded default, with several seeds; the stored results come from here.

Each run is a process of its own with a run folder of its own, so that a stopped call goes on where it was and studies
share their runs. The table and the plot are made from the runs' files and their final models, and nothing else.

Run: python scripts/reproduce.py --seeds 3                    (about 2 minutes a run on one core)
     python scripts/reproduce.py --study scope --seeds 5
"""

import json
import math
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from posttrain.common.cli import cli, require
from posttrain.common.engines.hf import HFEngine
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import Sampling
from posttrain.common.run import EVAL_KEYS, RESULTS, versions, write_atomically
from posttrain.common.tasks import CORRECT, make_task

METHODS = Path(__file__).resolve().parents[1] / "methods"
PLAIN = ["--margin", "none", "--online-balance", "none"]
EQUAL = ["--steps", "120", "--prompts-per-step", "8", "--group-size", "16"]  # uni_opd.py's
ONE_LAYER, LONG = ["--layers", "1", "--heads", "1", "--width", "24"], ["--steps", "19700"]  # cot2.py's; 240 epochs
# study -> arm -> script and flags. An arm's name means one command in all studies.
STUDIES = {
    "addition": {
        "grpo": ["grpo.py"],
        "opd": ["opd.py"],
        "opd-k1": ["opd.py", "--est", "k1_pg", "--lr", "3e-4"],
        "scope": ["scope_opd.py"],
        "sft-teacher": ["opd.py", "--cold-start-steps", "1000000", "--lr", "1e-3"],
        "grpo-random": ["grpo.py", "--reward", "random"],
    },
    "scope": {
        "grpo": ["grpo.py"],
        "opd-k1-g1": ["opd.py", "--est", "k1_pg", "--lr", "3e-4", "--group-size", "1"],  # as the paper has it
        "opd-k1": ["opd.py", "--est", "k1_pg", "--lr", "3e-4"],  # the same estimator and rollouts as SCOPE
        "scope": ["scope_opd.py"],
        "opd": ["opd.py"],
        "scope-full": ["scope_opd.py", "--kl", "full", "--lr", "5e-4"],
    },
    "machines": {  # flags that change speed and memory: adapters at ten times the rate, bf16 compute, recomputation
        "opd": ["opd.py"],
        "opd-lora": ["opd.py", "--lora-rank", "16", "--lr", "5e-3"],
        "opd-bf16": ["opd.py", "--dtype", "bfloat16"],
        "opd-checkpointing": ["opd.py", "--checkpointing"],
    },
    "arithmetic": {  # two domains, a teacher each; all arms with the same number of rollouts
        "uni-opd": ["uni_opd.py"],
        "uni-opd-delta-0.4": ["uni_opd.py", "--margin-delta", "0.4"],  # as the paper has it
        "margin-only": ["uni_opd.py", "--online-balance", "none"],
        "balance-only": ["uni_opd.py", "--margin", "none"],
        "multi-opd": ["uni_opd.py", *PLAIN],  # each prompt scored by its domain's teacher, nothing else
        "multi-opd-task": ["uni_opd.py", *PLAIN, "--task-coef", "1"],  # the control: an outcome reward, uncalibrated
        "grpo-arithmetic": ["grpo.py", "--model", "arithmetic-student", "--task", "arithmetic", *EQUAL],
    },
    "chain": {  # a calculator that fails at times; all arms add A, the reward's advantage, but for opd-alone
        "sod": ["sod.py"],
        "opd-chain": ["sod.py", "--weighting", "uniform"],
        "grpo-chain": ["sod.py", "--coef", "0"],
        "mask-after-error": ["sod.py", "--weighting", "mask_after_error"],
        "unclipped": ["sod.py", "--weighting", "unclipped"],
        "opd-alone": ["sod.py", "--weighting", "uniform", "--adv-grpo", "0"],
    },
    "lookup": {  # facts that a hint tells; Avg@k and greedy are without hints
        "pi-distill": ["pi_distill.py"],
        "pi-shared": ["pi_distill.py", "--student-kl", "shared"],  # as Algorithm 1 and the released code have it
        "pi-teacher-only": ["pi_distill.py", "--alpha", "1"],
        "pi-student-only": ["pi_distill.py", "--alpha", "0"],
        "pi-student-only-shared": ["pi_distill.py", "--alpha", "0", "--student-kl", "shared"],
        "pi-beta-0": ["pi_distill.py", "--beta", "0"],
        "pi-sparse": ["pi_distill.py", "--hint", "sparse"],  # half of the hint
        "opsd": ["pi_distill.py", "--preset", "opsd"],
        "opsd-0.5": ["pi_distill.py", "--preset", "opsd", "--beta", "0.5"],  # the paper's weight
        "opsd-frozen": ["pi_distill.py", "--preset", "opsd", "--opsd-teacher", "frozen"],
        "opsd-frozen-0.5": ["pi_distill.py", "--preset", "opsd", "--opsd-teacher", "frozen", "--beta", "0.5"],
        "opsd-sparse": ["pi_distill.py", "--preset", "opsd", "--hint", "sparse"],
        "grpo-lookup": ["pi_distill.py", "--preset", "grpo"],
        "sft-grpo": ["pi_distill.py", "--preset", "grpo", "--sft-steps", "40"],
    },
    "doubter": {  # the same facts with a model that follows seven hints in ten
        f"doubter-{arm}": ["pi_distill.py", "--model", "lookup-doubter", *flags]
        for arm, flags in {
            "pi-distill": [],
            "pi-shared": ["--student-kl", "shared"],
            "pi-teacher-only": ["--alpha", "1"],
            "pi-student-only": ["--alpha", "0"],
            "opsd": ["--preset", "opsd"],
            "opsd-0.5": ["--preset", "opsd", "--beta", "0.5"],
            "opsd-frozen-0.5": ["--preset", "opsd", "--opsd-teacher", "frozen", "--beta", "0.5"],
            "grpo": ["--preset", "grpo"],
            "sft-grpo": ["--preset", "grpo", "--sft-steps", "40"],
        }.items()
    },
    "sokoban": {  # 36 training levels, which is what headlines speak of
        "skill-sd": ["skill_sd.py"],
        "skill-sd-frozen": ["skill_sd.py", "--teacher-sync", "frozen"],
        "skill-sd-live": ["skill_sd.py", "--teacher-sync", "live"],  # as the paper has it
        "grpo-sokoban": ["skill_sd.py", "--sdl-coef", "0"],
        "opd-skill": ["skill_sd.py", "--adv-grpo", "0", "--sdl-coef", "1"],  # self-distillation alone
        "skill-sd-unread": ["skill_sd.py", "--skill-to", "nobody"],  # control: the slow teacher without the skill
        "grpo-skill": ["skill_sd.py", "--skill-to", "student", "--sdl-coef", "0"],  # the skill in the student's prompt
        "skill-sd-k3": ["skill_sd.py", "--est", "k3"],  # without the importance weight
        "skill-naive": ["skill_sd.py", "--preset", "naive"],  # live, k3, coefficient 1
        "skill-sd-live-1": ["skill_sd.py", "--teacher-sync", "live", "--sdl-coef", "1"],  # the same with the weight
    },
    "steps": {  # single and none are the paper's GRPO baselines; sampled tokens, the other axis, are in the JSON
        "rltf-single": ["rltf.py", "--mode", "single"],
        "rltf-single-16": ["rltf.py", "--mode", "single", "--group-size", "16"],  # twice the tries
        "rltf-none": ["rltf.py", "--mode", "none"],
        "rltf-sd": ["rltf.py"],
        "rltf-sd-1": ["rltf.py", "--sd-coef", "1"],
        "rltf-sd-second": ["rltf.py", "--sd-baseline", "second"],  # as the released code comes out
        "rltf-sd-correctness": ["rltf.py", "--critic", "correctness"],
        "rltf-sft": ["rltf.py", "--mode", "sft"],
        "rltf-fm": ["rltf.py", "--mode", "fm"],
        "rltf-fm-1": ["rltf.py", "--mode", "fm", "--fm-lambda", "1"],
    },
    "mnns": {  # sums by signs, CoT2 against discrete chains
        "cot2": ["cot2.py"],
        "cot2-self": ["cot2.py", "--feed", "self"],
        "cot2-budget-4": ["cot2.py", "--budget", "4"],
        "discrete": ["cot2.py", "--mode", "discrete"],
        "discrete-full": ["cot2.py", "--mode", "discrete", "--discrete-loss", "full"],  # as the released code has it
        "no-cot": ["cot2.py", "--mode", "none"],
    },
    "mts": {  # GRPO on thoughts; each goes on from the same seed's run of the study mnns
        f"{start}-{arm}": ["cot2.py", "--preset", "grpo", "--model", f"{{folder}}/{start}-{{seed}}/model", *flags]
        for start, arm, flags in (
            ("discrete", "mts-1", ["--k", "1"]),  # GRPO on a discrete chain of thought
            ("discrete", "mts-3", ["--k", "3"]),
            ("discrete", "mts-6", ["--k", "6"]),
            ("discrete", "mts-3-normalised", ["--k", "3", "--normalise-sampling"]),
            ("discrete", "dirichlet", ["--sampling", "dirichlet"]),
            ("cot2", "mts-3", ["--k", "3"]),
            ("cot2", "dirichlet", ["--sampling", "dirichlet"]),
        )
    },
    "one-layer": {  # one layer with one head, d = 24, as in the paper's Pass@k
        "one-cot2": ["cot2.py", *ONE_LAYER],
        "one-discrete": ["cot2.py", *ONE_LAYER, "--mode", "discrete", "--eval-draws", "14"],
        "one-discrete-0.4": ["cot2.py", *ONE_LAYER, "--mode", "discrete", "--eval-draws", "14", "--temperature", "0.4"],
    },
    "one-layer-mts": {  # and in its table of GRPO; from the runs of one-layer
        f"one-mts-{k}": ["cot2.py", "--preset", "grpo", "--k", k, "--model", "{folder}/one-discrete-{seed}/model"]
        for k in "136"
    },
    "width-24": {
        "cot2-24": ["cot2.py", "--width", "24"],
        "cot2-24-budget-4": ["cot2.py", "--width", "24", "--budget", "4"],
        "discrete-24": ["cot2.py", "--width", "24", "--mode", "discrete"],
    },
    "width-16": {  # longer, since it learns late; the paper clips no gradients
        "cot2-16": ["cot2.py", "--width", "16", *LONG],
        "cot2-16-budget-4": ["cot2.py", "--width", "16", *LONG, "--budget", "4"],
        "cot2-16-unclipped": ["cot2.py", "--width", "16", *LONG, "--max-grad-norm", "1e9"],
        "cot2-16-budget-4-unclipped": ["cot2.py", "--width", "16", *LONG, "--budget", "4", "--max-grad-norm", "1e9"],
        "discrete-16": ["cot2.py", "--width", "16", *LONG, "--mode", "discrete"],
    },
    "guesser": {  # the same problems with a model that tries every digit where it does not know
        f"guesser-{arm}": ["rltf.py", "--model", "steps-guesser", *flags]
        for arm, flags in {
            "single": ["--mode", "single"],
            "none": ["--mode", "none"],
            "sd": [],
            "sd-second": ["--sd-baseline", "second"],
            "fm": ["--mode", "fm"],
        }.items()
    },
}
STUDIES |= {
    "digits": {  # labels of which four in ten are drawn anew; all arms but ce with the teacher's soft labels
        "sinkd-kd": ["sinkd.py", "--divergence", "none"],
        "sinkd-ce": ["sinkd.py", "--divergence", "none", "--alpha", "0"],
        "sinkd": ["sinkd.py"],  # the released weight, 0.0008 times a sum
        "sinkd-0.01": ["sinkd.py", "--sink-weight", "0.01"],
        "sinkd-0.05": ["sinkd.py", "--sink-weight", "0.05"],
        "sinkd-0.01-plan": ["sinkd.py", "--sink-weight", "0.01", "--sink-grad", "plan"],
        "sinkd-0.01-row": ["sinkd.py", "--sink-weight", "0.01", "--divergence", "sinkhorn_sample"],
        "sinkd-row": ["sinkd.py", "--divergence", "sinkhorn_sample", "--tau", "1"],  # as released
        "sinkd-l1": ["sinkd.py", "--divergence", "l1"],
        "sinkd-kl": ["sinkd.py", "--divergence", "kl"],
        "sinkd-rkl": ["sinkd.py", "--divergence", "rkl"],
        "sinkd-rkl-1": ["sinkd.py", "--divergence", "rkl", "--divergence-weight", "1"],  # BERT's weight
        "sinkd-js": ["sinkd.py", "--divergence", "js"],
        "sinkd-tv": ["sinkd.py", "--divergence", "tv"],
    },
    "batch": {  # is there more to learn from a batch's geometry when it is larger? 25 epochs each
        f"sinkd-{arm}-n{n}": ["sinkd.py", "--prompts-per-step", str(n), "--steps", str(14976 // n), *flags]
        for n in (8, 32, 128)
        for arm, flags in {
            "kd": ["--divergence", "none"],
            "batch": ["--sink-reduction", "mean", "--sink-weight", "0.32"],
            "row": ["--sink-reduction", "mean", "--sink-weight", "0.32", "--divergence", "sinkhorn_sample"],
        }.items()
    },
}
HEADLINES = {"sokoban": "skill/train_success"}  # study -> metric of its curves and target, else eval/accuracy


@dataclass
class Config:
    study: Literal[tuple(STUDIES)] = "addition"  # a set of arms, see STUDIES
    only: tuple[str, ...] = ()  # its arms to run; empty = all
    seeds: int = 3  # runs of each arm, seeds 0, 1, ...
    jobs: int = 2  # runs at a time, one thread each
    eval_every: int = 20  # steps between points of the curves
    target: float = 0.45  # value of the study's headline whose first step is reported
    folder: str = "runs/reproduce"  # of the run folders
    out: str = str(RESULTS)  # folder of the stored results


def run(config: Config, arm: str, seed: int) -> Path:
    """One training run, skipped if it is complete and continued if it was stopped."""
    folder = Path(config.folder) / f"{arm}-{seed}"
    if not (folder / "summary.json").exists():
        script, *flags = (part.format(folder=config.folder, seed=seed) for part in STUDIES[config.study][arm])
        missing = [part for part in flags if part.startswith(f"{config.folder}/") and not Path(part).exists()]
        require(not missing, f"{arm} goes on from {missing[:1]}: run the study that makes it with as many seeds first")
        flags += ["--seed", str(seed), "--eval-every", str(config.eval_every), "--out", str(folder)]
        flags += ["--resume"] if (folder / "config.json").exists() else []
        done = subprocess.run([sys.executable, str(METHODS / script), *flags], capture_output=True, text=True)
        require(done.returncode == 0, f"{arm} with seed {seed} failed: {done.stderr.strip()[-300:]}")
    return folder


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def paired(differences: list[float]) -> list[float] | None:
    """Mean and half the width of its 95% interval by Student's t; None from one seed."""
    from scipy.stats import t

    n = len(differences)
    half = t.ppf(0.975, n - 1) * spread(differences) / math.sqrt(n) if n > 1 else None
    return None if half is None else [statistics.mean(differences), float(half)]


def diversity(model: str, task_name: str) -> dict[str, float]:
    """Of the correct among 16 samples to each of 128 held-out problems: which of the task's routes did they take?

    route_entropy in nats, mean over problems; two_routes = chance that two correct samples to one problem took
    different routes, an estimate without bias in their number. 0 if no problem has two correct samples.
    """
    task, tokenizer, entropies, differ = make_task(task_name), load_tokenizer(model), [], []
    if not hasattr(task, "route"):
        return {}
    engine = HFEngine(load_model(model, torch.device("cpu"), train=False), tokenizer)
    rollout = engine.generate(task.heldout(128), 16, Sampling(), key=(0, 0, 1))
    taken = defaultdict(list)
    for example, text in zip(rollout.examples, rollout.texts, strict=True):
        taken[example.prompt[-1]["content"]] += [task.route(text)] if task.grade(example, text) == CORRECT else []
    for routes in taken.values():
        counts, n = list(Counter(routes).values()), len(routes)
        if n > 1:
            entropies.append(-sum(k / n * math.log(k / n) for k in counts))
            differ.append(1 - sum(k * (k - 1) for k in counts) / (n * (n - 1)))
    return {"route_entropy": statistics.mean(entropies or [0.0]), "two_routes": statistics.mean(differ or [0.0])}


def plot(path: Path, title: str, metric: str, curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    """A metric over the steps: each arm's mean, and one standard deviation around it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for i, (arm, seeds) in enumerate(curves.items()):
        steps = [step for step, _ in seeds[0]]
        values = [[accuracy for _, accuracy in at_step] for at_step in zip(*seeds, strict=True)]
        means, spreads = [statistics.mean(v) for v in values], [spread(v) for v in values]
        axis.plot(steps, means, color=f"C{i}", linestyle="-" if i < 10 else "--", label=arm)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.12, linewidth=0)
    axis.set(xlabel="step", ylabel={"eval/accuracy": "held-out accuracy"}.get(metric, metric), title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main(config: Config) -> None:
    arms = STUDIES[config.study]
    unknown = [arm for arm in config.only if arm not in arms]
    require(not unknown, f"--only {unknown} is not known; choose from {', '.join(arms)}")
    arms = {arm: command for arm, command in arms.items() if arm in (config.only or arms)}
    console = Console(width=None if sys.stdout.isatty() else 140)
    pairs = [(arm, seed) for seed in range(config.seeds) for arm in arms]
    with ThreadPoolExecutor(config.jobs) as pool:
        jobs = [pool.submit(run, config, *pair) for pair in pairs]
        folders = {pair: job.result() for pair, job in zip(pairs, track(jobs, "runs", console=console), strict=True)}

    torch.set_num_threads(1)
    methods, curves, headline = {}, {}, HEADLINES.get(config.study, "eval/accuracy")
    table = Table(title=f"{config.study}: mean ± standard deviation over {config.seeds} seeds")
    columns = ["Avg@k before", "Avg@k after", "Pass@k", "greedy", "route entropy", "two routes"]
    columns += [headline] * (headline != "eval/accuracy")
    for column in ("", *columns, f"steps to {config.target}", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for arm, (script, *flags) in arms.items():
        mine = [folders[arm, seed] for seed in range(config.seeds)]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in mine]
        lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in mine]
        points = [[(line["step"], line[headline]) for line in each
                   if headline in line and line["step"] % config.eval_every == 0] for each in lines]  # fmt: skip
        reached = [next((step for step, accuracy in each if accuracy >= config.target), math.inf) for each in points]
        measured = [key for key in EVAL_KEYS if key in summaries[0]["after"]]
        after = {key: [summary["after"][key] for summary in summaries] for key in measured}
        measured = set(lines[0][0]).intersection(*(each[-1] for each in lines)) - {"step", *EVAL_KEYS}  # at evaluations
        measured |= {key for key in lines[0][-1] if key.endswith("/tokens")}  # running totals
        after |= {key: [each[-1][key] for each in lines] for key in sorted(measured)}
        every, prefix = [line for each in lines for line in each[1:]], summaries[0]["method"].split("_")[0] + "/"
        own = {key: [line[key] for line in every if key in line] for key in every[0] if key.startswith(prefix)}
        if "eval/pass_at_k" in after:  # a method that writes texts
            routes = [diversity(str(mine[i] / "model"), summaries[i]["task"]) for i in range(config.seeds)]
            after |= {key: [each[key] for each in routes] for key in routes[0]}
        before = statistics.mean(summary["accuracy_before"] for summary in summaries)
        seconds = statistics.mean(summary["seconds"] for summary in summaries)
        methods[arm] = {key: statistics.mean(values) for key, values in after.items()}
        methods[arm] |= {"eval/accuracy_se": spread(after["eval/accuracy"]), "seeds": config.seeds, "before": before}
        methods[arm] |= {"runs": after, "steps_to_target": [None if math.isinf(step) else step for step in reached]}
        first = methods[next(iter(arms))]["runs"]["eval/accuracy"]
        methods[arm]["minus first arm"] = paired([a - b for a, b in zip(after["eval/accuracy"], first, strict=True)])
        methods[arm]["mean over steps"] = {key: statistics.mean(values) for key, values in own.items()}
        methods[arm] |= {"seconds": seconds, "command": " ".join(["python", f"methods/{script}", *flags])}
        curves[arm] = points
        figures = {key: f"{statistics.mean(values):.3f} ± {spread(values):.3f}" for key, values in after.items()}
        shown = ["eval/accuracy", "eval/pass_at_k", "eval/greedy", "route_entropy", "two_routes"]
        shown += [headline] * (headline != "eval/accuracy")
        steps = ", ".join("never" if math.isinf(step) else str(step) for step in reached)
        table.add_row(arm, f"{before:.3f}", *(figures.get(key, "") for key in shown), steps, f"{seconds:.0f}")
    console.print(table)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    command = "python scripts/reproduce.py " + " ".join(sys.argv[1:])
    task = json.loads((folders[pairs[0]] / "summary.json").read_text())["task"]
    stored = {"task": task, "command": command.strip(), "versions": versions(), "target": config.target}
    stored["methods"] = methods
    write_atomically(out / f"{config.study}.json", json.dumps(stored, indent=1) + "\n")
    plot(out / f"{config.study}.png", f"{config.study}: mean ± deviation over seeds", headline, curves)
    console.print(f"stored in {out / config.study}.json, plotted in {out / config.study}.png")


if __name__ == "__main__":
    cli(main, Config)
