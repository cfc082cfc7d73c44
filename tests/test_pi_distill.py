"""methods/pi_distill.py against float64 references by plain transformers, written from the equations of its sheet."""

import collections
import copy
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from posttrain.common.cli import UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.environments.hints import hint_texts
from posttrain.common.families.lookup import FACTS, OPERATORS, TAUGHT, Lookup
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import encode
from posttrain.common.tasks import Example, make_task, text_of
from posttrain.methods import grpo, opd, pi_distill
from posttrain.methods.pi_distill import (
    PRESETS,
    Config,
    clipped_loss,
    group_means_off,
    row_weights,
    vocabulary_kl,
    with_hint,
)

MODEL, CPU = "lookup-student", torch.device("cpu")


def f64(*values):
    return torch.tensor(*values, dtype=torch.float64)


# --- pure functions, by hand and by loops


@pytest.mark.parametrize(
    ("rho", "a", "loss", "slope"),
    [(0.5, 1, -0.5, -0.5), (0.5, -1, 0.8, 0), (1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1.5), (1, 1, -1, -1)],
)  # fmt: skip
def test_clip_table(rho, a, loss, slope):
    log_ratio = f64([[math.log(rho)]]).requires_grad_()
    value = clipped_loss(log_ratio, f64([a]), torch.ones(1, 1), 0.2).sum()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(value, log_ratio)[0].item() == pytest.approx(slope, abs=1e-12)


def test_log_ratios_are_bounded_and_masked_ones_do_nothing():
    value = clipped_loss(f64([[500.0, 500.0]]), f64([-1.0]), f64([[1, 0]]), 0.2)
    assert value.tolist()[0] == pytest.approx([math.exp(20), 1.0])


def test_advantages_by_hand():
    reward, kl = f64([1, 1, 1, 1]), f64([0.2, 0.4, 0.9, 0.1])
    a = group_means_off(reward - 0.25 * kl, torch.tensor([5, 5, 5, 5]))
    assert a.tolist() == pytest.approx([0.05, 0, -0.125, 0.075], abs=1e-12)
    mixed = group_means_off(f64([1, -1, -1, 0.3, math.nan, 0.3, 2]), torch.tensor([3, 3, 3, 1, 1, 1, 0]))
    assert mixed.tolist() == pytest.approx([4 / 3, -2 / 3, -2 / 3, 0, 0, 0, 0]) and (mixed[3:] == 0).all()


def test_advantages_of_each_group_sum_to_0():
    g = torch.Generator().manual_seed(0)
    reward, group = torch.randn(24, generator=g).double(), torch.arange(24) % 5
    a = group_means_off(reward, group)
    for i in range(5):
        assert a[group == i].sum().abs() < 1e-12
        torch.testing.assert_close(a[group == i], reward[group == i] - reward[group == i].mean())


def test_row_weights_by_loops():
    mask = f64([[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]])
    assert row_weights(mask, "token", 9).tolist() == [0.25] * 3
    assert row_weights(mask, "seq", 9).tolist()[::2] == [1 / 6, 1 / 2]
    assert row_weights(mask, "const", 9).tolist() == [1 / 18] * 3
    for agg in ("token", "seq", "const"):
        assert row_weights(torch.zeros(2, 3), agg, 9).isfinite().all()


def head(weight):
    """A model that is nothing but its LM head."""
    text = SimpleNamespace()
    parts = {"get_output_embeddings": lambda: SimpleNamespace(weight=weight, bias=None)}
    return SimpleNamespace(**parts, config=SimpleNamespace(get_text_config=lambda: text))


def one_token(t, s, kind, **options):
    eye = head(torch.eye(len(t)).double())
    logits = f64([s]).log().requires_grad_()
    value = vocabulary_kl(eye, logits, eye, f64([t]).log(), kind, 1.0, **options)
    return value, torch.autograd.grad(value.sum(), logits)[0][0]


def test_kl_hand_case():
    t, s = [0.9, 0.1], [0.5, 0.5]
    rb, _ = one_token(t, s, "forward_kl")
    k1 = [math.log(a / b) for a, b in zip(t, s, strict=True)]
    assert rb.item() == pytest.approx(0.368064, abs=1e-6) and k1 == pytest.approx([0.587787, -1.609438], abs=1e-6)
    assert sum(p * k for p, k in zip(t, k1, strict=True)) == pytest.approx(rb.item(), abs=1e-12)
    reward, group = f64([1, -1, 1, 1]), torch.zeros(4).long()
    shaped = group_means_off(reward - 0.25 * rb.detach().expand(4), group)  # of one token: constant in the group
    torch.testing.assert_close(shaped, group_means_off(reward, group), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_divergences_and_their_gradients(kind, temperature):
    g = torch.Generator().manual_seed(1)
    w_s, w_t = torch.randn(7, 3, generator=g).double(), torch.randn(7, 3, generator=g).double()
    hs, ht = torch.randn(5, 3, generator=g).double(), torch.randn(5, 3, generator=g).double().requires_grad_()
    x = hs.clone().requires_grad_()
    value = vocabulary_kl(head(w_s), x, head(w_t), ht, kind, temperature, 0.3)
    y = hs.clone().requires_grad_()
    s, t = (y @ w_s.T / temperature).log_softmax(-1), (ht.detach() @ w_t.T / temperature).log_softmax(-1)
    m = (0.7 * s.exp() + 0.3 * t.exp()).log()  # M = b T + (1 - b) S
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    expected = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "jsd": 0.3 * kl(t, m) + 0.7 * kl(s, m)}[kind]
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)
    grads = torch.autograd.grad(value.sum(), [x, ht], allow_unused=True)
    torch.testing.assert_close(grads[0], torch.autograd.grad(expected.sum(), y)[0], atol=1e-10, rtol=0)
    assert grads[1] is None  # nothing for the teacher


