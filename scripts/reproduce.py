"""Methods against each other on the embedded default, with several seeds; the stored results come from here.

Each run is a process of its own with a run folder of its own, so that a stopped call goes on where it was and studies
share their runs. What a run measured is kept as one JSON as soon as it is done (OUT/runs/ARM-SEED.json: command,
versions, commit, end values, curve); table, study JSON and plot are made from these and nothing else, with --stored
without any training. Nothing stored in the repository changes unless --out says scripts/results.

Run: python scripts/reproduce.py                              all ten methods and their baselines, five seeds
     python scripts/reproduce.py --only opd scope --seeds 2   two of its rows and what they are compared with
     python scripts/reproduce.py --study scope                one method's ablations
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from posttrain.common.cli import UserError, cli, require, writable
from posttrain.common.engines.hf import HFEngine
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import Sampling
from posttrain.common.run import EVAL_KEYS, read_json, write_atomically
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
# arm -> what it is compared with, seed by seed; the first is the baseline that isolates the paper's idea.
AGAINST = {
    "grpo": ["before"],
    "opd": ["grpo"],
    "scope": ["opd-k1", "grpo"],
    "uni-opd": ["multi-opd"],
    "sod": ["opd-chain"],
    "skill-sd": ["grpo-sokoban"],
    "pi-distill": ["grpo-lookup"],
    "opsd": ["grpo-lookup"],
    "rltf-sd": ["rltf-single"],
    "rltf-fm": ["rltf-single"],
    "sinkd": ["sinkd-kd"],
    "cot2": ["discrete"],
}
COMMANDS = {arm: command for arms in STUDIES.values() for arm, command in arms.items()}
IN_METHODS = [name for arm, others in AGAINST.items() for name in (arm, *others) if name != "before"]
STUDIES["methods"] = {arm: COMMANDS[arm] for arm in dict.fromkeys(IN_METHODS)}
RECORD = {"versions": dict, "after": dict, "mean over steps": dict, "curve": list}  # at least
RECORD |= dict.fromkeys(("task", "command", "seconds", "before"), object)
HEADLINES = {"skill_sd.py": "skill/train_success"}  # what curves, differences and target speak of, else eval/accuracy
EVERY = {"skill_sd.py": 20, "pi_distill.py": 20, "rltf.py": 25, "sod.py": 50, "sinkd.py": 78, "cot2.py": 410}  # else 40


@dataclass
class Config:
    study: Literal[tuple(STUDIES)] = "methods"  # a set of arms, see STUDIES
    only: tuple[str, ...] = ()  # its arms to run, each with the baseline that isolates its idea; empty = all
    seeds: int = 5  # runs of each arm, seeds 0, 1, ...
    jobs: int = 2  # runs at a time, one thread each
    eval_every: int = 0  # steps between points of the curves; 0 = EVERY's
    target: float = 0.45  # value of the headline whose first step is reported
    stored: bool = False  # train nothing: table and plot from the stored runs
    folder: str = "runs/reproduce"  # of the run folders
    out: str = "runs/results"  # folder of table, plot and records; scripts/results holds the stored ones


def headline(script: str) -> str:
    return HEADLINES.get(Path(script).name, "eval/accuracy")


# --- runs


def run(arm: str, command: list[str], seed: int, every: int, folder: str) -> Path:
    """One training run, skipped if it is complete and continued if it was stopped. -> its folder"""
    out = Path(folder) / f"{arm}-{seed}"
    if not (out / "summary.json").exists():
        script, *flags = (part.replace("{folder}", folder).replace("{seed}", str(seed)) for part in command)
        missing = [part for part in flags if part.startswith(f"{folder}/") and not Path(part).exists()]
        require(not missing, f"{arm} goes on from {missing[:1]}: run the study that makes it with as many seeds first")
        flags += ["--seed", str(seed), "--eval-every", str(every), "--out", str(out)]
        flags += ["--resume"] if (out / "config.json").exists() else []
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(METHODS))))  # a script may lie anywhere
        done = subprocess.run([sys.executable, str(METHODS / script), *flags], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": path})  # fmt: skip
        require(done.returncode == 0, f"{arm} with seed {seed} failed: {cause(done.stderr, done.returncode)}")
    return out


def cause(stderr: str, code: int) -> str:
    """The line that says why a run failed, its middle left out if it is very long."""
    lines = stderr.strip().splitlines() or [f"exit code {code}"]
    line = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return line if len(line) <= 1000 else f"{line[:500]} ... {line[-500:]}"


def parts_of(out: Path, script: str) -> tuple[dict, dict, list[dict]]:
    """A complete run's summary, config and lines of metrics."""
    mend = f"delete {out}, and the same command makes its run again"
    keys = ("task", "method", "steps", "seconds", "after", "accuracy_before", "accuracy_teacher")
    [summary] = read_json(out / "summary.json", dict.fromkeys(keys, object), mend)
    [config] = read_json(out / "config.json", {"flags": dict, "versions": dict}, mend)
    lines = read_json(out / "metrics.jsonl", {"step": int}, mend)
    whole = len(lines) > 1 and lines[-1]["step"] == summary["steps"] and headline(script) in lines[-1]
    require(whole, f"{out / 'metrics.jsonl'} does not end with the last step's {headline(script)}: {mend}")
    return summary, config, lines


