"""scripts/explain.py: the page shows what the run computed, for all ten methods and for a file of one's own."""

import html
import html.parser
import json
import re
import sys
from pathlib import Path

import pytest

from posttrain.common.rollout import Rollout
from posttrain.methods import grpo, sod
from posttrain.scripts import explain

ROOT = Path(explain.__file__).resolve().parents[1]
VOID = {"meta", "input", "br"}
SMALL = ["--prompts-per-step=3", "--eval-problems=2"]
FLAGS = {name: [*SMALL, "--group-size=2", "--at-step=1"] for name in explain.VIEWS}
FLAGS["uni_opd"] += ["--group-size=4"]
FLAGS["skill_sd"] += ["--prompts-per-step=30", "--at-step=3"]  # a skill is read when a task returns
FLAGS["pi_distill"] += ["--alpha-anneal=0"]
FLAGS["sinkd"] = ["--prompts-per-step=8", "--at-step=2", "--eval-problems=8"]
FLAGS["cot2"] = [*SMALL, "--at-step=1"]


class Page(html.parser.HTMLParser):
    """The text of each element with an id or a class, and what is asked below; fails where tags do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tokens, self.titles, self.rows, self.groups, self.adds, self.means = [], [], [], {}, {}, [], {}
        self.outside = re.findall(r"(?:src|href)=|https?://|@import|url\(|<script", text)
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "data-adds" in given:
            self.adds.append(float(given["data-adds"]))
        if tag not in VOID:
            self.open.append((tag, given.get("id") or "", (given.get("class") or "").split(), given.get("title") or ""))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
            self.open.pop()

    def handle_data(self, data):
        ids = [id_ for _, id_, _, _ in self.open if id_]
        tag, _, classes, title = self.open[-1] if self.open else ("", "", [], "")
        if tag == "span" and "t" in classes:
            row = next(id_ for id_ in ids if id_.startswith("row-"))
            self.rows.setdefault(int(row[4:]), []).append((data, values(title)))
        if "mean" in classes:
            self.means[int(next(id_ for id_ in ids if id_.startswith("group-"))[6:])] = data


def values(title: str) -> dict[str, float]:
    return {label: float(value) for label, _, value in (line.rpartition(": ") for line in title.splitlines())}


def shown(name: str, tmp_path: Path, flags: list[str], monkeypatch) -> tuple[explain.Scene, Page, str]:
    """The page of a method, and the scene that it was made of."""
    scenes, watch = [], explain.watch

    def watched(*args):
        scenes.append(watch(*args))
        return scenes[-1]

    path = name if name.endswith(".py") else str(ROOT / "methods" / f"{name}.py")
    monkeypatch.setattr(explain, "watch", watched)
    monkeypatch.setattr(sys, "argv", ["explain.py", path, "--html", str(tmp_path / "page.html"), *flags])
    explain.start()
    text = (tmp_path / "page.html").read_text()
    return scenes[0], Page(text), text


@pytest.mark.parametrize("name", explain.VIEWS)
def test_every_method_has_a_page_that_agrees_with_its_run(name, tmp_path, monkeypatch):
    scene, page, text = shown(name, tmp_path, FLAGS[name], monkeypatch)
    assert not page.outside and len(text) < 1e6
    assert sum(page.adds) == pytest.approx(scene.metrics["loss/total"], rel=1e-4, abs=1e-6)
    assert explain.View.rest not in text, "the logged terms times their weights are not the whole loss"
    doc = explain.load(ROOT / "methods" / f"{name}.py").__doc__
    assert f"<h1>{html.escape(doc.splitlines()[0], quote=False)}</h1>" in text
    words = text.partition("<ul>")[2].partition("</ul>")[0] + str(explain.VIEWS[name])
    cited = set(re.findall(r"\((\d)\)", words))
    assert cited <= set(re.findall(r"^ *\((\d)\) ", doc, re.M)), "an equation that the file does not have"
    if scene.rollout is None:
        return
    rollout = explain.VIEWS[name].rollout(scene)
    wrote = {i: int((turn >= 0).sum()) for i, turn in enumerate(rollout.turn)}
    assert {i: len(tokens) for i, tokens in page.rows.items()} == {i: n for i, n in wrote.items() if n}
    for i, tokens in page.rows.items():
        ids = rollout.tokens[i][rollout.turn[i] >= 0].tolist()
        assert [text for text, _ in tokens] == [scene.tokenizer.decode([token]) for token in ids]
        assert any(told for _, told in tokens)
    for g in range(len(page.means)):
        expected = scene.rollout.reward[scene.rollout.group == g].mean().item()
        assert float(page.means[g]) == pytest.approx(expected, abs=1e-3)


def test_push_is_the_derivative_that_grpo_has_by_hand(tmp_path, monkeypatch):
    """One step a batch: dL/dlogp of a token is -A / (all tokens), A the centred reward over std + eps."""
    flags = ["--prompts-per-step=4", "--group-size=4", "--at-step=1", "--micro-batch-tokens=128"]  # many micro-batches
    scene, page, _ = shown("grpo", tmp_path, flags, monkeypatch)
    rollout, found = scene.rollout, 0
    for i in range(len(rollout)):
        reward = rollout.reward[rollout.group == rollout.group[i]]
        advantage = (rollout.reward[i] - reward.mean()) / (reward.std() + 1e-4)
        push = (advantage / rollout.loss_mask.sum()).item()
        for t, (_, told) in zip((rollout.turn[i] >= 0).nonzero().flatten(), page.rows[i], strict=True):
            assert told["push (5)"] == pytest.approx(push, rel=6e-3, abs=1e-9)
            assert told["log-prob"] == pytest.approx(rollout.behaviour_logps[i, t].item(), rel=6e-3, abs=1e-5)
            found += abs(push) > 0
    assert found


def test_scope_shows_paths_and_weights_of_the_run(tmp_path, monkeypatch):
    scene, _, text = shown("scope_opd", tmp_path, [*SMALL, "--group-size=6", "--at-step=1"], monkeypatch)
    assert scene.on["mle"].any() and scene.on["opd"].any()
    for i in range(len(scene.rollout)):
        row = text.partition(f'id="row-{i}"')[2].partition('<div class="row')[0]
        path = "imitated" if scene.on["mle"][i] else "distilled"
        weight = scene.weights["mle" if path == "imitated" else "opd"][i].item()
        assert f"path <b>{path}</b>" in row and f"w (1, 2) <b>{weight:.3g}</b>" in row


def test_sinkd_shows_the_plan_of_the_run(tmp_path, monkeypatch):
    scene, _, text = shown("sinkd", tmp_path, FLAGS["sinkd"], monkeypatch)
    plan = scene.kept_by.calls["transport"][1][1]
    assert scene.terms["sinkhorn"][1].item() == scene.kept_by.calls["transport"][1][0].item()
    figure = text.partition('aria-label="plan (5)"')[2].partition("</svg>")[0]
    cells = sorted(float(value) for value in re.findall(r": ([\d.e-]+)</title>", figure))
    assert cells == pytest.approx(sorted(plan[plan > 0.01 * plan.max()].tolist()), rel=6e-3)


def test_a_file_of_ones_own_is_shown_by_its_variables_and_markup_is_escaped(tmp_path, monkeypatch):
    """A copied method under another name, with a prompt, a response and an answer full of markup."""
    text = (ROOT / "methods" / "grpo.py").read_text().replace("GRPO: Group", "<b>Mine</b>: Group")
    at = "        metrics = {**rollout_metrics(rollout, reward, task)"
    assert text.count(at) == 1
    evil = "        rollout.examples[0].answer = '<script>alert(1)</script>'\n"
    (tmp_path / "mine.py").write_text(text.replace(at, evil + at))
    monkeypatch.setattr(explain, "prompt_of", lambda *args: "</details><img src=x onerror=alert(2)>")
    flags = ["--prompts-per-step=2", "--group-size=3"]
    scene, page, text = shown(str(tmp_path / "mine.py"), tmp_path, flags, monkeypatch)
    assert "<script" not in text and "<img" not in text and "<b>Mine" not in text and "&lt;script&gt;" in text
    assert len(page.rows) == 6 and "advantages <b>" in text
    assert all({"push", "log-prob", "entropy"} <= told.keys() for _, told in page.rows[0])
    decode = type(scene.tokenizer).decode
    monkeypatch.setattr(type(scene.tokenizer), "decode", lambda self, *a, **b: f"<i>&{decode(self, *a, **b)}")
    colours = explain.colourings(scene, explain.View(), scene.rollout)
    explain.groups_of(scene, explain.View(), scene.rollout, colours)
    again = explain.page(scene, explain.View(), "", "Title", "command")
    assert "<i>&" not in again and "&lt;i&gt;&amp;" in again
    Page(again)


def test_nothing_stays_patched_and_the_run_is_the_one_without_a_page(tmp_path, monkeypatch):
    pick, flags = Rollout.__getitem__, ["--prompts-per-step=2", "--group-size=2", "--steps=3", "--at-step=2"]
    scene, _, _ = shown("grpo", tmp_path, flags, monkeypatch)
    assert Rollout.__getitem__ is pick
    small = {"prompts_per_step": 2, "group_size": 2, "steps": 3, "eval_every": 0, "eval_problems": 8}
    grpo.main(grpo.Config(**small, eval_samples=2, out=str(tmp_path / "run")))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2])
    same = {key: value for key, value in line.items() if not key.startswith(("time/", "memory/", "eval/", "step"))}
    assert same == {key: scene.metrics[key] for key in same}


def test_a_run_folder_shows_its_stored_samples(tmp_path, monkeypatch):
    small = {"prompts_per_step": 2, "group_size": 2, "steps": 2, "eval_every": 0, "eval_problems": 4, "eval_samples": 1}
    sod.main(sod.Config(**small, out=str(tmp_path / "run")))
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for cut in ("", '{"step": 2, "kind": "oth'):  # what a kill leaves; then over the page of before
        with (tmp_path / "run" / "samples.jsonl").open("a") as file:
            file.write(cut)
        monkeypatch.setattr(sys, "argv", ["explain.py", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")])
        explain.start()
    page = Page((tmp_path / "page.html").read_text())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2])
    assert sum(page.adds) == pytest.approx(line["loss/total"])
    for i, row in enumerate(row for row in rows if row["step"] == 2):
        weights = [v for v, turn in zip(row["weight"], row["turn"], strict=True) if turn >= 0]
        assert [told["weight"] for _, told in page.rows[i]] == pytest.approx(weights, rel=6e-3, abs=1e-3)


def test_a_few_outliers_do_not_pale_the_others():
    colour = explain.Colouring("a", "x", [[0.1] * 60 + [-0.1] * 39 + [50.0], None])
    assert colour.css(0.1) == "ap4" and colour.css(-0.1) == "an4" and colour.css(50) == "ap4"
    assert colour.css(0.0) == colour.css(float("nan")) == "" and colour.css(0.02) == "ap2"
    small = explain.Colouring("a", "x", [[2e-5, 0.0]])
    assert small.power == -6 and small.at(0, 0) == pytest.approx(20) and small.legend()[0] == ("", "0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["methods/none.py"], "neither a method's file nor a run's folder"),
        (["README.md"], "neither a method's file nor a run's folder"),
        (["tests"], "is no run's folder"),
        (["common/models.py"], "has no Config and main"),
        (["methods/grpo.py", "--group-sise", "3"], "--group-sise"),
        (["methods/grpo.py", "--steps", "2", "--at-step", "3"], "raise --steps"),
        (["methods/grpo.py", "--html", "nowhere/page.html"], "nowhere (No such file or directory)"),
        (["methods/grpo.py", "--html", "tests"], "tests exists and is no page of this script"),
        (["methods/grpo.py", "--html", "/proc/page.html"], "cannot write the folder /proc ("),
        (["methods/opd.py", "--html", "methods/opd.py"], "methods/opd.py exists and is no page of this script"),
        (["--html", "x.html"], "name a method's file"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if "--html" in arguments:  # the place is looked at before the run
        monkeypatch.setattr(explain, "watch", None)
        monkeypatch.setattr(explain, "write_atomically", None)
    small = ["--prompts-per-step=1", "--group-size=2"] if "--at-step" in arguments else []
    monkeypatch.setattr(sys, "argv", ["explain.py", *arguments, *small])
    with pytest.raises(SystemExit) as stop:
        explain.start()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error


ROW = {"step": 1, "prompt": [{"role": "user", "content": "1+1="}], "text": "2", "reward": 1.0, "ids": [5], "turn": [0]}
LINE = json.dumps(ROW).encode() + b"\n"
FOLDER = {
    "samples.jsonl": LINE,
    "metrics.jsonl": b'{"step": 1}\n',
    "config.json": b'{"flags": {"model": "chain-student"}}',
}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("samples.jsonl", LINE[:30], "has no sample yet"),
        ("samples.jsonl", b"\xff" + LINE, "samples.jsonl is damaged (line 1: 'utf-8' codec"),
        ("samples.jsonl", b"half\n" + LINE, "samples.jsonl is damaged (line 1: "),
        ("samples.jsonl", b"3\n" + LINE, "samples.jsonl is damaged (line 1: 'int' object"),
        ("samples.jsonl", LINE.replace(b'"text"', b'"words"'), "(KeyError: 'text'): run it again"),
        ("metrics.jsonl", None, "it lacks metrics.jsonl"),
        ("metrics.jsonl", b"", "no metrics of step 1: choose another by --at-step"),
        ("config.json", b"", "config.json is damaged"),
        ("config.json", FOLDER["config.json"][:20], "config.json is damaged"),
        ("config.json", b"{}", "config.json is damaged (line 1: 'flags' is missing"),
        ("config.json", b'{"flags": 3}', "config.json is damaged (line 1: 'flags' is"),
    ],
)
def test_a_damaged_run_folder_is_one_line(file, text, said, tmp_path, monkeypatch, capsys):
    for name, whole in (FOLDER | {file: text}).items():
        if whole is not None:
            (tmp_path / name).write_bytes(whole)
    monkeypatch.setattr(sys, "argv", ["explain.py", str(tmp_path), "--html", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as stop:
        explain.start()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error
    assert not (tmp_path / "page.html").exists()


def test_an_interrupt_is_one_line_of_its_own(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "watch", interrupted)
    monkeypatch.setattr(
        sys, "argv", ["explain.py", str(ROOT / "methods" / "opd.py"), "--html", str(tmp_path / "p.html")]
    )
    with pytest.raises(SystemExit) as stop:
        explain.start()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "no page was written" in error
    assert not list(tmp_path.iterdir())