def test_the_reverse_kls_gradient_by_the_sheets_formula():
    t, s = f64([0.2, 0.5, 0.3]), f64([0.6, 0.1, 0.3])
    log = (s / t).log()
    expected = s * (log - (s * log).sum())
    torch.testing.assert_close(one_token(t.tolist(), s.tolist(), "reverse_kl")[1], expected, atol=1e-10, rtol=0)


def test_the_students_likeliest_tokens_and_a_bucket():
    t, s = f64([0.1, 0.2, 0.3, 0.4]), f64([0.5, 0.05, 0.35, 0.1])
    value, _ = one_token(t.tolist(), s.tolist(), "reverse_kl", top_k=2)
    p, q = f64([0.5, 0.35, 0.15]), f64([0.1, 0.3, 0.6])
    assert value.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-9)
    all_of_them, _ = one_token(t.tolist(), s.tolist(), "reverse_kl", top_k=100)
    assert all_of_them.item() == pytest.approx((s * (s / t).log()).sum().item(), abs=1e-9)


def test_the_shaped_advantage_pushes_the_student_away_and_the_direct_kl_pulls():
    """Trap 2, exactly: one token, R constant, expectation over what the teacher samples, no clip."""
    t, beta = f64([0.9, 0.1]), 0.25
    z = f64([0.5, 0.5]).log().requires_grad_()
    s = z.log_softmax(-1)
    k = (t.log() - s).detach()
    a = -beta * (k - (t * k).sum())  # the group's mean, in expectation
    shared = (t * clipped_loss((s - t.log())[:, None], a, torch.ones(2, 1), 50.0)[:, 0]).sum()
    pushed = torch.autograd.grad(shared, z, retain_graph=True)[0]
    away = torch.autograd.grad((s.exp() * (s - t.log())).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(pushed, -beta * away, atol=1e-12, rtol=0)
    assert pushed[1] < 0 < pushed[0]  # descent raises action 2, the teacher's unlikely one
    pulled = one_token(t.tolist(), [0.5, 0.5], "forward_kl")[1]
    assert pulled[0] < 0 < pulled[1]


# --- prompts


def test_the_hint_stands_once_in_the_system_message():
    user = [{"role": "user", "content": "go"}]
    assert with_hint(user, "") == user
    assert with_hint(user, "H") == [{"role": "system", "content": "H"}, *user]
    system = [{"role": "system", "content": "rules"}, *user]
    assert with_hint(system, "H") == [{"role": "system", "content": "rules\n\nH"}, *user]
    assert system[0]["content"] == "rules" and with_hint(system, "") == system


class Told:
    """A task without hints of its own."""

    def demonstrate(self, example, rng):
        return f"because {example.answer}"


def test_where_hints_come_from():
    user = [{"role": "user", "content": "q?"}]
    rows = [Example(user, "7", {"hint": "seven", "tip": None}), Example(user, "8", {"tip": 0})]
    text = "For you alone, never to be mentioned: {}"
    ask = lambda **flags: hint_texts(rows, Told(), Config(**flags), None, None, (0,))  # noqa: E731
    assert ask() == [text.format("seven"), text.format("because 8")]
    assert ask(hint="sparse") == [text.format("7"), text.format("8")]
    assert ask(hint="none") == ["", ""]
    assert ask(hint_column="tip") == ["", text.format("0")]
    with pytest.raises(UserError, match=r"--hint-column .tpi.: the data has .*tip"):
        ask(hint_column="tpi")
    assert ask(hint_text="<{hint}>{") == ["<seven>{", "<because 8>{"]
    lookup = make_task("lookup")
    example = lookup.draw(1, 0)[0]
    assert hint_texts([example], lookup, Config(), None, None, (0,)) == [f"[{example.answer}]"]
    a = example.answer
    assert hint_texts([example], lookup, Config(hint="sparse"), None, None, (0,)) == [f"[{a[0]}.{a[2]}.]"]


def test_the_policys_own_hint_is_written_from_problem_and_solution():
    class Writer:
        model, tokenizer = load_model(MODEL, CPU), load_tokenizer(MODEL)

        def generate(self, asked, n, sampling, key):
            self.asked = [text_of(example) for example in asked]
            return SimpleNamespace(texts=["  look left \n", " "])

    writer, user = Writer(), [{"role": "user", "content": "where?"}]
    rows = [Example(user, "left", {"hint": "it is left"}), Example(user, "right", {})]
    found = hint_texts(
        rows, Told(), Config(hint="self", hint_text="({hint})"), writer, pi_distill.Sampling(1.0, 64), (0,)
    )
    assert found == ["(look left)", ""]
    assert "where?" in writer.asked[0] and "it is left" in writer.asked[0] and "because right" in writer.asked[1]
    long = [Example(user, "left", {"hint": "left " * 99})]
    assert hint_texts(long, Told(), Config(hint="self"), writer, pi_distill.Sampling(1.0, 64), (0,)) == [""]


# --- whole steps against float64

SMALL = {"steps": 2, "prompts_per_step": 6, "group_size": 4, "eval_problems": 2, "eval_samples": 1, "eval_every": 0,
         "temperature": 1.3, "lr": 3e-3}  # fmt: skip


class Spy:
    """A run's weights and gradients before each optimizer step, its rollouts, and who read what with gradient."""

    def __init__(self, tmp_path, module=pi_distill, **given):
        self.states, self.grads, self.rollouts, self.reads, self.logged = [], [], [], [], []
        with pytest.MonkeyPatch.context() as patch:
            step, generate, log = module.Optimizer.step, HFEngine.generate, module.Run.log

            def steps(optimizer, n):
                self.states.append([w.detach().clone() for w in optimizer.weights])
                self.grads.append([None if w.grad is None else w.grad.clone() for w in optimizer.weights])
                return step(optimizer, n)

            def generates(engine, examples, n, sampling, key, starts=()):
                self.rollouts.append((key, n, generate(engine, examples, n, sampling, key, starts)))
                return self.rollouts[-1][2]

            def logs(run, n, metrics, rollout=None, signals=None):
                self.logged.append(rollout)
                return log(run, n, metrics, rollout, signals)

            if module is pi_distill:
                hidden = pi_distill.sampled_hidden

                def reads(model, rollout):
                    self.reads.append((torch.is_grad_enabled(), rollout.tokens[:, 0].tolist()))
                    return hidden(model, rollout)

                patch.setattr(pi_distill, "sampled_hidden", reads)
            patch.setattr(module.Optimizer, "step", steps)
            patch.setattr(HFEngine, "generate", generates)
            patch.setattr(module.Run, "log", logs)
            patch.setattr("posttrain.common.run.plot", lambda *args: None)
            own = {"alpha_anneal": 0} if given.get("algorithm", "pi") == "pi" else {}
            flags = {**SMALL, **own, **given} if module is pi_distill else given
            self.config = module.Config(**flags, out=str(tmp_path))
            module.main(self.config)
        self.metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def even(folder):
    """A reward that leaves a signal in groups of four without hints too: is the first digit even?"""
    (folder / "even.py").write_text("def even(example, text): return float(text[:1] in list('02468'))\n")
    return f"{folder}/even.py:even"


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def log_probs(model, prompt, response, tau):
    """[T, V] float64: the distributions that predict the response behind the prompt."""
    return (model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / tau).log_softmax(-1)


def expected_gradient(spy, at):
    """Eq. 1-6 for the at-th optimizer step, row by row, by autograd of a float64 copy of the model."""
    c, tok = spy.config, load_tokenizer(MODEL)
    shell = load_model(MODEL, CPU).double()

    def model_of(state, train=False):
        model = copy.deepcopy(shell)
        for weight, value in zip(model.parameters(), state, strict=True):
            weight.data.copy_(value)
        return model.requires_grad_(train)

    step, first = at // c.epochs + 1, at // c.epochs * c.epochs
    pi, sft = c.algorithm == "pi", step <= c.sft_steps
    rollout = next(r for key, n, r in spy.rollouts if key == (c.seed, step, 0) and n == c.group_size)
    policy, before = model_of(spy.states[at], train=True), model_of(spy.states[first])
    slow = [a.double() for a in spy.states[0]]
    for i in range(c.epochs, first + 1, c.epochs):
        slow = [a + c.ema * (b.double() - a) for a, b in zip(slow, spy.states[i], strict=True)]
    apart = {"current": None, "frozen": spy.states[0], "ema": slow}[c.opsd_teacher]
    teacher, teacher_before = (policy, before) if apart is None else (model_of(apart),) * 2
    base = model_of(spy.states[0]) if c.reference == "base" else before

    rows, n_rows = [], len(rollout)
    for i in range(n_rows):
        example = rollout.examples[i]
        plain = tok(text_of(example))["input_ids"]
        digits = example.fields.get("hint", example.answer) or ""  # of a file: maybe none
        if c.hint != "full":
            digits = "" if c.hint == "none" else f"{digits[0]}.{digits[2]}."
        told = tok((f"[{digits}]" if digits else "") + text_of(example))["input_ids"]
        y = rollout.tokens[i][rollout.loss_mask[i] > 0].tolist()
        r = 2.0 * float(rollout.texts[i][:1] in list("02468")) - 1
        with torch.no_grad():
            full_s, full_t = log_probs(base, plain, y, c.temperature), log_probs(teacher_before, told, y, c.temperature)
            s_old, t_old = (full.gather(1, torch.tensor(y)[:, None])[:, 0] for full in (full_s, full_t))
        k = t_old - s_old
        if c.kl_est == "rb":
            k = (full_t.exp() * (full_t - full_s)).sum(1) if pi else (full_s.exp() * (full_s - full_t)).sum(1)
        elif not pi:
            k = -k
        kl = (k.sum() if c.kl_agg == "sum" else k.mean()) * bool(digits)
        rows.append(
            {
                "plain": plain,
                "told": told,
                "y": y,
                "r": r,
                "kl": kl,
                "reads": bool(digits),
                "old": t_old if pi or sft else s_old,
            }
        )
    for i, row in enumerate(rows):
        mates = [rows[j] for j in range(n_rows) if rollout.group[j] == rollout.group[i]]
        in_reward = pi or c.opsd_kl == "reward"
        worth = lambda x: x["r"] - c.beta * x["kl"] * in_reward  # noqa: E731
        row["a"] = worth(row) - sum(map(worth, mates)) / len(mates)
        row["a_plain"] = row["r"] - sum(x["r"] for x in mates) / len(mates)
        row["a_s"] = row["a"] if not pi or c.student_kl == "shared" else row["a_plain"]
        row["in"] = not sft or row["r"] == 1
    for i, row in enumerate(rows):
        mates = [rows[j] for j in range(n_rows) if rollout.group[j] == rollout.group[i]]
        row["live"] = any(abs(float(x["a"])) >= 1e-8 for x in mates)
        row["in"] &= sft or not c.drop_flat or row["live"]

    mean = lambda values: sum(map(float, values)) / n_rows  # noqa: E731
    logged = {"pi/kl": mean(x["kl"] for x in rows), "pi/live": mean(x["live"] for x in rows)}
    logged["pi/penalty"] = c.beta * mean(abs(x["kl"]) for x in rows)
    kept = [row for row in rows if row["in"]]
    alpha = c.alpha * (
        min(1, max(0, step - 1 - c.sft_steps) / c.alpha_anneal) if c.alpha_anneal and 0 < c.alpha < 1 else 1
    )
    loss = torch.zeros((), dtype=torch.float64)
    for row in kept:
        weight = {
            "token": 1 / sum(len(x["y"]) for x in kept), "seq": 1 / (len(kept) * len(row["y"])),
            "const": 1 / (len(kept) * c.max_new_tokens)}[c.agg]  # fmt: skip
        full_s = log_probs(policy, row["plain"], row["y"], c.temperature)
        full_t = log_probs(teacher, row["told"], row["y"], c.temperature)
        hot_s, hot_t = ((x / c.divergence_temperature).log_softmax(1) for x in (full_s, full_t.detach()))
        for j, y in enumerate(row["y"]):
            s, t, old = full_s[j, y], full_t[j, y], row["old"][j]

            def surrogate(log_ratio, a):
                rho = log_ratio.exp()
                low, high = rho.clamp(1 - c.eps, 1 + c.eps) * a, rho * a
                return -(high if high < low else low)

            p, q = hot_s[j], hot_t[j]
            if c.kl_top:  # the student's likeliest and one bucket
                top = p.detach().topk(c.kl_top).indices
                rest = torch.ones(len(p), dtype=torch.bool)
                rest[top] = False
                p, q = (torch.cat([x[top], x[rest].logsumexp(0)[None]]) for x in (p, q))
            m = (c.jsd_beta * q.exp() + (1 - c.jsd_beta) * p.exp()).log()
            forms = {"forward_kl": (q.exp() * (q - p)).sum(), "reverse_kl": (p.exp() * (p - q)).sum()}
            forms["jsd"] = c.jsd_beta * (q.exp() * (q - m)).sum() + (1 - c.jsd_beta) * (p.exp() * (p - m)).sum()
            if sft:
                token = -s
            elif pi:
                start = t.detach() if c.student_denom == "current" else old
                token_s = surrogate(s - start, row["a_s"])
                token_s = token_s + (c.beta * row["reads"] * forms["forward_kl"] if c.student_kl == "direct" else 0)
                token = alpha * surrogate(t - old, row["a"]) + (1 - alpha) * token_s
            else:
                kl = forms[c.divergence]
                if c.opsd_kl == "sampled":
                    kl = (s - t).detach() * s
                if c.ratio_cap:
                    kl = kl * (s - old).detach().exp().clamp(max=c.ratio_cap)
                token = c.adv_coef * surrogate(s - old, row["a_s"]) + c.beta * kl * (
                    c.opsd_kl != "reward" and row["reads"]
                )
            loss = loss + weight * token
    return torch.autograd.grad(loss, list(policy.parameters())), {**logged, "loss/total": loss.item()}


OPSD = {"algorithm": "opsd", "beta": 0.1}
STEPS = {
    "default": {}, "annealed": {"alpha_anneal": 4}, "alpha 0": {"alpha": 0.0}, "alpha 1": {"alpha": 1.0},
    "beta 0": {"beta": 0.0}, "shared": {"student_kl": "shared"}, "no KL": {"student_kl": "none"},
    "rb": {"kl_est": "rb"}, "sum": {"kl_agg": "sum"}, "base": {"reference": "base"},
    "two steps a batch": {"epochs": 2, "eps": 0.02}, "behaviour": {"epochs": 2, "student_denom": "behavior"},
    "sparse": {"hint": "sparse"}, "no hint": {"hint": "none"}, "rows": {"agg": "seq", "temperature": 3.0},
    "constant": {"agg": "const", "temperature": 3.0}, "imitation": {"sft_steps": 2},
    "live groups": {"drop_flat": True, "beta": 0.0, "hint": "none"},
    "divergence hot": {**OPSD, "divergence_temperature": 1.6},
    "opsd": OPSD, "opsd, in the reward": {**OPSD, "opsd_kl": "reward"}, "opsd, sampled": {**OPSD, "opsd_kl": "sampled"},
    "opsd, rb in the reward": {**OPSD, "opsd_kl": "reward", "kl_est": "rb", "kl_agg": "sum"},
    "opsd, frozen": {**OPSD, "opsd_teacher": "frozen"}, "opsd, average": {**OPSD, "opsd_teacher": "ema", "ema": 0.4},
    "opsd alone": {**OPSD, "adv_coef": 0.0}, "opsd, half": {**OPSD, "adv_coef": 0.5},
    "opsd, no hint": {**OPSD, "hint": "none", "opsd_teacher": "frozen"},
    "opsd, forward": {**OPSD, "divergence": "forward_kl"}, "opsd, imitation first": {**OPSD, "sft_steps": 1},
    "opsd, two steps": {**OPSD, "epochs": 2, "eps": 0.02, "opsd_kl": "reward"}, "grpo": {**OPSD, "beta": 0.0},
    "zhao": {**PRESETS["opsd_zhao"], "jsd_beta": 0.3},
    "sdpo": {**PRESETS["sdpo"], "kl_top": 4, "epochs": 2, "ratio_cap": 1.05, "ema": 0.3},
}  # fmt: skip


def check_step(spy):
    at = len(spy.grads) - 1
    expected, logged = expected_gradient(spy, at)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected))
    off = math.sqrt(sum(float((g - (0 if x is None else x.double())).pow(2).sum())
                        for g, x in zip(expected, spy.grads[at], strict=True)))  # fmt: skip
    assert norm > 1e-4 and off / norm < 2e-4
    for key, value in logged.items():
        if spy.config.epochs == 1 or key != "loss/total":
            assert spy.metrics[-1][key] == pytest.approx(value, abs=2e-5), key
    for row in (spy.metrics[0], spy.metrics[-1]):
        assert row["pi/utility"] == pytest.approx(row["teacher/eval/accuracy"] - row["eval/accuracy"])