def check_held(arm: str, command: list[str], seed: int, every: int, folder: str) -> None:
    """Refuse a folder that holds a damaged run, or one whose curve has its points elsewhere than the others' will."""
    out = Path(folder) / f"{arm}-{seed}"
    if (out / "summary.json").exists():
        parts_of(out, command[0])
    if (out / "config.json").exists():
        [config] = read_json(out / "config.json", {"flags": dict}, f"delete {out}, and its run begins anew")
        had = config["flags"].get("eval_every")
        require(had == every, f"{out} was made with --eval-every {had}, not {every}: give that, or delete the folder")


def record(out: Path, arm: str, command: list[str], seed: int, every: int) -> dict:
    """What is kept of a run."""
    summary, config, lines = parts_of(out, command[0])
    last = {key: summary["after"][key] for key in EVAL_KEYS if key in summary["after"]}
    last |= {key: lines[-1][key] for key in sorted(lines[0].keys() & lines[-1].keys() - last.keys() - {"step"})}
    last |= {key: value for key, value in lines[-1].items() if key.endswith("/tokens")}  # running totals
    if "eval/pass_at_k" in last:  # a method that writes texts
        last |= diversity(str(out / "model"), summary["task"])
    prefix, script = summary["method"].split("_")[0] + "/", command[0]
    own = {key: [line[key] for line in lines[1:] if key in line] for key in lines[1] if key.startswith(prefix)}
    points = [line for line in lines[:-1] if headline(script) in line and line["step"] % every == 0] + lines[-1:]
    shown = script if Path(script).is_absolute() else f"methods/{script}"
    shown = f"{' '.join(['python', shown, *command[1:]])} --seed {seed} --eval-every {config['flags']['eval_every']}"
    found = {"arm": arm, "seed": seed, "task": summary["task"], "steps": summary["steps"], "command": shown}
    found |= {"versions": config["versions"], "seconds": summary["seconds"], "before": summary["accuracy_before"]}
    found |= {"teacher": summary["accuracy_teacher"], "after": last}
    found |= {"mean over steps": {key: statistics.mean(values) for key, values in own.items()}}
    return found | {"curve": [[line["step"], line[headline(script)]] for line in points]}


