"""Tool calls in a model's text, and the calculator that needs no process of its own.

tiny     <35*6>, always the calculator
hermes   <tool_call>{"name": "python", "arguments": {"code": "1+1"}}</tool_call>   Hermes, Qwen2.5, Qwen3
json     {"name": "python", "parameters": {"code": "1+1"}}, in a fence or not      Llama 3.1
"""

import ast
import json
import re
from operator import add, floordiv, mod, mul, sub, truediv
from typing import Literal, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
SPACE, UNFINISHED = re.compile(r"\s*"), re.compile(r"[-+.\\\w]*\s*")  # the latter: half of null, 1.5e-3 or \u00e9
KEY = re.compile(r"""\{\s*['"]?(name|type|function|arguments|parameters)['"]?\s*:""")  # no call: {x}, {"sum": 3}
SIGNS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.FloorDiv: floordiv, ast.Mod: mod}


class Call(NamedTuple):
    name: str
    arguments: dict
    error: str  # "" or why it cannot be run


def find_call(text: str, form: Literal["tiny", "hermes", "json"]) -> Call | None:
    """The first complete call. None, so that the turn is final, if there is none or it is opened and not closed."""
    if form == "tiny":
        _, opened, rest = text.partition("<")
        expression, closed, _ = rest.partition(">")
        return Call("calculator", {"expression": expression}, "") if opened and closed else None
    reasoning, thought, rest = text.partition("</think>")
    if not thought and reasoning.lstrip().startswith("<think>"):
        return None
    text = rest if thought else text  # reasoning calls nothing
    return hermes_call(text) if form == "hermes" else json_call(text)


def hermes_call(text: str) -> Call | None:
    at = text.find(OPEN)
    while at >= 0:
        start = at + len(OPEN)
        value, end, error = decode(text, start)
        if not error and text[end:].lstrip().startswith(CLOSE):  # whatever tags its strings hold
            return as_call(value)
        at, close = text.find(OPEN, start), text.find(CLOSE, start)
        if close >= 0 and (at < 0 or close < at):
            return Call("", {}, error or "bad JSON: something follows the object")
    return None


def json_call(text: str) -> Call | None:
    at = text.find("{")
    while at >= 0:
        value, end, error = decode(text, at)
        if error and end == len(text):  # what follows at most lies inside an object that is not closed
            return None
        if error and KEY.match(text, at):
            return Call("", {}, error)
        if not error and value.keys() & {"arguments", "parameters"}:
            return as_call(value)
        at = text.find("{", at + 1 if error else end)
    return None


def decode(text: str, at: int) -> tuple[object, int, str]:
    """(JSON value, its end, "") or (None, where it goes wrong: at the end of text if cut short, what is wrong)."""
    try:
        return *json.JSONDecoder().raw_decode(text, SPACE.match(text, at).end()), ""
    except json.JSONDecodeError as error:
        cut = UNFINISHED.fullmatch(text, error.pos) or error.msg.startswith("Unterminated string")
        return None, len(text) if cut else error.pos, f"bad JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return None, at, f"bad JSON: {error}"


def as_call(value: object) -> Call:
    if not isinstance(value, dict):
        return Call("", {}, "a call must be a JSON object")
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return Call("", {}, "the call has no name")
    arguments = decode(arguments, 0)[0] if isinstance(arguments, str) else arguments
    return Call(name, arguments, "") if isinstance(arguments, dict) else Call(name, {}, "arguments must be an object")


def calculate(expression: str) -> str:
    """The value of + - * / // % and parentheses over decimal numbers; ValueError with a short reason."""
    if len(expression) > 64:
        raise ValueError("longer than 64 characters")
    if strange := expression.strip("0123456789.+-*/%() "):
        raise ValueError(f"{strange[0]!r} is not allowed")
    try:
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError("not an expression" if isinstance(error, SyntaxError) else "division by zero") from None
    return str(value) if isinstance(value, int) else f"{value + 0:.12g}"  # + 0: no -0


def evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -evaluate(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        value = SIGNS[type(node.op)](evaluate(node.left), evaluate(node.right))
    else:
        raise ValueError("only numbers and + - * / // % are allowed")
    if not abs(value) < 1e12:
        raise ValueError("too large")
    return value


def shorten(text: str, limit_chars: int) -> str:
    """At most limit_chars characters: head and tail with a marker between; where that does not fit, the head."""
    mark, room = " [...] ", limit_chars - len(" [...] ")
    if len(text) <= limit_chars or room < 2:
        return text[:limit_chars]
    return text[: room - room // 2] + mark + text[len(text) - room // 2 :]