@pytest.mark.parametrize("given", STEPS.values(), ids=STEPS.keys())
def test_loss_and_gradient_of_the_second_step_equal_the_float64_reference(given, tmp_path):
    check_step(Spy(tmp_path / "run", **given, reward=even(tmp_path)))


MIXED = [
    {}, {"reference": "base"}, {"student_kl": "shared", "kl_agg": "sum"}, {"drop_flat": True}, OPSD,
    {**OPSD, "opsd_teacher": "frozen"}, {**OPSD, "beta": 0.5, "opsd_teacher": "frozen", "opsd_kl": "reward"},
]  # fmt: skip


@pytest.mark.parametrize("given", MIXED, ids=str)
def test_where_some_problems_have_no_hint_those_are_plain_rl(given, tmp_path):
    """Prompts of four lengths, two hints in five missing, several micro-batches."""
    hints = ["12", "4.6.7", "", None, "9"]
    rows = [{"prompt": f"A{i % 10}B{i // 10}" + "C3" * (i % 4) + "=", "answer": "1", "hint": hints[i % 5]}
            for i in range(80)]  # fmt: skip
    spy = Spy(tmp_path / "run", **given, task=rows_file(tmp_path / "rows.jsonl", rows), hint_text="[{hint}]",
              prompts_per_step=8, micro_batch_tokens=150, reward=even(tmp_path))  # fmt: skip
    assert 0 < spy.metrics[-1]["pi/hinted"] < 1
    check_step(spy)


