"""common/rollout.py and common/scoring.py: alignment by hand-made rows, log-probs against a plain forward pass."""

import dataclasses
import itertools

import pytest
import torch
import transformers

from posttrain.common.cli import UserError
from posttrain.common.rollout import Rollout, assemble, concat, under_prompts
from posttrain.common.scoring import carry, micro_batches, sampled_hidden, scatter, score, token_logps
from posttrain.common.tasks import Example
from posttrain.methods import grpo, opd

V, PAD = 19, 0
TENSORS = ("tokens", "attention_mask", "loss_mask", "turn", "behaviour_logps")
SMALL = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXTRA = {  # what these families do to their logits
    "Qwen3": {},
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},  # a bias in the head
}


def make_model(family="Qwen3", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SMALL, **EXTRA[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    for p in model.parameters():  # far from uniform predictions
        p.data += 0.3 * torch.randn(p.shape).to(dtype)
    model.autocast_dtype = None
    return model


def multi_turn():
    """p p a b e e c $ e .   and a shorter single-turn row; e is written by the environment, after the end too."""
    return Rollout(
        tokens=torch.tensor([[5, 6, 7, 8, 9, 10, 11, 2, 12, PAD], [5, 13, 2, PAD, PAD, PAD, PAD, PAD, PAD, PAD]]),
        attention_mask=torch.tensor([[1.0] * 9 + [0], [1.0] * 3 + [0] * 7]),
        loss_mask=torch.tensor([[0.0, 0, 1, 1, 0, 0, 1, 1, 0, 0], [0, 1.0, 1] + [0] * 7]),
        turn=torch.tensor([[-1, -1, 0, 0, -1, -1, 1, 1, -1, -1], [-1, 0, 0] + [-1] * 7]),
        behaviour_logps=torch.tensor([[0, 0, -0.1, -0.2, 0, 0, -0.3, -0.4, 0, 0], [0, -0.5, -0.6] + [0] * 7]),
        group=torch.tensor([0, 0]),
        finished=torch.tensor([True, False]),
        reward=torch.tensor([1.0, 0.0]),
        texts=["ab c", "d"],
        examples=[Example([], "x"), Example([], "y")],
        episodes=[None, None],
    )


def random_rollout(seed=0, n=8, empty=True):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(3, V, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    prompts, responses = [ids(1, 6) for _ in range(n)], [ids(1, 9) for _ in range(n)]
    if empty:
        responses[1] = []
    logps = [(-3 * torch.rand(len(r), generator=g)).tolist() for r in responses]
    group, reward = torch.arange(n) // 4, torch.randint(0, 2, (n,), generator=g).float()
    return assemble(prompts, responses, PAD, logps, group=group, reward=reward), prompts, responses


def plain_logps(model, prompt, response, temperature=1.0, vocab_size=None):
    """Log-prob of each response token and entropy, from the logits of this one row without padding.  [n], [n]"""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, :, :vocab_size]
    logps = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = [logps[t, token] for t, token in enumerate(response)]
    return (torch.stack(chosen) if chosen else logps.new_zeros(0)), -(logps.exp() * logps).sum(-1)[: len(response)]


def same(a, b):
    for f in dataclasses.fields(Rollout):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, f.name


# --- layout


def test_assemble_lines_up_every_tensor_with_its_token():
    rollout = assemble([[5, 6], [7], [8]], [[9, 10, 2], [11], []], PAD, [[-0.1, -0.2, -0.3], [-0.4], []])
    expected = {
        "tokens": [[5, 6, 9, 10, 2], [7, 11, 0, 0, 0], [8, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
        "loss_mask": [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0] * 5],
        "turn": [[-1, -1, 0, 0, 0], [-1, 0, -1, -1, -1], [-1] * 5],
        "behaviour_logps": [[0, 0, -0.1, -0.2, -0.3], [0, -0.4, 0, 0, 0], [0] * 5],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(rollout, name), torch.tensor(value).to(getattr(rollout, name).dtype))
    assert rollout.tokens.dtype == rollout.turn.dtype == rollout.group.dtype == torch.int64
    assert rollout.attention_mask.dtype == rollout.behaviour_logps.dtype == torch.float32
    assert rollout.reward.isnan().all() and rollout.group.tolist() == [0, 1, 2] and len(rollout) == 3


def test_masks_come_from_lengths_when_pad_is_a_real_token():
    rollout = assemble([[PAD, 5]], [[PAD, 6, PAD]], PAD)
    assert rollout.loss_mask.tolist() == [[0, 0, 1, 1, 1]] and rollout.attention_mask.tolist() == [[1] * 5]


def test_under_prompts_moves_single_turn_responses_and_back():
    rollout, prompts, responses = random_rollout()
    before = dataclasses.replace(rollout, **{k: getattr(rollout, k).clone() for k in TENSORS})
    others = [[3] * (1 + (5 * i) % 7) for i in range(len(prompts))]
    moved = under_prompts(rollout, others, PAD)
    logps = [row[m > 0].tolist() for row, m in zip(rollout.behaviour_logps, rollout.loss_mask, strict=True)]
    fresh = assemble(others, responses, PAD, logps)
    for name in TENSORS:
        assert torch.equal(getattr(moved, name), getattr(fresh, name)), name
    same(rollout, before)
    back = under_prompts(moved, prompts, PAD)
    same(dataclasses.replace(back, reward=rollout.reward.nan_to_num()), rollout)
    values = torch.randn(moved.tokens.shape)
    carried = carry(values, moved, rollout)
    assert torch.equal(carried[rollout.loss_mask > 0], values[moved.loss_mask > 0])
    assert not carried[rollout.loss_mask == 0].any()


def test_under_prompts_moves_a_multi_turn_row_as_one_block():
    rollout = multi_turn()
    moved = under_prompts(rollout, [[3, 3, 3, 4], [4]], PAD)
    assert moved.tokens.tolist() == [[3, 3, 3, 4, 7, 8, 9, 10, 11, 2, 12], [4, 13, 2] + [PAD] * 8]
    assert moved.attention_mask.tolist() == [[1] * 11, [1] * 3 + [0] * 8]
    assert moved.loss_mask.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1] + [0] * 8]
    assert moved.turn.tolist() == [[-1, -1, -1, -1, 0, 0, -1, -1, 1, 1, -1], [-1, 0, 0] + [-1] * 8]
    torch.testing.assert_close(moved.behaviour_logps[0, [4, 5, 8, 9]], torch.tensor([-0.1, -0.2, -0.3, -0.4]))
    for name in ("group", "finished", "reward", "texts", "examples"):
        assert getattr(moved, name) is getattr(rollout, name)
    values = torch.arange(22.0).view(2, 11) + 1
    assert carry(values, moved, rollout).tolist() == [[0, 0, 5, 6, 0, 0, 9, 10, 0, 0], [0, 13, 14] + [0] * 7]
    same(rollout, multi_turn())


def test_carry_refuses_other_responses():
    rollout = multi_turn()
    with pytest.raises(ValueError):
        carry(rollout.behaviour_logps, rollout, rollout[torch.tensor([1, 0])])


def test_concat_pads_to_the_widest_and_renumbers_groups():
    first, second, third = multi_turn(), random_rollout(1)[0], random_rollout(2, n=4)[0]
    inputs = [first, second, third]
    copies = [dataclasses.replace(r, group=r.group.clone()) for r in inputs]
    joined = concat(inputs, pad=17)
    assert joined.group.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    start = 0
    for part, copy in zip(inputs, copies, strict=True):
        rows, width = joined[torch.arange(start, start + len(part))], part.tokens.shape[1]
        for name, fill in zip(TENSORS, (17, 0, 0, -1, 0), strict=True):
            assert torch.equal(getattr(rows, name)[:, :width], getattr(part, name))
            assert (getattr(rows, name)[:, width:] == fill).all()
        assert torch.equal(rows.reward, part.reward) and rows.texts == part.texts and rows.examples == part.examples
        assert torch.equal(part.group, copy.group), "the caller's groups were renumbered in place"
        start += len(part)
    same(concat([first], PAD), first)


def test_picked_rows_keep_their_width_and_their_lists():
    rollout, index = random_rollout()[0], torch.tensor([6, 1, 1])
    rollout.texts = list("abcdefgh")
    picked = rollout[index]
    assert picked.texts == ["g", "b", "b"] and picked.tokens.shape[1] == rollout.tokens.shape[1]
    assert torch.equal(picked.behaviour_logps, rollout.behaviour_logps[index])
    assert len(rollout[torch.tensor([], dtype=torch.long)]) == 0


def groups_of_rows(n=3, group=4, empty=False):
    """n prompts of different lengths, `group` responses of different lengths to each; empty: one without any token."""
    g = torch.Generator().manual_seed(0)
    ids = lambda k: torch.randint(3, V, (k,), generator=g).tolist()  # noqa: E731
    prompts = [prompt for k in range(n) for prompt in [ids(3 + 2 * k)] * group]
    responses = [ids(1 + 3 * i % 5) for i in range(n * group)]
    if empty:
        responses[1] = []
    return assemble(prompts, responses, PAD, group=torch.arange(n * group) // group)


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Granite", "Cohere", "Phi"])
@pytest.mark.parametrize("limit", [30, 10**4])  # some groups together, or all
def test_prompts_read_once_change_neither_logps_nor_gradients(family, limit):
    model, rollout = make_model(family), groups_of_rows()
    weights = torch.randn(rollout.tokens.shape, dtype=torch.float64)
    outcomes = []
    for share in (False, True):
        model.zero_grad()
        logps, entropy = (torch.zeros(rollout.tokens.shape, dtype=torch.float64) for _ in range(2))
        for rows in micro_batches(rollout, limit, share):
            a, b = token_logps(model, rollout[rows], 0.7, share=share)
            ((a + 0.3 * b) * weights[rows]).sum().backward()
            logps[rows], entropy[rows] = a.detach(), b.detach()
        outcomes.append([logps, entropy, *(p.grad for p in model.parameters())])
    within = 1e-9 if family == "Phi" else 1e-5  # the others' norms compute in fp32 whatever comes in
    for one, other in zip(*outcomes, strict=True):
        assert (other - one).abs().max() <= within * one.abs().max()
    assert outcomes[0][0].abs().sum() > 1


@pytest.mark.parametrize("rollout", [multi_turn(), groups_of_rows(1, 3), groups_of_rows(2, 2, empty=True)])
def test_prompts_read_once_in_turns_alone_and_without_response(rollout):
    model = make_model(dtype=torch.float32)
    for one, other in zip(score(model, rollout, 10**4, share=True), score(model, rollout, 10**4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_prompts_read_once_cost_less_and_other_layers_are_refused():
    model, rollout, read = make_model(dtype=torch.float32), groups_of_rows(1, 4), []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kw: read.append(kw["input_ids"].numel()), with_kwargs=True
    )
    score(model, rollout, 10**4)
    plainly = sum(read)
    read.clear()
    score(model, rollout, 10**4, share=True)
    hook.remove()
    assert read == [2, plainly - 4 * 2]  # all of the prompt but its last token, which each row reads itself
    with pytest.raises(UserError, match="leave --share-prompts away"):
        score(make_model("Gemma2", dtype=torch.float32), rollout, 10**4, share=True)


def test_micro_batches_may_keep_groups_together():
    rollout = groups_of_rows()
    batches = micro_batches(rollout, 50, share=True)
    assert sorted(torch.cat(batches).tolist()) == list(range(12))
    order = rollout.group[torch.cat(batches)].tolist()
    assert sum(a != b for a, b in itertools.pairwise(order)) == 2
    lengths = rollout.attention_mask.sum(1)
    assert all(lengths[rows].max() * len(rows) <= 50 for rows in batches) and len(batches) > 1


@pytest.mark.parametrize("limit", [1, 10, 14, 40, 10**6])
def test_micro_batches_hold_every_row_once_within_the_budget(limit):
    rollout = random_rollout(3, n=40)[0]
    lengths, batches = rollout.attention_mask.sum(1), list(micro_batches(rollout, limit))
    assert sorted(torch.cat(batches).tolist()) == list(range(40))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= limit
    if limit == 10**6:
        assert len(batches) == 1
    order = lengths[torch.cat(batches)].tolist()
    assert order == sorted(order), "rows of similar length belong together"


# --- log-probs


@pytest.mark.parametrize("family", EXTRA)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_equal_plain_logits_of_each_row_alone(family, temperature):
    model = make_model(family)
    rollout, prompts, responses = random_rollout()
    logps, entropy = token_logps(model, rollout, temperature)
    assert logps.shape == entropy.shape == rollout.tokens.shape
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        span = slice(len(prompt), len(prompt) + len(response))
        expected = plain_logps(model, prompt, response, temperature)
        torch.testing.assert_close((logps[i, span], entropy[i, span]), expected, rtol=1e-5, atol=1e-6)
    assert not logps[rollout.loss_mask == 0].any() and not entropy[rollout.loss_mask == 0].any()


def test_token_logps_gradient_equals_that_of_the_plain_computation():
    rollout, prompts, responses = random_rollout()
    upstream, grads = torch.randn(2, *rollout.tokens.shape).double(), []
    for ours in (True, False):
        model = make_model()
        if ours:
            logps, entropy = token_logps(model, rollout, 0.7)
            loss = (upstream[0] * logps + upstream[1] * entropy).sum()
        else:
            loss = 0
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                span = slice(len(prompt), len(prompt) + len(response))
                logp, h = plain_logps(model, prompt, response, 0.7)
                loss = loss + (upstream[0, i, span] * logp + upstream[1, i, span] * h).sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_token_logps_of_a_multi_turn_row_skip_the_environment_and_read_it():
    model, rollout = make_model(), multi_turn()
    logps, _ = token_logps(model, rollout)
    row = rollout.tokens[0, :9].tolist()
    for t in (2, 3, 6, 7):
        torch.testing.assert_close(logps[0, t], plain_logps(model, row[:t], row[t : t + 1])[0][0], rtol=1e-6, atol=1e-7)
    assert not logps[0, [0, 1, 4, 5, 8, 9]].any()
    changed = multi_turn()
    changed.tokens[0, 4] = 3
    assert (token_logps(model, changed)[0][0, 6] - logps[0, 6]).abs() > 1e-4


def test_padding_content_extra_width_vocabulary_slice_and_given_hidden_states():
    model = make_model()
    rollout, prompts, responses = random_rollout()
    logps, entropy = token_logps(model, rollout, 0.7)
    dirty = dataclasses.replace(rollout, tokens=torch.where(rollout.attention_mask > 0, rollout.tokens, 18))
    torch.testing.assert_close(token_logps(model, dirty, 0.7), (logps, entropy), rtol=0, atol=0)
    wide = concat([rollout, assemble([[3] * 30], [[4]], PAD)], PAD)[torch.arange(8)]
    wide_logps, _ = token_logps(model, wide, 0.7)
    torch.testing.assert_close(wide_logps[:, : logps.shape[1]], logps)
    torch.testing.assert_close(token_logps(model, rollout, 0.7, hidden=sampled_hidden(model, rollout))[0], logps)
    small = assemble(prompts, [[x % 15 for x in r] for r in responses], PAD)
    sliced = token_logps(model, small, vocab_size=15)[0]
    expected = plain_logps(model, prompts[0], [x % 15 for x in responses[0]], vocab_size=15)[0]
    torch.testing.assert_close(sliced[0][small.loss_mask[0] > 0], expected, rtol=1e-6, atol=1e-7)


def test_rows_without_any_response_give_zeros_with_a_graph():
    model, rollout = make_model(dtype=torch.float32), assemble([[3, 4], [5]], [[], []], PAD)
    logps, entropy = token_logps(model, rollout)
    assert logps.shape == (2, 2) and not logps.any() and not entropy.any()
    (logps + entropy).sum().backward()
    assert not score(model, rollout, 100)[0].any()


@pytest.mark.parametrize("limit", [1, 20, 10**6])
def test_score_equals_token_logps_without_gradient(limit):
    model, rollout = make_model(dtype=torch.float32), random_rollout(4, n=12)[0]
    scored = score(model, rollout, limit, 0.7)
    assert not scored[0].requires_grad
    torch.testing.assert_close(scored, tuple(x.detach() for x in token_logps(model, rollout, 0.7)), rtol=0, atol=1e-5)
    sliced = token_logps(model, rollout[torch.tensor([0])], 0.7, V)[0].detach()
    torch.testing.assert_close(score(model, rollout, limit, 0.7, V)[0][:1], sliced, rtol=0, atol=1e-5)


def test_a_teacher_under_other_prompts_scores_the_same_tokens():
    teacher = make_model(seed=1, dtype=torch.float32)
    rollout, prompts, responses = random_rollout()
    others = [[4] * (1 + (3 * i) % 5) for i in range(len(prompts))]
    seen = under_prompts(rollout, others, PAD)
    ours = carry(score(teacher, seen, 30)[0], seen, rollout)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected = plain_logps(teacher, others[i], response)[0]
        found = ours[i, len(prompt) : len(prompt) + len(response)]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)
    hidden = sampled_hidden(teacher, seen)  # row for row with sampled_hidden of the student
    assert len(hidden) == rollout.loss_mask.sum()
    order = scatter(torch.arange(1.0, len(hidden) + 1), rollout)[rollout.loss_mask > 0]
    assert order.tolist() == list(range(1, len(hidden) + 1))
    tokens = seen.tokens[seen.loss_mask > 0]
    assert torch.equal(tokens, rollout.tokens[rollout.loss_mask > 0])


# --- a whole optimizer step


def grpo_gradients(limit, agg, seed=0):
    """The update of methods/grpo.py with every term on, in micro-batches of at most limit tokens."""
    config = grpo.Config(agg=agg, beta=0.1, ent_coef=0.01, ratio_level="seq" if agg == "seq" else "token")
    model, reference = make_model(dtype=torch.float32), make_model(seed=1, dtype=torch.float32)
    rollout = random_rollout(seed, n=8)[0]
    mask, reward = rollout.loss_mask, torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1])
    old = score(model, rollout, 10**6)[0] + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    ref = score(reference, rollout, 10**6)[0]
    advantages = grpo.group_advantages(reward, rollout.group, "group_std")
    c, n_tokens = grpo.row_weights(mask, rollout.group, agg, 12)[:, None], mask.sum()
    for rows in micro_batches(rollout, limit):
        m = mask[rows]
        logps, entropy = token_logps(model, rollout[rows])
        ratio = grpo.importance_ratio(logps, old[rows], m, config.ratio_level)
        policy = (grpo.policy_token_loss(logps, ratio, advantages[rows], config) * m * c[rows]).sum()
        kl = (grpo.kl_token_penalty(logps, ref[rows], ratio, config.kl) * m * c[rows]).sum()
        (policy + config.beta * kl - config.ent_coef * (entropy * m).sum() / n_tokens).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("agg", ["token", "token_group", "seq", "const"])
