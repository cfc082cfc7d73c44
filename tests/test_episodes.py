"""Multi-turn episodes: masks token by token, the engine's memory, endings, chat templates, environments and tools.

The forced policy is a real engine whose tokens a function of the text so far decides: its noise holds the ids, and its
log-probs are the model's own.
"""

import itertools
import json
import math
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.common.cli import UserError
from posttrain.common.engines import hf as hf_module
from posttrain.common.engines.hf import HFEngine, Memory, sample_tokens
from posttrain.common.environments import episodes as module
from posttrain.common.environments.episodes import Environment, Episodes, Step, demonstrated, reply
from posttrain.common.environments.tools import ToolUse, make_environment
from posttrain.common.families.chain import Chain
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import Sampling, concat, encode, under_prompts
from posttrain.common.scoring import carry, score
from posttrain.common.tasks import Example, make_task
from posttrain.common.training import evaluate

CPU = torch.device("cpu")
ECHO = """
class Echo:
    stops = ("=", "+")
    turn_tokens = 5

    def __init__(self):
        self.said = []

    def reset(self, example):
        self.number = sum(map(ord, example.prompt[-1]["content"]))
        return example.prompt[-1]["content"]

    def step(self, text):
        self.said.append(text)
        right = float(len("".join(self.said)) % 2)
        return "(" + text[-2:] * 2 + ")", len(self.said) > self.number % 5, right, "3" in text
"""


@pytest.fixture(scope="module")
def tiny():
    return load_model("addition-student", CPU), load_tokenizer("addition-student")


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    path = tmp_path_factory.mktemp("echo") / "echo.py"
    path.write_text(ECHO)
    return make_environment(f"{path}:Echo", None, "hermes")


def examples(*texts: str) -> list[Example]:
    return [Example([{"role": "user", "content": text}], "") for text in texts]


class Forced(HFEngine):
    """Writes what policy(text so far) says, encoded or as ids, then the end token for as long as it is asked."""

    policy, tails = None, ()

    def complete(self, contexts, u, *rest):
        ids = []
        for context in contexts:
            said = type(self).policy(self.tokenizer.decode(context))
            said = self.tokenizer(said, add_special_tokens=False)["input_ids"] if isinstance(said, str) else said
            ids.append([*said, *[self.stop_ids[0]] * u.shape[1]][: u.shape[1]])
        return super().complete(contexts, torch.tensor(ids, dtype=torch.float64), *rest)


@pytest.fixture
def forced(tiny, monkeypatch):
    """forced(policy, environment, ...) -> Episodes that play it."""

    def scripted(logits, u, temperature, top_p=1.0):
        logps = (logits / temperature).log_softmax(-1)
        return u.long(), logps.gather(-1, u.long()[:, None])[:, 0]

    def make(policy, environment, max_turns=10, max_seconds=0.0, tokenizer=None, model=None, batch_tokens=2**16):
        monkeypatch.setattr(hf_module, "sample_tokens", scripted)
        engine = type("Forced", (Forced,), {"policy": staticmethod(policy)})
        engine = engine(model or tiny[0], tokenizer or tiny[1], batch_tokens)
        return Episodes(engine, environment, max_turns, max_seconds)

    return make


class Says(Environment):
    """Answers turn k with the k-th of its steps."""

    stops = (";",)

    def __init__(self, *steps, prompt="q?", **more):
        self.steps, self.prompt, self.heard = list(steps), prompt, []
        vars(self).update(more)

    def reset(self, example):
        return self.prompt

    def step(self, text):
        self.heard.append(text)
        return self.steps.pop(0)


def oracle(text: str) -> str:
    """The right next call of the chain task, or the answer; a failed call is made again."""
    question, _, rest = text.partition("?")
    start, *parts = re.findall(r"\d+|[+*-]\d", question)
    results = re.findall(r"\((\d+)\)", rest)
    value = results[-1] if results else start
    return f"<{value}{parts[len(results)]}>" if len(results) < len(parts) else f"={value};"


def text_of(tokenizer, rollout, i):
    """The row's real tokens as characters, <eos> as $."""
    ids = rollout.tokens[i][rollout.attention_mask[i] > 0].tolist()
    return "".join("$" if x == tokenizer.eos_token_id else tokenizer.decode([x]) for x in ids)


def marks(rollout, i):
    """Each real token's turn as a digit, - where the policy did not write it."""
    return "".join("-" if k < 0 else str(k) for k in rollout.turn[i][rollout.attention_mask[i] > 0].tolist())


# --- the layout


def test_masks_of_a_written_out_episode_token_by_token(forced, tiny):
    """The second prompt is shorter, its third call malformed, its answer wrong and closed by the end token."""

    def policy(text):
        return oracle(text) if text.startswith("35") else next(others)

    others = iter(["<9+1>", "<10-5*>", "=12"])
    problems = [Example([{"role": "user", "content": t}], a) for t, a in (("35*6-7?", "3"), ("9+1-5?", "5"))]
    episodes = forced(policy, lambda example, seed: Chain("chain", fault=0.0).environment(example, 3))
    r = episodes.generate(problems, 1, Sampling(1.0, 60), (0, 0))
    fail = r.episodes[1].turns[1].observation
    assert fail[:2] == "(X" and fail[-1] == ")" and len(fail) == 13
    #                                  35*6-7?<35*6>(10)<10-7>(3)=3;
    assert text_of(tiny[1], r, 0) == "35*6-7?<35*6>(10)<10-7>(3)=3;"
    assert marks(r, 0) == "-------000000----111111---222"
    assert text_of(tiny[1], r, 1) == f"9+1-5?<9+1>(10)<10-5*>{fail}=12$"
    assert marks(r, 1) == "------00000----1111111" + "-" * 13 + "2222"
    assert torch.equal(r.loss_mask, (r.turn >= 0).float())
    for i in range(2):
        n = len(marks(r, i))
        assert r.attention_mask[i].tolist() == [1.0] * n + [0.0] * (r.tokens.shape[1] - n)
        assert (r.turn[i, n:] == -1).all() and (r.tokens[i, n:] == tiny[1].pad_token_id).all()
        assert r.texts[i] == text_of(tiny[1], r, i)[len(problems[i].prompt[0]["content"]) :].rstrip("$")
    assert r.reward.tolist() == [1.0, 0.0] and r.finished.tolist() == [True, True] and r.group.tolist() == [0, 1]
    assert [turn.text for turn in r.episodes[1].turns] == ["<9+1>", "<10-5*>", "=12"]
    assert [turn.observation for turn in r.episodes[0].turns] == ["(10)", "(3)", ""]
    assert [turn.failed for turn in r.episodes[1].turns] == [False, True, False]
    assert [episode.ending for episode in r.episodes] == ["done", "done"]
    assert not r.behaviour_logps[r.loss_mask == 0].any() and (r.behaviour_logps[r.loss_mask > 0] < 0).all()
    assert r.tokens.dtype == r.turn.dtype == torch.int64 and r.behaviour_logps.dtype == torch.float32