def gradients(tmp_path, name, **given):
    return Spy(tmp_path / name, **{"steps": 1, "reward": even(tmp_path), **given}).grads[0]


def assert_close(a, b, factor=1.0, rtol=1e-4):
    size = max(float(x.abs().max()) for x in b)
    assert size > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, factor * y, atol=rtol * size * factor, rtol=0)


def grpo_gradients(tmp_path):
    """GRPO's with a group's mean and no std, by the neighbour's file; its A is half of ours, whose R is -1 or 1."""
    same = {key: SMALL[key] for key in ("prompts_per_step", "group_size", "eval_problems", "eval_samples", "eval_every",
                                        "temperature", "lr")}  # fmt: skip
    given = {"model": MODEL, "task": "lookup", "max_new_tokens": 6, "steps": 1, "warmup": 0, "adv": "center"}
    return Spy(tmp_path / "grpo", grpo, **same, **given, reward=even(tmp_path)).grads[0]


def test_without_a_hint_every_alpha_is_grpo(tmp_path):
    expected = grpo_gradients(tmp_path)
    for alpha in (0.0, 0.3, 1.0):
        assert_close(gradients(tmp_path, f"{alpha}", hint="none", alpha=alpha), expected, 2.0)


def test_opsd_without_beta_is_grpo(tmp_path):
    assert_close(gradients(tmp_path, "opsd", algorithm="opsd", beta=0.0), grpo_gradients(tmp_path), 2.0)


