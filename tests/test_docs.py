"""What the documentation says is there: links, commands, flags, and the lines of equations."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from posttrain.common.cli import UserError, check_ranges, parse
from posttrain.scripts import ablate, equations
from posttrain.scripts.reproduce import STUDIES
from posttrain.tests.pages import FENCE, ROOT, Section, everything, sections_of

OURS = ("methods", "scripts")
SCRIPTS = [path for name in OURS for path in (ROOT / name).glob("*.py") if path.name != "posttrain.py"]
METHODS = sorted(path.stem for path in SCRIPTS if path.parent.name == "methods")
FOREIGN = {  # pattern of a command that is not ours, and so neither checked nor run -> why
    r"^\w+=\S+$": "sets a variable",
    r"vllm serve |-m vllm\.entrypoints": "needs vLLM, which tests/test_vllm.py and test_servers.py use",
    r"^pip ": "installs",
    r"^source ": "the shell's",
    r"explain\.py runs/": "of a run's folder",
}
NOT_RUN = FOREIGN | {  # pattern of a command -> why test_commands_run leaves it out
    r"^bash ": "makes environments, runs all tests",
    r"\b[A-Z][A-Z_0-9]{2,}\b|\$M|--model M\b|\.\.\.": "names a model, a file or a run of the reader's",
    r"Qwen/|SmolLM2|gsm8k|get_smollm2\.py": "needs a model or a data set from elsewhere",
    r"torchrun|http://|--rollout vllm": "needs servers or several processes, which have tests of their own",
    r"(reproduce|ablate|pretrain_tiny|compile_kernels|bench_\w+)\.py": "takes minutes to hours",
    r"(explain|bundle)\.py": "runs with all methods in tests/test_explain.py and test_bundle.py",
    r"(equations|pictures)\.py": "changes the checkout; tests compare its results with what is there",
}
SMALL = {"--steps": 1, "--prompts-per-step": 2, "--eval-problems": 2, "--eval-samples": 1, "--eval-every": 0}
SMALLER = {"--cold-start-steps": 1, "--sft-steps": 1, "--recovery-probe": 2}  # where the command has them


# --- links


def anchors(text: str) -> set[str]:
    """As GitHub makes them of the headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)", FENCE.sub("", text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug + f"-{found.count(slug)}" * (slug in found))
    return set(found)


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        if link.startswith(("http://", "https://")):
            continue
        lines = [int(n) for n in re.findall(r"L(\d+)", anchor)]
        if not path.exists():
            broken.append(f"{page.name}: {link}: no such file")
        elif lines and not 0 < max(lines) <= len(path.read_text().splitlines()):
            broken.append(f"{page.name}: {link}: the file has fewer lines")
        elif anchor and not lines and anchor not in anchors(path.read_text() if name else text):
            broken.append(f"{page.name}: {link}: no such heading")
    return broken


# --- commands and flags


