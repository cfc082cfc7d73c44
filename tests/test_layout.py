"""The house: who may import whom, what may lie on the import path, and what all method files have in common."""

import ast
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELPER = "posttrain.py"
METHODS = sorted(path for path in (ROOT / "methods").glob("*.py") if path.name != HELPER)
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name != HELPER)
REQUIREMENTS = [ROOT / f"requirements{kind}.txt" for kind in ("", "-bench", "-vllm", "-vllm-cpu")]
COMMON, KERNELS = sorted((ROOT / "common").rglob("*.py")), sorted((ROOT / "kernels").glob("*.py"))
SHARED = "--model --task --steps --prompts-per-step --group-size --max-new-tokens --temperature --lr --seed --rollout "
SHARED += "--device --dtype --lora-rank --micro-batch-tokens --eval-every --save-every --resume --out --wandb"
LABELLED = {"sinkd", "cot2"}  # learn from examples with labels: no rollouts, hence not all of SHARED
DATA_COLUMNS = {"text_column", "text_pair_column", "label_column"}
STUB = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args and isinstance(args[0], type) else Anything()
    def __getattr__(self, name): return Anything()
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith("use_"):  # decorator factories
        return lambda *args, **kwargs: lambda decorated: decorated
    return Anything() if name[0].islower() else Anything
"""
REPORT = """
import atexit, json, os, sys
def report():
    if {"posttrain", "transformers"} <= sys.modules.keys():  # ours, not a helper process
        found = {name: sys.modules[name].__file__ for name in ("kernels", "transformers") if name in sys.modules}
        found |= {"path": sys.path, "ours": sorted(m for m in sys.modules if m.startswith("posttrain."))}
        json.dump(found, open(os.environ["REPORT_TO"], "w"))