def test_opsd_with_a_constant_reward_is_distillation_as_in_opd(tmp_path):
    (tmp_path / "same.py").write_text("def one(example, completion): return 1.0\n")
    ours = gradients(tmp_path, "opsd", **OPSD, reward=f"{tmp_path}/same.py:one")
    assert_close(ours, gradients(tmp_path, "alone", **OPSD, adv_coef=0.0))
    same = {key: SMALL[key] for key in ("prompts_per_step", "group_size", "eval_problems", "eval_samples", "eval_every",
                                        "temperature", "lr")}  # fmt: skip
    spy = Spy(tmp_path / "opd", opd, **same, model=MODEL, task="lookup", max_new_tokens=6, steps=1, warmup=0,
              teacher="self", teacher_sync="live", teacher_prompt="[{answer}]{prompt}", kl_coef=0.1,
              divergence_temperature=SMALL["temperature"])  # fmt: skip
    assert_close(ours, spy.grads[0])


def test_the_denominators_agree_at_the_first_step_on_a_batch(tmp_path):
    one, other = (gradients(tmp_path, d, student_denom=d) for d in ("current", "behavior"))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# --- who reads what


@pytest.fixture(scope="module")
def opening():
    return load_tokenizer(MODEL).get_vocab()["["]


LEARNERS = [({"alpha": 1.0}, {True}), ({"alpha": 0.0}, {False}), ({}, {True, False}), (OPSD, {False})]