def run_all(arms: dict[str, list[str]], seeds: int, jobs: int, every: int, folder: str, console: Console,
            keep: Callable[[dict], None] = lambda record: None) -> dict[str, list[dict]]:  # fmt: skip
    """All arms with all seeds, seed by seed, under a progress bar. keep is given each run's record as soon as the run
    is done. -> arm: its records by seed"""
    pairs = [(arm, arms[arm], seed, every or EVERY.get(arms[arm][0], 40)) for seed in range(seeds) for arm in arms]
    for pair in pairs:  # before any trains
        check_held(*pair, folder)
    pool, found = ThreadPoolExecutor(jobs), {}
    started = {pool.submit(run, *pair, folder): pair for pair in pairs}
    try:
        for job in track(as_completed(started), "runs", len(pairs), console=console):
            arm, _, seed, _ = pair = started[job]
            found[arm, seed] = record(job.result(), *pair)
            keep(found[arm, seed])
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on where it was") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return {arm: [found[arm, seed] for seed in range(seeds)] for arm in arms}


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


# --- statistics


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ends(records: list[dict]) -> list[float]:
    """The headline at the end of each seed's run."""
    return [record["curve"][-1][1] for record in records]


def paired(differences: list[float]) -> dict:
    """Differences seed by seed: mean, how many are above 0, and two 95% intervals of the mean.

    interval resamples the seeds (percentile bootstrap, which knows no distribution and cannot leave the range of what
    was seen: with five seeds it is too narrow, by a third or so); t_half is half the width of Student's, for
    differences that are about normal. Both None from one seed.
    """
    import numpy
    from scipy.stats import bootstrap, t

    n, mean = len(differences), statistics.mean(differences)
    found = {"difference": mean, "seeds_above": sum(d > 0 for d in differences), "interval": None, "t_half": None}
    if n > 1:
        low, high = bootstrap((differences,), numpy.mean, method="percentile", rng=0).confidence_interval
        half = t.ppf(0.975, n - 1) * spread(differences) / math.sqrt(n)
        found |= {"interval": [float(low), float(high)], "t_half": float(half)}
    return found


def against(records: dict[str, list[dict]], arm: str, other: str) -> dict:
    """arm minus other seed by seed in the arm's headline; other "before": minus each run's own start."""
    mine = records[arm]
    theirs = [record["curve"][0][1] for record in mine] if other == "before" else ends(records[other])
    return paired([a - b for a, b in zip(ends(mine), theirs, strict=True)])


def summary_of(records: list[dict], target: float) -> dict:
    """Means over an arm's seeds, beside each seed's values."""
    after = {key: [record["after"][key] for record in records] for key in records[0]["after"]}
    reached = [next((step for step, value in record["curve"] if value >= target), None) for record in records]
    found = {key: statistics.mean(values) for key, values in after.items()}
    found |= {"eval/accuracy_se": spread(after["eval/accuracy"]), "seeds": len(records), "runs": after}
    own = {key: statistics.mean(r["mean over steps"][key] for r in records) for key in records[0]["mean over steps"]}
    found |= {key: statistics.mean(record[key] for record in records) for key in ("before", "seconds")}
    found |= {"steps_to_target": reached, "mean over steps": own, "task": records[0]["task"]}
    return found | {"command": records[0]["command"].split(" --seed 0 ")[0]}


# --- pictures


def curves(axis, records: dict[str, list[dict]], label: str) -> None:
    """The headline over the steps that all seeds have: each arm's mean, and one standard deviation around it."""
    for i, (arm, runs) in enumerate(records.items()):
        points = [dict(run["curve"]) for run in runs]
        steps = [step for step in points[0] if all(step in each for each in points)]
        values = [[each[step] for each in points] for step in steps]
        means, spreads = [statistics.mean(v) for v in values], [spread(v) for v in values]
        axis.plot(steps, means, color=f"C{i}", linestyle="-" if i < 10 else "--", label=arm)
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.12, linewidth=0)
    axis.set(xlabel="step", ylabel={"eval/accuracy": "held-out accuracy"}.get(label, label))
    axis.grid(alpha=0.3)


