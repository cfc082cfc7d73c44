"""The tiny student and teachers of a task family, from nothing: the models that every script's default starts from.

Plain supervised training on demonstrations of TRAINING problems only; the held-out ones are never seen. Same seed,
same weights, bit for bit; a killed call goes on from its last checkpoint when repeated with --resume. A student is
stopped early, at a loss and not at a step, since seeds differ in when they learn; and its learning rate is decayed to
0 by then, since an undecayed start flatters every method that lowers the rate. An expert starts from its family's
student and sees one domain only.

Weights are saved in bfloat16 and measured as saved. One tokenizer serves all families: a token per character.

Run: python scripts/pretrain_tiny.py addition            (about 4 minutes on one core; arithmetic: 2 minutes)
"""

import json
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.common.cli import cli, require, writable
from posttrain.common.engines.hf import HFEngine
from posttrain.common.environments.episodes import Episodes, demonstrated
from posttrain.common.machines.weights import save_model
from posttrain.common.models import TINY, load_model, load_tokenizer
from posttrain.common.rollout import Sampling, encode, seed_of, written
from posttrain.common.run import versions, write_atomically
from posttrain.common.scoring import token_logps
from posttrain.common.tasks import CORRECT, make_task
from posttrain.common.training import evaluate


@dataclass(frozen=True)
class Recipe:
    """One model: which demonstrations, how many, how large."""

    task: str
    max_new_tokens: int  # longest response, for the measurement
    decay_below: float  # running mean of the loss, nats a token, at which the learning rate starts to fall to 0
    decay_steps: int  # over so many steps, which end the training
    batch: int = 64  # problems a step
    start: str = ""  # model of the family to go on from; empty = from nothing
    domain: str = ""  # train on this one only
    high_first: float = 0.65  # fraction of demonstrations in the first of the task's two orders
    lr: float = 2e-3  # peak, after 20 steps of warm-up
    width: int = 96
    layers: int = 3
    heads: int = 4  # of 32
    max_turns: int = 1  # of an episode, for the measurement


MAX_STEPS = 6000  # more than any recipe takes
# Useful, imperfect, and with another taste in orders than the student: what calibration is for.
EXPERT = {"task": "arithmetic", "max_new_tokens": 20, "decay_below": 9.0}  # decays from the start
EXPERT |= {"start": "arithmetic-student", "high_first": 0.4, "batch": 128}  # half of a batch is of the domain
CHAIN = {"max_new_tokens": 120, "max_turns": 10, "width": 64}
LOOKUP = {"max_new_tokens": 6, "batch": 128, "lr": 3e-3, "width": 64, "layers": 2}
LOOKUP |= {"decay_below": 9.0, "decay_steps": 750}  # from the start
STEPS = {"max_new_tokens": 5, "batch": 128, "width": 64, "layers": 2}
FAMILIES = {
    "addition": {
        "addition-student": Recipe("addition", max_new_tokens=20, decay_below=0.5, decay_steps=150),
        "addition-teacher": Recipe("addition", max_new_tokens=20, decay_below=0.08, decay_steps=800),
    },
    "arithmetic": {
        "arithmetic-student": Recipe("arithmetic", max_new_tokens=20, decay_below=0.34, decay_steps=150),
        "arithmetic-add-teacher": Recipe(**EXPERT, domain="add", decay_steps=200),
        "arithmetic-mul-teacher": Recipe(**EXPERT, domain="mul", decay_steps=500),
    },
    "chain": {  # only the student has ever seen a call fail
        "chain-student": Recipe("chain:shown_fault=0.12", **CHAIN, decay_below=0.6, decay_steps=50),
        "chain-teacher": Recipe("chain", **CHAIN, decay_below=0.03, decay_steps=200),
    },
    "lookup": {
        "lookup-student": Recipe("lookup:shown_hints=0.5", **LOOKUP),
        "lookup-doubter": Recipe("lookup:shown_hints=0.5,trust=0.7", **LOOKUP),
    },
    "sokoban": {  # decays from the start
        "sokoban-student": Recipe(
            "sokoban:levels=0,shown_skills=0.5",
            max_new_tokens=36,
            max_turns=12,
            lr=3e-3,
            decay_below=9.0,
            decay_steps=2000,
            width=64,
        ),
    },
    "steps": {
        "steps-student": Recipe("steps:lessons=sure", **STEPS, decay_below=9.0, decay_steps=700),  # from the start
        "steps-guesser": Recipe("steps:lessons=guess", **STEPS, decay_below=0.32, decay_steps=200),
    },
}


@dataclass
class Config:
    family: Annotated[str, tyro.conf.Positional]  # addition, arithmetic, chain, lookup, sokoban or steps
    seed: int = 0  # of weights and data
    out: str = str(TINY)  # folder that receives one folder a model
    save_every: int = 100  # steps between checkpoints
    resume: bool = False  # go on from the last checkpoint
    max_steps: int = 0  # stop every recipe after so many steps, to try things out elsewhere; 0 = the recipe's own
    problems: int = 256  # held-out problems of the measurement, 8 samples each


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character and the newline; a chat template that only joins the messages."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Qwen3 with heads of 32, which vLLM's kernels take as well."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=8 * recipe.width // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads // 2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.autocast_dtype = None
    return model.eval()


