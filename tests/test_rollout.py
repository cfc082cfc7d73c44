"""The hf engine: its log-probs, its stops, its masks and its sampler, against scoring, transformers and counting."""

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.common.engines.hf import HFEngine, sample_tokens
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import Sampling, encode, seed_of
from posttrain.common.scoring import score
from posttrain.common.tasks import Example

CPU = torch.device("cpu")
STOPS = [1, 5, 9]
LETTERS = "abcdefghijklmnopqrst"


def letters(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Ids 0 <pad>, 1 <eos>, then letters; no chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    base = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    base.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>", pad_token=pad)


def random_qwen(stops: list[int] | int = STOPS, seed: int = 0, positions: int = 64) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(LETTERS) + 2, num_key_value_heads=1, head_dim=16, max_position_embeddings=positions,
        eos_token_id=stops, pad_token_id=0, initializer_range=0.6, **sizes,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.autocast_dtype = stops, None  # as load_model leaves it
    return model


def examples(*texts: str) -> list[Example]:
    return [Example([{"role": "user", "content": text}], "") for text in texts]


def sums(*pairs: tuple[int, int]) -> list[Example]:
    return examples(*(f"{a}+{b}=" for a, b in pairs))


MIXED = examples("a", "bcdefghij", "klm", "nopqrstabcdefgh", "cc")


@pytest.fixture(scope="module")
def random_engine():
    return HFEngine(random_qwen(), letters())


@pytest.fixture(scope="module", params=["addition-student", "addition-teacher", "random", "lora"])
def engine(request):
    """Engine and prompts of different lengths."""
    if request.param == "random":
        return HFEngine(random_qwen(), letters()), MIXED
    tokenizer = load_tokenizer(request.param if "addition" in request.param else "addition-student")
    prompts = sums((123, 456), (7, 8), (99, 12345), (1, 1), (950, 61))
    if request.param != "lora":
        return HFEngine(load_model(request.param, CPU), tokenizer), prompts
    model = load_model("addition-student", CPU, lora_rank=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return HFEngine(model, tokenizer), prompts


def rows_of(rollout) -> list[list[int]]:
    """Response ids, row by row."""
    return [t[m > 0].tolist() for t, m in zip(rollout.tokens, rollout.loss_mask, strict=True)]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_behaviour_logps_are_the_scored_logps(engine, temperature):
    engine, prompts = engine
    rollout = engine.generate(prompts, 4, Sampling(temperature, 18), key=(3, 1))
    logps, _ = score(engine.model, rollout, 120, temperature)
    assert rollout.attention_mask.sum(1).unique().numel() > 2  # rows of several lengths
    assert rollout.loss_mask.sum() > 4 * len(prompts)
    torch.testing.assert_close(rollout.behaviour_logps, logps, atol=1e-4, rtol=0)


def test_layout_of_a_rollout(engine):
    engine, prompts = engine
    n = 3
    rollout = engine.generate(prompts, n, Sampling(1.0, 16), key=(0, 2))
    assert len(rollout) == n * len(prompts) and rollout.group.tolist() == [
        i for i in range(len(prompts)) for _ in "abc"
    ]
    assert rollout.tokens.dtype == torch.int64 and rollout.behaviour_logps.dtype == torch.float32
    for i in range(len(rollout)):
        prompt = encode(engine.tokenizer, prompts[i // n].prompt)
        length, first = int(rollout.attention_mask[i].sum()), len(prompt)
        assert rollout.tokens[i, :first].tolist() == prompt
        assert rollout.attention_mask[i].tolist() == [1.0] * length + [0.0] * (rollout.tokens.shape[1] - length)
        assert rollout.loss_mask[i].nonzero().squeeze(1).tolist() == list(range(first, length))
        assert rollout.examples[i] is prompts[i // n]
        response = rollout.tokens[i, first:length]
        assert rollout.texts[i] == engine.tokenizer.decode(response, skip_special_tokens=True)
    assert torch.equal(rollout.turn, rollout.loss_mask.long() - 1)
    assert not rollout.behaviour_logps[rollout.loss_mask == 0].any()
    assert (rollout.behaviour_logps[rollout.loss_mask > 0] <= 0).all()
    assert rollout.reward.isnan().all()
    assert rollout.attention_mask[:, -1].any()  # no column of padding alone


@pytest.mark.parametrize("batch_tokens", [1, 100, 300])
def test_chunks_of_prompts_change_nothing(engine, batch_tokens):
    engine, prompts = engine
    small = HFEngine(engine.model, engine.tokenizer, batch_tokens)
    a, b = (e.generate(prompts, 4, Sampling(1.0, 16), key=(8, 8)) for e in (engine, small))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_mask, b.loss_mask) and a.texts == b.texts
    torch.testing.assert_close(a.behaviour_logps, b.behaviour_logps, atol=1e-4, rtol=0)


def test_a_row_does_not_depend_on_the_prompts_batched_with_it(engine):
    engine, prompts = engine
    ids = [encode(engine.tokenizer, example.prompt) for example in prompts]
    u = torch.rand(len(ids), 4, 16, generator=torch.Generator().manual_seed(5))
    together, logps = engine.complete([row for row in ids for _ in range(4)], u.flatten(0, 1), Sampling())
    for order in ([2], [4, 0], [3, 1, 2]):
        some = [ids[i] for i in order for _ in range(4)]
        alone, alone_logps = engine.complete(some, u[order].flatten(0, 1), Sampling())
        where = [4 * i + j for i in order for j in range(4)]
        assert alone == [together[i] for i in where]
        for row, i in zip(alone_logps, where, strict=True):
            assert row == pytest.approx(logps[i], abs=1e-4)


def test_first_prompts_of_a_longer_list_get_the_same_samples(random_engine):
    few = random_engine.generate(MIXED[:2], 3, Sampling(1.0, 12), key=(1,))
    many = random_engine.generate(MIXED, 3, Sampling(1.0, 12), key=(1,))
    assert rows_of(few) == rows_of(many)[:6]


@torch.no_grad()
def test_greedy_is_generate_token_for_token(engine):
    engine, prompts = engine
    rollout = engine.generate(prompts, 1, Sampling(0.0, 16), key=(0,))
    for example, response in zip(prompts, rows_of(rollout), strict=True):
        prompt = torch.tensor([encode(engine.tokenizer, example.prompt)])
        settings = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": engine.stop_ids, "pad_token_id": 0}
        out = engine.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert response == out[0, prompt.shape[1] :].tolist()


def test_greedy_ignores_the_key_and_gives_equal_rows(random_engine):
    a, b = (random_engine.generate(MIXED, 2, Sampling(0.0, 10), key=(k,)) for k in (1, 2))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.tokens[0::2], a.tokens[1::2])


def test_every_stop_id_ends_a_row_and_nothing_else_does(random_engine):
    limit = 12
    rollout = random_engine.generate(MIXED, 64, Sampling(1.0, limit), key=(4, 2))
    assert random_engine.stop_ids == STOPS
    responses = rows_of(rollout)
    for response, finished in zip(responses, rollout.finished.tolist(), strict=True):
        assert not set(response[:-1]) & set(STOPS)
        assert finished == (response[-1] in STOPS)  # the end token is inside the loss mask
        assert finished or len(response) == limit
    assert {r[-1] for r in responses} > set(STOPS)  # each was met, and rows cut by length too
    assert any(len(r) == limit and r[-1] in STOPS for r in responses)  # ended on the very last token: finished
    assert {len(r) for r in responses} >= {1, 2, limit}


def test_stop_ids_of_the_generation_config_join_the_tokenizers():
    assert HFEngine(random_qwen(stops=7), letters()).stop_ids == [1, 7]
    model = random_qwen()
    model.generation_config.eos_token_id = None
    assert HFEngine(model, letters()).stop_ids == [1]


def test_pad_equal_to_eos_keeps_the_end_token_in_the_mask():
    engine = HFEngine(random_qwen(), letters(pad="<eos>"))
    assert engine.tokenizer.pad_token_id == engine.tokenizer.eos_token_id == 1
    rollout = engine.generate(MIXED, 16, Sampling(1.0, 10), key=(0,))
    usual = HFEngine(random_qwen(), letters()).generate(MIXED, 16, Sampling(1.0, 10), key=(0,))
    assert torch.equal(rollout.loss_mask, usual.loss_mask) and torch.equal(rollout.finished, usual.finished)
    ended = [r for r in rows_of(rollout) if r[-1] == 1]
    assert ended and rows_of(rollout) == rows_of(usual)
    logps, _ = score(engine.model, rollout, 500)
    torch.testing.assert_close(rollout.behaviour_logps, logps, atol=1e-4, rtol=0)


def test_one_new_token(random_engine):
    rollout = random_engine.generate(MIXED, 32, Sampling(1.0, 1), key=(2,))
    assert rollout.loss_mask.sum(1).tolist() == [1.0] * len(rollout)
    assert rollout.finished.tolist() == [r[0] in STOPS for r in rows_of(rollout)]
    assert 0 < rollout.finished.sum() < len(rollout)


def test_prompt_and_response_may_fill_all_positions():
    engine = HFEngine(random_qwen(positions=20), letters())
    rollout = engine.generate(examples("a" * 12, "b"), 8, Sampling(1.0, 8), key=(0,))
    assert rollout.tokens.shape[1] <= 20


def test_same_key_same_samples_other_key_others(random_engine):
    runs = [random_engine.generate(MIXED, 4, Sampling(1.0, 12), key=k) for k in ((1, 2), (1, 2), (2, 1), (1, 3))]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert torch.equal(runs[0].behaviour_logps, runs[1].behaviour_logps)
    assert rows_of(runs[0]) != rows_of(runs[2]) and rows_of(runs[0]) != rows_of(runs[3])


def test_rows_of_a_group_differ_from_each_other(random_engine):
    responses = rows_of(random_engine.generate(MIXED, 8, Sampling(1.0, 12), key=(1, 2)))
    different = [len({tuple(r) for r in responses[i : i + 8]}) for i in range(0, len(responses), 8)]
    assert sum(different) > 3 * len(MIXED)  # a prompt may have one response that is nearly certain


def test_generate_leaves_global_random_numbers_and_the_model_alone(random_engine):
    before, state = copy.deepcopy(random_engine.model.state_dict()), torch.random.get_rng_state()
    random_engine.generate(MIXED, 4, Sampling(1.0, 12), key=(0,))
    assert torch.equal(torch.random.get_rng_state(), state) and not random_engine.model.training
    assert all(torch.equal(before[k], v) for k, v in random_engine.model.state_dict().items())


def test_seeds_of_neighbouring_keys_differ():
    keys = [(a, b, c) for a in range(12) for b in range(30) for c in range(4)] + [(0, 1, 2**31), (1, 0, 2**31)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)


# --- sample_tokens


def draws(logits, u, temperature=1.0, top_p=1.0):
    return sample_tokens(logits.expand(len(u), -1), u, temperature, top_p)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    probs, n = (logits.double() / temperature).softmax(-1), 400_000
    ids, logps = draws(logits, torch.rand(n, generator=torch.Generator().manual_seed(2)), temperature)
    seen = torch.bincount(ids, minlength=50).double()
    chi2 = ((seen - n * probs) ** 2 / (n * probs)).sum()
    assert chi2 < 49 + 5 * (2 * 49) ** 0.5  # five standard deviations of a chi-square with 49 degrees
    torch.testing.assert_close(logps.double(), probs.log()[ids], atol=1e-5, rtol=1e-5)


def test_evenly_spaced_numbers_give_exact_shares():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 3
    n = 100_000
    ids, _ = draws(logits, (torch.arange(n) + 0.5) / n)
    assert ((torch.bincount(ids, minlength=30) - n * logits.double().softmax(-1)).abs() < 2).all()
    assert (ids.diff() >= 0).all()


EXTREMES = torch.tensor([0.0, 1e-45, 1e-38, 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])  # rand's largest is the last


@pytest.mark.parametrize("masked", [[0], [1], [-1], [0, 1, -1, -2], [3, 4, 5], list(range(1, 12)), list(range(11))])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_a_token_of_probability_zero_is_never_picked(masked, scale):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * scale
    logits[masked] = -torch.inf
    for temperature in (0.0, 0.3, 1.0):
        ids, logps = draws(logits, EXTREMES, temperature)
        assert ((ids >= 0) & (ids < 12)).all() and logps.isfinite().all() and not logits[ids].isinf().any()


def test_underflowed_probabilities_are_never_picked():
    logits = torch.tensor([-1000.0, 0.0, -1000.0, 0.0, -1000.0])
    ids, _ = draws(logits, torch.cat([EXTREMES, torch.rand(1000)]))
    assert set(ids.tolist()) == {1, 3}


def test_a_large_vocabulary_is_covered_to_both_ends():
    logits = torch.zeros(151_936)
    logits[-100:] = -torch.inf
    ids, _ = draws(logits, EXTREMES)
    assert ids[0] == 0 and ids[-1] == 151_835 and (ids < 151_836).all()


def test_zero_temperature_is_argmax_with_the_plain_log_prob():
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(5))
    ids, logps = sample_tokens(logits, torch.rand(6), 0.0)
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logps, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(1e-6, {2}), (0.49, {2}), (0.5, {2}), (0.51, {2, 0}), (0.74, {2, 0}), (0.76, {2, 0, 3}), (0.9, {2, 0, 3, 1})],
)
def test_top_p_keeps_exactly_the_nucleus(top_p, nucleus):
    probs = torch.tensor([0.25, 0.0625, 0.5, 0.125, 0.0625])  # 1 comes before 4 among equals
    logits = probs.log()
    n = 64_000
    ids, logps = draws(logits, (torch.arange(n) + 0.5) / n, top_p=top_p)
    seen = torch.bincount(ids, minlength=5) / n
    assert set(ids.tolist()) == nucleus
    kept = torch.tensor([p if i in nucleus else 0.0 for i, p in enumerate(probs.tolist())])
    torch.testing.assert_close(seen, kept / kept.sum(), atol=1e-3, rtol=0)
    torch.testing.assert_close(logps, logits[ids])  # of the whole vocabulary, not of the nucleus
    assert set(draws(logits, EXTREMES, top_p=top_p)[0].tolist()) <= nucleus


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sampler_computes_in_fp32_whatever_the_logits(dtype):
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(6)).to(dtype)
    u = torch.rand(4, generator=torch.Generator().manual_seed(7))
    ids, logps = sample_tokens(logits, u, 0.9)
    expected_ids, expected = sample_tokens(logits.float(), u, 0.9)
    assert logps.dtype == torch.float32 and torch.equal(ids, expected_ids) and torch.equal(logps, expected)