def plot(path: Path, title: str, records: dict[str, list[dict]], label: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    curves(axis, records, label)
    axis.set_title(title)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def plot_methods(path: Path, records: dict[str, list[dict]]) -> None:
    """All methods on one page: where each run starts and ends beside its baseline, and the difference with interval."""
    from matplotlib.figure import Figure

    rows = [arm for arm in AGAINST if arm in records]
    figure = Figure(figsize=(11, 1.5 + 0.45 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, arm in enumerate(rows):
        base, mine = AGAINST[arm][0], ends(records[arm])
        starts, found = [record["curve"][0][1] for record in records[arm]], against(records, arm, base)
        parts = [(starts, "o", "white", "before training"), (mine, "o", "C0", "method")]
        parts += [(ends(records[base]), "D", "0.6", "its baseline")] if base != "before" else []
        left.plot([statistics.mean(starts), statistics.mean(mine)], [y, y], color="C0", alpha=0.4, zorder=1)
        for values, marker, fill, label in parts:
            label = label if y == 0 or (y == 1 and marker == "D") else None
            look = {"fmt": marker, "mfc": fill, "mec": "0.3", "ecolor": "0.3", "label": label}
            left.errorbar(statistics.mean(values), y, xerr=spread(values), **look)
        theirs = starts if base == "before" else ends(records[base])
        differences = [a - b for a, b in zip(mine, theirs, strict=True)]
        right.scatter(differences, [y] * len(differences), s=12, color="0.6", label="one seed" if y == 0 else None)
        low, high = found["interval"] or [found["difference"]] * 2
        error = [[found["difference"] - low], [high - found["difference"]]]
        right.errorbar(found["difference"], y, xerr=error, fmt="o", color="C0", capsize=3,
                       label="mean and 95% bootstrap interval" if y == 0 else None)  # fmt: skip
    names = [f"{arm}\nminus {'its start' if AGAINST[arm][0] == 'before' else AGAINST[arm][0]}" for arm in rows]
    left.set_yticks(range(len(rows)), names, fontsize="small")
    left.invert_yaxis()
    left.set(xlabel="accuracy (mean ± deviation over seeds); each row its own task", xlim=(0, 1))
    right.set(xlabel="method minus baseline, seed by seed")
    right.axvline(0, color="0.3", linewidth=1)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small", loc="best")
    figure.savefig(path, dpi=120)


# --- all of it


def table(title: str, methods: dict[str, dict], target: float | None) -> Table:
    """An arm a row; differences as mean, bootstrap interval, and in how many seeds the arm was ahead."""
    shown = {"eval/accuracy": "Avg@k", "eval/pass_at_k": "Pass@k", "eval/greedy": "greedy"}
    shown |= {"route_entropy": "route entropy", "two_routes": "two routes", "skill/train_success": "training tasks"}
    shown = {key: label for key, label in shown.items() if any(key in each["runs"] for each in methods.values())}
    drawn = Table(title=title)
    for column in ("", "before", *shown.values(), "difference", *([f"steps to {target}"] if target else []), "seconds"):
        drawn.add_column(column, justify="right" if column else "left")
    for arm, each in methods.items():
        cells = [f"{each['before']:.3f}"]
        for key in shown:
            values = each["runs"].get(key)
            cells.append(f"{statistics.mean(values):.3f} ± {spread(values):.3f}" if values else "")
        cells.append("\n".join(difference(found, other) for other, found in each["against"].items()))
        if target:
            cells.append(", ".join("never" if step is None else str(step) for step in each["steps_to_target"]))
        drawn.add_row(arm, *cells, f"{each['seconds']:.0f}")
    return drawn


def difference(found: dict, other: str) -> str:
    interval = "" if found["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*found["interval"])
    return f"{found['difference']:+.3f}{interval} to {other}"


def markdown(methods: dict[str, dict], records: dict[str, list[dict]]) -> str:
    """README's table: each method beside the baseline that isolates its idea."""
    columns = "method | task | lines | before | after | baseline | after | difference | seeds ahead | seconds"
    rows = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]

    def figure(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {spread(values):.3f}"

    for arm in (arm for arm in AGAINST if arm in methods):
        mine, base = methods[arm], AGAINST[arm][0]
        script, *flags = mine["command"].removeprefix("python methods/").split()
        lines = len((METHODS / script).read_text().splitlines())
        cells = [f"[{arm}](methods/{script[:-3]}.md)" + f" `{' '.join(flags)}`" * bool(flags), mine["task"], str(lines)]
        cells += [figure([record["curve"][0][1] for record in records[arm]]), figure(ends(records[arm]))]
        theirs = "" if base == "before" else methods[base]["command"].removeprefix("python methods/")
        cells += [f"{base} `{theirs}`", figure(ends(records[base]))] if theirs else ["its own start", ""]
        found = mine["against"][base]
        cells += [difference(found, "").removesuffix(" to "), f"{found['seeds_above']} of {mine['seeds']}"]
        rows.append(f"| {' | '.join(cells)} | {mine['seconds']:.0f} |")
    return "\n".join(rows) + "\n"


def main(config: Config) -> None:
    arms, out = STUDIES[config.study], Path(config.out)
    require(min(config.seeds, config.jobs) > 0, "--seeds and --jobs must be at least 1")
    unknown = [arm for arm in config.only if arm not in arms]
    require(not unknown, f"--only {unknown} is not known; choose from {', '.join(arms)}")
    wanted = {name for arm in config.only for name in (arm, *AGAINST.get(arm, [])[:1])} or set(arms)
    arms = {arm: command for arm, command in arms.items() if arm in wanted}
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(1)
    kept = {(arm, seed): out / "runs" / f"{arm}-{seed}.json" for arm in arms for seed in range(config.seeds)}

    def keep(record: dict) -> None:
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        write_atomically(kept[record["arm"], record["seed"]], "{\n" + ",\n".join(lines) + "\n}\n")

    if config.stored:
        missing = [path.name for path in kept.values() if not path.exists()]
        require(not missing, f"{out / 'runs'} lacks {', '.join(missing[:3])}: run without --stored to make them")
        mend = "delete it, and run without --stored to make it again"
        records = {arm: [read_json(kept[arm, n], RECORD, mend)[0] for n in range(config.seeds)] for arm in arms}
    else:
        writable(out / "runs", "choose another --out", make=True)
        records = run_all(arms, config.seeds, config.jobs, config.eval_every, config.folder, console, keep)

    methods, first = {}, next(iter(arms))
    for arm in arms:
        others = [other for other in AGAINST.get(arm, []) if other in (*arms, "before")]
        others += [first] if config.study != "methods" and arm != first and first not in others else []
        methods[arm] = summary_of(records[arm], config.target)
        methods[arm]["against"] = {other: against(records, arm, other) for other in others}
    several = config.study == "methods"  # tasks: one target for all would say nothing
    title = f"{config.study}: mean ± standard deviation over {config.seeds} seeds"
    console.print(table(title, methods, None if several else config.target))
    task = None if several else records[first][0]["task"]
    command = "python scripts/reproduce.py " + " ".join(part for part in sys.argv[1:] if part != "--stored")
    made_with = records[first][0]["versions"]  # each record has its own
    result = {"task": task, "command": command.strip(), "versions": made_with, "target": config.target}
    write_atomically(out / f"{config.study}.json", json.dumps(result | {"methods": methods}, indent=1) + "\n")
    if several:
        plot_methods(out / f"{config.study}.png", records)
        write_atomically(out / f"{config.study}.txt", markdown(methods, records))
    else:
        title = f"{config.study}: mean ± deviation over seeds"
        plot(out / f"{config.study}.png", title, records, headline(arms[first][0]))
    console.print(f"stored in {out / config.study}.json, plotted in {out / config.study}.png")


if __name__ == "__main__":
    cli(main, Config)