def test_reset_may_give_another_prompt_and_the_rollout_keeps_that(forced, tiny):
    r = forced(lambda text: "a;", lambda e, s: Says(Step(done=True), prompt=f"new{e.answer}?")).generate(
        [Example([{"role": "user", "content": "old"}], "7")], 2, Sampling(1.0, 9), (0,)
    )
    assert text_of(tiny[1], r, 0) == text_of(tiny[1], r, 1) == "new7?a;" and r.group.tolist() == [0, 0]
    assert r.examples[0].prompt == [{"role": "user", "content": "new7?"}] and r.examples[0].answer == "7"
    started = forced(lambda text: "a;", lambda e, s: Says(Step(done=True))).generate(
        examples("x", "y"), 2, Sampling(1.0, 9), (0,), starts=[[20, 21], [22]]
    )
    assert [text_of(tiny[1], started, i) for i in range(4)] == ["12a;", "12a;", "3a;", "3a;"]


def test_reward_is_that_of_the_last_step_and_a_users_tuple_may_be_short(forced):
    cases = [
        ([("x", False, 0.25), ("", True, 0.75)], 0.75, "done"),
        ([("x",), ("", True)], 0.0, "done"),
        ([("x", False, 1.0), ("y", False, -0.5), ("z", False, 0.5, True)], 0.5, "turns"),
    ]
    for steps, reward, ending in cases:
        r = forced(lambda text: "a;", lambda e, s, steps=steps: Says(*steps), max_turns=3).generate(
            examples("q"), 1, Sampling(1.0, 40), (0,)
        )
        assert r.reward.tolist() == [reward] and r.episodes[0].ending == ending
        assert r.finished.tolist() == [ending == "done"]
        assert r.episodes[0].turns[-1].failed == (ending == "turns")


def test_ids_are_never_encoded_again(forced, tiny):
    """The policy writes a and b, whose text alone would be one token; a second id for the same text stays itself."""
    vocab = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4, ";": 5, "q": 6, "c": 7, "d": 8, "e": 9, "f": 10}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab, [("a", "b")])), eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    assert tokenizer("ab")["input_ids"] == [4]
    turns = iter([[2, 3, 5], [4, 2, 3, 1]])
    r = forced(
        lambda text: next(turns), lambda e, s: Says(("ab",), ("", True), prompt="qab"), tokenizer=tokenizer
    ).generate(examples("q"), 1, Sampling(1.0, 30), (0,))
    assert r.tokens.tolist() == [[6, 4, 2, 3, 5, 4, 4, 2, 3, 1]] and marks(r, 0) == "--000-1111"
    assert [turn.text for turn in r.episodes[0].turns] == ["ab;", "abab"]


# --- endings


def play(forced, turns, steps, budget=40, max_turns=5, **more):
    """-> episode, its text behind the prompt, what the environment heard, the rollout."""
    said, made = iter(turns), []

    def environment(example, seed):
        made.append(Says(*steps, **more))
        return made[-1]

    episodes = forced(lambda text: next(said), environment, max_turns=max_turns)
    r = episodes.generate(examples("q"), 1, Sampling(1.0, budget), (0,))
    return r.episodes[0], text_of(episodes.tokenizer, r, 0)[2:], made[0].heard, r


GO = Step("12", reward=0.5)


def test_ending_done_wins_over_every_limit_met_at_the_same_turn(forced):
    episode, text, heard, r = play(forced, ["ab;"], [Step("12", True, 1.0)], budget=3, max_turns=1)
    assert (episode.ending, text, heard) == ("done", "ab;", ["ab;"]) and r.finished.all() and r.reward.item() == 1
    assert episode.turns[0].observation == "12", "kept for the transcript, not shown to the model"


def test_ending_turns(forced):
    episode, text, heard, r = play(forced, ["ab;", "c;"], [GO, GO], max_turns=2)
    assert (episode.ending, text, heard) == ("turns", "ab;12c;", ["ab;", "c;"])
    assert not r.finished.any() and r.reward.item() == 0.5


def test_ending_tokens_cut_inside_a_turn_runs_no_tool(forced):
    episode, text, heard, r = play(forced, ["ab;", "cdef;"], [GO, Step(done=True, reward=1.0)], budget=8)
    assert (episode.ending, text, heard) == ("tokens", "ab;12cde", ["ab;"])
    assert [(turn.text, turn.observation, turn.failed) for turn in episode.turns] == [
        ("ab;", "12", False), ("cde", "", False),
    ]  # fmt: skip
    assert not r.finished.any() and r.reward.item() == 0.5 and marks(r, 0) == "--000--111"