def test_grpo_gradient_does_not_depend_on_micro_batches(agg):
    whole = grpo_gradients(10**6, agg)
    for limit in (1, 20, 40):
        parts = grpo_gradients(limit, agg)
        assert (parts - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("flags", [{"est": "full", "beta": 0.5}, {"est": "topk", "top_k": 4, "support": "union"}])
def test_distillation_gradient_does_not_depend_on_micro_batches(flags):
    config, gradients = opd.Config(**flags), []
    for limit in (10**6, 20, 1):
        model, teacher = make_model(dtype=torch.float32), make_model(seed=1, dtype=torch.float32)
        rollout = random_rollout(5)[0]
        seen = under_prompts(rollout, [[4] * (1 + (3 * i) % 5) for i in range(len(rollout))], PAD)
        c = opd.row_weights(rollout.loss_mask, "token", 12)[:, None]
        for rows in micro_batches(rollout, limit):
            hidden = sampled_hidden(model, rollout[rows])
            with torch.no_grad():
                teacher_hidden = sampled_hidden(teacher, seen[rows])
            value, measured = opd.teacher_divergence(model, hidden, teacher, teacher_hidden, V, config)
            (scatter(value, rollout[rows]) * rollout.loss_mask[rows] * c[rows]).sum().backward()
            assert all(len(x) == len(hidden) for x in measured.values())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert all(p.grad is None for p in teacher.parameters())
    for parts in gradients[1:]:
        assert (parts - gradients[0]).norm() <= 1e-5 * gradients[0].norm()
