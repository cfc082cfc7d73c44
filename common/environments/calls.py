"""Tool calls in a model's text, and the calculator that needs no process of its own.

tiny     <35*6>, always the calculator
hermes   <tool_call>{"name": "python", "arguments": {"code": "1+1"}}</tool_call>   Hermes, Qwen2.5, Qwen3
json     {"name": "python", "parameters": {"code": "1+1"}}, in a fence or not      Llama 3.1
"""

import ast
import json
import operator
import re
from typing import Literal, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGINS = re.compile(
    r"""\{\s*['"]?(name|type|function|arguments|parameters)['"]?\s*:"""
)  # a call, in prose and \boxed{}
SPACE, CUT = re.compile(r"\s*"), " [...] "
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS |= {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
LARGEST = 10**12


class Call(NamedTuple):
    name: str
    arguments: dict
    error: str  # "" or why it cannot be run


def find_call(text: str, form: Literal["tiny", "hermes", "json"]) -> Call | None:
    """The first complete call. None, and so a final answer, if there is none or it is opened and not closed.

    Reasoning up to </think> calls nothing.
    """
    if form == "tiny":
        _, opened, rest = text.partition("<")
        expression, closed, _ = rest.partition(">")
        return Call("calculator", {"expression": expression}, "") if opened and closed else None
    reasoning, closed, rest = text.partition("</think>")
    if closed:
        text = rest
    elif reasoning.lstrip().startswith("<think>"):
        return None
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
        if error and BEGINS.match(text, at):
            return Call("", {}, error)
        if not error and value.keys() & {"arguments", "parameters"}:
            return as_call(value)
        at = text.find("{", at + 1 if error else end)
    return None


def decode(text: str, at: int) -> tuple[object, int, str]:
    """(the JSON value at this place, its end, "") or (None, where it goes wrong, what is wrong).

    One that lacks only its rest goes wrong at the end of the text.
    """
    try:
        return *json.JSONDecoder().raw_decode(text, SPACE.match(text, at).end()), ""
    except json.JSONDecodeError as error:
        rest = text[error.pos :].rstrip()
        cut = any(word.startswith(rest) for word in ("true", "false", "null", "-1", "NaN", "Infinity", "-Infinity"))
        cut = cut or error.msg.startswith("Unterminated string") or ("XXXX" in error.msg and len(rest) < 6)
        return None, len(text) if cut else error.pos, f"bad JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return None, at, f"bad JSON: {error}"


def as_call(value: object) -> Call:
    if not isinstance(value, dict):
        return Call("", {}, "a call must be a JSON object")
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return Call("", {}, "the call has no name")
    if isinstance(arguments, str):
        arguments = decode(arguments, 0)[0]
    return Call(name, arguments, "") if isinstance(arguments, dict) else Call(name, {}, "arguments must be an object")


def calculate(expression: str) -> str:
    """The value of + - * / // % and parentheses over decimal numbers; ValueError with a short reason."""
    if len(expression) > 64:
        raise ValueError("longer than 64 characters")
    if strange := expression.strip("0123456789.+-*/%() "):
        raise ValueError(f"{strange[0]!r} is not allowed")
    try:
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError("not an expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
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
    if not abs(value) < LARGEST:
        raise ValueError("too large")
    return value


def shorten(text: str, limit_chars: int) -> str:
    """At most limit_chars characters: head and tail with a marker between; where that does not fit, the head."""
    room = limit_chars - len(CUT)
    if len(text) <= limit_chars:
        return text
    return text[: room - room // 2] + CUT + text[len(text) - room // 2 :] if room >= 2 else text[:limit_chars]
