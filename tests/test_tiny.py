"""The shipped tiny models: what they are, what they can do, and that scripts/pretrain_tiny.py makes the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.common.cli import UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.models import TINY, load_model, load_tokenizer
from posttrain.common.rollout import Sampling
from posttrain.common.tasks import make_task
from posttrain.common.training import evaluate
from posttrain.scripts import pretrain_tiny

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_tiny.py"
FAMILIES = {
    "addition": ["addition-student", "addition-teacher"],
    "arithmetic": ["arithmetic-student", "arithmetic-add-teacher", "arithmetic-mul-teacher"],
    "lookup": ["lookup-student", "lookup-doubter"],
    "steps": ["steps-student", "steps-guesser"],
}
MODELS = [name for family in FAMILIES.values() for name in family]


@pytest.fixture(scope="module", params=MODELS)
def folder(request):
    return TINY / request.param


def test_characters_survive_the_tokenizer_one_token_each(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n  two  spaces \n" + "".join(map(chr, range(32, 127))) + " ."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("12<eos>")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("12<eos><pad>")["input_ids"], skip_special_tokens=True) == "12"
    assert tokenizer.bos_token is None and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_chat_template_only_joins_the_messages(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "123+456="}, {"role": "assistant", "content": " 5\n"}]
    for prompt in (False, True):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert text == "123+456= 5\n"


def test_plain_transformers_loads_them_with_their_end_token(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert config.model_type == "qwen3" and config.head_dim == 32 and config.vocab_size == len(tokenizer)
    assert 0.1e6 < model.num_parameters() < 1e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_weights_are_bfloat16(folder):
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_each_has_a_record_of_how_it_was_made(folder):
    assert f"pretrain_tiny.py {folder.name.split('-')[0]}" in (folder / "training.json").read_text()


def test_all_tiny_models_share_one_tokenizer_and_fit_in_12_mb():
    vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in TINY.iterdir() if path.is_dir()]
    assert len(vocabularies) >= 2 and all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 12e6


@pytest.mark.parametrize(("name", "low", "high"), [("addition-student", 0.15, 0.40), ("addition-teacher", 0.90, 1.0)])
def test_held_out_accuracy_is_what_the_methods_count_on(name, low, high):
    task, model = make_task("addition"), load_model(name, torch.device("cpu"), train=False)
    engine = HFEngine(model, load_tokenizer(name))
    metrics, rollout = evaluate(engine, task, task.heldout(128), 4, Sampling(1.0, 20), seed=0)
    slack = 3 * metrics["eval/accuracy_se"]  # 128 problems are a sample of those the range is stated for
    assert low - slack <= metrics["eval/accuracy"] <= high + slack
    assert rollout.finished.float().mean() > 0.9
    routes = [task.route(text) for text in rollout.texts]
    written = routes.count("high") + routes.count("low")
    assert 0.4 < routes.count("high") / written < 0.9  # both orders are alive


def test_each_expert_is_good_at_its_own_domain_and_useless_at_the_other():
    task, found = make_task("arithmetic"), {}
    for name in FAMILIES["arithmetic"]:
        engine = HFEngine(load_model(name, torch.device("cpu"), train=False), load_tokenizer(name))
        found[name] = evaluate(engine, task, task.heldout(128), 4, Sampling(1.0, 20), seed=0, by="domain")[0]
    for domain, other in (("add", "mul"), ("mul", "add")):
        student, expert = found["arithmetic-student"], found[f"arithmetic-{domain}-teacher"]
        assert expert[f"eval/accuracy/{domain}"] > student[f"eval/accuracy/{domain}"] + 0.15
        assert expert[f"eval/accuracy/{other}"] < 0.05 < student[f"eval/accuracy/{domain}"] < 0.5
        assert expert[f"eval/accuracy/{domain}"] < 0.95  # useful, imperfect
    for metrics in found.values():
        halves = [metrics[f"eval/accuracy/{domain}"] for domain in ("add", "mul")]
        assert metrics["eval/accuracy"] == pytest.approx(sum(halves) / 2)


def command(family, out, *flags):
    small = ["--seed", "3", "--max-steps", "6", "--save-every", "2", "--problems", "8"]
    return [sys.executable, str(SCRIPT), family, "--out", str(out), *small, *flags]


def run(family, out, *flags):
    result = subprocess.run(command(family, out, *flags), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return {name: load_file(out / name / "model.safetensors") for name in FAMILIES[family]}


def same(a, b):
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


@pytest.mark.parametrize("family", ["addition", "arithmetic"])  # from nothing, and one model from another
def test_pretraining_gives_the_same_bits_again_and_after_a_kill(tmp_path, family):
    whole = run(family, tmp_path / "whole")
    out = tmp_path / "killed"
    process = subprocess.Popen(command(family, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list(out.glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = torch.load(next(out.glob("*.pt")), weights_only=True)
    assert 0 < state["step"] <= 6
    assert same(run(family, out, "--resume"), whole)
    assert not same(run(family, tmp_path / "other", "--seed", "4"), whole)


def test_an_unknown_family_ends_in_one_line():
    result = subprocess.run([sys.executable, str(SCRIPT), "sudoku"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "addition" in result.stderr


@pytest.mark.parametrize("trial", [{"max_steps": 2}, {"problems": 4}, {"seed": 1, "resume": True}])
def test_a_trial_leaves_the_shipped_models_alone(trial, monkeypatch):
    monkeypatch.setattr(pretrain_tiny, "train", None)
    with pytest.raises(UserError, match="would replace the shipped models by others: name a folder by --out"):
        pretrain_tiny.main(pretrain_tiny.Config("lookup", **trial))


def test_a_folder_that_cannot_be_had_is_one_line_and_models_in_it_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_tiny, "train", None)
    (tmp_path / "afile").write_text("mine")
    for out in (tmp_path / "afile", tmp_path / "afile" / "below"):
        with pytest.raises(UserError, match=r"cannot write the folder .*choose another --out"):
            pretrain_tiny.main(pretrain_tiny.Config("lookup", out=str(out)))
    record = tmp_path / "lookup-doubter" / "training.json"
    record.parent.mkdir()
    record.write_text('{"command": "python scripts/pretrain_tiny.py lookup --seed 1"}')
    with pytest.raises(UserError, match="lookup-doubter exists: add --resume"):
        pretrain_tiny.main(pretrain_tiny.Config("lookup", out=str(tmp_path)))
    (tmp_path / "lookup-doubter").rename(tmp_path / "lookup-student")
    with pytest.raises(UserError, match=r"was made by .* --seed 1: choose another --out"):
        pretrain_tiny.main(pretrain_tiny.Config("lookup", out=str(tmp_path), resume=True))