def spans(section: Section) -> list[str]:
    """What stands in backticks in the text."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", section.prose)]


def commands(section: Section) -> Iterator[str]:
    """Each command line of the bash blocks, without comments; those in backticks that name a script."""
    for kind, block in FENCE.findall(section.text):
        if kind == "bash":
            lines = [shlex.join(shlex.split(line, comments=True)) for line in block.replace("\\\n", " ").splitlines()]
            yield from filter(None, lines)
    for code in spans(section):
        if re.match(r"(python|bash|pip) |(\w+/)?\w+\.py -", code):
            yield code.removesuffix(" ...")  # and other flags


def script_of(words: list[str]) -> tuple[Path | None, list[str]]:
    """The script of ours that a command runs, and what follows it; of explain.py the method, whose flags it takes."""
    words = [word for word in words if not word.endswith("/explain.py")]
    for i, word in enumerate(words):
        if re.fullmatch(r"(methods/|scripts/)?\w+\.(py|sh)", word):
            return next((p for p in (ROOT / word, ROOT / "methods" / word) if p.is_file()), ROOT / word), words[i + 1 :]
    return None, []


def module(script: Path) -> ModuleType:
    return importlib.import_module(f"posttrain.{script.parent.name}.{script.stem}")


@functools.cache
def flags_of(script: Path) -> set[str]:
    config = module(script).Config
    kinds = (config, type(config.system)) if hasattr(config, "system") else (config,)
    names = {field.name.replace("_", "-") for kind in kinds for field in dataclasses.fields(kind)} - {"system"}
    return {f"--{no}{name}" for name in names for no in ("", "no-")}


@functools.cache
def complaint(script: Path, *args: str, alone: bool = False) -> str:
    """What the script's own parser, and ablate.py's of its grid, says against these flags, without running anything;
    alone: without required ones."""
    said, argv, config = io.StringIO(), sys.argv, module(script).Config
    missing = [field for field in dataclasses.fields(config)
               if alone and field.default is field.default_factory is dataclasses.MISSING]  # fmt: skip
    others = ["x" if "Positional" in str(field.type) else f"--{field.name}=x" for field in missing]
    try:
        sys.argv = [str(script), *(flag for flag in others if flag.split("=")[0] not in args), *args]
        with contextlib.redirect_stderr(said):
            parsed = parse(config, getattr(module(script), "PRESETS", {}))
            check_ranges(parsed)
            if script.stem == "ablate" and not alone and "METHOD" not in parsed.method:
                ablate.plan(dataclasses.replace(parsed, method=str(ROOT / parsed.method)))
    except UserError as error:
        return str(error)
    except SystemExit:
        return said.getvalue().strip()
    finally:
        sys.argv = argv
    return ""


def method_of(section: Section) -> str:
    """The method that a page or a section is about: methods/opd.md, or the heading `OPD: paper, ...`."""
    head = re.match(r"#* ?([^:\n]*)", section.text)[1].lower().replace("π", "pi")
    head = re.sub(r"\W+", "_", section.page.stem if section.page.parent.name == "methods" else head)
    return next((name for name in METHODS if len(head) > 2 and (head.startswith(name) or name.startswith(head))), "")


def takers_in(section: Section) -> list[Path]:
    """Scripts whose flags a section may speak of: of a method: itself, those that it names, its studies' others."""
    if not method_of(section):
        return SCRIPTS
    names = {f"{method_of(section)}.py", "reproduce.py", *re.findall(r"\w+\.py", section.text)}
    names |= {script for name in section.studies for script, *_ in STUDIES.get(name, {}).values()}
    return [path for path in SCRIPTS if path.name in names]


def wrong_flags(section: Section) -> Iterator[str]:
    """Flags in backticks, with or without values or a list of choices, that no script of this section takes."""
    for code in spans(section):
        for piece in re.split(r" (?=--)", code) if re.match(r"--[a-z]", code) and code != "--help" else ():
            flag, *values = re.split(r",? ", piece)
            takers = [path for path in takers_in(section) if flag in flags_of(path)]
            if not takers:
                yield f"`{code}`: no script of this section takes {flag}"
            elif values and all(complaint(path, flag, *values, alone=True) for path in takers):
                for value in values:
                    said = [complaint(path, flag, value, alone=True) for path in takers]
                    if all(said) and not value.isupper():  # NAME
                        yield f"`{code}`: {said[0]}"


def wrong_commands(section: Section) -> Iterator[str]:
    """Commands whose script, flags, values, study or arms are not there."""
    for command in commands(section):
        script, args = script_of(shlex.split(command))
        if script is None:
            known = any(re.search(pattern, command) for pattern in FOREIGN)
            yield from [] if known else [f"{command}: neither a script of ours nor a known program"]
        elif not script.is_file() and not script.stem.isupper():  # METHOD.py
            yield f"{command}: there is no {script.name}"
        elif script in SCRIPTS and (said := complaint(script, *args)):
            yield f"{command}: {said}"
        elif script.name == "reproduce.py" and "--only" in args:
            study = STUDIES[args[args.index("--study") + 1] if "--study" in args else "methods"]
            arms = itertools.takewhile(lambda arm: not arm.startswith("--"), args[args.index("--only") + 1 :])
            yield from (f"{command}: no arm {arm!r}" for arm in arms if arm not in study)


