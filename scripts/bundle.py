"""A method as ONE file: its script, and of common/ and kernels/ just what it uses.

The file runs where nothing of this repository is, with the packages of requirements.txt alone, and gives the same
metrics, samples and weights, bit for bit. The method comes first, as it is read; its plumbing follows, file by file.
Python allows that, since functions look names up when they are called; what is looked up sooner (default values, base
classes, annotations) is moved in front. Text is copied as it stands, comments included. Changed are our imports, names
that would clash within one file, and the few places that look for files of the repository, see rewrites().

Every flag keeps its meaning, so all engines and all tasks come along. What you will never use can stay behind:
python scripts/bundle.py methods/grpo.py --leave-out common/engines/local.py common/engines/server.py

Run: python scripts/bundle.py methods/scope_opd.py -o scope_opd.py
"""

import ast
import atexit
import base64
import builtins
import dis
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import CodeType, ModuleType
from typing import Annotated, NamedTuple

import tyro

from posttrain.common.cli import UserError, cli, first_line, require

ROOT = Path(__file__).resolve().parents[1]
CHARS = 10_000  # of a line of a tiny model: editors are slow with lines of a million


@dataclass
class Config:
    method: tyro.conf.Positional[str]  # a file of methods/, or your copy of one
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""  # new file to write; empty = the method's name, here
    tiny: bool = True  # append the built-in models that the method names, so that it runs without flags
    leave_out: tuple[str, ...] = ()  # files of common/ to do without; a flag that needs one will say so


# --- what bundles have in place of what a file of the repository finds by path or by name


@cache
def tiny_models() -> Path:
    """A folder of the models that the last lines of this file hold. It goes when the process ends."""
    folder, files = Path(tempfile.mkdtemp(prefix="tiny-")), {}
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for line in Path(__file__).read_text("utf-8").splitlines():
        if line.startswith("#:tiny:"):
            _, _, name, text = line.split(":", 3)
            files[name] = files.get(name, "") + text
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(zlib.decompress(base64.b85decode(text)))
    return folder


def left_out(file: str):
    """Stands for what is in that file."""

    def missing(*args, **kwargs):
        raise UserError(f"{file} is not in this file: bundle it again without --leave-out {file}")

    return missing