def train(name: str, recipe: Recipe, config: Config, out: Path) -> tuple[Qwen3ForCausalLM, int]:
    """Supervised training, continued from out/NAME.pt if asked."""
    tokenizer, task = make_tokenizer(), make_task(recipe.task)
    task.high_first = recipe.high_first
    torch.manual_seed(seed_of(config.seed))
    model = load_model(str(out / recipe.start), torch.device("cpu")) if recipe.start else make_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint, end = out / f"{name}.pt", config.max_steps or MAX_STEPS
    made_by = {"recipe": asdict(recipe), "seed": config.seed}
    state = {"step": 0, "loss": 5.0, "decay_from": MAX_STEPS, "made_by": made_by}
    if config.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        require(
            state["made_by"] == made_by, f"{checkpoint} is of another seed or recipe; remove it or leave out --resume"
        )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(desc=name, initial=state["step"], total=end, unit=" steps")
    while state["step"] < min(end, state["decay_from"] + recipe.decay_steps):
        step = state["step"]
        problems = task.draw(recipe.batch, config.seed, step, 0)
        problems = [example for example in problems if recipe.domain in ("", example.fields.get("domain"))]
        rng = random.Random(seed_of(config.seed, step, 1))
        shown = [task.demonstrate(problem, rng) for problem in problems]
        if recipe.max_turns > 1:
            batch = demonstrated(tokenizer, [encode(tokenizer, problem.prompt) for problem in problems], shown)
        else:
            batch = written(tokenizer, problems, shown)
        logps, _ = token_logps(model, batch)
        loss = -logps.sum() / batch.loss_mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        left = 1 - max(0, step - state["decay_from"]) / recipe.decay_steps
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / 20, left)
        optimizer.step()
        optimizer.zero_grad()
        state["step"], state["loss"] = step + 1, 0.95 * state["loss"] + 0.05 * loss.item()
        if state["loss"] < recipe.decay_below:
            state["decay_from"] = min(state["decay_from"], step + 1)
        bar.update()
        bar.set_postfix_str(f"loss {state['loss']:.3f}")
        if (step + 1) % config.save_every == 0:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | parts, checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)
    bar.close()
    return model, state["step"]


def main(config: Config) -> None:
    require(config.family in FAMILIES, f"family {config.family!r} is not known; choose from {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    out, given = Path(config.out), {key: getattr(config, key) for key in ("seed", "max_steps", "problems")}
    other = " ".join(f"--{k.replace('_', '-')} {x}" for k, x in given.items() if x != getattr(Config, k))
    command = f"python scripts/pretrain_tiny.py {config.family} {other or '--seed 0'}"
    if out.resolve() == TINY.resolve():
        require(not other, f"{other} would replace the shipped models by others: name a folder by --out")
    else:
        held = next((out / name for name in FAMILIES[config.family] if (out / name).exists()), None)
        require(config.resume or not held, f"{held} exists: add --resume to go on, or choose another --out")
    writable(out, "choose another --out", make=True)
    for name, recipe in FAMILIES[config.family].items():
        record = out / name / "training.json"
        if config.resume and record.exists():  # finished before the call was stopped
            made_by = json.loads(record.read_text())["command"]
            require(made_by == command, f"{out / name} was made by {made_by}: choose another --out")
            continue
        model, steps = train(name, recipe, config, out)
        save_model(model.to(torch.bfloat16), make_tokenizer(), out / name)
        path, task = str(out / name), make_task(recipe.task)
        engine = HFEngine(load_model(path, torch.device("cpu")), load_tokenizer(path))
        engine = Episodes(engine, task.environment, recipe.max_turns) if recipe.max_turns > 1 else engine
        figures, rollout = evaluate(
            engine, task, task.heldout(config.problems), 8, Sampling(1.0, recipe.max_new_tokens), seed=0, by="domain"
        )
        figures |= {"parameters": sum(p.numel() for p in engine.model.parameters())}
        told, system = task.heldout(config.problems), None  # what else the model can read
        if hasattr(task, "second_prompt"):  # a critique of its greedy answer, where that is wrong
            first = engine.generate(told, 1, Sampling(0.0, recipe.max_new_tokens), key=(0,)).texts
            wrong = [(e, text) for e, text in zip(told, first, strict=True) if task.grade(e, text) < CORRECT]
            told = [replace(e, prompt=task.second_prompt(e, text, task.critique(e, text))) for e, text in wrong]
        elif hasattr(task, "privileged"):
            system = [task.privileged(e, "full") for e in told]
        elif hasattr(task, "oracle"):  # the skill of a shortest solution
            system = [task.skill_text(task.oracle(e)) for e in told]
        else:
            told = []
        if system:
            system = [{"role": "system", "content": text} for text in system]
            told = [replace(e, prompt=[message, *e.prompt]) for e, message in zip(told, system, strict=True)]
        if told:
            figures["told"] = evaluate(engine, task, told, 8, Sampling(1.0, recipe.max_new_tokens), seed=0)[0]
        if hasattr(task, "route"):
            correct = [
                task.route(text) for text, reward in zip(rollout.texts, rollout.reward, strict=True) if reward == 1
            ]
            figures["route_high"] = correct.count("high") / max(1, len(correct))
        facts = {"command": command, "recipe": asdict(recipe), "steps": steps, **figures, "versions": versions()}
        write_atomically(record, json.dumps(facts, indent=1) + "\n")
        (out / f"{name}.pt").unlink(missing_ok=True)
        print(
            f"{name}, {figures['parameters'] / 1e6:.2f}M parameters, {steps} steps; on {config.problems} problems: "
            f"Avg@8 {figures['eval/accuracy']:.3f}, Pass@8 {figures['eval/pass_at_k']:.3f}, "
            f"greedy {figures['eval/greedy']:.3f}"
        )


if __name__ == "__main__":
    cli(main, Config)
