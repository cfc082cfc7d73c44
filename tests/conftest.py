"""Makes `posttrain` importable as the scripts do; torch runs on one thread, as it does for the tiny default."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "methods"))
import posttrain  # noqa: E402, F401

sys.path.remove(str(ROOT / "methods"))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
os.environ["TRITON_INTERPRET"] = "1"  # @triton.jit looks at it while kernels/ is imported; without effect on torch

import torch  # noqa: E402

torch.set_num_threads(1)