def module_in_a_file(name: str, text: str) -> ModuleType:
    """save_pretrained copies the file of a class beside its weights: a run's model/ then loads anywhere."""
    folder = tempfile.mkdtemp(prefix="module-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, f"{name}.py").write_text(text)
    sys.path.insert(0, folder)
    return importlib.import_module(name)


TOOLS = """import atexit, base64, importlib, shutil, sys, tempfile, zlib
from functools import cache
from pathlib import Path
from types import ModuleType


"""
MLP = """

MLP_FILE = r'''{}'''
mlp = module_in_a_file("mlp", MLP_FILE)
MLP, MLPConfig = mlp.MLP, mlp.MLPConfig
"""
HEAD = """\
{name}.py as one file, of commit {commit},
made by: python scripts/bundle.py {name}.py{flags}
What it uses of common/ and kernels/ stands below it. Edit it freely; it needs these packages and nothing else:

/// script
requires-python = ">=3.11"
dependencies = [
{needs}
]
///

Contents, by line:
"""


@cache
def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@cache
def rewrites() -> dict[str, list[tuple[str, str]]]:
    """File -> what it says, and what it says in a bundle. Imports are put where they belong later on."""
    names = ("tasks.py", "labelled/mlp.py", "environments/inside.py")
    tasks, mlp, inside = ((ROOT / "common" / name).read_text() for name in names)
    families = dict.fromkeys(re.findall(r'"((\w+):(\w+))"', tasks))  # "arithmetic:Arithmetic"
    late = "".join(f"        from posttrain.common.families.{file} import {name}\n" for _, file, name in families)
    models = TOOLS + inspect.getsource(tiny_models)
    slow = "from transformers.modeling_layers import GradientCheckpointingLayer\n"  # --help need not wait for it
    worker = "PYTHONPATH={} and --worker-extension-cls {}.Worker"
    return defaultdict(list) | {
        "common/tasks": [
            *((f'"{spec}"', f"lambda: {name}") for spec, _, name in families),
            ("module of common/families and class in it, which", "class, looked up when it is needed, which"),
            ('        module, _, family = FAMILIES[name].partition(":")\n', late),
            ('getattr(importlib.import_module(f"posttrain.common.families.{module}"), family)', "FAMILIES[name]()"),
        ],
        "common/families/answers": [
            ('.parents[2] / "methods")  # where posttrain.py lies', ".parent)  # where this file lies"),
        ],
        "common/models": [
            ('TINY = Path(__file__).parent / "tiny"  # trained by scripts/pretrain_tiny.py\n', models),
            ("TINY", "tiny_models()"),
            ('glob("*/config.json")))', 'glob("*/config.json"))) or "models, of which this file has none"'),
        ],
        "common/run": [
            ('[json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]', "[]  # see the repository"),
            ('"unknown"', f'"bundled from {commit()}"'),
        ],
        "common/environments/sandbox": [
            ('Path(__file__).with_name("inside.py")', f"r'''{inside}'''"),
            ("str(INSIDE)", '"-c", INSIDE'),
        ],
        "common/engines/server": [
            (f'"{worker.format("methods", "posttrain.common.engines.worker")}"',
             f'f"{worker.format(".", "{Path(__file__).stem}")}" if Worker else ""'),
            ("LOWEST =", "from posttrain.common.engines.worker import Worker\nLOWEST ="),
        ],
        "common/labelled/mlp": [(mlp, TOOLS + inspect.getsource(module_in_a_file) + MLP.format(mlp))],
        "common/machines/memory": [(slow, ""), ("    return [module for", f"    {slow}\n    return [module for")],
    }  # fmt: skip


# --- what statements use


def read(path: Path) -> str:
    """Its text, if that is Python."""
    try:
        text = path.read_text("utf-8")
        compile(text, path.name, "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte
        raise UserError(f"{path} cannot be read as Python: {first_line(error)}; mend it") from None
    return text


class Symbol(NamedTuple):
    """What a name means: a name of one of our files, or ("", what) of a package."""

    file: str
    name: str


class Use(NamedTuple):
    """A place in a file that names a symbol."""

    line: int  # from 0
    byte: int
    text: str  # what stands there: name, or file.name
    symbol: Symbol
    eager: bool = False  # looked up at import


@dataclass(eq=False)
class Unit:
    """A top-level statement, with the comments above it."""

    file: "File"
    node: ast.stmt
    start: int  # its first line, from 0
    end: int
    binds: set[str]

    @cached_property
    def uses(self) -> list[Use]:
        return sorted(set(self.file.uses_of(self.node)))

    def belongs_to(self, name: str) -> bool:
        """Whether it binds a name of its file, or changes it, or what is outside of the file."""
        own = {use.symbol.name for use in self.uses if use.symbol.file == self.file.name}
        return name in (self.binds or own or {name})


class File:
    """A file of ours: its statements, what they use, and what the names in it mean."""

    def __init__(self, path: Path, name: str):
        self.name, self.ours, self.packages, text = name, {}, defaultdict(list), read(path)
        self.early, self.late = {}, {}  # our files that it imports, at its top and within functions
        for old, new in rewrites()[name]:
            require(
                old in text, f"{name}.py is not what rewrites() in scripts/bundle.py expects, but has no {old!r:.50}"
            )
            text = text.replace(old, new)
        text = self.without_late_imports(text)
        self.lines, tree = text.encode().splitlines(True), ast.parse(text)
        self.title = (ast.get_docstring(tree) or "").partition("\n")[0]
        self.doc = tree.body.pop(0) if self.title else None
        self.places, self.bound = {}, []  # (line, byte, name) -> eager; (line, name)
        self.look_up(compile(text, str(path), "exec", dont_inherit=True), True)
        self.units, end = [], self.doc.end_lineno if self.doc else 0
        for node in tree.body:
            start, end = end, node.end_lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.read_import(node, self.early)
            else:
                binds = {name for line, name in self.bound if start <= line < end}
                self.units.append(Unit(self, node, start, end, binds))
        self.own = {name for unit in self.units for name in unit.binds}

    def without_late_imports(self, text: str) -> str:
        """The text without imports of ours in functions: in a bundle all names are at hand."""
        lines = text.splitlines(True)
        for node in ast.walk(ast.parse(text)):
            inner = isinstance(node, ast.ImportFrom) and node.col_offset
            if inner and (node.level or re.match(r"posttrain\b", node.module)):
                self.read_import(node, self.late)
                end = node.end_lineno + (not lines[node.end_lineno].strip())
                lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
        return "".join(lines)

    def read_import(self, node: ast.Import | ast.ImportFrom, files: dict) -> None:
        of, place = getattr(node, "module", "") or "", f"{self.name}.py, line {node.lineno}"
        form = f"{place}: a bundle can follow `from posttrain.common.FILE import NAME` alone; write it so"
        for alias in node.names:
            name, whole = alias.asname or alias.name, f"{of}.{alias.name}".strip(".")
            if of.startswith("posttrain."):
                folder, file = (x.removeprefix("posttrain.").replace(".", "/") for x in (of, whole))
                self.ours[name] = Symbol(file, "") if (ROOT / f"{file}.py").is_file() else Symbol(folder, alias.name)
                file = f"{self.ours[name].file}.py"
                require((ROOT / file).is_file(), f"{place}: there is no {file}; import what is in common/ or kernels/")
                require(name != "*", form)
                files[self.ours[name].file] = None
            else:
                require(whole.partition(".")[0] != "posttrain" and not getattr(node, "level", 0), form)
                top = name if of or alias.asname else name.partition(".")[0]
                beside = b"" if of else self.lines[node.lineno - 1].partition(b"  #")[2]
                self.packages[top].append((whole if top == name else top, (of, alias.name), beside.decode()))

    def look_up(self, code: CodeType, eager: bool) -> None:
        """Where the compiler looks a name up among those of the file."""
        steps, top = list(dis.get_instructions(code)), code.co_name == "<module>"
        attributes = set() if top else {step.argval for step in steps if step.opname == "STORE_NAME"}  # of a class
        for step in steps:
            if "GLOBAL" in step.opname or (step.opname.endswith("_NAME") and step.argval not in attributes):
                place = step.positions.lineno - 1, step.positions.col_offset, step.argval
                self.places[place] = eager
                if top and step.opname.startswith("STORE"):
                    self.bound.append((place[0], step.argval))
        for inner in (x for x in code.co_consts if isinstance(x, CodeType)):
            now = not inner.co_flags & inspect.CO_OPTIMIZED or re.match("<.*(comp|expr)>|__annotate__", inner.co_name)
            self.look_up(inner, eager and bool(now))

    def uses_of(self, statement: ast.stmt) -> Iterator[Use]:
        nodes = list(ast.walk(statement))
        for hint in (getattr(node, key, None) for node in nodes for key in ("annotation", "returns")):
            quoted = isinstance(hint, ast.Constant) and isinstance(hint.value, str)
            names = ast.walk(ast.parse(hint.value, mode="eval") if quoted else hint) if hint else ()
            for name in (name for name in names if isinstance(name, ast.Name)):
                if quoted:
                    yield from self.use(hint.lineno - 1, hint.col_offset + 1 + name.col_offset, name.id)
                else:  # of a local variable: not compiled
                    self.places.setdefault((name.lineno - 1, name.col_offset, name.id), False)
        dots = {id(node.value): node.attr for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Name):
                place = node.lineno - 1, node.col_offset, node.id
                if place in self.places:
                    yield from self.use(*place, self.places[place], dots.get(id(node), ""))
            elif isinstance(node, ast.Global) or (node is statement and hasattr(node, "name")):
                for name in getattr(node, "names", None) or [node.name]:  # whose places are not in the tree
                    found = re.search(rb"\b%s\b" % name.encode(), self.lines[node.lineno - 1])
                    yield from self.use(node.lineno - 1, found.start(), name)

    def use(self, line: int, byte: int, name: str, eager: bool = False, attribute: str = "") -> Iterator[Use]:
        symbol = self.meaning(name)
        if symbol and not symbol.name:  # one of our files
            symbol, name = load(symbol.file).meaning(attribute), f"{name}.{attribute}"
            require(symbol, f"{self.name}.py, line {line + 1}: there is no {name}")
        if symbol:
            yield Use(line, byte, name, symbol, eager)

    def meaning(self, name: str) -> Symbol | None:
        """None: it is Python's."""
        if name in self.own:
            return Symbol(self.name, name)
        if name in self.ours:
            file, inner = self.ours[name]
            found = load(file).meaning(inner) if inner else Symbol(file, "")
            require(found, f"{self.name}.py imports {inner} of {file}.py, where there is none; mend that import")
            return found
        return Symbol("", self.packages[name][0][0]) if name in self.packages else None


@cache
def load(name: str) -> File:
    """common/machines/distributed -> that file"""
    return File(ROOT / f"{name}.py", name)


# --- the bundle


class Bundle:
    """What can be reached from a method's statements, but for files that stay behind; and its names in one file."""

    def __init__(self, method: File, stay: list[str]):
        self.method, self.missing, self.names, reached = method, {}, {}, set()
        self.packages: dict[Symbol, tuple[str, dict]] = {}  # its name, and what its imports say
        todo = list(method.units)
        while todo:
            unit = todo.pop()
            todo += () if unit in reached else self.needs(unit, stay)
            reached.add(unit)
        self.files = self.in_order()
        self.units = [unit for file in self.files for unit in file.units if unit in reached]
        self.name_all()

    def needs(self, unit: Unit, stay: list[str]) -> Iterator[Unit]:
        for use in unit.uses:
            file, name = use.symbol
            if file in stay:
                require(not use.eager, f"--leave-out {file}.py: {unit.file.name}.py cannot be imported without it")
                self.missing[use.symbol] = None
            elif file:
                yield from (each for each in self.file(file).units if each.belongs_to(name))
            else:
                forms = self.packages.setdefault(use.symbol, (use.text, {}))[1]
                forms |= {said: beside for what, said, beside in unit.file.packages[use.text] if what == name}

    def file(self, name: str) -> File:
        return self.method if name == self.method.name else load(name)

    def in_order(self) -> list[File]:
        """The method, then files behind those that they import, those that are imported late at the end."""
        order, late = {}, [self.method.name]

        def visit(name: str) -> None:
            for other in self.file(name).early:
                visit(other)
            late.extend(self.file(name).late if name not in order else ())
            order.setdefault(name)

        for name in late:  # it grows
            visit(name)
        return [self.method, *(load(name) for name in order if name != self.method.name)]

    def name_all(self) -> None:
        """A name for each symbol. Where two would share one, or Python has it, the file's name is put before it; so it
        is for what is called file.name anywhere."""
        dotted = {use.symbol for unit in self.units for use in unit.uses if "." in use.text}
        defined = [Symbol(unit.file.name, name) for unit in self.units for name in sorted(unit.binds)]
        mine = [symbol for symbol in defined if symbol.file == self.method.name]
        mine += [self.method.meaning(name) for name, symbol in self.method.ours.items() if symbol.name]
        words = {word for file in self.files for line in file.lines for word in re.findall(r"\w+", line.decode())}
        taken = set(dir(builtins))
        for symbol in dict.fromkeys([*mine, *sorted(self.packages), *defined, *self.missing]):
            name = symbol.name if symbol.file else self.packages[symbol][0]
            if name in taken or symbol in dotted:
                name = f"{re.split('[./]', symbol.file or symbol.name)[-1 if symbol.file else -2]}_{name}"
                assert name not in words, f"{name} means something else somewhere"
            taken.add(name)
            self.names[symbol] = name

    def text(self, unit: Unit) -> str:
        lines = [bytearray(line) for line in unit.file.lines[unit.start : unit.end]]
        for use in reversed(unit.uses):
            name, place, line = self.names[use.symbol], slice(use.byte, use.byte + len(use.text)), use.line - unit.start
            if name != use.text:
                assert lines[line][place] == use.text.encode(), (use, lines[line])
                lines[line][place] = name.encode()
        return b"".join(lines).decode()

    def first(self) -> list[Unit]:
        """What the method's statements look up at import, and what that does in turn."""
        todo, found = [unit for unit in self.units if unit.file == self.method][:-1], []  # the last starts the run
        while todo:
            unit = todo.pop()
            called = unit.file != self.method and isinstance(unit.node, ast.FunctionDef)
            symbols = {use.symbol for use in unit.uses if use.eager or called}
            more = [each for each in self.units if symbols & {Symbol(each.file.name, name) for name in each.binds}]
            more = [each for each in more if each.file != self.method and each not in found]
            found, todo = found + more, todo + more
        return [unit for unit in self.units if unit in found]

    def imports(self) -> str:
        lines = set()
        for symbol, (_, forms) in self.packages.items():
            for (of, what), beside in forms.items():
                name = self.names[symbol]
                renamed = f" as {name}" if name != what and (of or symbol.name == what) else ""
                lines.add(f"from {of} " * bool(of) + f"import {what}{renamed}" + f"  #{beside}" * bool(beside))
        return "\n".join(sorted(lines))


# --- its text


def heading(what: str) -> str:
    return f"\n\n# === {what} {'=' * (113 - len(what))}\n"


def code(bundle: Bundle) -> str:
    """All but the head and the tiny models."""
    doc = lambda file: b"".join(file.lines[: file.doc.end_lineno]).decode() if file.doc else ""  # noqa: E731
    first, run = bundle.first(), bundle.method.units[-1]
    out = [doc(bundle.method), "\n", bundle.imports(), "\n", heading("What flags and signatures of the method name")]
    for file in bundle.files:
        units = [unit for unit in first if unit.file == file]
        out += [f"\n# --- from {file.name}.py\n" * bool(units), *map(bundle.text, units)]
    for file in bundle.files:
        if units := [unit for unit in bundle.units if unit.file == file and unit not in (*first, run)]:
            new = [name for symbol, name in bundle.names.items() if symbol.file == file.name and symbol.name != name]
            told = textwrap.fill(f"Names with the file's before them: {', '.join(new)}" if new else "", 118)
            out += [heading(f"{file.name}.py"), textwrap.indent(f"{told}\n", "# ")]
            out += [doc(file) if file != bundle.method else "", "\n", *map(bundle.text, units)]
    if bundle.missing:
        out += [heading("What was left out"), "\n", inspect.getsource(left_out), "\n\n"]
        out += [f'{bundle.names[symbol]} = left_out("{symbol.file}.py")\n' for symbol in bundle.missing]
    return "".join([*out, heading("Run"), bundle.text(run)])


def ruff(text: str, *command: str) -> str:
    where = ["--config", ROOT / "pyproject.toml", "--stdin-filename", "bundle.py", "-"]
    done = subprocess.run([sys.executable, "-m", "ruff", *command, *where], input=text, capture_output=True, text=True)
    require(done.returncode == 0, f"ruff cannot read the bundle: {done.stderr.strip()}")
    return done.stdout


def head(bundle: Bundle, text: str, config: Config) -> str:
    """What stands above the docstring: where the file is from, what it needs, and where its parts begin."""
    name, flags = bundle.method.name, "" if config.tiny else " --no-tiny"
    flags += "".join(f" {word}" for word in ("--leave-out", *config.leave_out) if config.leave_out)
    needs = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    needs = "\n".join(f"  '{line}'," for line in needs if line and not re.match("pytest|ruff", line))
    said = HEAD.format(name=name, flags=flags, commit=commit(), needs=needs)
    about = {f"{file.name}.py": re.split("[:.;(]|, (?!a)", file.title)[0] for file in bundle.files}
    parts = [(i, line.strip("# =")) for i, line in enumerate(text.splitlines(), 1) if line.startswith("# === ")]
    start = said.count("\n") + len(parts) + 1
    said += "".join(f"{start + i:6}  {part:35}{about.get(part, '')}\n" for i, part in parts)
    return "".join(f"# {line:.118}".rstrip() + "\n" for line in said.splitlines()) + "\n"


def models(file: File) -> str:
    """The built-in models that the method's text names, as comments."""
    words, lines = set(re.findall(r"[\w-]+", b"".join(file.lines).decode())), []
    for path in sorted((ROOT / "common" / "tiny").glob("*/*")):
        if path.parent.name in words and path.name != "training.json":
            packed = base64.b85encode(zlib.compress(path.read_bytes(), 9)).decode()
            name = f"#:tiny:{path.parent.name}/{path.name}:"
            lines += [name + packed[i : i + CHARS] + "\n" for i in range(0, len(packed), CHARS)]
    return heading("Tiny models, which tiny_models() unpacks") + "".join(lines) if lines else ""


def main(config: Config) -> None:
    path, stay = Path(config.method), [name.removesuffix(".py") for name in config.leave_out]
    out = Path(config.out or path.name)
    text = read(path) if path.suffix == ".py" and path.is_file() else ""
    ours = all(
        re.search(part, text, re.M)
        for part in (r"^from posttrain.common.run import .*\bRun\b", "^class Config:", "^if __name__")
    )
    require(ours, f"{config.method!r} is no method's file: give one of methods/, or a copy of one")
    require(out.resolve() != path.resolve(), f"{out} is the method itself: name another file by -o")
    require(not os.path.lexists(out), f"{out} exists: name another file by -o, or remove it first")
    for name in stay:
        require((ROOT / f"{name}.py").is_file(), f"--leave-out {name}: no such file; one is common/engines/local.py")
    name = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else Path(path.name)
    bundle = Bundle(File(path, str(name.with_suffix(""))), stay)
    text = ruff(ruff(code(bundle), "check", "--quiet", "--fix", "--select", "I"), "format")
    text = head(bundle, text, config) + text + models(bundle.method) * config.tiny
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(out)  # never half a file
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name another file by -o") from None
    print(f"{out}: {len(text.splitlines()):,} lines, {len(text) / 2**20:.1f} MB")


if __name__ == "__main__":
    cli(main, Config)
