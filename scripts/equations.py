"""Links from the equations of a method to the lines that carry them out, kept fresh in the documentation.

A method's docstring numbers its equations. The first line that names one as "Eq. n", in a function's docstring or in a
comment of the code, is where it is carried out; a flag whose help names it acts on it. From these this script fills the
blocks between markers in any Markdown file, with NAME as in methods/NAME.py:

    <!-- equations NAME --> ... <!-- end -->             a table, on lines of its own
    <!-- equations-inline NAME -->...<!-- end -->        links such as [1](methods/opd.py#L163), also in a table's cell

"(n)" in the code speaks of an equation without being the place of it; "paper, Eq. n" is the publication's number.

Run: python scripts/equations.py            (--check: say which blocks are stale, and change nothing)
"""

import ast
import io
import os
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.common.cli import UserError, cli, first_line, require

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("methods", "common", "kernels", "scripts", "tests")
BLOCK = re.compile(r"(<!-- equations(-inline)? (\w+) -->)(.*?)(<!-- end -->)", re.S)
FOREIGN = re.compile(r"(?:paper|[A-Z]{3,}),? Eq\. [\d-]+(?:, \d+)*")  # of a publication
NAMED = re.compile(r"Eq\. (\d+(?:(?:-| to |, and |, or |, | and | or )\d+)*)")


@dataclass
class Config:
    check: bool = False  # only say which blocks are stale, one line each, with exit code 1


@dataclass
class Equation:
    text: str = ""  # as in the docstring
    paper: str = ""  # where it stands there: Eq. 6
    flags: list = field(default_factory=list)  # --flag, at last (--flag, its line)
    lines: list[tuple[str, int]] = field(default_factory=list)  # (link's text, line): functions, then lines in them


def documents() -> list[Path]:
    """All Markdown files of the checkout, whether git knows them or not."""
    return sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])


def text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): mend it, or take it out of the checkout"
        ) from None


def named(text: str) -> set[int]:
    """'A of Eq. 1 and 3-5; paper, Eq. 9' -> {1, 3, 4, 5}"""
    found = set()
    for numbers in NAMED.findall(FOREIGN.sub("", text)):
        for part in re.split(r", and |, or |, | and | or ", numbers):
            first, *last = map(int, re.split(r"-| to ", part))
            found |= set(range(first, (last or [first])[0] + 1))
    return found


def numbered(docstring: str) -> dict[int, Equation]:
    """The lines '    (n)  formula     paper, Eq. k    --flag', each with the deeper lines that follow it."""
    equations, current = {}, None
    for line in docstring.splitlines():
        start = re.match(r"    \((\d+)\) +", line)
        if start:
            current = equations.setdefault(int(start[1]), Equation())
        elif not line.startswith(" " * 6):
            current = None
        if current:
            formula, *flags = re.split(r" {2,}(?=--)", line[start.end() if start else 0 :])
            formula, *paper = re.split(r" {2,}paper, (?=Eq|Alg)", formula)
            formula = re.sub(r"(?<=[^,; ]) {3,}(?![ =])", ", ", formula.rstrip())  # columns of the docstring
            current.text = " ".join(f"{current.text} {formula}".split())
            current.paper += "".join(paper).strip()
            current.flags += re.findall(r"--[\w-]+", "".join(flags))
    return equations


def read(name: str) -> dict[int, Equation]:
    """The equations of methods/NAME.py with the places of their code."""
    source = text_of(ROOT / "methods" / f"{name}.py")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"methods/{name}.py is not Python: {error.msg}, line {error.lineno}; mend it") from None
    equations = numbered(ast.get_docstring(tree) or "")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    settings = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    flags = {node.lineno: node.target.id for node in settings.body if isinstance(node, ast.AnnAssign)}
    for function in functions:
        for n in named(ast.get_docstring(function) or "") & set(equations):
            equations[n].lines.append((f"`{function.name}`", function.lineno))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            inside = [f.name for f in functions if f.lineno <= line <= f.end_lineno]
            for n in named(token.string) & set(equations):
                if line in flags:
                    flag = f"--{flags[line].replace('_', '-')}"
                    equations[n].flags += [flag] if flag not in equations[n].flags else []
                elif inside:
                    equations[n].lines.append((f"`{inside[0]}` line {line}", line))
    for equation in equations.values():  # a flag links to its line in Config
        known = {f"--{flag.replace('_', '-')}": line for line, flag in flags.items()}
        equation.flags = [(flag, known[flag]) for flag in equation.flags if flag in known]
    return equations


def block(name: str, inline: bool, page: Path) -> str:
    """What stands between the markers in page."""
    link, equations = os.path.relpath(ROOT / "methods" / f"{name}.py", page.parent), read(name)
    if inline:
        return " ".join(f"[{n}]({link}#L{each.lines[0][1]})" for n, each in equations.items() if each.lines)
    rows = ["", "| equation | formula | code | flags |", "|---|---|---|---|"]
    for n, each in equations.items():
        code = [f"[{where}]({link}#L{line})" for where, line in each.lines]
        flags = [f"[`{flag}`]({link}#L{line})" for flag, line in each.flags]
        number, formula = f"({n})" + f"; paper: {each.paper}" * bool(each.paper), each.text.replace("|", "\\|")
        rows.append(f"| {number} | `{formula}` | {', '.join(code)} | {', '.join(flags)} |")
    return "\n".join([*rows, ""])


def renewed(page: Path, text: str) -> tuple[str, list[str]]:
    """The page with all blocks made anew, and 'methods/opd.md:12: equations opd' for each that was stale."""
    stale = []

    def fill(match: re.Match) -> str:
        start, inline, name, old, end = match.groups()
        where = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: equations{inline or ''} {name}"
        require((ROOT / "methods" / f"{name}.py").is_file(), f"{where}: there is no methods/{name}.py")
        new = block(name, bool(inline), page)
        stale.extend([where] if new != old else [])
        return start + new + end

    new = BLOCK.sub(fill, text)
    opened = len(re.findall(r"<!-- equations(?:-inline)? \w+ -->", text))
    require(opened == len(BLOCK.findall(text)), f"{page.relative_to(ROOT)}: a block of equations lacks <!-- end -->")
    return new, stale


def main(config: Config) -> None:
    every = []
    for page in documents():
        text = text_of(page)
        new, stale = renewed(page, text)
        every += stale
        if stale and not config.check:
            page.write_text(new, "utf-8")
    for line in every:
        print(f"{line} {'is stale: run python scripts/equations.py' if config.check else 'written'}")
    sys.exit(bool(every) and config.check)


if __name__ == "__main__":
    cli(main, Config)