def test_ending_tokens_cut_inside_the_first_turn_runs_no_tool_either(forced):
    """With no limit on a turn of its own, the first turn may take the whole budget."""
    episode, text, heard, r = play(forced, ["abcdef;"], [Step(done=True, reward=1.0)], budget=5)
    assert (episode.ending, text, heard) == ("tokens", "abcde", []) and r.reward.item() == 0 and not r.finished.any()


def test_ending_tokens_because_the_observation_leaves_no_room(forced):
    for budget, fits in ((4, False), (5, False), (6, True)):  # ab; 12 and one more token
        episode, text, heard, r = play(forced, ["ab;", "c;"], [GO, GO], budget=budget)
        assert (episode.ending, text) == ("tokens", "ab;12c" if fits else "ab;")
        assert heard == ["ab;"] and r.reward.item() == 0.5 and episode.turns[0].observation == "12"


@pytest.mark.parametrize(("turn", "heard"), [("ab;", "ab;"), ("ab$", "ab"), ("abc", None)])
def test_a_turn_that_ends_with_the_last_token_of_the_budget_is_whole(turn, heard, forced, tiny):
    ids = tiny[1](turn.strip("$"))["input_ids"] + [tiny[1].eos_token_id] * turn.count("$")
    episode, _, was, r = play(forced, [ids], [Step(done=True, reward=1.0)], budget=3)
    assert was == ([heard] if heard else []) and r.reward.item() == float(heard is not None)
    assert episode.ending == ("done" if heard else "tokens")


def test_ending_time(forced, monkeypatch):
    """The clock is read at the start and after each turn's sampling: 0, 1, 2, ..."""
    for seconds, ending, turns in ((1.5, "time", 2), (0.0, "turns", 4), (30.0, "turns", 4)):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        episodes = forced(lambda text: "a;", lambda e, s: Says(GO, GO, GO, GO), max_turns=4, max_seconds=seconds)
        r = episodes.generate(examples("q", "r"), 1, Sampling(1.0, 60), (0,))
        assert [(e.ending, len(e.turns)) for e in r.episodes] == [(ending, turns)] * 2
        assert not r.finished.any() and r.reward.tolist() == [0.5, 0.5]


def test_turn_tokens_end_a_turn_and_hand_it_to_the_environment(forced):
    episode, text, heard, r = play(forced, ["abcdef;", "gh;"], [GO, Step(done=True)], turn_tokens=4)
    assert (episode.ending, text, heard) == ("done", "abcd12gh;", ["abcd", "gh;"]) and marks(r, 0) == "--0000--111"
    _, text, heard, _ = play(forced, ["abcd;", "e;"], [GO, Step(done=True)], budget=4, turn_tokens=4)
    assert heard == ["abcd"], "its own limit, and not the budget, ended it"


def test_rows_with_other_limits_of_a_turn_do_not_disturb_each_other(forced):
    kinds = iter([2, 5, 0])
    episodes = forced(
        lambda text: "abcdef;", lambda e, s: Says(GO, Step(done=True), turn_tokens=next(kinds)), max_turns=2
    )
    r = episodes.generate(examples("q", "q", "q"), 1, Sampling(1.0, 40), (0,))
    assert [e.turns[0].text for e in r.episodes] == ["ab", "abcde", "abcdef;"]
    assert [marks(r, i) for i in range(3)] == ["--00--11", "--00000--11111", "--0000000--1111111"]


# --- stops


def test_a_stop_of_several_tokens_ends_the_turn_at_its_last(forced, tiny):
    stop = "</tool_call>"
    assert len(tiny[1](stop)["input_ids"]) == len(stop)
    turns = iter([f"a</tool{stop}bc", f"{stop}", "</tool_cal$", f"x{stop}"])
    environment = Says(GO, GO, GO, Step(done=True), stops=(stop, "never"), prompt="q" + stop)
    r = forced(lambda text: next(turns), lambda e, s: environment).generate(examples("q"), 1, Sampling(1.0, 90), (0,))
    assert environment.heard == [f"a</tool{stop}", stop, "</tool_cal$", f"x{stop}"]
    assert (
        r.episodes[0].ending == "done"
        and marks(r, 0)[13:] == "0" * 19 + "--" + "1" * 12 + "--" + "2" * 12 + "--" + "3" * 13
    )


