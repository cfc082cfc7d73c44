"""SinKD's runs: its data, its kinds of models, which logits enter the loss, resume, presets, what it refuses.

The mathematics of its functions is in test_sinkd_math.py, that of the kernels in test_sinkhorn.py.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from posttrain.common import cli
from posttrain.common.cli import UserError
from posttrain.common.labelled import digits
from posttrain.common.labelled.batches import Batch, Reader, logits_of
from posttrain.common.labelled.models import kind_of
from posttrain.common.labelled.text import Answers, Classes
from posttrain.common.machines import checkpoint
from posttrain.common.training import batch_of
from posttrain.methods import sinkd

CPU = torch.device("cpu")
LETTERS = [*"abcdefghijklmnop0123456789 >"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>"}
SMALL = {"steps": 4, "prompts_per_step": 4, "eval_every": 2, "save_every": 2, "eval_problems": 6}


def make_tokenizer(letters: list[str] = LETTERS) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def make_model(kind: str, vocabulary: int, **more):
    torch.manual_seed(more.pop("seed", 0))
    if kind.startswith("bert"):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        made = {"bert": BertForSequenceClassification, "bert-base": BertModel, "bert-mlm": BertForMaskedLM}[kind]
        return made(BertConfig(vocab_size=vocabulary, pad_token_id=0, max_position_embeddings=64, **sizes, **more))
    if kind.startswith("t5"):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        made = T5EncoderModel if kind == "t5-encoder" else T5ForConditionalGeneration
        return made(T5Config(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, **sizes, **more))
    if kind == "bart":
        sizes = {f"{part}_{key}": n for part in ("encoder", "decoder")
                 for key, n in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "decoder_start_token_id": 1}
        return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, d_model=16, **sizes, **ids, **more))
    ids = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=64, **ids))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind, letters, ...) -> folder of a tiny random model with a tokenizer of characters."""
    seen: dict[str, str] = {}

    def get(kind: str, letters: list[str] = LETTERS, **more) -> str:
        key = repr((kind, letters, more))
        if key not in seen:
            folder, tokenizer = tmp_path_factory.mktemp(kind), make_tokenizer(letters)
            make_model(kind, len(tokenizer) + more.pop("extra", 0), **more).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            seen[key] = str(folder)
        return seen[key]

    return get


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Folder with labelled texts, pairs and answers."""
    folder = tmp_path_factory.mktemp("tables")
    labelled = [{"text": f"{'abcdefg'[i % 7]}{i}", "more": f"b{i % 3}", "label": ["bad", "good", "odd"][i % 3]}
                for i in range(60)]  # fmt: skip
    answers = [
        {"prompt": f"{LETTERS[i % 16]}{i // 16}{'aa' * (i % 6 == 5)}>", "answer": f"{i % 10}{'ab' * (i % 4)}"}
        for i in range(60)
    ]
    for name, rows in (("labels", labelled), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = "sentence,label\n"
    (folder / "labels.csv").write_text(header + "".join(f"a{i},{i % 2}\n" for i in range(40)))
    return folder


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Half of a short run's time."""
    monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)


