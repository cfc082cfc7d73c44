"""Compile every Triton kernel of kernels/ for GPUs that need not be here, and show what each costs them.

Each tile, with its warps, and each value of a constexpr is compiled for aligned fp32 tensors and for one other choice
of dtypes and alignment; those take turns, and --every takes all. (Triton compiles sizes and strides that are multiples
of 16, here "aligned", apart from others.) The table shows the largest over dtypes, alignments and soft-caps; yellow is
a target's largest, red a failure. Exit code 1 if something does not compile, wants more shared memory than the target
has or, on NVIDIA, spills registers. Needs no GPU, CUDA or ROCm.

Run: python scripts/compile_kernels.py            (a minute or two on two cores; --every takes ten times as long)
"""

import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

import posttrain.kernels
from posttrain.common.cli import cli, first_line, require
from posttrain.kernels import backend, divergence, sinkhorn

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that one program may have

# What a parameter is, by its name. A kernel with a name that is not here is an error: nothing new goes unchecked.
TYPES = {
    "*": "logits student teacher da C",  # in several dtypes
    "*i64": "ids",
    "*fp32": "stats m log_s entropy g g_entropy d a b f e h grad P Q W dP",
    "i32": "R V A B iters stride da_stride teacher_stride",
    "fp32": "temperature beta cap teacher_cap scale",
}
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
FLAGS = {"KIND": range(len(divergence.KINDS))}
FLAGS |= dict.fromkeys(("HAS_CAP", "TEACHER_CAP", "HAS_ENTROPY", "GRAD", "L1"), (False, True))
TILES = {  # constexprs that go together -> their values, then the number of warps
    ("COLS", "TILE"): sinkhorn.COST_TILES,
    ("TILE",): backend.TILES,
    ("ROWS", "COLS"): sinkhorn.SINKHORN_TILES,
}


@dataclass
class Config:
    targets: str = ",".join(TARGETS)  # which of these, separated by commas
    only: str = ""  # kernels whose name contains this
    every: bool = False  # all dtypes and alignments for every tile and constexpr
    jobs: int = 2  # processes
    out: str = ""  # write the figures of every compilation as JSON


@dataclass
class Case:
    """One compilation and, once it is done, what it takes."""

    module: str
    kernel: str
    target: str
    types: dict[str, str]
    constants: dict[str, int]
    warps: int
    aligned: bool
    registers: int = 0  # a thread
    shared: int = 0  # bytes a program
    spills: int = 0  # bytes a thread, in memory
    scalars: int = 0  # AMD: scalar registers that are kept in vector registers
    error: str = ""

    def name(self, caps: bool = True) -> str:
        shown = {k: v for k, v in self.constants.items() if v is not False and (caps or "CAP" not in k)}
        return " ".join([*(k if v is True else f"{k}={v}" for k, v in shown.items()), f"warps={self.warps}"])

    def __str__(self) -> str:
        dtypes = [self.types[name][1:] for name in self.types if TYPES.get(name) == "*"]
        return " ".join([self.kernel, self.name(), *dtypes, "aligned" if self.aligned else "unaligned", self.target])

    def complaint(self) -> str:
        if self.error or self.shared > SHARED[self.target]:
            return self.error or f"needs {self.shared} bytes of shared memory"
        return f"spills {self.spills} bytes" if self.spills and self.target.startswith("sm") else ""