atexit.register(report)
"""


def ids(paths):
    return [path.stem for path in paths]


def run(command: list, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400", **env}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder for PYTHONPATH with a `kernels` distribution that transformers accepts, and a reporter at exit."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path_factory.mktemp("site")
    info = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    for folder in (site / "kernels", site / "kernels" / "layer", info):
        folder.mkdir()
    (site / "kernels" / "__init__.py").write_text(f"__version__ = {KERNELS_MIN_VERSION!r}\n{STUB}")
    (site / "kernels" / "layer" / "__init__.py").write_text(STUB)
    (site / "kernels" / "layer" / "mode.py").write_text(STUB)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (info / "RECORD").write_text("")
    (info / "top_level.txt").write_text("kernels\n")
    (site / "sitecustomize.py").write_text(REPORT)
    return site


def test_transformers_sees_the_fake_kernels_at_all(fake, tmp_path):
    """Without ours: else the tests below would prove nothing."""
    code = (
        "import kernels, transformers.integrations.hub_kernels as h; print(kernels.__file__, h.is_kernels_available())"
    )
    done = run(["-c", code], tmp_path, PYTHONPATH=str(fake), REPORT_TO=str(tmp_path / "x"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(fake / "kernels" / "__init__.py"), "True"]


@pytest.fixture(scope="module")
def help_of(fake, tmp_path_factory):
    """script -> its --help run from an empty folder beside the fake, and the folder; each is run once."""

    @functools.cache
    def get(script: Path) -> tuple[subprocess.CompletedProcess, Path]:
        cwd = tmp_path_factory.mktemp("empty")
        report = {"REPORT_TO": str(cwd / "report.json")}
        return run([script, "--help"], cwd, PYTHONPATH=str(fake), **report), cwd

    return get


@pytest.mark.parametrize("script", METHODS + SCRIPTS, ids=ids(METHODS + SCRIPTS))
def test_help_from_another_folder_beside_a_kernels_distribution(script, fake, help_of):
    done, cwd = help_of(script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "--help" in done.stdout
    if script in METHODS:
        assert (cwd / "report.json").is_file()
    if (cwd / "report.json").is_file():
        found = json.loads((cwd / "report.json").read_text())
        assert str(ROOT) not in [os.path.realpath(entry) for entry in found["path"]]
        assert found.get("kernels", str(fake)).startswith(str(fake))
        assert "site-packages" in found["transformers"]
        fused = any(name.startswith("posttrain.kernels.") for name in found["ours"])
        assert fused or script not in METHODS or script.stem == "cot2"  # whose vocabularies are small
    assert {path.name for path in cwd.iterdir()} <= {"report.json"}


def test_a_run_beside_a_kernels_distribution(fake, tmp_path):
    small = {"steps": 1, "prompts-per-step": 2, "group-size": 2, "eval-problems": 2, "eval-samples": 1, "out": "run"}
    report, flags = tmp_path / "report.json", [f"--{name}={value}" for name, value in small.items()]
    done = run([ROOT / "methods" / "opd.py", *flags], tmp_path, PYTHONPATH=str(fake), REPORT_TO=str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["kernels"].startswith(str(fake)) and str(ROOT) not in found["path"]
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_tests_themselves_do_not_put_the_checkout_on_the_path():
    assert str(ROOT) not in [os.path.realpath(entry or os.getcwd()) for entry in sys.path]
    assert str(ROOT / "methods") not in sys.path


def test_helper_is_the_same_beside_methods_and_scripts():
    assert (ROOT / "methods" / HELPER).read_bytes() == (ROOT / "scripts" / HELPER).read_bytes()


# --- imports


def imports(path: Path) -> set[str]:
    """Full names of all modules imported anywhere in a file; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """First folder of each posttrain import: common, kernels, methods, ..."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("posttrain.")}


def top(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", METHODS, ids=ids(METHODS))
def test_methods_import_common_and_kernels_and_never_each_other(path):
    assert ours(path) <= {"common", "kernels"}
    assert not top(path) & {other.stem for other in METHODS + SCRIPTS}


@pytest.mark.parametrize("path", COMMON, ids=ids(COMMON))
def test_common_imports_common_and_kernels_only(path):
    assert ours(path) <= {"common", "kernels"}


@pytest.mark.parametrize("path", KERNELS, ids=ids(KERNELS))
def test_kernels_import_torch_triton_and_kernels_only(path):
    assert ours(path) <= {"kernels"}
    assert top(path) - sys.stdlib_module_names <= {"torch", "triton", "posttrain"}


@pytest.mark.parametrize(
    "path", METHODS + COMMON + KERNELS + SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_our_folders_are_imported_under_our_name_only(path):
    assert not top(path) & {"common", "kernels", "methods", "scripts", "tests"}
    assert not re.search(r"sys\.path\.(insert|append)\([^)]*ROOT\)?\s*\)", path.read_text())


@pytest.mark.parametrize("path", COMMON, ids=ids(COMMON))
def test_common_names_no_method(path):
    """No identifier and no string of the code is a method's name; docstrings and comments may mention one."""
    tree, names = ast.parse(path.read_text()), {method.stem for method in METHODS}
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, with_docstring)
                  and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        words = [getattr(node, key, "") for key in ("id", "attr", "name", "arg")]
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            words.append(node.value)
        for word in words:
            parts = set(re.split(r"[^a-z0-9]+", word.lower())) if isinstance(word, str) else set()
            assert not parts & names, f"line {node.lineno}: {word!r}"


# --- files


@pytest.mark.parametrize("path", METHODS, ids=ids(METHODS))
def test_a_method_has_150_to_350_lines(path):
    assert 150 <= len(path.read_text().splitlines()) <= 350


LINES = {"common": 1325, "common/engines": 1030, "common/environments": 910, "common/machines": 562}
LINES |= {"common/families": 1095, "common/labelled": 360}


@pytest.mark.parametrize(("folder", "most"), LINES.items())
def test_common_is_thin(folder, most):
    """Plumbing; engines; episodes and tools; processes and memory; the embedded tasks; examples with labels."""
    assert 0 < sum(len(path.read_text().splitlines()) for path in (ROOT / folder).glob("*.py")) <= most


def test_nothing_else_is_visible_at_the_top():
    house = {"methods", "common", "kernels", "scripts", "tests", "README.md", "pyproject.toml"}
    house |= {path.name for path in REQUIREMENTS}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    there = {name.split("/")[0] for name in tracked.splitlines()}
    assert {name for name in there if not name.startswith(".")} <= house


@pytest.mark.parametrize("path", REQUIREMENTS, ids=ids(REQUIREMENTS))
def test_requirements_are_pinned_exactly(path):
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    lines = [line for line in lines if line]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[\w,-]+\])?==\d+(\.\d+)+(\.post\d+)?(\+\w+)?(\s*;.*)?", line), line
    names = [re.split(r"[=\[]", line)[0].lower() for line in lines]
    assert len(names) == len(set(names))


