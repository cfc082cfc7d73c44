"""Multi-turn episodes: the policy writes, an environment answers, and so on, all episodes of a batch together.

    tokens       p p < 3 * 5 > ( 1 5 ) = 1 5 ; .      prompt "pp", a call, its result, the answer, padding
    loss_mask    0 0 1 1 1 1 1 0 0 0 0 1 1 1 1 0      only what the policy sampled
    turn        -1-1 0 0 0 0 0-1-1-1-1 1 1 1 1-1

Token ids flow from the sampler to the loss: text is decoded for the environment, and never encoded again. What ends a
turn belongs to the policy; the observation and, for chat models, the next turn's header belong to the environment.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import transformers
from jinja2 import TemplateError
from torch import Tensor

from posttrain.common.cli import UserError, first_line, require
from posttrain.common.engines.hf import Memory
from posttrain.common.machines import distributed
from posttrain.common.models import device_of
from posttrain.common.rollout import Rollout, Sampling, assemble, encode, seed_of, to_device
from posttrain.common.tasks import Example


class Step(NamedTuple):
    """What an environment says to one turn. A user's may be a shorter tuple."""

    observation: str = ""  # for the model to read next
    done: bool = False  # the episode is over
    reward: float = 0.0  # of the whole episode, if it ends here
    failed: bool = False  # this turn's call or action did


class Environment:
    """One episode. A class of one's own needs the two methods only."""

    stops: tuple[str, ...] = ()  # texts that end a turn, besides the end token
    turn_tokens: int = 0  # the most tokens of one turn; 0 = no such limit
    role: str = "user"  # in whose name a chat template shows observations

    def reset(self, example: Example) -> str | list[dict[str, str]]:
        """The prompt."""
        raise NotImplementedError

    def step(self, text: str) -> Step:
        """The answer to what the policy wrote, its end token left out."""
        raise NotImplementedError


@dataclass
class Turn:
    text: str
    observation: str = ""
    failed: bool = False


@dataclass
class Episode:
    turns: list[Turn] = field(default_factory=list)
    ending: Literal["done", "turns", "tokens", "time"] = "done"  # by the environment, or which limit was met


@dataclass
class Row:
    """An episode while it is played."""

    environment: Any
    example: Example
    ids: list[int]  # prompt and all that followed
    noise: Tensor  # one number in [0, 1) for each token that may follow
    turns: list[int] = field(default_factory=list)  # of each id behind the prompt: the turn that wrote it, or -1
    logps: list[float] = field(default_factory=list)
    episode: Episode = field(default_factory=Episode)
    reward: float = 0.0

    def append(self, ids: list[int], logps: list[float], turn: int) -> None:
        self.ids += ids
        self.logps += logps
        self.turns += [turn] * len(ids)


