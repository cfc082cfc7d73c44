"""Command line: a Config dataclass in, one clear line and exit code 2 on anything a user can mend."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro


@dataclass(frozen=True)
class System:
    """Of machines: they change speed and memory, not what is learnt."""

    threads: int = 0  # CPU threads of each process; 0 = one for tiny models, torch's choice otherwise
    shard: Literal["none", "fsdp"] = "none"  # under torchrun: a whole copy in each process, or FSDP2's shards
    cpu_offload: bool = False  # with --shard fsdp: weights, gradients and optimizer state wait in CPU memory
    checkpointing: bool = False  # recompute each layer in the backward pass instead of keeping its activations
    dry_run: bool = False  # print the memory that these flags will take on --processes, and stop
    processes: int = 1  # of --dry-run; a run takes their number from torchrun


@dataclass(frozen=True)
class Engines(System):
    """Of machines and engines: they change speed and memory, not what is learnt."""

    vllm_memory: float = 0.4  # share of a GPU for --rollout vllm: its weights and key-value cache
    vllm_sleep: bool = False  # give that memory to the trainer between rollouts
    server_seconds: float = 600.0  # longest wait for one answer of a vLLM server
    teacher_cache: str = ""  # folder that keeps a served teacher's scores; empty it if the served weights change


class UserError(Exception):
    """Something the user can mend. The message is one line: the cause, then what to do."""


class Ended(UserError):
    """One that all processes raise together (distributed.together): they can still save what they have."""


AT_END: list[Callable[[bool], str]] = []  # what then is to be called, and at Ctrl-C: the run's rescue


def launched() -> bool:
    """By torchrun or its like. Some schedulers set RANK and WORLD_SIZE alone."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def require(condition: Any, message: str) -> None:
    """Raise UserError with the message unless condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def writable(folder: Path, mend: str, make: bool = False) -> Path:
    """The folder, tried before any work is done for it; make: with all that lead to it."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write the folder {folder} ({error.strerror}); {mend}") from None
    return folder


def fail(message: str) -> NoReturn:
    """Print one line to stderr and leave with exit code 2."""
    if launched() and os.environ["RANK"] != "0":
        time.sleep(30)  # torchrun ends the others when the first process has said it
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


POSITIVE = {"lr", "steps", "prompts_per_step", "max_new_tokens", "micro_batch_tokens", "eval_problems", "eval_samples"}
POSITIVE |= {"max_grad_norm", "group_size", "minibatches", "epochs", "top_k", "repeats", "problems", "samples"}
POSITIVE |= {"max_turns", "bank_size", "summary_tokens", "critique_tokens", "kd_temperature", "iters", "max_length"}
POSITIVE |= {"mlot_top", "tau", "eps", "k", "gamma", "keep_every", "eval_draws", "width", "layers", "heads"}
POSITIVE |= {"vllm_memory", "processes", "server_seconds", "prompts", "seeds", "jobs"}
MOST = {"seed": 2**32, "vllm_memory": 1, "lr": 1000, "lora_rank": 2**14, "threads": 1024, "jobs": 1024, "seeds": 1024}
MOST |= dict.fromkeys(["prompts_per_step", "group_size", "eval_problems", "eval_samples", "problems", "samples"], 2**20)
ANY = {"margin_delta", "balance_ratio"}  # negative or infinite values have a meaning


def require_no_idle(config: Any, acts: dict[str, tuple[Any, str]]) -> None:
    """acts: flags -> whether they act here, and with what they do. Refuses one that does not but has been changed."""
    for flag, (active, where) in ((flag, each) for flags, each in acts.items() for flag in flags.split()):
        idle = f"--{flag.replace('_', '-')} has nothing to act on here, but with {where}"
        require(active or getattr(config, flag) == getattr(type(config), flag), idle)


def check_ranges(config: Any) -> None:
    for flag, value in (vars(config) | vars(getattr(config, "system", config))).items():
        if type(value) in (int, float) and flag not in ANY:
            tiny, most = 0 < value < 1e-30, MOST.get(flag, 1e30)  # beyond these fp32 soon has 0 or inf
            least = 1e-30 if tiny or flag in POSITIVE else 0
            bound = "at least 1e-30" if tiny else "above 0" if least else "at least 0"
            bound += f", below {most}" * (flag in MOST or value >= most)
            require(least <= value < most, f"--{flag.replace('_', '-')} {value}: must be finite and {bound}")


def parse(config_class: type, presets: dict[str, dict[str, Any]]) -> Any:
    """Flags -> config_class. With presets, `--preset NAME` changes the defaults and explicit flags still win."""
    boxes, about = io.StringIO(), sys.modules[config_class.__module__].__doc__
    try:
        with contextlib.redirect_stderr(boxes):
            flat = (tyro.conf.OmitArgPrefixes,)  # --shard, not --system.shard
            config = tyro.cli(config_class, description=about, config=flat)
            if presets:
                default = dataclasses.replace(config_class(), **presets[config.preset])
                config = tyro.cli(config_class, default=default, config=flat)
        return config
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        text = re.sub(r"[╭╮╰╯│]|─+ [\w ]+ ─+", " ", boxes.getvalue())  # tyro draws a box; we want its sentence
        cause, *rest = [" ".join(part.split()) for part in re.split(r"─{3,}", text) if part.strip()]
        near = [" (near: " + part.split(": ", 1)[1].split(" ")[0] + ")" for part in rest if part.startswith("Perhaps")]
        fail(cause.rstrip(".") + "".join(near[:1]) + "; --help lists all flags")


def cli(main: Callable[[Any], None], config_class: type, presets: dict[str, dict[str, Any]] | None = None) -> None:
    """Entry point of every script: parse, run, and turn a UserError into its line."""
    config = parse(config_class, presets or {})
    try:
        check_ranges(config)
        main(config)
    except UserError as error:
        for rescue in AT_END if isinstance(error, Ended) else ():
            print(rescue(True), end="")
        fail(str(error))
    except KeyboardInterrupt:
        fail("; ".join(["interrupted", *(rescue(False) for rescue in AT_END)]))