def test_a_stop_inside_the_last_token_of_the_budget_ends_the_turn(forced, tiny):
    """A token may hold more than the stop's end."""
    vocab = {"<pad>": 0, "<eos>": 1, "a": 2, ";!": 3, "q": 4, "b": 5, "c": 6, "d": 7, "e": 8, "f": 9}
    base = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    base.pre_tokenizer, base.decoder = pre_tokenizers.Split(Regex(";!|."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>", pad_token="<pad>")
    for budget in (3, 20):
        environment = Says(Step(done=True, reward=1.0))
        r = forced(lambda text: [2, 2, 3, 2, 2], lambda e, s, x=environment: x, tokenizer=tokenizer).generate(
            examples("q"), 1, Sampling(1.0, budget), (0,)
        )
        assert environment.heard == ["aa;!"] and r.reward.item() == 1 and r.finished.all()


def test_stops_and_limits_of_complete(tiny, monkeypatch):
    monkeypatch.setattr(hf_module, "sample_tokens", lambda z, u, *rest: (u.long(), u.float() * 0))
    engine = HFEngine(*tiny)
    words = ["ab;cd", "abcde", "a<eos>"]
    u = torch.tensor([(tiny[1](word)["input_ids"] + [1] * 9)[:7] for word in words], dtype=torch.float64)
    contexts = [[20], [21, 22], [23]]
    ids, logps = engine.complete(contexts, u, Sampling(), (";",), [7, 3, 7])
    assert [tiny[1].decode(row) for row in ids] == ["ab;", "abc", "a<eos>"] and list(map(len, logps)) == [3, 3, 2]
    assert list(map(len, engine.complete(contexts, u, Sampling())[0])) == [6, 6, 2]
    ids, _ = engine.complete(contexts, u, Sampling(), ("c", "ab"), [1, 7, 7])
    assert [tiny[1].decode(row) for row in ids] == ["a", "ab", "a<eos>"]


# --- batches and memory


def random_qwen(seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=98, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, eos_token_id=[1, 30], pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.autocast_dtype = [1, 30], None  # as load_model leaves it
    return model


@pytest.fixture(scope="module", params=["tiny", "random"])
def model(request, tiny):
    return tiny[0] if request.param == "tiny" else random_qwen()


PROMPTS = examples("12+7=", "3+4", "99999+123456=", "1", "5+5=", "840+9=")


def assert_same_episodes(a, b, n=None):
    rows = range(n or len(a))
    for i in rows:
        assert a.tokens[i][a.attention_mask[i] > 0].tolist() == b.tokens[i][b.attention_mask[i] > 0].tolist()
        assert a.turn[i][a.attention_mask[i] > 0].tolist() == b.turn[i][b.attention_mask[i] > 0].tolist()
        x, y = (r.behaviour_logps[i][r.attention_mask[i] > 0] for r in (a, b))
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
        assert a.episodes[i] == b.episodes[i] and a.texts[i] == b.texts[i] and a.reward[i] == b.reward[i]
        assert a.finished[i] == b.finished[i] and a.group[i] == b.group[i]


def test_batched_episodes_equal_the_same_run_one_by_one_with_a_users_environment(model, tiny, echo):
    made = [Episodes(HFEngine(model, tiny[1], size), echo, 6) for size in (2**16, 1, 200)]
    whole, one, few = (e.generate(PROMPTS, 3, Sampling(1.0, 30), (4, 2)) for e in made)
    assert_same_episodes(whole, one)
    assert_same_episodes(whole, few)
    assert whole.turn.amax(1).unique().numel() > 2 and len({tuple(row.tolist()) for row in whole.tokens}) > 12
    first = made[0].generate(PROMPTS[:2], 3, Sampling(1.0, 30), (4, 2))
    assert_same_episodes(first, whole)
    other = made[0].generate(PROMPTS[:2], 3, Sampling(1.0, 30), (4, 3))
    assert first.texts != other.texts


def test_batched_episodes_equal_the_same_run_one_by_one_in_chain(forced):
    """A policy that answers rightly, so that rows end after three to twelve turns, with failures between."""
    task = Chain("chain", fault=0.3)
    problems = task.draw(5, 1)
    whole, one = (
        forced(oracle, task.environment, batch_tokens=size).generate(problems, 3, Sampling(1.0, 120), (7,))
        for size in (2**16, 1)
    )
    assert_same_episodes(whole, one)
    assert any(turn.failed for e in whole.episodes for turn in e.turns) and whole.turn.amax(1).unique().numel() > 2
    assert {e.ending for e in whole.episodes} >= {"done"} and whole.reward.sum() >= 8
    assert ((whole.reward == 1) == whole.finished).all()


def test_a_row_that_ends_early_does_not_disturb_the_others(tiny, echo):
    """Episodes of one prompt alone equal those beside prompts that take more or fewer turns."""
    engine = Episodes(HFEngine(*tiny), echo, 6)
    alone = engine.generate(PROMPTS[:1], 4, Sampling(1.0, 40), (9,))
    together = engine.generate([PROMPTS[0], *PROMPTS], 4, Sampling(1.0, 40), (9,))
    assert_same_episodes(alone, together, 4)


def test_the_engines_memory_changes_nothing_over_several_turns_with_rows_dropped(model, tiny):
    """Against complete without memory on the whole contexts."""
    engine, tokenizer = HFEngine(model, tiny[1]), tiny[1]
    g = torch.Generator().manual_seed(0)
    contexts = [encode(tokenizer, e.prompt) for e in PROMPTS for _ in range(2)]
    memory, lengths = Memory(), set()
    for turn, keep in enumerate([range(12), [0, 1, 3, 4, 7, 9, 11], [1, 2, 5], [2]]):
        if turn:
            memory.keep(list(keep))
            contexts = [contexts[i] for i in keep]
        u = torch.rand(len(contexts), 9, generator=g)
        limits = [9 - i % 3 * 2 for i in range(len(contexts))]
        before = [list(c) for c in contexts]
        ids, logps = engine.complete(contexts, u, Sampling(0.9), ("=", "9"), limits, memory)
        plain_ids, plain_logps = engine.complete(contexts, u, Sampling(0.9), ("=", "9"), limits)
        assert contexts == before and ids == plain_ids
        for x, y in zip(logps, plain_logps, strict=True):
            assert x == pytest.approx(y, abs=1e-4)
        assert all(1 <= len(row) <= limit for row, limit in zip(ids, limits, strict=True))
        lengths |= set(map(len, ids))
        extra = [
            torch.randint(19, 29, (int(n),), generator=g).tolist()
            for n in torch.randint(0, 6, (len(ids),), generator=g)
        ]
        contexts = [c + row + more for c, row, more in zip(contexts, ids, extra, strict=True)]
        known = memory.mask.sum(1).tolist()
        assert all(k < len(c) for k, c in zip(known, contexts, strict=True))
    assert len(lengths) > 2


def test_memory_reads_only_what_is_new(tiny, monkeypatch):
    engine, seen = HFEngine(*tiny), []
    forward = type(tiny[0]).forward

    def counted(self, input_ids=None, **rest):
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(tiny[0]), "forward", counted)
    memory, context = Memory(), encode(tiny[1], PROMPTS[2].prompt)
    ids, _ = engine.complete([context], torch.full((1, 4), 0.3), Sampling(), (), (), memory)
    seen.clear()
    engine.complete([context + ids[0] + [25, 26]], torch.full((1, 1), 0.3), Sampling(), (), (), memory)
    assert seen == [(1, 3)], "the last sampled token and the two that followed"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_trainers_scores_are_the_behaviour_log_probs_of_multi_turn_rows(model, tiny, echo, temperature):
    r = Episodes(HFEngine(model, tiny[1]), echo, 6).generate(PROMPTS, 3, Sampling(temperature, 40), (1, 1))
    logps, entropy = score(model, r, 150, temperature)
    assert r.turn.max() >= 3 and (r.loss_mask.sum(1) < r.attention_mask.sum(1) - 5).any()
    torch.testing.assert_close(logps, r.behaviour_logps, atol=1e-4, rtol=0)
    assert (entropy[r.loss_mask == 0] == 0).all()


def test_scores_of_a_chain_with_failures_are_the_behaviour_log_probs(forced, tiny):
    task = Chain("chain", fault=0.3)
    r = forced(oracle, task.environment).generate(task.draw(6, 2), 2, Sampling(1.0, 120), (3,))
    logps, _ = score(tiny[0], r, 400)
    torch.testing.assert_close(logps, r.behaviour_logps, atol=1e-4, rtol=0)
    assert r.behaviour_logps.min() < -1


def test_evaluation_takes_the_environments_rewards_and_splits_them_by_failure(tiny, echo):
    class Task:
        def grade(self, example, text):
            raise AssertionError("the environment has graded")

    engine = Episodes(HFEngine(*tiny), echo, 6)
    metrics, r = evaluate(engine, Task(), PROMPTS, 4, Sampling(1.0, 40), 3)
    failed = [any(turn.failed for turn in episode.turns) for episode in r.episodes]
    right = [reward == 1 for reward in r.reward.tolist()]
    both = list(zip(failed, right, strict=True))
    assert metrics["eval/accuracy"] == pytest.approx(sum(right) / 24) and 0 < sum(right) < 24 and 0 < sum(failed) < 24
    assert metrics["eval/failed_share"] == pytest.approx(sum(failed) / 24)
    assert metrics["eval/accuracy/with_failure"] == pytest.approx(sum(x and y for x, y in both) / sum(failed))
    assert metrics["eval/accuracy/without_failure"] == pytest.approx(sum(y > x for x, y in both) / (24 - sum(failed)))
    greedy = engine.generate(PROMPTS, 1, Sampling(0.0, 40), (3, 0, 2))
    assert metrics["eval/greedy"] == pytest.approx(greedy.reward.mean().item())


# --- other prompts


def test_multi_turn_rows_move_behind_another_prompt_as_one_block_and_values_come_back(tiny, echo):
    r = Episodes(HFEngine(*tiny), echo, 6).generate(PROMPTS, 2, Sampling(1.0, 30), (5,))
    hints = ["", "a longer hint: ", "h"] * 4
    prompts = [tiny[1](hint + e.prompt[-1]["content"])["input_ids"] for hint, e in zip(hints, r.examples, strict=True)]
    moved = under_prompts(r, prompts, tiny[1].pad_token_id)
    for i in range(len(r)):
        was, now = text_of(tiny[1], r, i), text_of(tiny[1], moved, i)
        assert now == hints[i] + was and marks(moved, i) == "-" * len(hints[i]) + marks(r, i)
    assert torch.equal(moved.loss_mask, (moved.turn >= 0).float()) and moved.episodes is r.episodes
    back = carry(moved.turn.float() + 1, moved, r)
    assert torch.equal(back, (r.turn + 1).float())
    same = under_prompts(r, [encode(tiny[1], e.prompt) for e in r.examples], tiny[1].pad_token_id)
    for name in ("tokens", "attention_mask", "loss_mask", "turn", "behaviour_logps"):
        assert torch.equal(getattr(same, name), getattr(r, name))
    scored = carry(score(tiny[0], moved, 500)[0], moved, r)
    plain_scored, hinted = score(tiny[0], r, 500)[0], [i for i, hint in enumerate(hints) if hint]
    unhinted = [i for i in range(len(r)) if i not in hinted]
    torch.testing.assert_close(scored[unhinted], plain_scored[unhinted], atol=1e-4, rtol=0)
    assert all((scored[i] - plain_scored[i]).abs().max() > 0.01 for i in hinted)


def test_rows_are_picked_and_joined_with_their_episodes(tiny, echo):
    engine = Episodes(HFEngine(*tiny), echo, 6)
    a, b = (engine.generate(PROMPTS[:2], 2, Sampling(1.0, n), (n,)) for n in (20, 30))
    picked = a[torch.tensor([2, 0])]
    assert picked.episodes == [a.episodes[2], a.episodes[0]]
    both = concat([a, b], tiny[1].pad_token_id)
    assert both.episodes == a.episodes + b.episodes and both.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [marks(both, 4 + i) for i in range(4)] == [marks(b, i) for i in range(4)]


# --- chat templates

CHATML = """{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}<|im_start|>system
S<|im_end|>
{% endif -%}
{%- if m.role == 'tool' -%}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else -%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def chat(template=CHATML, eos="<|im_end|>") -> PreTrainedTokenizerFast:
    """A character a token, and the marks of ChatML; ids stay below the tiny model's 98."""
    letters = [chr(i) for i in range(32, 127) if chr(i) not in "~`^|"]
    names = ["<pad>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n"]
    vocab = {token: i for i, token in enumerate([*names, *letters])}
    base = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    base.pre_tokenizer, base.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token=eos, pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>", "<|im_end|>"],
    )  # fmt: skip
    made.chat_template = template
    return made


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("end", ["<|im_end|>", ""], ids=["it wrote the end token", "it did not"])
def test_a_conversation_is_what_the_template_makes_of_it_as_a_whole(role, end, forced, tiny):
    tokenizer = chat()
    stop = "" if end else ";"
    turns = iter([f"one{stop}{end}", f"two{stop}{end}", f"x{stop}{end}"])
    environment = Says(("R1",), ("R2\nand more",), ("", True), prompt="Q?", role=role)
    r = forced(lambda text: next(turns), lambda e, s: environment, tokenizer=tokenizer).generate(
        examples("q"), 1, Sampling(1.0, 230), (0,)
    )
    messages = [{"role": "user", "content": "Q?"}]
    for said, back in (("one", "R1"), ("two", "R2\nand more")):
        messages += [{"role": "assistant", "content": said + stop}, {"role": role, "content": back}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = r.tokens[0][r.attention_mask[0] > 0].tolist()
    assert tokenizer.decode(ids) == whole + f"x{stop}{end}"
    assert environment.heard == [f"one{stop}", f"two{stop}", f"x{stop}"]
    assert ("<tool_response>" in whole) == (role == "tool")
    written = "".join(tokenizer.decode([x]) for x, k in zip(ids, r.turn[0].tolist(), strict=False) if k >= 0)
    assert written == f"one{stop}{end}two{stop}{end}x{stop}{end}", "all else is the environment's"


def test_a_second_end_token_that_the_template_does_not_write_stays_and_the_turn_is_closed():
    tokenizer = chat()
    back = tokenizer.decode(list(reply(tokenizer, "R", "user", "<|endoftext|>")))
    assert back == "<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(list(reply(tokenizer, "R", "user", "<|im_end|>"))) == back.removeprefix("<|im_end|>")


def test_a_template_without_tools_shows_observations_as_the_users():
    simple = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    simple += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    strict = "{% if messages[-1].role == 'tool' %}{{ raise_exception('an id') }}{% endif %}" + simple
    for template in (simple, strict):  # strict: as Mistral's, whose tools answer to the id of a call
        tokenizer = chat(template)
        back = tokenizer.decode(list(reply(tokenizer, "R", "tool", "")))
        assert back == "<|im_end|><|im_start|>user:R<|im_end|><|im_start|>"
    with pytest.raises(UserError, match="chat template"):
        reply(chat("{{ raise_exception('no') }}"), "R", "tool", "")


def test_without_a_template_an_observation_is_its_plain_text_and_may_be_empty(forced):
    tokenizer = chat(None)
    assert tokenizer.decode(list(reply(tokenizer, "R 2", "tool", "<|im_end|>"))) == "R 2"
    assert reply(tokenizer, "", "user", "") == ()
    _, text, heard, r = play(forced, ["a;", "b;"], [("",), ("", True)])
    assert text == "a;b;" and marks(r, 0) == "--0011" and heard == ["a;", "b;"], "two turns that touch stay two"


# --- demonstrations


def test_demonstrations_are_laid_out_like_episodes(tiny):
    episodes = [[("<3+4>", "(7)"), ("=7;", "")], [("=1;", "")]]
    r = demonstrated(tiny[1], [[20, 21], [22]], episodes)
    assert [text_of(tiny[1], r, i) for i in range(2)] == ["12<3+4>(7)=7;", "3=1;"]
    assert [marks(r, i) for i in range(2)] == ["--00000---111", "-000"]
    assert torch.equal(r.loss_mask, (r.turn >= 0).float())
    with pytest.raises(UserError, match="empty"):
        demonstrated(tiny[1], [[20]], [[("", "")]])


# --- the chain family


def test_chain_problems_are_worked_out_from_left_to_right_and_demonstrations_earn_the_reward(forced):
    task = Chain("chain", fault=0.0)
    problems = task.draw(40, 0) + task.heldout(20)
    for example in problems:
        question = example.prompt[-1]["content"]
        value, *parts = re.findall(r"\d+|[+*-]\d", question.removesuffix("?"))
        assert 2 <= len(parts) <= 4 and 1 <= int(value) <= 99 and question.endswith("?")
        for part in parts:
            value = eval(f"({value}{part}) % 100")
        assert example.answer == str(value)
    demos = {e.prompt[-1]["content"]: [t for t, _ in task.demonstrate(e, random.Random(0))] for e in problems}

    def policy(text):
        question, _, rest = text.partition("?")
        return demos[question + "?"][rest.count("(")]

    r = forced(policy, task.environment).generate(problems, 1, Sampling(1.0, 120), (0,))
    assert (r.reward == 1).all() and r.finished.all()
    for example, episode in zip(problems, r.episodes, strict=True):
        shown = [(turn.text, turn.observation) for turn in episode.turns]
        assert shown == task.demonstrate(example, random.Random(1))
    assert all(task.grade(e, text) == 1 for e, text in zip(problems, r.texts, strict=True))


def test_shown_faults_come_at_their_rate_and_each_call_is_made_again():
    task, rng = Chain("chain", fault=0.0, shown_fault=0.25), random.Random(0)
    n = bad = 0
    for example in task.draw(400, 0):
        turns = task.demonstrate(example, rng)
        assert turns[-1] == (f"={example.answer};", "")
        for (call, observation), (after, _) in itertools.pairwise(turns):
            n, bad = n + 1, bad + observation.startswith("(X")
            assert not observation.startswith("(X") or after == call
    assert abs(bad / n - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_faults_come_at_the_stated_rate_and_a_malformed_call_always_fails():
    n, fault = 3000, 0.15
    environment = Chain("chain").environment(None, 5)
    steps = [environment.step("<35*6>") for _ in range(n)]
    share = sum(step.failed for step in steps) / n
    assert abs(share - fault) < 4 * math.sqrt(fault * (1 - fault) / n)
    for step in steps:
        assert not step.done and step.reward == 0
        text = step.observation
        assert text == "(10)" or (step.failed and len(text) == 13 and set(text[2:-1]) <= set("0123456789eX|"))
    calm = Chain("chain", fault=0.0).environment(None, 5)
    for call in ("<35*6", "3*5>", "<123+4>", "<3/4>", "<>", "< 3+4>", "<3+4>>", "a<3+4>", "<3+-4>", "<3+444>"):
        step = calm.step(call if call.endswith(">") else call + ">>")
        assert step.failed and step.observation.startswith("(X") and not step.done
    results = [calm.step(call).observation for call in ("<35*6>", "<3-9>", "<99+99>", "<0*0>", "<10-7>")]
    assert results == ["(10)", "(94)", "(98)", "(0)", "(3)"]


def test_the_same_seed_fails_the_same_calls_and_rows_have_seeds_of_their_own(forced):
    task = Chain("chain", fault=0.5)

    def failures(seed):
        environment = task.environment(None, seed)
        return [environment.step("<1+1>").observation for _ in range(40)]

    assert failures(1) == failures(1) != failures(2)
    problems = task.draw(1, 3)
    a, b, c = (
        forced(oracle, task.environment).generate(problems, 6, Sampling(1.0, 120), key) for key in ((1,), (1,), (2,))
    )
    assert a.texts == b.texts != c.texts and len(set(a.texts)) > 1


@pytest.mark.parametrize(
    ("last", "grade"),
    [
        ("=98;", 1),
        ("=98", 0),
        ("=9;", 0),
        ("=098;", 0),
        ("98;", 0),
        ("x=98;", 0),
        ("=98;=98;", 0),
        ("", 0),
        ("=98; ", 0),
    ],
)
def test_only_the_answer_alone_is_graded(last, grade):
    task = Chain("chain", fault=0.0)
    example = Example([{"role": "user", "content": "90+8?"}], "98")
    environment = task.environment(example, 0)
    environment.reset(example)
    assert environment.step(last) == Step(done=True, reward=float(grade))
    assert task.grade(example, f"<90+8>(98){last}") == grade


@pytest.mark.parametrize(
    "spec", ["chain:fault=1", "chain:fault=-0.1", "chain:fault=x", "chain:shown_fault=1.5", "chain:faults=0.1"]
)
def test_options_of_chain_out_of_range_are_one_line(spec):
    with pytest.raises(UserError, match="chain"):
        make_task(spec)
    assert make_task("chain:fault=0.5,shown_fault=0.1").fault == 0.5


# --- a user's environment

GOOD = """class E:
    def reset(self, example):
        return 'q'
    def step(self, text):
        return 'o', True, 1.0
"""
STATIC = GOOD.replace("    def step(self, text):", "    @staticmethod\n    def step(text):")
BROKEN = {
    "missing class": (GOOD, "Other", ["Other", "--environment"]),
    "missing method": ("class E:\n    def reset(self, example): return 'q'\n", "E", ["step", "--environment"]),
    "missing both": ("class E: pass\n", "E", ["reset", "step"]),
    "not importable": ("import nothing_of_the_kind\n", "E", ["nothing_of_the_kind"]),
    "constructor raises": (GOOD + "    def __init__(self): raise OSError('no\\nluck')\n", "E", ["E", "OSError", "no"]),
    "constructor wants more": (GOOD + "    def __init__(self, size): pass\n", "E", ["E", "size"]),
    "reset raises": (GOOD.replace("return 'q'", "raise KeyError('k')"), "E", ["E.reset", "KeyError", "k"]),
    "step raises": (GOOD.replace("return 'o'", "return 1 / 0"), "E", ["E.step", "ZeroDivisionError"]),
    "step exits": (GOOD.replace("return 'o'", "return exit(3)"), "E", ["E.step", "SystemExit"]),
    "static step raises": (STATIC.replace("return 'o'", "return 1 / 0"), "E", ["step", "ZeroDivisionError"]),
    "observation None": (GOOD.replace("'o'", "None"), "E", ["step", "observation", "None"]),
    "observation a number": (GOOD.replace("'o'", "7"), "E", ["step", "observation", "7"]),
    "step a text": (GOOD.replace("'o', True, 1.0", "'abc'"), "E", ["step", "'abc'"]),
    "step None": (GOOD.replace("return 'o', True, 1.0", "pass"), "E", ["step", "None"]),
    "step of five": (GOOD.replace("'o', True, 1.0", "'o', 1.0, True, False, {}"), "E", ["step", "{}"]),
    "reward a word": (GOOD.replace("1.0", "'good'"), "E", ["step", "good"]),
    "reset None": (GOOD.replace("return 'q'", "pass"), "E", ["reset", "None"]),
    "reset empty": (GOOD.replace("'q'", "''"), "E", ["reset", "''"]),
    "reset no messages": (GOOD.replace("'q'", "['q']"), "E", ["reset", "['q']"]),
    "reset a message of nothing": (GOOD.replace("'q'", "[{'role': 'user'}]"), "E", ["reset", "role"]),
    "reset a content of None": (GOOD.replace("'q'", "[{'role': 'user', 'content': None}]"), "E", ["reset", "None"]),
}  # fmt: skip


def run_file(tiny, path, name="E"):
    environment = make_environment(f"{path}:{name}", make_task("addition"), "hermes")
    return Episodes(HFEngine(*tiny), environment, 3).generate(examples("x", "y"), 2, Sampling(1.0, 12), (0,))


@pytest.mark.parametrize(("code", "name", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_environment_of_the_user_is_one_line(code, name, words, tiny, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError) as error:
        run_file(tiny, tmp_path / "mine.py", name)
    said = str(error.value)
    assert "\n" not in said and len(said) < 400
    assert all(word in said for word in words), said


def test_good_environments_by_path(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    r = run_file(tiny, tmp_path / "mine.py")
    assert r.reward.tolist() == [1.0] * 4 and all(e.prompt[0]["content"] == "q" for e in r.examples)
    assert [turn.observation for turn in r.episodes[0].turns] == ["o"]
    (tmp_path / "numbers.py").write_text(
        "import numpy as np\n" + GOOD.replace("True, 1.0", "np.True_, np.float32(0.5), 0")
    )
    r = run_file(tiny, tmp_path / "numbers.py")
    assert r.reward.tolist() == [0.5] * 4 and r.finished.all() and r.episodes[0].turns[0].failed is False
    with pytest.raises(UserError, match=r"no\.py.*--environment|--environment.*no\.py"):
        make_environment(f"{tmp_path}/no.py:E", None, "hermes")
    with pytest.raises(UserError, match="--environment"):
        make_environment("wizardry", None, "hermes")
    with pytest.raises(UserError, match="--environment"):
        make_environment("task", make_task("addition"), "hermes")


def test_environments_run_at_the_same_time_and_each_row_has_its_own(forced):
    both = threading.Barrier(2, timeout=60)  # one environment alone would wait for ever

    class Waits(Says):
        def step(self, text):
            both.wait()
            return Step(done=True, reward=float(self.mine))

    numbers = iter(range(4))
    episodes = forced(lambda text: "a;", lambda e, s: Waits(mine=next(numbers)))
    episodes.pool = ThreadPoolExecutor(2)  # however many cores there are
    r = episodes.generate(examples("q", "r"), 2, Sampling(1.0, 9), (0,))
    assert r.reward.tolist() == [0, 1, 2, 3]


# --- tools


@pytest.fixture(scope="module")
def sums():
    return make_task("reasoning_gym:chain_sum")


def call(form, name="calculator", **arguments):
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>" if form == "hermes" else text


@pytest.fixture(params=["hermes", "json"])
def tool(request, sums):
    made = make_environment("calculator", sums, request.param)(None, 0)
    example = sums.draw(1, 0)[0]
    return made, made.reset(example), example


def test_the_prompt_describes_the_tool_and_keeps_the_tasks_messages(tool, sums):
    made, messages, example = tool
    assert [m["role"] for m in messages] == ["system", "user"] and messages[1:] == example.prompt
    for word in ("calculator", "expression", "description", "parameters"):
        assert word in messages[0]["content"]
    assert ("<tool_call>" in messages[0]["content"]) == (made.form == "hermes")
    assert made.stops == (("</tool_call>",) if made.form == "hermes" else ()) and made.role == "tool"
    own = Example([{"role": "system", "content": "Be brief."}, *example.prompt], example.answer)
    given = made.reset(own)
    assert [m["role"] for m in given] == ["system", "user"] and given[0]["content"].startswith("Be brief.\n")
    assert own.prompt[0]["content"] == "Be brief.", "the example is left as it was"


def test_a_call_is_answered_and_an_answer_without_a_call_is_graded(tool, sums):
    made, _, example = tool
    step = made.step("Let me see. " + call(made.form, expression="2*(3+4)"))
    assert step == Step("14")
    right = made.step(f"The sum is <answer>{example.answer}</answer>")
    assert right.done and right.reward == 1.0 and not right.failed
    wrong = made.step("<answer>123456789</answer>")
    assert wrong.done and wrong.reward < 1.0


def test_calls_that_cannot_be_run_are_told_and_the_episode_goes_on(tool):
    made, _, _ = tool
    cases = {
        "wrong tool": (call(made.form, "python", code="1"), "calculator"),
        "missing argument": (call(made.form), "expression"),
        "wrong argument": (call(made.form, code="1+1"), "expression"),
        "argument no text": (call(made.form, expression=3), "expression"),
        "not an expression": (call(made.form, expression="2+"), "error"),
        "division": (call(made.form, expression="1/0"), "error"),
        "bad JSON": (
            '<tool_call>{"name": calculator}</tool_call>' if made.form == "hermes" else '{"name": calculator}',
            "error",
        ),
    }
    for text, word in cases.values():
        step = made.step(text)
        assert step.failed and not step.done and step.reward == 0 and "error" in step.observation
        assert word in step.observation and len(step.observation) <= 256


def test_of_several_calls_the_first_is_run(tool):
    made, _, _ = tool
    step = made.step(call(made.form, expression="1+1") + "\n" + call(made.form, expression="2+2"))
    assert step == Step("2")


def test_an_observation_is_cut_and_keeps_both_ends(sums):
    for limit in (20, 40):
        made = ToolUse(sums, "calculator", "hermes", observation_chars=limit)
        made.reset(sums.draw(1, 0)[0])
        made.run = lambda name, arguments: ("a" * 300 + "z" * 300, False)
        seen = made.step(call("hermes", expression="1")).observation
        assert len(seen) == limit and seen[0] == "a" and seen[-1] == "z"


def test_an_episode_with_a_tool_through_a_chat_template(forced, sums):
    tokenizer = chat(CHATML.replace("S<|im_end|>", "<|im_end|>"))
    example = sums.draw(1, 0)[0]
    said = iter([call("hermes", expression="40+2"), f"{example.answer}<|im_end|>"])
    episodes = forced(
        lambda text: next(said),
        make_environment("calculator", sums, "hermes"),
        tokenizer=tokenizer,
        model=random_long(),
    )
    r = episodes.generate([example], 1, Sampling(1.0, 300), (0,))
    assert [turn.observation for turn in r.episodes[0].turns] == ["42", ""] and r.reward.item() == 1
    ids = r.tokens[0][r.attention_mask[0] > 0].tolist()
    assert "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n" in tokenizer.decode(ids)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\n") and r.finished.all()


def random_long():
    model = random_qwen()
    model.config.max_position_embeddings = 4096
    return model


def test_prompts_and_budget_beyond_the_models_positions_are_one_line(forced, tiny):
    episodes = forced(lambda text: "a;", lambda e, s: Says(Step(done=True)))
    with pytest.raises(UserError, match="--max-new-tokens"):
        episodes.generate(examples("q"), 1, Sampling(1.0, 511), (0,))
    assert sample_tokens is not hf_module.sample_tokens, "the forced policy is on"
