"""Our sampling loop against transformers' own `model.generate`, same model, prompts and numbers of tokens, same run.

Both sample at temperature 1 with a key-value cache. Ours also returns the log-prob of every sampled token, which
`generate` does not; its own way to them, keeping every step's logits, is timed as a third line. The runs take turns;
a ratio above 1 means that ours is faster.

Run: python scripts/bench_rollout.py                                   (the tiny student)
     python scripts/bench_rollout.py --model models/SmolLM2-135M-Instruct --task reasoning_gym:chain_sum --prompts 4
"""

import json
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from posttrain.common.cli import cli
from posttrain.common.engines.hf import HFEngine
from posttrain.common.models import load_model, load_tokenizer, prepare
from posttrain.common.rollout import Sampling, encode
from posttrain.common.tasks import make_task


@dataclass
class Config:
    model: str = "addition-student"  # folder, hub name, or a built-in tiny model
    task: str = "addition"  # whose held-out prompts are answered
    prompts: int = 16  # P
    group_size: int = 8  # G
    max_new_tokens: int = 20  # L_max
    repeats: int = 7  # timed turns of each, after one that is not counted
    seed: int = 0  # of sampling
    device: str = "auto"  # auto, cpu, cuda, ...
    threads: int = 0  # CPU threads; 0 = one for tiny models, torch's choice otherwise
    out: str = ""  # write the figures as JSON


def main(config: Config) -> None:
    device = prepare(config)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, device, train=False)
    engine = HFEngine(model, tokenizer)
    problems = make_task(config.task).heldout(config.prompts)
    prompts = [encode(tokenizer, example.prompt) for example in problems]
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    stop = {"eos_token_id": engine.stop_ids, "pad_token_id": tokenizer.pad_token_id}
    plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "num_return_sequences": config.group_size, **stop}
    with_logps = {**plain, "output_logits": True, "return_dict_in_generate": True}
    seconds: dict[str, list[float]] = {"ours, with log-probs": [], "generate": [], "generate, with log-probs": []}
    tokens: dict[str, int] = dict.fromkeys(seconds, 0)

    def generate(**kwargs) -> int:
        out = model.generate(**padded, max_new_tokens=config.max_new_tokens, **kwargs)
        ids = out if torch.is_tensor(out) else out.sequences
        if not torch.is_tensor(out):
            logps = torch.stack(out.logits, 1).float().log_softmax(-1)
            logps.gather(-1, ids[:, padded["input_ids"].shape[1] :, None])
        ends = torch.isin(ids[:, padded["input_ids"].shape[1] :], torch.tensor(engine.stop_ids, device=device))
        return int((ends.cumsum(1) - ends.long() == 0).sum())  # up to and with the first stop token

    for turn in range(config.repeats + 1):
        torch.manual_seed(config.seed + turn)
        works = (
            lambda t=turn: int(
                engine.generate(problems, config.group_size, Sampling(1.0, config.max_new_tokens), (config.seed, t))
                .loss_mask.sum()
            ),
            lambda: generate(**plain),
            lambda: generate(**with_logps),
        )  # fmt: skip
        for name, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            tokens[name] += work()
            seconds[name].append(time.perf_counter() - start)
    table = Table(
        title=f"{config.model}: {config.prompts} x {config.group_size} responses, up to {config.max_new_tokens} tokens"
    )
    for column in ("", "median s", "min", "max", "sampled tokens a turn", "ours is faster by"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(seconds["ours, with log-probs"][1:])
    results = {}
    for name, timed in seconds.items():
        median = statistics.median(timed[1:])
        results[name] = {"median": median, "min": min(timed[1:]), "max": max(timed[1:]), "ratio": median / ours}
        table.add_row(name, f"{median:.3f}", f"{min(timed[1:]):.3f}", f"{max(timed[1:]):.3f}",
                      f"{tokens[name] / len(timed):.0f}", f"{median / ours:.2f}x")  # fmt: skip
    Console().print(table)
    if config.out:
        with open(config.out, "w") as file:
            json.dump({"config": vars(config), "results": results}, file, indent=1)


if __name__ == "__main__":
    cli(main, Config)