def test_every_third_party_import_is_in_requirements():
    pinned = "\n".join(path.read_text() for path in REQUIREMENTS).lower()
    files = METHODS + COMMON + KERNELS + SCRIPTS + sorted((ROOT / "tests").glob("*.py"))
    used = set().union(*map(top, files)) - sys.stdlib_module_names - {"posttrain"}
    # PyYAML, Pillow, scikit-learn and POT are imported by other names; vLLM and verl are installed apart.
    implied = {"yaml", "PIL", "sklearn", "ot", "vllm", "verl"}
    missing = {name for name in used - implied if not re.search(rf"^{name.replace('_', '[-_]')}==", pinned, re.M)}
    assert not missing


def test_tiny_models_take_12_mb():
    files = [path for path in (ROOT / "common" / "tiny").rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) <= 12 * 2**20


# --- flags


def config(path: Path) -> type:
    return importlib.import_module(f"posttrain.methods.{path.stem}").Config


def first_block(path: Path) -> list[str]:
    """Fields above the line `# --- this method`."""
    shared, heading, _ = path.read_text().split("class Config:", 1)[1].partition("# --- this method")
    assert heading
    return re.findall(r"^    (\w+):", shared, re.M)


def test_a_flag_that_methods_share_has_one_type():
    hints = [typing.get_type_hints(config(path)) for path in METHODS]
    shared = set(SHARED.replace("--", "").replace("-", "_").split())
    of_all = [typing.get_type_hints(config(path)) for path in METHODS if path.stem not in LABELLED]
    for name in shared:
        assert len({str(hint.get(name)) for hint in of_all}) == 1 and name in of_all[0], name
    firsts = set().union(*map(first_block, METHODS))
    for name in firsts:
        kinds = {str(hint[name]) for hint in hints if name in hint}
        assert len(kinds) == 1 or name == "system", name  # the labelled methods have no engines


def test_first_block_of_flags_is_in_one_order_in_all_methods():
    others = [path for path in METHODS if path.stem not in LABELLED]
    blocks = [first_block(path) for path in others]
    common = set(blocks[0]).intersection(*blocks)
    assert len({tuple(name for name in block if name in common) for block in blocks}) == 1
    for path, block in zip(others, blocks, strict=True):
        assert set(block) - common <= {"teacher"}, path.name
        assert block == [field.name for field in dataclasses.fields(config(path))][: len(block)]


@pytest.mark.parametrize("path", [path for path in METHODS if path.stem in LABELLED], ids=lambda path: path.stem)
def test_first_block_of_a_labelled_method_is_a_part_of_the_others_in_their_order(path):
    blocks = [first_block(other) for other in METHODS if other.stem not in LABELLED]
    union = next(block for block in blocks if "teacher" in block)
    assert set().union(*blocks) <= set(union)
    block = first_block(path)
    assert [name for name in block if name not in DATA_COLUMNS] == [name for name in union if name in block]
    assert block == [field.name for field in dataclasses.fields(config(path))][: len(block)]


def test_sklearn_is_imported_by_the_digits_alone():
    """transformers would import it at every start, for a second, because it is installed."""
    code = "import sys, posttrain.methods.grpo, posttrain.methods.sinkd; print('sklearn' in sys.modules)"
    done = run(["-c", code], ROOT / "methods")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


@pytest.mark.parametrize("path", METHODS, ids=ids(METHODS))
def test_every_flag_has_a_help_text_of_its_own(path, help_of):
    """The comment of a flag is its help, on one line with it: a comment that a formatter moved is lost."""
    text, without = " ".join(help_of(path)[0].stdout.replace("│", " ").split()), []
    system = type(config(path)().system)
    for name in {field.name for kind in (config(path), system) for field in dataclasses.fields(kind)} - {"system"}:
        flag = f"--{name.replace('_', '-')}"
        found = re.search(rf"{flag}(?:, --no-[\w-]+| \{{[^}}]*\}}| [A-Z]+) (.*?) ?\(default: ", text)
        assert found, f"{flag} is not in --help"
        if not found[1] or found[1].startswith(("(default", "---", "--")):
            without.append(flag)
    assert not without


def test_the_readme_has_no_gap_left_to_fill():
    gaps = [line for line in (ROOT / "README.md").read_text().splitlines() if re.fullmatch(r"[A-Z_]{8,}", line.strip())]
    assert not gaps
