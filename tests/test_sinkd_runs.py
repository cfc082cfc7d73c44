"""methods/sinkd.py as whole runs: the folder, resume, every kind of model, data of one's own, what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from posttrain.common.cli import cli
from posttrain.common.labelled.batches import Reader, logits_of
from posttrain.common.labelled.mlp import MLP
from posttrain.common.labelled.models import load_all
from posttrain.common.labelled.text import Answers
from posttrain.methods import sinkd
from posttrain.methods.sinkd import Config

CPU = torch.device("cpu")
SMALL = {"steps": 6, "eval_every": 2, "save_every": 2, "eval_problems": 40, "prompts_per_step": 8}
WORDS = ["<pad>", "</s>", "one", "two", "three", "four", "plus", "is", "good", "bad", "film"]
EVAL = {"eval/accuracy", "eval/accuracy_se", "sinkd/agreement", "sinkd/l1", "sinkd/debiased", "sinkd/diagonal"}


def run(out, **given) -> Path:
    sinkd.main(Config(**{**SMALL, **given}, out=str(out)))
    return out


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def results(out):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines(out)]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


# --- the digits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sinkd") / "whole")


def test_a_run_leaves_its_folder_and_the_metrics_of_all_methods(whole):
    names = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model", "summary.json", "curve.png"}
    assert {path.name for path in whole.iterdir()} == names
    rows, summary = lines(whole), json.loads((whole / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(range(7))
    every = {"train/accuracy", "loss/total", "loss/ce", "loss/kd", "loss/sinkhorn", "sinkd/grad_ratio", "optim/lr"}
    assert all(row.keys() >= every for row in rows[1:])
    assert [row["step"] for row in rows[1:] if row.keys() >= EVAL] == [2, 4, 6]
    assert (
        summary["accuracy_before"] == rows[0]["eval/accuracy"]
        and summary["accuracy_after"] == rows[-1]["eval/accuracy"]
    )
    assert summary["accuracy_teacher"] > 0.9
    kinds = [row["kind"] for row in lines(whole, "samples.jsonl")]
    assert kinds == ["best", "worst", "other"] * 6
    total = [0.2 * row["loss/ce"] + 0.8 * row["loss/kd"] + 0.0008 * row["loss/sinkhorn"] for row in rows[1:]]
    assert total == pytest.approx([row["loss/total"] for row in rows[1:]], rel=1e-6)


def test_model_loads_plainly_and_gives_the_accuracy_of_the_summary(whole):
    model = MLP.from_pretrained(whole / "model").eval()
    table = load_all(Config(), "digits", CPU, True)[0]
    batch = table.collate("test", list(range(40)), Reader(None, CPU))
    right = (model(**batch.inputs).logits.argmax(-1) == batch.labels).double().mean().item()
    assert right == lines(whole)[-1]["eval/accuracy"]


def test_resume_goes_on_bit_for_bit(whole, tmp_path):
    out = run(tmp_path / "part", steps=4)
    resumed = run(out, resume=True)
    assert results(resumed) == results(whole)
    assert lines(resumed, "samples.jsonl") == lines(whole, "samples.jsonl")
    assert all(torch.equal(weights(resumed)[key], value) for key, value in weights(whole).items())


def test_same_seed_same_run_and_another_seed_another(whole, tmp_path):
    assert results(run(tmp_path / "same")) == results(whole)
    assert results(run(tmp_path / "other", seed=1))[1]["loss/ce"] != results(whole)[1]["loss/ce"]


def test_the_official_iteration_gives_the_same_run(whole, tmp_path):
    for ours, theirs in zip(results(run(tmp_path / "official", sink_form="official")), results(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("divergence", ["sinkhorn_sample", "kl", "rkl", "js", "tv", "l1", "none"])
def test_every_divergence_trains(divergence, tmp_path):
    rows = lines(run(tmp_path / "run", divergence=divergence, steps=2))
    named = {"sinkhorn_sample": "loss/sinkhorn", "none": "loss/kd"}.get(divergence, f"loss/{divergence}")
    assert rows[-1][named] > 0 and rows[-1]["optim/grad_norm"] > 0


def test_a_student_learns(tmp_path):
    flags = {"steps": 150, "prompts_per_step": 32, "eval_problems": 200, "eval_every": 0, "task": "digits:noise=0"}
    rows = lines(run(tmp_path / "run", **flags))
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.4


# --- texts


def tokenizer_of(words, ends: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        end = [("</s>", words.index("</s>"))]
        inner.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", special_tokens=end)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random models of each kind with their tokenizers, and two files."""
    at = tmp_path_factory.mktemp("models")
    size, ids = len(WORDS), {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    qwen = {**shape, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    bert = {**shape, "max_position_embeddings": 64, "id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    other = [*WORDS[:2], *reversed(WORDS[2:]), "more", "words"]
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        made = {
            "bert": BertForSequenceClassification(BertConfig(vocab_size=size, pad_token_id=0, **bert)),
            "t5": T5ForConditionalGeneration(T5Config(vocab_size=size, pad_token_id=0, eos_token_id=1, **t5)),
            "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=64, **ids)),
            "qwen": Qwen3ForCausalLM(Qwen3Config(vocab_size=len(other), **qwen, **ids)),
        }
        for name, model in made.items():
            model.save_pretrained(at / f"{name}-{role}")
            words = other if name == "qwen" else WORDS
            tokenizer_of(words, ends=name in ("bert", "t5")).save_pretrained(at / f"{name}-{role}")
    texts = [{"text": f"film {'good' if i % 2 else 'bad'} {WORDS[2 + i % 4]}", "label": "pos" if i % 2 else "neg"}
             for i in range(40)]  # fmt: skip
    sums = [{"prompt": f"{a} plus {b}", "answer": f"is {a} {b}" + " two" * (i % 3)} for i, (a, b) in enumerate(
        (a, b) for a in WORDS[2:8] for b in WORDS[2:8])]  # fmt: skip
    (at / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (at / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return at


def pair(folder, name, teacher=None, task="sums.jsonl"):
    given = {"model": folder / f"{name}-student", "teacher": folder / f"{teacher or name}-teacher"}
    return {key: str(value) for key, value in {**given, "task": folder / task}.items()} | {"threads": 1}


@pytest.mark.parametrize(
    ("name", "given"),
    [("bert", {"task": "texts.jsonl"}), ("t5", {}), ("t5", {"dtype": "bfloat16"}), ("gpt2", {}),
     ("gpt2", {"rows": 5, "vocab_top": 3}), ("gpt2", {"dtype": "bfloat16", "lora_rank": 2}), ("qwen", {}),
     ("gpt2", {"teacher": "qwen", "mode": "uld"}), ("gpt2", {"teacher": "qwen", "mode": "mlot"}),
     ("gpt2", {"teacher": "qwen", "mode": "mlot", "mlot_faithful": True}),
     ("bert", {"task": "texts.jsonl", "dtype": "bfloat16"})],
)  # fmt: skip
def test_each_kind_of_model_trains_and_resumes(folder, tmp_path, name, given):
    given = dict(given)
    flags = pair(folder, name, given.pop("teacher", None), given.pop("task", "sums.jsonl"))
    flags |= {**given, "lr": 1e-3, "save_every": 1}
    out = run(tmp_path / "run", **flags, steps=3)
    rows = lines(out)
    assert all(torch.tensor(list(row.values()), dtype=torch.float64).isfinite().all() for row in rows)
    assert all(row["optim/grad_norm"] > 0 for row in rows[1:]) and rows[-1]["optim/skipped"] == 0
    part = run(tmp_path / "part", **flags, steps=2)
    assert results(run(part, **flags, steps=3, resume=True))[2:3] == results(out)[2:3]
    assert (out / "model" / "config.json").is_file() and (out / "model" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "causal"), ("t5", "seq2seq")])
def test_rows_are_the_logits_that_predict_each_token_of_the_answers(folder, name, kind):
    """The shift, the mask and the padding against the model's own forward on one example at a time."""
    flags = pair(folder, name)
    table, readers, student, _, _ = load_all(Config(**flags), kind, CPU, True)
    assert isinstance(table, Answers)
    batch, i = table.collate("train", list(range(7)), readers[0]), 0
    rows = logits_of(student, batch)
    for prompt, answer, _ in table.encoded["train", id(readers[0])][:7]:
        if kind == "causal":
            alone = student(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        else:
            alone = student(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
        torch.testing.assert_close(rows[i : i + len(answer)], alone, atol=1e-5, rtol=1e-5)
        assert batch.labels[i : i + len(answer)].tolist() == answer and answer[-1] == 1
        i += len(answer)
    assert i == len(rows) == len(batch.owner)
    keep = torch.tensor([0, 3, 4])
    torch.testing.assert_close(logits_of(student, batch, keep), rows[keep])


# --- presets and refusals


def test_presets_are_the_sheet_s_table():
    for task, alpha, t, lr, size, anneal in (
        ("cola", 0.9, 1.0, 5e-5, 16, False), ("mnli", 0.8, 3.0, 4e-5, 16, True), ("mrpc", 1.0, 4.0, 3e-5, 16, True),
        ("qnli", 0.8, 3.0, 3e-5, 16, False), ("qqp", 1.0, 4.0, 4e-5, 32, True), ("rte", 0.9, 3.5, 2e-5, 16, False),
        ("sst2", 0.9, 2.0, 4e-5, 32, False),
    ):  # fmt: skip
        config = Config(**sinkd.PRESETS[task])
        given = (config.alpha, config.kd_temperature, config.lr, config.prompts_per_step, config.anneal)
        assert given == (alpha, t, lr, size, anneal) and config.schedule == "linear"
    t0 = Config(**sinkd.PRESETS["t0"])
    assert (t0.combine, t0.alpha, t0.kd_temperature, t0.sink_weight) == ("added", 0.1, 1.0, 0.0008)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"divergence": "kl", "eps": 0.2}, ["--eps"]), ({"divergence": "none", "tau": 1.0}, ["--tau"]),
     ({"divergence_weight": 1.0}, ["--divergence-weight"]), ({"rows": 4}, ["--rows"]), ({"mode": "uld"}, ["--mode"]),
     ({"alpha": 1.5}, ["--alpha"]), ({"sink_form": "official", "eps": 0.01}, ["underflows", "--eps"]),
     ({"task": "digits:noise=2"}, ["noise"]), ({"task": "digits:rows=5000"}, ["rows"]), ({"task": "digits:x=1"}, ["x"]),
     ({"task": "missing.jsonl", "model": "nothing"}, ["nothing"]),
     ({"eps": 0.0}, ["--eps"]), ({"iters": 0}, ["--iters"])],
)  # fmt: skip
def test_bad_flags_end_in_one_line(given, words, tmp_path, monkeypatch, capsys):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**SMALL, **given, "out": tmp_path / "run"}.items()]
    monkeypatch.setattr(sys, "argv", ["sinkd.py", *flags])
    with pytest.raises(SystemExit) as stop:
        cli(sinkd.main, Config, sinkd.PRESETS)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.strip().splitlines()) == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [("bert", {"task": "texts.jsonl", "label_column": "class"}, ["class", "label"]),
     ("gpt2", {"teacher": "qwen"}, ["vocabular"]), ("gpt2", {"max_length": 3}, ["--max-length"]),
     ("bert", {"task": "sums.jsonl", "text_column": "prompt", "label_column": "answer"}, ["classes"]),
     ("gpt2", {"prompt_column": "question"}, ["question"])],
)  # fmt: skip
def test_data_and_models_that_do_not_fit_end_in_one_line(folder, name, given, words, tmp_path, monkeypatch, capsys):
    given = dict(given)
    flags = pair(folder, name, given.pop("teacher", None), given.pop("task", "sums.jsonl"))
    test_bad_flags_end_in_one_line({**flags, **given}, words, tmp_path, monkeypatch, capsys)