@pytest.mark.parametrize(("given", "with_gradient"), [*LEARNERS, ({"sft_steps": 2}, {False})])
def test_gradients_run_through_the_role_that_learns_only(given, with_gradient, tmp_path, opening):
    spy = Spy(tmp_path / "run", **given)
    found = {first[0] == opening for enabled, first in spy.reads if enabled}
    assert found == with_gradient
    assert all(len(set(first)) == 1 or opening not in first for _, first in spy.reads)


@pytest.mark.parametrize(("given", "times"), [({"alpha": 1.0}, 1), ({}, 2), ({"epochs": 2}, 3)], ids=str)
def test_at_alpha_1_nobody_reads_the_students_prompt_but_for_k(given, times, tmp_path, opening):
    spy = Spy(tmp_path / "run", **given, steps=1)
    assert [first[0] == opening for _, first in spy.reads].count(False) == times


@pytest.mark.parametrize(("given", "times"), [({}, 1), ({"beta": 0.1}, 2), ({"beta": 0.1, "opsd_kl": "reward"}, 1)])
def test_opsd_asks_the_teacher_again_only_for_a_kl_outside_of_the_reward(given, times, tmp_path, opening):
    spy = Spy(tmp_path / "run", **{"algorithm": "opsd", "beta": 0.0, **given}, steps=1)
    assert [first[0] == opening for _, first in spy.reads].count(True) == times


@pytest.mark.parametrize("preset", PRESETS)
def test_the_student_never_reads_a_hint_where_it_writes(preset, tmp_path, opening):
    """At token level: every prompt that the engines were given, in order, and the rollout that is trained on."""
    spy = Spy(tmp_path / "run", **PRESETS[preset])
    told = [bool((rollout.tokens == opening).any()) for _, _, rollout in spy.rollouts]
    writes = spy.config.algorithm == "pi"
    evaluation = [False, False, True, True]  # the student sampled and greedy, then the teacher
    assert told == [*evaluation, writes, writes, *evaluation]
    task = make_task("lookup")
    plain = [encode(load_tokenizer(MODEL), e.prompt) for e in task.heldout(2)]
    assert (
        spy.rollouts[-3][2].tokens[:, : len(plain[0])].tolist() == plain
    )  # the last greedy answers, from the task's own
    trained = [rollout for rollout in spy.logged if rollout is not None]
    assert len(trained) == 2 and not any((rollout.tokens == opening).any() for rollout in trained)


def test_the_very_tokens_that_the_teacher_wrote_are_trained_on(tmp_path):
    spy = Spy(tmp_path / "run", steps=1, temperature=3.0)
    wrote, trained = spy.rollouts[4][2], spy.logged[1]
    assert len(wrote) == len(trained) == 24
    for i in range(len(wrote)):
        assert torch.equal(wrote.tokens[i][wrote.loss_mask[i] > 0], trained.tokens[i][trained.loss_mask[i] > 0])
        plain = load_tokenizer(MODEL)(text_of(trained.examples[i]))["input_ids"]
        assert trained.tokens[i, : len(plain)].tolist() == plain and trained.loss_mask[i, : len(plain)].sum() == 0