class Episodes:
    """An engine whose rollouts are whole episodes; called as the engine itself.

    make_environment(example, seed) -> Environment, one for each row. Raises UserError where one of its methods fails.
    """

    def __init__(self, engine: Any, make_environment: Callable, max_turns: int, max_seconds: float = 0.0):
        self.engine, self.make_environment = engine, make_environment
        self.max_turns, self.max_seconds = max_turns, max_seconds  # of a batch of episodes; 0 = no limit
        self.model, self.tokenizer, self.stop_ids = engine.model, engine.tokenizer, engine.stop_ids
        self.pool = ThreadPoolExecutor(os.cpu_count())  # a tool may be a process that takes its time

    def openings(self, examples: list[Example]) -> list[list[dict[str, str]]]:
        """The prompts with which episodes of the examples begin."""
        return [first_prompt(guard(self.make_environment, example, 0), example) for example in examples]

    def generate(self, examples: list[Example], n: int, sampling: Sampling, key: tuple, starts: list = ()) -> Rollout:
        """n episodes of each example, or behind its ids in starts, with their rewards.

        sampling.max_new_tokens bounds all that follows a prompt, observations included. A row's noise depends on
        (key, row) only.
        """
        length, rows = sampling.max_new_tokens, []
        for i, example in enumerate(example for example in examples for _ in range(n)):
            seed = seed_of(*key, i)
            environment = guard(self.make_environment, example, seed)
            example = replace(example, prompt=first_prompt(environment, example))
            ids = list(starts[i // n]) if starts else encode(self.tokenizer, example.prompt)
            noise = torch.rand(2 * length, generator=torch.Generator().manual_seed(seed))
            rows.append(Row(environment, example, ids, noise))
        prompts = [list(row.ids) for row in rows]
        longest = self.engine.fit(prompts, length)
        per_batch = max(1, getattr(self.engine, "batch_tokens", len(rows) * longest) // longest)
        mine = rows[distributed.part(len(rows))]
        with self.engine.ready(), distributed.together():
            for at in range(0, len(mine), per_batch):
                self.play(mine[at : at + per_batch], sampling)
        # Environments stay here: one may not be fit to travel.
        rows = distributed.gather([replace(row, environment=None, noise=None) for row in mine])
        blocks = [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        rest = {"texts": self.tokenizer.batch_decode(blocks, skip_special_tokens=True)}
        rest |= {"group": torch.arange(len(rows)) // n, "reward": torch.tensor([row.reward for row in rows])}
        rest |= {"examples": [row.example for row in rows], "episodes": [row.episode for row in rows]}
        rest["finished"] = torch.tensor([episode.ending == "done" for episode in rest["episodes"]])
        logps, turns = [row.logps for row in rows], [row.turns for row in rows]
        rollout = assemble(prompts, blocks, self.tokenizer.pad_token_id, logps, turns, **rest)
        return to_device(rollout, device_of(self.model))

    def play(self, rows: list[Row], sampling: Sampling) -> None:
        """Turn by turn until the last episode has ended."""
        began, memory = time.monotonic(), Memory()
        for turn in range(self.max_turns):
            left = [sampling.max_new_tokens - len(row.turns) for row in rows]
            caps = [getattr(row.environment, "turn_tokens", 0) or math.inf for row in rows]
            limits = list(map(min, left, caps))
            u = torch.stack([row.noise[len(row.turns) :][: max(limits)] for row in rows])
            stops = tuple(sorted({stop for row in rows for stop in getattr(row.environment, "stops", ())}))
            contexts = [row.ids for row in rows]
            ids, logps = self.engine.complete(contexts, u, sampling, stops, limits, memory)
            late = self.max_seconds and time.monotonic() - began > self.max_seconds

            def answer(i: int, rows=rows, ids=ids, logps=logps, left=left, caps=caps, turn=turn, late=late) -> bool:
                """Append the turn and the environment's answer to row i. -> whether its episode goes on"""
                row, room = rows[i], left[i] - len(ids[i])
                row.append(ids[i], logps[i], turn)
                last = self.tokenizer.decode(ids[i][-1:]) if ids[i][-1:] and ids[i][-1] in self.stop_ids else ""
                text = self.tokenizer.decode(ids[i]).removesuffix(last)
                ended = last or len(ids[i]) == caps[i] or any(stop in text for stop in stops)
                if room == 0 and not ended:
                    row.episode.turns.append(Turn(text))  # cut inside a turn: no tool is run
                    row.episode.ending = "tokens"
                    return False
                step = checked_step(row.environment, text)
                row.episode.turns.append(Turn(text, step.observation, step.failed))
                row.reward = step.reward
                ids_back = reply(self.tokenizer, step.observation, getattr(row.environment, "role", "user"), last)
                limits = {"done": step.done, "turns": turn + 1 == self.max_turns, "time": late}
                met = [name for name, here in {**limits, "tokens": len(ids_back) >= room}.items() if here]
                if met:
                    row.episode.ending = met[0]
                    return False
                row.append(list(ids_back), [0.0] * len(ids_back), -1)
                return True

            going = [i for i, on in enumerate(self.pool.map(answer, range(len(rows)))) if on]
            if not going:
                return
            if len(going) < len(rows):
                memory.keep(going)
            rows = [rows[i] for i in going]


def guard(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) of an environment, whose failures become one line."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        where = getattr(function, "__qualname__", "method")
        raise UserError(f"the environment's {where} failed ({type(error).__name__}: {first_line(error)})") from None


def first_prompt(environment: Any, example: Example) -> list[dict[str, str]]:
    """What reset returns, as chat messages."""
    said = guard(environment.reset, example)
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    fits = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    fits = fits and any(m["content"] for m in messages) and all(isinstance(m["content"], str) for m in messages)
    require(fits, f"the environment's reset must return a text or chat messages, not {said!r:.80}")
    return messages


def checked_step(environment: Any, text: str) -> Step:
    """What step returns, filled up."""
    said = guard(environment.step, text)
    try:
        observation, done, reward, failed = Step(*said)
        step = Step(observation, bool(done), float(reward), bool(failed))
    except (TypeError, ValueError):
        step = None
    fits = step and isinstance(said, tuple) and isinstance(step.observation, str)
    require(fits, f"the environment's step must return (observation text, done, reward), not {said!r:.80}")
    return step


@lru_cache(2**14)
def reply(tokenizer: "transformers.PreTrainedTokenizerBase", observation: str, role: str, last: str) -> tuple[int, ...]:
    """Ids of an observation and of the next turn's header, as the chat template puts them behind a turn.

    last: the end token that the model wrote itself, which the template would write once more.
    """
    text, mark = observation, "the model's turn"
    if tokenizer.chat_template:
        role = role if role in str(tokenizer.chat_template) else "user"  # not every template knows tools
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": mark}]
        turns.append({"role": role, "content": observation})
        try:
            whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # such as Mistral's, whose tools answer to a call's id
            require(role != "user", f"the chat template cannot show an observation ({first_line(error)})")
            return reply(tokenizer, observation, "user", last)
        text = whole.partition(mark)[2].removeprefix(last)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def demonstrated(
    tokenizer: "transformers.PreTrainedTokenizerBase", prompts: list[list[int]], episodes: list[list[tuple]]
) -> Rollout:
    """Episodes that nobody sampled, each a list of (the model's text, the observation), as a Rollout of plain text."""
    blocks, turns = [], []
    for episode in episodes:
        texts = [(text, k if i == 0 else -1) for k, pair in enumerate(episode) for i, text in enumerate(pair)]
        ids = [(tokenizer(text, add_special_tokens=False)["input_ids"], turn) for text, turn in texts]
        blocks.append([token for part, _ in ids for token in part])
        turns.append([turn for part, turn in ids for _ in part])
    require(all(blocks), "a demonstration is empty")
    return assemble(prompts, blocks, tokenizer.pad_token_id, turns=turns)