def kernels(package: ModuleType) -> Iterator[tuple[str, object]]:
    """(module, function) of all Triton functions in a package that no other of them calls."""
    from triton.runtime.jit import JITFunction

    modules = {info.name: importlib.import_module(info.name)
               for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")}  # fmt: skip
    mine = [(name, f) for name, module in modules.items() for f in vars(module).values()
            if isinstance(f, JITFunction) and f.__module__ == name]  # fmt: skip
    called = [f.fn.__globals__.get(name) for _, f in mine for name in f.fn.__code__.co_names]
    return ((name, f) for name, f in mine if f not in called)


def dtypes_of(pointers: list[str]) -> Iterator[dict[str, str]]:
    """All fp32 first. Heads make fp32 logits and take da in their own dtype; given logits want da in theirs."""
    for kinds in itertools.product(("fp32", "bf16", "fp16"), repeat=len(pointers)):
        chosen = dict(zip(pointers, kinds, strict=True))
        da, logits = chosen.pop("da", None), chosen.get("logits", chosen.get("student"))
        if da in (None, logits) or set(chosen.values()) == {"fp32"}:
            yield dict(zip(pointers, (f"*{kind}" for kind in kinds), strict=True))


def cases(module: str, kernel, every: bool = False) -> Iterator[Case]:
    names, flags = kernel.arg_names, [p.name for p in kernel.params if p.is_constexpr]
    tile = next((tile for tile in TILES if set(tile) <= set(flags)), ())
    unknown = set(names) - {*TYPES, *FLAGS, *tile}
    missing = ", ".join(sorted(unknown)) or "its tile"
    require(tile and not unknown, f"{kernel.__name__}: scripts/compile_kernels.py must learn what to give {missing}")
    plain = [name for name in flags if name not in tile]
    variants = list(itertools.product(dtypes_of([name for name in names if TYPES.get(name) == "*"]), (True, False)))
    turns = itertools.cycle(variants[1:])
    for *sizes, warps in TILES[tile]:
        for values in itertools.product(*(FLAGS[name] for name in plain)):
            constants = dict(zip((*plain, *tile), (*values, *sizes), strict=True))
            for dtypes, aligned in variants if every else (variants[0], next(turns)):
                types = {name: "constexpr" if name in flags else dtypes.get(name, TYPES.get(name)) for name in names}
                for target in TARGETS:
                    yield Case(module, kernel.__name__, target, types, constants, warps, aligned)


def compiled(case: Case) -> Case:
    """The case with its figures or its error. Runs in a process of the pool."""
    import triton
    from triton.backends.compiler import GPUTarget

    function = getattr(importlib.import_module(case.module), case.kernel)
    constants = {(function.arg_names.index(name),): value for name, value in case.constants.items()}
    multiples = "*i" if case.aligned else "*"
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(case.types.values()) if kind[0] in multiples}
    source = triton.compiler.ASTSource(function, case.types, constants, attrs)
    options = {"num_warps": case.warps}
    if case.target.startswith("sm"):  # as backend.launch does
        options["maxnreg"] = 255 if "COLS" in case.constants else backend.ROW_REGISTERS
    try:
        binary = triton.compile(source, GPUTarget(*TARGETS[case.target]), options)
    except Exception as error:  # of any stage: Triton's, LLVM's or the assembler's
        case.error = first_line(error)
        return case
    case.shared = binary.metadata.shared
    if "amdgcn" in binary.asm:
        case.registers, case.spills, case.scalars = amd_usage(binary.asm["amdgcn"])
        return case
    with tempfile.NamedTemporaryFile() as file:  # Triton itself learns these figures only when a GPU loads the code
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        case.registers, case.spills = nvidia_usage(subprocess.check_output(command, text=True))
    return case


def nvidia_usage(text: str) -> tuple[int, int]:
    """cuobjdump's text -> registers, bytes of stack and local memory"""
    return int(re.search(r"\bREG:(\d+)", text)[1]), sum(map(int, re.findall(r"\b(?:STACK|LOCAL):(\d+)", text)))


def amd_usage(text: str) -> tuple[int, ...]:
    """Metadata of an assembly listing -> vector registers, bytes of scratch memory, spilled scalars"""
    names = ("vgpr_count", "private_segment_fixed_size", "sgpr_spill_count")
    return tuple(int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names)


def table_of(done: list[Case], targets: list[str]) -> Table:
    table = Table(title="registers a thread / bytes of shared memory a program / bytes a thread spilled; largest of n")
    for column in ("kernel", "form", "n", *targets):
        table.add_column(column, justify="right" if column in ("n", *targets) else "left", no_wrap=True)
    most, groups = {target: max(case.registers for case in done if case.target == target) for target in targets}, {}
    for case in done:
        groups.setdefault((case.kernel, case.name(caps=False)), []).append(case)
    for form, group in groups.items():
        cells = []
        for target in targets:
            here = [case for case in group if case.target == target]
            figures = [max(getattr(case, x) for case in here) for x in ("registers", "shared", "spills", "scalars")]
            cell = " / ".join(map(str, figures[:3])) + (f" + {figures[3]} scalars" if figures[3] else "")
            large = figures[0] == most[target] or any(figures[2:])
            cells.append(Text(cell, "red" if any(case.complaint() for case in here) else "yellow" if large else ""))
        table.add_row(*form, str(len(group)), *cells)
    return table


def main(config: Config) -> None:
    require(backend.triton, "there is no Triton for this platform")
    targets = config.targets.split(",")
    require(set(targets) <= set(TARGETS), f"--targets {config.targets}: known are {', '.join(TARGETS)}")
    interpreted = backend.triton.knobs.runtime.interpret
    require(not interpreted, "TRITON_INTERPRET replaces the compiler: unset it and run again")
    found = list(kernels(posttrain.kernels))
    todo = [case for module, kernel in found if config.only in kernel.__name__
            for case in cases(module, kernel, config.every) if case.target in targets]  # fmt: skip
    require(todo, f"--only {config.only}: kernels are {', '.join(kernel.__name__ for _, kernel in found)}")
    with tempfile.TemporaryDirectory() as cache:
        # Fusion of a multiplication with an addition is what Triton does now; the default of a later release differs.
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        with ProcessPoolExecutor(max(1, config.jobs), multiprocessing.get_context("fork")) as pool:
            done = list(pool.map(compiled, todo, chunksize=3))
    Console(width=None if sys.stdout.isatty() else 150).print(table_of(done, targets))
    if config.out:
        with open(config.out, "w") as file:
            json.dump([{**asdict(case), "complaint": case.complaint()} for case in done], file, indent=1)
    bad = [f"{case} {case.complaint()}" for case in done if case.complaint()]
    if bad:
        shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        sys.exit(f"error: {len(bad)} of {len(done)} compilations failed: {shown}")
    print(f"{len(done)} compilations, no complaint")


if __name__ == "__main__":
    cli(main, Config)