def to_run(sections: list[Section]) -> list[str]:
    """Commands that no reason excuses, one for each script, preset and mode, and those whose folder others may read."""
    chosen = {}
    for command in itertools.chain(*map(commands, sections)):
        script, args = script_of(shlex.split(command))
        which = [args[i + 1] for i, arg in enumerate(args) if arg in ("--preset", "--mode", "--out")]
        if not any(re.search(pattern, command) for pattern in NOT_RUN):
            chosen.setdefault((script, *which), command)
    return list(chosen.values())


def shortened(command: str, out: str) -> list[str]:
    """The command with the flags that make it small."""
    script, args = script_of(shlex.split(command))
    small = {flag: value for flag, value in SMALL.items() if flag in flags_of(script)}
    small |= {flag: value for flag, value in SMALLER.items() if flag in args} | (
        {} if "--out" in args else {"--out": out}
    )
    return [str(script), *args, *(f"{flag}={value}" for flag, value in small.items())]


# --- tests


@pytest.mark.parametrize("page", equations.documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken_links(page, page.read_text())


@pytest.mark.parametrize("page", equations.documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_equations_are_fresh(page):
    assert not equations.renewed(page, page.read_text())[1]


@pytest.mark.parametrize("name", METHODS)
def test_every_equation_has_a_line_of_code(name):
    found = equations.read(name)
    assert found and list(found) == list(range(1, len(found) + 1))
    assert not [n for n, equation in found.items() if not equation.lines]


def test_a_moved_line_makes_a_block_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(equations, "ROOT", tmp_path)
    source, page = tmp_path / "methods" / "opd.py", tmp_path / "README.md"
    source.parent.mkdir()
    source.write_text((ROOT / "methods" / "opd.py").read_text())
    text = "| <!-- equations-inline opd -->x<!-- end --> |\n\n<!-- equations opd -->\n<!-- end -->\n"
    new, stale = equations.renewed(page, text)
    assert [line.split(": ")[0] for line in stale] == ["README.md:1", "README.md:3"]
    assert "-->[1](methods/opd.py#L" in new and equations.renewed(page, new) == (new, [])
    source.write_text("\n" + source.read_text())
    assert len(equations.renewed(page, new)[1]) == 2


@pytest.mark.parametrize("file", ["README.md", "methods/opd.py"])
def test_a_page_or_a_method_that_is_no_text_is_one_line(file, tmp_path, monkeypatch):
    monkeypatch.setattr(equations, "ROOT", tmp_path)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "opd.py").touch()
    (tmp_path / "README.md").write_text("<!-- equations opd --><!-- end -->")
    (tmp_path / file).write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=f"{file} cannot be read .*0xe9"):
        equations.main(equations.Config(check=True))


def test_commands_and_flags_exist():
    assert not [line for section in everything() for line in (*wrong_commands(section), *wrong_flags(section))]


def test_wrong_links_commands_and_flags_are_found():
    page = ROOT / "README.md"
    text = "## OPD: here\n[a](nowhere.py) [b](#opd-there) [c](methods/opd.py#L9999) `--kappa 1` `--est full, k9`\n"
    text += "`python methods/opd.py --est k9` `python methods/none.py` `python scripts/reproduce.py --only nobody`\n"
    text += "`python scripts/ablate.py methods/opd.py --grid est=full,k9`\n"
    text += "```bash\nbash scripts/none.sh   # `--est k9`\nmake all\n```\n"
    section = sections_of(page, text)[-1]
    assert method_of(section) == "opd" and len(broken_links(page, text)) == 3
    assert len(list(wrong_commands(section))) == 6 and len(list(wrong_flags(section))) == 2


def test_commands_run(tmp_path):
    """About a minute: the documentation's commands that need nothing from elsewhere, in their order, made small."""
    chosen = to_run(list(everything()))
    calls = [shortened(command, f"runs/{i}") for i, command in enumerate(chosen)]
    done = subprocess.run([sys.executable, ROOT / "tests" / "forked.py"], input=json.dumps(calls), cwd=tmp_path,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(calls) >= len(METHODS), done.stderr
    assert not [(command, said) for command, (code, said) in zip(chosen, results, strict=True) if code]