def run(out: Path, **given) -> list[dict]:
    sinkd.main(sinkd.Config(**{**SMALL, **given, "out": str(out)}))
    return lines(out)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def results(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    assert results(lines(a)) == results(lines(b)) and lines(a, "samples.jsonl") == lines(b, "samples.jsonl")
    x, y = ((out / "model" / "model.safetensors").read_bytes() for out in (a, b))
    assert x == y


# --- the digits


def test_digits_hold_out_600_and_draw_four_labels_in_ten_anew():
    (x, y), table = digits.images(), digits.Digits("digits", 3)
    assert len(y) == 1797 and x.min() == 0 and x.max() == 1
    assert table.size("train") == 600 and table.size("test") == 600 and torch.equal(table.splits["test"][1], y[:600])
    clean = digits.Digits("digits", 3, noise=0.0)
    assert torch.equal(clean.splits["train"][0], table.splits["train"][0])
    changed = (clean.splits["train"][1] != table.splits["train"][1]).sum().item()
    assert 190 < changed < 240 and changed == pytest.approx(600 * 0.4 * 0.9, abs=25)  # one in ten is drawn as it was
    drawn = digits.Digits("digits:noise=1", 3, noise=1.0).splits["train"][1]
    assert all(30 < count < 95 for count in drawn.bincount(minlength=10).tolist())  # 60 of each, uniformly
    rows = {tuple(row) for row in table.splits["train"][0].tolist()}
    assert not rows & {tuple(row) for row in x[:600].tolist()}


def test_digits_differ_by_seed_in_the_students_rows_only():
    a, b = digits.Digits("digits", 0), digits.Digits("digits", 1)
    assert not torch.equal(a.splits["train"][0], b.splits["train"][0])
    assert all(torch.equal(x, y) for x, y in zip(a.splits["test"], b.splits["test"], strict=True))


def test_the_teacher_of_digits_is_good_the_same_for_all_and_leaves_the_noise_alone():
    torch.manual_seed(5)
    teacher, after = digits.trained_teacher.__wrapped__(), torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    again = digits.trained_teacher()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    x, y = digits.images()
    assert (teacher(x[:600]).logits.argmax(-1) == y[:600]).float().mean() > 0.95


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    run(out, steps=12, eval_every=5, save_every=6, eval_problems=100)
    return out


def test_a_run_leaves_its_folder_and_finite_metrics(whole, capsys):
    names = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model", "summary.json", "curve.png"}
    assert {path.name for path in whole.iterdir()} == names
    rows, summary = lines(whole), json.loads((whole / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(range(13))
    shared = {"loss/total", "loss/ce", "loss/kd", "loss/sinkhorn", "train/accuracy", "optim/lr", "optim/grad_norm"}
    shared |= {"optim/skipped", "time/sample", "time/score", "time/update", "memory/peak_gib", "sinkd/grad_ratio"}
    evaluated = {"eval/accuracy", "eval/accuracy_se", "sinkd/agreement", "sinkd/l1"}
    for row in rows[1:]:
        assert row.keys() >= shared and all(map(math.isfinite, row.values()))
        assert (evaluated | {"sinkd/debiased", "sinkd/diagonal"} <= row.keys()) == (row["step"] in (5, 10, 12))
        parts = 0.2 * row["loss/ce"] + 0.8 * row["loss/kd"] + 0.0008 * row["loss/sinkhorn"]
        assert row["loss/total"] == pytest.approx(parts)
    assert rows[0].keys() >= evaluated | {"teacher/eval/accuracy"} and "teacher/eval/accuracy" not in rows[5]
    assert summary["method"] == "sinkd" and summary["accuracy_teacher"] > 0.9
    assert summary["accuracy_before"] < 0.3 and summary["accuracy_after"] == rows[-1]["eval/accuracy"]
    best, worst, other = lines(whole, "samples.jsonl")[:3]
    assert [row["kind"] for row in (best, worst, other)] == ["best", "worst", "other"]
    assert best["loss"] <= other["loss"] <= worst["loss"] and best["text"].count("\n") == 7
    assert best.keys() >= {"label", "predicted", "teacher"} and best["label"] in digits.NAMES


def test_loss_keys_name_the_third_term_and_none_has_none(tmp_path):
    rows = run(tmp_path / "a", divergence="rkl", sink_weight=0.0008, steps=2)
    assert "loss/rkl" in rows[1] and "loss/sinkhorn" not in rows[1] and "sinkd/debiased" in rows[2]
    rows = run(tmp_path / "b", divergence="none", steps=2)
    assert "sinkd/grad_ratio" not in rows[1] and rows[1]["loss/total"] == pytest.approx(
        0.2 * rows[1]["loss/ce"] + 0.8 * rows[1]["loss/kd"]
    )


def test_the_gradient_ratio_is_that_of_the_terms_on_the_logits(tmp_path, monkeypatch):
    seen, before = [], sinkd.objective

    def kept(student, teacher, labels, *rest):
        seen.append((student.detach().clone(), teacher, labels, rest[1:]))
        return before(student, teacher, labels, *rest)

    monkeypatch.setattr(sinkd, "objective", kept)
    rows = run(tmp_path / "run", steps=2)
    student, teacher, labels, (t, top, config) = seen[0]
    student = student.double().requires_grad_()
    terms = before(student, teacher.double(), labels, [], t, top, config)
    kd, third = (torch.autograd.grad(w * x, student, retain_graph=True)[0] for w, x in [*terms.values()][1:])
    assert rows[1]["sinkd/grad_ratio"] == pytest.approx((third.norm() / kd.norm()).item(), rel=1e-4)
    assert top == 0  # no bucket among classes


def test_interrupted_and_resumed_digits_equal_the_whole_run_bit_for_bit(whole, tmp_path, monkeypatch):
    out, calls, before = tmp_path / "run", iter(range(1, 99)), sinkd.objective

    def stopped(*args):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return before(*args)

    given = {"steps": 12, "eval_every": 5, "save_every": 6, "eval_problems": 100}
    monkeypatch.setattr(sinkd, "objective", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(out, **given)
    monkeypatch.undo()
    assert len(lines(out)) == 9 and not (out / "model").exists()
    torch.manual_seed(123)
    run(out, **given, resume=True)
    assert_same_run(whole, out)


def test_the_model_folder_loads_here_and_without_us(whole, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(whole / "model")
    state = checkpoint.read(whole / "checkpoint")["policy"]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model.config.id2label[3] == "3" and not (whole / "model" / "tokenizer.json").exists()
    code = "import sys; from transformers import AutoModelForSequenceClassification as A; import torch; "
    code += "m = A.from_pretrained(sys.argv[1], trust_remote_code=True); print(m(features=torch.zeros(1, 64)).logits)"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(whole / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "tensor" in done.stdout, done.stderr


def test_a_trained_network_may_be_student_or_teacher_of_digits(whole, tmp_path):
    rows = run(tmp_path / "run", model=str(whole / "model"), teacher=str(whole / "model"), steps=2)
    assert rows[0]["sinkd/agreement"] == 1 and rows[0]["sinkd/l1"] == 0
    assert rows[0]["eval/accuracy"] == rows[0]["teacher/eval/accuracy"]


@pytest.mark.parametrize(
    "given",
    [{"sink_grad": "plan"}, {"sink_grad": "implicit", "debias": True}, {"sink_form": "official"}, {"cost": "l2"},
     {"cost": "sq"}, {"divergence": "sinkhorn_sample", "tau": 1.0}, {"divergence": "kl"}, {"divergence": "js"},
     {"divergence": "tv"}, {"divergence": "l1"}, {"alpha": 0.0, "divergence": "none"}, {"combine": "added"},
     {"lora_rank": 2}, {"dtype": "bfloat16"}, {"sink_reduction": "mean", "eps": 0.02, "iters": 5}],
    ids=lambda given: ",".join(given),
)  # fmt: skip
def test_flags_run_and_change_the_weights(whole, tmp_path, given):
    rows = run(tmp_path / "run", steps=3, lr=0.01, **given)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    plain = run(tmp_path / "plain", steps=3, lr=0.01)
    same = results(rows) == results(plain)
    assert not same or given == {"sink_form": "official"}  # equal to rounding


def test_the_learning_rate_of_an_annealed_temperature_ends_at_one(tmp_path, monkeypatch):
    seen, before = [], sinkd.objective
    monkeypatch.setattr(sinkd, "objective", lambda *args: (seen.append(args[4]), before(*args))[1])
    run(tmp_path / "run", task="digits:rows=8", steps=6, anneal=True, kd_temperature=4.0)
    assert seen == [4, 4, 2.5, 2.5, 1, 1]  # batches of 4 of 8 rows: epochs of 2 steps


# --- batches


def test_epochs_laid_end_to_end_show_every_row_once_an_epoch_and_fill_every_batch():
    rows = [batch_of(10, 4, 7, step).tolist() for step in range(1, 11)]
    assert all(len(batch) == 4 for batch in rows)
    flat = [row for batch in rows for row in batch]
    for epoch in range(4):
        assert sorted(flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert flat[:10] != flat[10:20] and batch_of(10, 4, 8, 1).tolist() != rows[0]
    assert sorted(batch_of(3, 6, 0, 1).tolist()) == [0, 0, 1, 1, 2, 2]  # a batch may be longer than the table


def test_the_share_of_right_predictions_is_by_example():
    batch = Batch({}, torch.zeros(5), torch.tensor([0, 0, 0, 1, 1]))
    assert batch.mean(torch.tensor([1.0, 0, 0, 1, 1])).tolist() == pytest.approx([1 / 3, 1])


# --- which logits


def answers_of(made, tables, kind: str, name: str, max_length: int = 64):
    tokenizer = make_tokenizer()
    reader = Reader(tokenizer, CPU, max_length, {"t5": 0, "bart": 1}.get(name, 0))
    task = Answers(str(tables / "answers.jsonl"), kind, "prompt", "answer", [reader])
    model = make_model(name, len(tokenizer)).eval()
    model.autocast_dtype = None  # as load_model leaves it
    return task, reader, model


def test_the_state_before_a_token_predicts_it_in_causal_models(made, tables):
    task, reader, model = answers_of(made, tables, "causal", "gpt2")
    batch = task.collate("train", [0, 7, 3], reader)
    found, at = logits_of(model, batch), 0
    for row in (0, 7, 3):
        example = task.train[row]
        prompt = reader.tokenizer(example.prompt[0]["content"])["input_ids"]
        answer = [*reader.tokenizer(example.fields["solution"])["input_ids"], 1]
        with torch.no_grad():
            alone = model(torch.tensor([prompt + answer])).logits[0]
        for k, token in enumerate(answer):
            torch.testing.assert_close(found[at], alone[len(prompt) + k - 1])
            assert batch.labels[at] == token and batch.owner[at] == [0, 7, 3].index(row)
            at += 1
    assert at == len(batch.labels) == len(found)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_give_the_logits_of_their_own_loss(made, tables, name):
    task, reader, model = answers_of(made, tables, "seq2seq", name)
    if name == "bart":  # a bias that a head of one's own would forget
        model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    batch = task.collate("train", [0, 7, 3], reader)
    labels = torch.full(batch.at.shape, -100).masked_scatter(batch.at, batch.labels)
    inputs = {key: value for key, value in batch.inputs.items() if not key.startswith("decoder")}
    own = model(**inputs, labels=labels)  # it shifts the labels itself
    found = logits_of(model, batch)
    torch.testing.assert_close(found, own.logits[batch.at])
    torch.testing.assert_close(cross_entropy(found, batch.labels), own.loss)
    assert "forward" not in vars(model.get_output_embeddings())


def test_logits_are_fp32_and_only_of_the_kept_rows_and_gradients_flow_into_the_head(made, tables):
    task, reader, model = answers_of(made, tables, "causal", "gpt2")
    batch = task.collate("train", [0, 7, 3], reader)
    keep = torch.tensor([1, 4])
    torch.testing.assert_close(logits_of(model, batch, keep), logits_of(model, batch)[keep])
    sizes, head = [], model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, given, out: sizes.append(out.shape))
    logits_of(model, batch, keep).sum().backward()
    handle.remove()
    assert sizes == [(2, len(reader.tokenizer))] and head.weight.grad.abs().sum() > 0
    exact = logits_of(model, batch).detach()
    half = model.to(torch.bfloat16)
    out = logits_of(half, batch)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())
    assert (out - exact).abs().max() < 0.1


def test_padding_of_a_batch_changes_no_logits(made, tables):
    for kind, name in (("causal", "gpt2"), ("seq2seq", "t5")):
        task, reader, model = answers_of(made, tables, kind, name)
        alone = [logits_of(model, task.collate("train", [row], reader)) for row in (0, 7, 3)]
        together = logits_of(model, task.collate("train", [0, 7, 3], reader))
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_answers_end_and_their_cuts_are_counted(tables):
    tokenizer = make_tokenizer()
    reader = Reader(tokenizer, CPU, 6)
    task = Answers(str(tables / "answers.jsonl"), "causal", "prompt", "answer", [reader])
    every = task.encoded["train", id(reader)] + task.encoded["test", id(reader)]
    assert all(len(prompt) + len(answer) <= 6 and answer for prompt, answer, _ in every)
    assert task.left_out == 0 and any(cut for *_, cut in every)
    assert all(cut == (answer[-1] != 1) for _, answer, cut in every)
    batch = task.collate("train", list(range(8)), reader)
    assert batch.cut == sum(cut for *_, cut in task.encoded["train", id(reader)][:8])
    short = Answers(str(tables / "answers.jsonl"), "causal", "prompt", "answer", [Reader(tokenizer, CPU, 4)])
    assert short.left_out == 10  # prompts of five characters leave no room
    whole = Reader(tokenizer, CPU, 64)
    task = Answers(str(tables / "answers.jsonl"), "causal", "prompt", "answer", [whole])
    assert all(answer[-1] == 1 and not cut for _, answer, cut in task.encoded["train", id(whole)])


# --- classes


def test_classes_are_sorted_or_as_the_column_names_them_and_splits_do_not_overlap(tables, monkeypatch):
    task = Classes(str(tables / "labels.jsonl"), "text", "", "label")
    assert task.names == ["bad", "good", "odd"] and task.size("train") + task.size("test") == 60
    assert task.size("test") == 6 and not {e.prompt[0]["content"] for e in task.train} & {
        e.prompt[0]["content"] for e in task.test
    }
    import datasets

    names = datasets.ClassLabel(names=["zero", "one"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})

    def split(n, hidden=False):
        rows = {"text": [f"{n}{i}" for i in range(n)], "label": [-1 if hidden else i % 2 for i in range(n)]}
        return datasets.Dataset.from_dict(rows, features=features)

    splits = {"train": split(8), "validation": split(5), "test": split(6, hidden=True)}
    monkeypatch.setattr(datasets, "load_dataset", lambda **given: splits)
    task = Classes("glue:sst2", "text", "", "label")
    assert task.names == ["zero", "one"] and task.size("train") == 8 and task.size("test") == 5
    batch = task.collate("test", [0, 1], Reader(make_tokenizer(), CPU, 8))
    assert batch.labels.tolist() == [0, 1]


def test_pairs_of_texts_are_read_as_pairs_and_cut(tables):
    task = Classes(str(tables / "labels.jsonl"), "text", "more", "label")
    seen = []
    reader = Reader(lambda *texts, **given: seen.append((texts, given)) or SimpleNamespace(to=lambda d: {}), CPU, 9)
    task.collate("train", [0, 1], reader)
    (first, second), given = seen[0]
    assert first == [e.prompt[0]["content"] for e in task.train[:2]] and second[0].startswith("b")
    assert given["truncation"] and given["max_length"] == 9


# --- each kind of model trains


KINDS = {
    "classify": ("bert", {"task": "labels.jsonl", "num_labels": 3}),
    "classify, pairs": ("bert", {"task": "labels.jsonl", "text_pair_column": "more", "num_labels": 3}),
    "classify, csv": ("bert", {"task": "labels.csv", "text_column": "sentence", "num_labels": 2}),
    "seq2seq": ("t5", {"task": "answers.jsonl"}),
    "seq2seq, bart": ("bart", {"task": "answers.jsonl"}),
    "seq2seq, bf16": ("t5", {"task": "answers.jsonl", "dtype": "bfloat16"}),
    "seq2seq, lora": ("t5", {"task": "answers.jsonl", "lora_rank": 2}),
    "causal": ("gpt2", {"task": "answers.jsonl"}),
    "causal, all tokens": ("gpt2", {"task": "answers.jsonl", "vocab_top": 0, "rows": 0}),
    "causal, few rows": ("gpt2", {"task": "answers.jsonl", "vocab_top": 5, "rows": 3}),
    "classify, bf16": ("bert", {"task": "labels.jsonl", "dtype": "bfloat16", "num_labels": 3}),
}


@pytest.mark.parametrize(("name", "given"), KINDS.values(), ids=KINDS.keys())
def test_each_kind_of_model_trains_and_saves(made, tables, tmp_path, name, given):
    given = {**given, "task": str(tables / given["task"])}
    more = {"num_labels": given.pop("num_labels")} if "num_labels" in given else {}
    student, teacher = made(name, **more), made(name, seed=1, **more)
    rows = run(tmp_path / "run", model=student, teacher=teacher, steps=2, lr=0.01, **given)
    assert len(rows) == 3 and all(math.isfinite(value) for row in rows for value in row.values())
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    assert ("eval/greedy" in rows[0]) == (name != "bert") and "teacher/eval/accuracy" in rows[0]
    assert ("sinkd/cut" in rows[1]) == (name != "bert")
    assert kind_of(str(tmp_path / "run" / "model")) == {"bert": "classify", "gpt2": "causal"}.get(name, "seq2seq")
    if name == "gpt2":
        assert rows[1]["loss/sinkhorn"] <= 2 * (given.get("rows") or 60)


def test_a_base_model_gets_a_head_with_the_tables_classes(made, tables, tmp_path):
    given = {"task": str(tables / "labels.jsonl"), "teacher": made("bert", num_labels=3), "kind": "classify"}
    for number, base in enumerate(("bert-base", "bert-mlm")):
        run(tmp_path / f"{number}", model=made(base), steps=2, **given)
        config = json.loads((tmp_path / f"{number}" / "model" / "config.json").read_text())
        assert config["id2label"] == {"0": "bad", "1": "good", "2": "odd"}


def test_dropout_is_on_in_training_and_the_same_after_a_resume(made, tables, tmp_path, monkeypatch):
    """Also with adapters, beside which the new head trains whole and is stored."""
    given = {"task": str(tables / "labels.jsonl"), "teacher": made("bert", num_labels=3), "kind": "classify"}
    for lora in (0, 2):
        options = {**given, "model": made("bert-base"), "lora_rank": lora, "lr": 0.01}
        calls, before, modes = iter(range(1, 99)), sinkd.objective, []

        def stopped(*args, calls=calls, before=before):
            if next(calls) == 4:
                raise KeyboardInterrupt
            return before(*args)

        run(tmp_path / f"whole{lora}", **options)
        monkeypatch.setattr(sinkd, "objective", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"cut{lora}", **options)
        monkeypatch.setattr(sinkd, "objective", before)
        real = sinkd.logits_of

        def watched(model, *rest, real=real, modes=modes):
            modes.append(model.training)
            return real(model, *rest)

        monkeypatch.setattr(sinkd, "logits_of", watched)
        run(tmp_path / f"cut{lora}", **options, resume=True)
        monkeypatch.setattr(sinkd, "logits_of", real)
        assert_same_run(tmp_path / f"whole{lora}", tmp_path / f"cut{lora}")
        assert modes.count(True) == 2  # the student in steps 3 and 4; the teacher and all evaluations without


def test_at_most_so_many_rows_drawn_anew_each_step(made, tables, tmp_path, monkeypatch):
    kept, real = [], sinkd.logits_of

    def watched(model, batch, keep=None):
        kept.append(None if keep is None else (keep.tolist(), len(batch.labels)))
        return real(model, batch, keep)

    monkeypatch.setattr(sinkd, "logits_of", watched)
    given = {"model": made("gpt2"), "teacher": made("gpt2", seed=1), "task": str(tables / "answers.jsonl")}
    run(tmp_path / "run", **given, rows=5, eval_every=0)
    drawn = [each for each in kept if each]
    assert len(drawn) == 8 and all(a == b for a, b in zip(drawn[::2], drawn[1::2], strict=True))  # teacher, student
    assert all(len(rows) == 5 and rows == sorted(set(rows)) and max(rows) < n for rows, n in drawn)
    assert len({tuple(rows) for rows, _ in drawn}) > 1


def test_heads_of_different_padding_share_their_first_tokens(made, tables, tmp_path):
    given = {"model": made("gpt2"), "teacher": made("gpt2", extra=7), "task": str(tables / "answers.jsonl")}
    for top in (0, 64):
        rows = run(tmp_path / f"{top}", **given, vocab_top=top, steps=2)
        assert all(math.isfinite(value) for row in rows for value in row.values())


OTHER = [*"0123456789abcxyz>"]  # another vocabulary, of other ids


@pytest.mark.parametrize("given", [{"mode": "uld"}, {"mode": "mlot"}, {"mode": "mlot", "mlot_faithful": True}],
                         ids=["uld", "mlot", "mlot, faithful"])  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_models_whose_tokenizers_differ_train_in_the_other_modes(made, tables, tmp_path, given, name):
    task = {"task": str(tables / "answers.jsonl"), "steps": 2, "lr": 0.01}
    rows = run(tmp_path / "run", model=made(name), teacher=made(name, OTHER), **task, **given)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    parts = {"uld"} if given["mode"] == "uld" else {"mlot_h", "mlot_k", "mlot_q"}
    assert {key.removeprefix("loss/") for key in rows[1] if key.startswith("loss/")} == {"total", "ce", *parts}
    weights = {"ce": 1, "uld": 1.5, "mlot_h": 1.5, "mlot_k": 0.15, "mlot_q": 0.15}
    assert rows[1]["loss/total"] == pytest.approx(sum(weights[key] * rows[1][f"loss/{key}"] for key in ("ce", *parts)))
    assert "sinkd/agreement" not in rows[0] and "teacher" not in lines(tmp_path / "run", "samples.jsonl")[0]


def test_a_teacher_with_an_own_tokenizer_may_classify(made, tables, tmp_path):
    given = {"task": str(tables / "labels.jsonl"), "model": made("bert", num_labels=3)}
    rows = run(tmp_path / "run", **given, teacher=made("bert", OTHER, num_labels=3), steps=2)
    assert math.isfinite(rows[-1]["loss/total"])


# --- presets

SHEET = {  # section 6: annealed, batch, lr, alpha, T, seed
    "cola": (False, 16, 5e-5, 0.9, 1.0, 0),
    "mnli": (True, 16, 4e-5, 0.8, 3.0, 0),
    "mrpc": (True, 16, 3e-5, 1.0, 4.0, 0),
    "qnli": (False, 16, 3e-5, 0.8, 3.0, 0),
    "qqp": (True, 32, 4e-5, 1.0, 4.0, 0),
    "rte": (False, 16, 2e-5, 0.9, 3.5, 20),
    "sst2": (False, 32, 4e-5, 0.9, 2.0, 0),
}


def parsed(monkeypatch, *flags: str) -> sinkd.Config:
    monkeypatch.setattr(sys, "argv", ["sinkd.py", *flags])
    return cli.parse(sinkd.Config, sinkd.PRESETS)


@pytest.mark.parametrize("task", SHEET)
def test_presets_are_the_released_scripts_and_explicit_flags_win(monkeypatch, task):
    config = parsed(monkeypatch, "--preset", task)
    got = (config.anneal, config.prompts_per_step, config.lr, config.alpha, config.kd_temperature, config.seed)
    assert got == SHEET[task] and config.schedule == "linear" and config.max_length == 128 and config.warmup == 0
    assert config.sink_weight == 0.0008 and config.sink_reduction == "sum" and config.combine == "convex"
    assert (config.tau, config.eps, config.iters, config.weight_decay, config.max_grad_norm) == (2, 0.1, 20, 0, 1)
    assert parsed(monkeypatch, "--preset", task, "--alpha", "0.5").alpha == 0.5


def test_presets_of_language_models(monkeypatch):
    t0, neo = (parsed(monkeypatch, "--preset", name) for name in ("t0", "gpt_neo"))
    for config in (t0, neo):
        assert (config.combine, config.alpha, config.kd_temperature) == ("added", 0.1, 1.0)
        assert (config.lr, config.weight_decay, config.prompts_per_step) == (1e-4, 0.01, 4)
    assert t0.divergence == "sinkhorn" and t0.max_length == 1024 and neo.divergence == "none"
    mlot = parsed(monkeypatch, "--preset", "mlot")
    assert (mlot.mode, mlot.iters, mlot.mlot_faithful, mlot.transport_weight, mlot.mlot_top) == (
        "mlot",
        10,
        True,
        1.5,
        50,
    )
    assert parsed(monkeypatch, "--preset", "uld").mode == "uld"


@pytest.mark.parametrize("preset", sinkd.PRESETS)
def test_every_preset_passes_its_own_check(preset):
    kind = "causal" if preset in ("t0", "gpt_neo", "uld", "mlot") else "classify"
    sinkd.check(sinkd.Config(**sinkd.PRESETS[preset]), kind)


# --- what is refused: flags, words of the line

BAD = {
    "alpha above 1": ({"alpha": 1.5}, ["--alpha", "convex"]),
    "underflow": ({"sink_form": "official", "eps": 0.01}, ["0.019", "--sink-form stable"]),
    "underflow, l2": ({"sink_form": "official", "eps": 0.01, "cost": "l2"}, ["0.014"]),
    "a weight without its term": ({"divergence": "kl", "sink_weight": 0.1}, ["--sink-weight", "sinkhorn"]),
    "another's weight": ({"divergence_weight": 1.0}, ["--divergence-weight", "rkl"]),
    "eps of nothing": ({"divergence": "none", "eps": 0.2}, ["--eps", "sinkhorn"]),
    "eps of one row": ({"divergence": "sinkhorn_sample", "eps": 0.2}, ["--eps"]),
    "a gradient of nothing": ({"divergence": "tv", "sink_grad": "plan"}, ["--sink-grad"]),
    "a temperature of nothing": ({"alpha": 0.0, "kd_temperature": 2.0}, ["--kd-temperature", "--alpha"]),
    "tau of nothing": ({"divergence": "none", "tau": 1.0}, ["--tau"]),
    "rows of digits": ({"rows": 5}, ["--rows", "language model"]),
    "a bucket of digits": ({"vocab_top": 5}, ["--vocab-top", "language model"]),
    "text of digits": ({"text_column": "sentence"}, ["--text-column"]),
    "a length of digits": ({"max_length": 5}, ["--max-length"]),
    "a kind of digits": ({"kind": "causal"}, ["--kind"]),
    "uld of digits": ({"mode": "uld"}, ["--mode"]),
    "mlot's flags elsewhere": ({"mlot_top": 5}, ["--mlot-top", "mlot"]),
    "a weight of uld elsewhere": ({"transport_weight": 1.0}, ["--transport-weight", "uld"]),
    "unknown option": ({"task": "digits:nois=0.1"}, ["nois", "noise"]),
    "share out of range": ({"task": "digits:noise=2"}, ["noise", "share"]),
    "more rows than there are": ({"task": "digits:rows=5000"}, ["1197"]),
    "a language model for digits": ({"model": "addition-student"}, ["addition-student", "--task"]),
    "unknown model": ({"model": "no/such"}, ["no/such"]),
    "unknown task": ({"task": "digitz", "model": "addition-student", "teacher": "addition-student"}, ["digitz"]),
}


@pytest.mark.parametrize(("given", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(tmp_path, given, words, capfd, monkeypatch):
    out = tmp_path / "run"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**SMALL, **given, "out": out}.items()]
    monkeypatch.setattr(sys, "argv", ["sinkd.py", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.cli(sinkd.main, sinkd.Config, sinkd.PRESETS)
    said = capfd.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700, said
    assert all(word.lower() in said.lower() for word in words), said
    assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize(("flag", "value"), [("eps", 0), ("tau", 0), ("iters", 0), ("kd-temperature", 0),
                                             ("max-length", 0), ("mlot-top", 0), ("alpha", -1), ("sink-weight", -1),
                                             ("vocab-top", -1), ("rows", -1)])  # fmt: skip
def test_numbers_out_of_range_are_refused_and_zero_rows_and_tokens_mean_all(monkeypatch, flag, value):
    with pytest.raises(UserError, match=f"--{flag}"):
        cli.check_ranges(parsed(monkeypatch, f"--{flag}={value}"))
    cli.check_ranges(parsed(monkeypatch, "--vocab-top=0", "--rows=0"))


def refused(tmp_path, words: list[str], **given) -> None:
    with pytest.raises(UserError) as said:
        run(tmp_path / "run", **given)
    assert all(word.lower() in str(said.value).lower() for word in words), str(said.value)


def test_models_and_tables_that_do_not_fit_are_refused_in_words(made, tables, tmp_path):
    labels, answers, bert = str(tables / "labels.jsonl"), str(tables / "answers.jsonl"), made("bert", num_labels=3)
    texts = {"task": labels, "model": bert, "teacher": bert}
    refused(tmp_path, ["classes", "2", "3", "bad"], **{**texts, "teacher": made("bert", num_labels=2)})
    refused(tmp_path, ["classes", "2"], **{**texts, "model": made("bert", num_labels=2)})
    named = made("bert", num_labels=3, id2label={0: "good", 1: "bad", 2: "odd"})
    refused(tmp_path, ["good, bad, odd", "bad, good, odd", "id2label"], **{**texts, "teacher": named})
    refused(tmp_path, ["good, bad, odd", "id2label"], **{**texts, "model": named})
    alike = made("bert", num_labels=3, id2label={0: "Bad", 1: "GOOD", 2: "odd"})
    run(tmp_path / "named", **{**texts, "steps": 1, "teacher": alike})
    refused(tmp_path, ["teacher", "no trained classification head"], **{**texts, "teacher": made("bert-base")})
    refused(tmp_path, ["BertModel", "--kind"], **{**texts, "model": made("bert-base")})
    refused(tmp_path, ["colour", "--text-column", "label"], **texts, text_column="colour")
    refused(tmp_path, ["colour", "--label-column"], **texts, label_column="colour")
    refused(tmp_path, ["colour", "--text-pair-column"], **texts, text_pair_column="colour")
    refused(tmp_path, ["--prompt-column"], **texts, prompt_column="text")
    lm = {"task": answers, "model": made("gpt2"), "teacher": made("gpt2")}
    refused(tmp_path, ["--text-column"], **lm, text_column="prompt")
    refused(tmp_path, ["--max-length 2", "raise it"], **lm, max_length=2)
    refused(tmp_path, ["vocabular"], **{**lm, "teacher": made("gpt2", OTHER)})
    refused(tmp_path, ["lacks weights"], **{**lm, "model": made("t5-encoder"), "kind": "seq2seq"})
    refused(tmp_path, ["lacks weights"], **{**lm, "teacher": made("bert-base")}, kind="causal")
    refused(tmp_path, ["--alpha"], **lm, mode="uld", alpha=0.5)
    refused(tmp_path, ["--rows"], **lm, mode="mlot", rows=5)
    refused(tmp_path, ["0.019"], **lm, mode="mlot", mlot_faithful=True, eps=0.01)


ROWS = {
    "a class that is none": ([{"text": "a", "label": None}], ["row 0"]),
    "a hidden class": ([{"text": "a", "label": -1}], ["row 0"]),
    "a class with a fraction": ([{"text": "a", "label": 0.5}], ["row 0", "class"]),
    "no text": ([{"text": "", "label": 1}], ["row 0", "text"]),
    "one class": ([{"text": f"{i}", "label": "x"} for i in range(30)], ["one class", "x"]),
    "too few": ([{"text": "a", "label": 0}], ["too few"]),
}


@pytest.mark.parametrize(("rows", "words"), ROWS.values(), ids=ROWS.keys())
def test_bad_rows_are_refused_in_words(tmp_path, made, rows, words):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bert = made("bert", num_labels=2)
    refused(tmp_path, words, task=str(tmp_path / "rows.jsonl"), model=bert, teacher=bert)