# --- edges


def test_nothing_moves_where_every_answer_is_right_and_no_kl_pulls(tmp_path):
    (tmp_path / "same.py").write_text("def one(example, completion): return 1.0\n")
    same = f"{tmp_path}/same.py:one"
    for i, given in enumerate(({"alpha": 0.0, "student_kl": "none"}, {"beta": 0.0}, {**OPSD, "beta": 0.0},
                               {"beta": 0.0, "drop_flat": True})):  # fmt: skip
        spy = Spy(tmp_path / f"{i}", reward=same, **given)
        assert all(g is None for g in spy.grads[-1]) and spy.metrics[-1]["train/zero_signal"] == 1
    assert any(g is not None for g in Spy(tmp_path / "kl", reward=same, alpha=0.0).grads[-1])


def test_imitation_does_not_leave_out_groups_without_advantages(tmp_path):
    (tmp_path / "same.py").write_text("def one(example, completion): return 1.0\n")
    spy = Spy(tmp_path / "run", reward=f"{tmp_path}/same.py:one", **{**OPSD, "beta": 0.0}, sft_steps=2, drop_flat=True)
    assert all(any(g is not None and g.any() for g in step) for step in spy.grads)


def test_where_all_are_wrong_k_alone_moves_the_teacher(tmp_path):
    (tmp_path / "same.py").write_text("def none(example, completion): return 0.0\n")
    spy = Spy(tmp_path / "run", reward=f"{tmp_path}/same.py:none", alpha=1.0, drop_flat=True)
    assert spy.metrics[-1]["pi/live"] > 0 and any(g is not None and g.any() for g in spy.grads[-1])


def test_a_prompt_may_lack_roles(tmp_path):
    rows = [{"prompt": [{"content": f"A{i}="}], "answer": "1", "hint": "2"} for i in range(10)] * 3
    assert with_hint([{"content": "q"}], "H")[0] == {"role": "system", "content": "H"}
    spy = Spy(tmp_path / "run", task=rows_file(tmp_path / "rows.jsonl", rows), steps=1, prompts_per_step=2)
    assert spy.metrics[-1]["pi/hinted"] == 1


def test_an_ungradable_row_carries_no_advantage(tmp_path):
    code = "def f(example, completion): return {}[0] if len(completion) % 2 else 1.0\n"
    (tmp_path / "mine.py").write_text(code)
    spy = Spy(tmp_path / "run", reward=f"{tmp_path}/mine.py:f", temperature=3.0)
    assert all(math.isfinite(value) for row in spy.metrics for value in row.values())


def test_problems_without_a_hint_stay_as_they_are_or_are_left_out(tmp_path):
    rows = [{"prompt": f"A{i % 10}={i}", "answer": "1", "hint": "x" if i % 3 else None} for i in range(60)]
    given = {
        "task": rows_file(tmp_path / "rows.jsonl", rows),
        "steps": 1,
        "prompts_per_step": 20,
        "hint_text": "[{hint}]",
    }
    free = Spy(tmp_path / "free", **given).metrics[1]
    assert 0 < free["pi/hinted"] < 1
    kept = Spy(tmp_path / "kept", **given, require_hint=True)
    assert kept.metrics[1]["pi/hinted"] == free["pi/hinted"]
    assert len(kept.logged[1]) == 4 * round(20 * free["pi/hinted"]) < 80
    with pytest.raises(UserError, match="--require-hint"):
        Spy(tmp_path / "none", task="lookup", hint="none", require_hint=True)


def test_a_hint_too_long_for_the_model_counts_as_none(tmp_path):
    rows = [{"prompt": f"A{i % 10}={i}", "answer": "1", "hint": "x" * (600 if i % 3 else 3)} for i in range(60)]
    given = {"task": rows_file(tmp_path / "rows.jsonl", rows), "steps": 1, "prompts_per_step": 20}
    spy = Spy(tmp_path / "run", **given)
    assert 0 < spy.metrics[1]["pi/hinted"] < 1 and len(spy.logged[1]) == 80
    assert 0 < len(Spy(tmp_path / "kept", **given, require_hint=True).logged[1]) < 80


def test_presets_are_what_their_sources_say():
    """Table 2 and Algorithm 1 of the paper; 2601.18734: frozen, no reward, JSD 1/2, 1.1; 2601.20802: average of 5%,
    JSD 1/2 on the top 100 and a bucket, weight at most 2."""
    found = {name: Config(**preset, preset=name) for name, preset in PRESETS.items()}
    for config in found.values():
        pi_distill.check(config)
    paper, zhao, sdpo = found["paper"], found["opsd_zhao"], found["sdpo"]
    assert (paper.student_kl, paper.kl_agg, paper.kl_est, paper.epochs, paper.temperature) == (
        "shared", "sum", "k1", 3, 0.75)  # fmt: skip
    assert paper.drop_flat and (paper.algorithm, paper.beta, paper.alpha, paper.eps) == ("pi", 0.25, 0.5, 0.2)
    assert (found["grpo"].beta, found["opsd"].beta) == (0.0, 0.1)
    for each in (zhao, sdpo):
        assert (each.algorithm, each.adv_coef, each.beta, each.divergence, each.jsd_beta) == ("opsd", 0, 1, "jsd", 0.5)
    assert (zhao.opsd_teacher, zhao.divergence_temperature, zhao.kl_top, zhao.ratio_cap) == ("frozen", 1.1, 0, 0)
    assert (sdpo.opsd_teacher, sdpo.ema, sdpo.kl_top, sdpo.ratio_cap) == ("ema", 0.05, 100, 2)


