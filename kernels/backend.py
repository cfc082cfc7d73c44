"""Which form of an operation runs: Triton on GPUs, its PyTorch twin everywhere else. One rule for the whole folder."""

import contextlib

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twins serve
    triton, tl = None, type("tl", (), {"constexpr": None})

TILES = ((1024, 4), (4096, 8))  # columns of a row that a program holds at a time, and its warps
ROW_REGISTERS = 128  # a thread, of row kernels: two programs of 8 warps fit on an SM
choice = {"backend": "auto", "tile": None}


def jit(kernel):
    return triton.jit(kernel) if triton else kernel


def backend_for(x: Tensor) -> str:
    """triton for fp32, bf16 and fp16 tensors on CUDA, ROCm (which reports cuda) and XPU devices; torch otherwise."""
    on_gpu = x.device.type in ("cuda", "xpu") and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return choice["backend"] if choice["backend"] != "auto" else "triton" if triton and on_gpu else "torch"


@contextlib.contextmanager
def use_backend(backend: str, tile: int | None = None):
    """Force auto, triton or torch, and the row kernels' tile, for tests and benchmarks.

    Triton on CPU tensors needs TRITON_INTERPRET=1 in the environment before this module is imported.
    """
    before = dict(choice)
    choice.update(backend=backend, tile=tile)
    try:
        yield
    finally:
        choice.update(before)


def tile_for(width: int) -> dict[str, int]:
    """Tile and warps of a row kernel over `width` columns: the smallest of TILES that holds a row, else the largest."""
    tile, warps = next((t for t in TILES if width <= t[0]), TILES[-1])
    return {"TILE": choice["tile"] or tile, "num_warps": warps, "registers": ROW_REGISTERS}


def launch(kernel, programs: int, near: Tensor, *args, registers: int = 255, **meta) -> None:
    """Start one program a row (or problem) on the device of `near`; none of them is no launch."""
    if near.is_cuda and not torch.version.hip:  # told no limit, ptxas spills a few bytes to fit more programs on an SM
        meta["maxnreg"] = registers
    with torch.cuda.device(near.device) if near.is_cuda else contextlib.nullcontext():
        if programs:
            kernel[(programs,)](*args, **meta)
