"""scripts/bundle.py: a method in one file does what it does in the repository, bit for bit, where nothing of it is.

All bundles run in one process, started with -I in a folder that holds nothing but them; the originals run in this one.
The data file's run is a process of its own, since its grader starts the file again.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from posttrain.common.cli import UserError
from posttrain.scripts import bundle

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py") if path.stem != "posttrain")
SMALL = {
    "steps": 2, "prompts_per_step": 4, "group_size": 4, "eval_problems": 8, "eval_samples": 2, "eval_every": 1,
    "schedule": "constant",
}  # fmt: skip
LEFT = ("common/engines/server.py", "common/engines/teacher.py", "common/families/sokoban.py")
DRIVER = '''
import contextlib, importlib.util, io, json, os, runpy, sys, traceback
assert importlib.util.find_spec("posttrain") is None and not os.path.exists("common")
def run(file, flags):
    sys.argv, out, err, code = [file, *flags], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
    return [code, out.getvalue(), err.getvalue()]
def parts():
    """What tests call by itself: the Python tool, and a kernel in both forms."""
    tool = runpy.run_path("sod.py", run_name="sod")["run_python"]
    said = [tool(code) for code in ("print(1)\\n6*7", "open('/etc/passwd')", "1/0")]
    names = runpy.run_path("opd.py", run_name="opd")
    import torch
    torch.manual_seed(0)
    hidden, weight, values = torch.randn(5, 8), torch.randn(35, 8), []
    for form in ("torch", "triton"):
        names["choice"].update(backend=form, tile=16)
        x = hidden.clone().requires_grad_()
        logps, entropy = names["linear_token_logp"](x, weight, torch.arange(5))
        (logps.sum() + entropy.sum()).backward()
        values.append(torch.cat([logps.detach(), entropy.detach(), x.grad.flatten()]))
    return said, (values[0] - values[1]).abs().max().item()
found = {name: run(*job) for name, job in json.load(open("jobs.json")).items()}
found["parts"] = parts()
assert not [name for name in sys.modules if name.partition(".")[0] == "posttrain"]
json.dump(found, open("found.json", "w"))
'''


def flags(method: str, **given) -> list[str]:
    known = {field.name for field in fields(import_module(f"posttrain.methods.{method}").Config)}
    known -= {"group_size"} if method == "cot2" else set()  # it acts in one of its modes only
    return [f"--{k.replace('_', '-')}={v}" for k, v in {**SMALL, **given}.items() if k in known]


def run(command: list, cwd: Path) -> subprocess.CompletedProcess:
    """With nothing that could lead a bundle to the repository."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-I", *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def make(folder: Path, method: str, name: str = "", **more) -> Path:
    out = folder / f"{name or method}.py"
    bundle.main(bundle.Config(str(ROOT / "methods" / f"{method}.py"), str(out), **more))
    return out


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """The folder with all bundles and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    for method in METHODS:
        make(folder, method)
    make(folder, "grpo", "slim", tiny=False, leave_out=LEFT)
    return folder


@pytest.fixture(scope="module")
def found(empty):
    """What became of each run in the empty folder: exit code, output, errors."""
    jobs = {f"{m} {kind}": (f"{m}.py", more) for m in METHODS for kind, more in
            (("run", flags(m, out=f"{m}-run")), ("help", ["--help"]))}  # fmt: skip
    jobs["first half"] = ("opd.py", flags("opd", out="halves", steps=1))
    jobs["second half"] = ("opd.py", [*flags("opd", out="halves"), "--resume"])
    jobs["no tiny"] = ("slim.py", flags("grpo", out="none"))
    jobs["left out"] = ("slim.py", flags("grpo", out="none", model=ROOT / "common" / "tiny" / "addition-student",
                                         rollout="http://localhost:1"))  # fmt: skip
    (empty / "jobs.json").write_text(json.dumps(jobs, default=str))
    (empty / "all_bundles").write_text(DRIVER)
    done = run(["all_bundles"], empty)
    assert done.returncode == 0, done.stderr
    return json.loads((empty / "found.json").read_text())


def original(method: str, given: list[str], monkeypatch) -> str:
    """Run as a script in this process. -> what it printed"""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", [f"{method}.py", *given])
    monkeypatch.chdir(ROOT / "methods")
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_path(f"{method}.py", run_name="__main__")
    return said.getvalue()


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def assert_same(a: Path, b: Path) -> None:
    """Metrics, samples, and all files of the model, code among them."""
    assert len(metrics(a)) == 3 and metrics(a) == metrics(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    names = sorted(path.name for path in (a / "model").iterdir())
    assert "model.safetensors" in names and names == sorted(path.name for path in (b / "model").iterdir())
    for name in names:
        assert (a / "model" / name).read_bytes() == (b / "model" / name).read_bytes(), name


@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_does_the_same_to_the_bit(method, empty, found, tmp_path, monkeypatch):
    code, _, errors = found[f"{method} run"]
    assert code == 0, f"{code}{errors}"
    original(method, flags(method, out=tmp_path / "run"), monkeypatch)
    assert_same(tmp_path / "run", empty / f"{method}-run")
    versions = json.loads((empty / f"{method}-run" / "config.json").read_text())["versions"]
    assert versions["git_commit"].startswith("bundled from ")


@pytest.mark.parametrize("method", METHODS)
def test_help_is_the_originals(method, found, monkeypatch):
    said = original(method, ["--help"], monkeypatch)
    assert "--prompts-per-step" in said and found[f"{method} help"][:2] == [0, said]


def test_a_bundle_resumes(empty, found):
    assert found["first half"][0] == found["second half"][0] == 0, found["second half"]
    assert_same(empty / "halves", empty / "opd-run")


def test_a_grader_in_a_process_of_its_own_starts_the_bundle(empty, tmp_path):
    """It raises where its process does not come up, and a gold answer is 1 only if it has computed something."""
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = "    print(limited(same_mathematics, '1/2', '0.5'), flush=True)\n"
    (tmp_path / "grpo.py").write_text((empty / "grpo.py").read_text().replace("    cli(main", f"{told}    cli(main"))
    done = run(
        ["grpo.py", *flags("grpo", task="data.jsonl", steps=1, prompts_per_step=2, group_size=2, out="run")], tmp_path
    )
    assert done.returncode == 0 and done.stdout.startswith("True\n"), done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_python_tool_and_the_kernels_work_in_a_bundle(found):
    said, gap = found["parts"]
    assert said[0] == ["1\n42", False] and said[1][1] and "reading files is not allowed" in said[1][0]
    assert said[2] == ["ZeroDivisionError: division by zero (line 1)", True]
    assert gap < 1e-5


def test_what_is_not_in_a_bundle_is_said_in_a_line(found):
    code, _, errors = found["no tiny"]
    assert code == 2 and errors.count("\n") == 1 and "of which this file has none" in errors
    code, _, errors = found["left out"]
    file = "common/engines/server.py"
    assert code == 2 and errors == f"error: {file} is not in this file: bundle it again without --leave-out {file}\n"


def test_bundles_pass_the_repositorys_lint_and_hold_nothing_of_it(empty):
    settings = ["--config", ROOT / "pyproject.toml"]
    for command in (["check", "--output-format", "concise"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *settings, *sorted(empty.glob("*.py"))],
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout[:2000]
    for method in METHODS:
        text = (empty / f"{method}.py").read_text()
        assert "import posttrain" not in text and "from posttrain" not in text and str(ROOT) not in text


def test_a_bundle_is_deterministic_and_starts_with_its_origin(empty, tmp_path):
    again = make(tmp_path, "uni_opd")
    assert again.read_bytes() == (empty / "uni_opd.py").read_bytes()
    lines = again.read_text().splitlines()
    assert lines[0].startswith("# methods/uni_opd.py as one file, of commit ")
    assert lines[1] == "# made by: python scripts/bundle.py methods/uni_opd.py"
    contents = [line.split() for line in lines if line.startswith("#   ") and ".py  " in line]
    assert len(contents) > 20
    for _, number, file, *_ in contents:
        assert lines[int(number) - 1].startswith(f"# === {file} ===")


def test_only_what_is_reached_is_in(empty):
    text = (empty / "grpo.py").read_text()
    assert "def linear_token_logp" in text and "def linear_divergence" not in text and "def run_python" not in text
    assert "def use_backend" not in text and "class Sokoban" in text
    assert "class Sokoban" not in (empty / "slim.py").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("methods/nothing.py",), "no method's file"),
        (("methods/posttrain.py",), "no method's file"),
        (("scripts/transcript.py", "x.py"), "no method's file"),
        (("README.md",), "no method's file"),
        (("methods/grpo.py", "methods/grpo.py"), "is the method itself"),
        (("methods/grpo.py", "nowhere/x.py"), "cannot write nowhere/x.py"),
        (("methods/grpo.py", "x.py", True, ("common/engines/nothing.py",)), "no such file"),
        (("methods/grpo.py", "x.py", True, ("common/cli.py",)), "cannot be imported without"),
    ],
)
def test_bad_input_is_a_line(given, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        bundle.main(bundle.Config(*given))
    assert not (ROOT / "x.py").exists()


@pytest.mark.parametrize("name", ["sod.py", "notes.txt"])
def test_a_file_that_is_there_stays_as_it_is(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="exists: name another file by -o, or remove it first"):
        bundle.main(bundle.Config(str(ROOT / "methods" / "opd.py"), str(tmp_path / name)))
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"# \xff", "cannot be read as Python: .*0xff"),
        (b"def half(:", r"cannot be read as Python: invalid syntax \(copy.py, line"),
        (b"from posttrain.common.nothing import x", "there is no common/nothing.py"),
        (b"from posttrain.common.cli import nobody\nnobody()", "imports nobody of common/cli.py"),
        (b"from posttrain.common import cli as c\nc.nobody()", "there is no c.nobody"),
        (b"from posttrain.common.cli import *", "write it so"),
        (b"import posttrain.common.cli", "write it so"),
        (b"from .common import cli", "write it so"),
        (b"def later():\n    from . import cli", "write it so"),
    ],
)
def test_a_copy_that_cannot_be_bundled_is_a_line(line, message, tmp_path):
    copy, out = tmp_path / "copy.py", tmp_path / "out.py"
    copy.write_bytes(
        (ROOT / "methods" / "opd.py").read_bytes().replace(b"\nimport torch\n", b"\nimport torch\n%s\n" % line)
    )
    with pytest.raises(UserError, match=message):
        bundle.main(bundle.Config(str(copy), str(out)))
    assert not out.exists()