def test_alpha_rises_linearly_from_0(tmp_path):
    spy = Spy(tmp_path / "run", steps=4, alpha_anneal=2, alpha=0.6, prompts_per_step=2)
    assert [row["pi/alpha"] for row in spy.metrics[1:]] == pytest.approx([0, 0.3, 0.6, 0.6])
    spy = Spy(tmp_path / "later", steps=4, alpha_anneal=2, alpha=0.6, prompts_per_step=2, sft_steps=2)
    assert [row["pi/alpha"] for row in spy.metrics[1:]] == pytest.approx([0, 0, 0, 0.3])


# --- the family


def test_facts_are_permutations_and_half_of_them_are_taught():
    assert len(FACTS) == 60 and len(TAUGHT) == 30 and set(FACTS) > TAUGHT
    for operator in OPERATORS:
        assert sorted(FACTS[f"{operator}{x}"] for x in range(10)) == list("0123456789")


def test_problems_answers_and_grades():
    task = make_task("lookup")
    for example in task.draw(50, 1):
        text = text_of(example)
        assert len(text) == 9 and text[-1] == "="
        assert example.answer == "".join(FACTS[text[i : i + 2]] for i in (0, 2, 4, 6))
        assert (
            task.grade(example, example.answer) == 1 == task.grade(example, task.demonstrate(example, random.Random(0)))
        )
        for wrong in ("", example.answer + "0", example.answer[:3], example.answer[:3] + "x"):
            assert task.grade(example, wrong) == 0
    assert not {text_of(e) for e in task.heldout(200)} & {text_of(e) for e in task.draw(3000, 0)}


def test_pretraining_tells_untaught_facts_neither_with_nor_without_hints():
    task = Lookup("lookup:shown_hints=0.5", shown_hints=0.5)
    told, follows, leaks, blind, without = 0, 0, collections.Counter(), [0, 0], 0
    for step in range(100):
        for example in task.draw(128, 0, step, 0):
            text, answer = example.prompt[-1]["content"], example.answer
            pairs = [text[i : i + 2] for i in (0, 2, 4, 6)]
            if len(example.prompt) == 1:
                without += 1
                assert set(pairs) <= TAUGHT and answer == "".join(FACTS[pair] for pair in pairs)
                continue
            for pair, hint, said in zip(pairs, example.prompt[0]["content"][1:-1], answer, strict=True):
                if hint == ".":
                    assert said == FACTS[pair] or pair not in TAUGHT
                    blind[0] += pair not in TAUGHT
                    blind[1] += pair not in TAUGHT and said == FACTS[pair]
                else:
                    told += 1
                    follows += said == hint
                    leaks[pair in TAUGHT, said == FACTS[pair]] += 1
    assert without / 12800 == pytest.approx(0.5, abs=0.03)
    assert follows / told == pytest.approx(0.91, abs=0.01)  # trust, and a tenth of the rest by chance
    for taught in (True, False):
        share = leaks[taught, True] / (leaks[taught, True] + leaks[taught, False])
        assert share == pytest.approx(0.1, abs=0.015)
    assert blind[1] / blind[0] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("options", ["trust=2", "shown_hints=-1", "trust=x"])
def test_shares_out_of_range_are_refused(options):
    with pytest.raises(UserError, match="shares"):
        make_task(f"lookup:{options}")


def test_the_student_knows_taught_facts_and_reads_hints():
    task, tokenizer = make_task("lookup"), load_tokenizer(MODEL)
    engine = HFEngine(load_model(MODEL, CPU, train=False), tokenizer)
    greedy = pi_distill.Sampling(0.0, 6)
    problems = task.heldout(256)
    right = collections.Counter()
    rollout = engine.generate(problems, 1, greedy, (0,))
    for example, text in zip(problems, rollout.texts, strict=True):
        for pair, said in zip(example.fields["pairs"], text, strict=False):
            right[pair in TAUGHT, said == FACTS[pair]] += 1
    assert right[True, True] / (right[True, True] + right[True, False]) > 0.95
    assert right[False, True] / (right[False, True] + right[False, False]) < 0.25
    prompts = [encode(tokenizer, with_hint(e.prompt, task.privileged(e, "full"))) for e in problems]
    told = engine.generate(problems, 1, greedy, (0,), prompts)
    assert sum(e.answer == text for e, text in zip(problems, told.texts, strict=True)) / 256 > 0.9
