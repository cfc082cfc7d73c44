"""Tool calls in text and the calculator: written-out cases of each format, then properties over random ones."""

import ast
import json
import random
from fractions import Fraction

import pytest

from posttrain.common.environments.calls import Call, calculate, find_call, shorten

CODE = Call("python", {"code": "1+1"}, "")
HERMES = '<tool_call>\n{"name": "python", "arguments": {"code": "1+1"}}\n</tool_call>'
LLAMA = '{"name": "python", "parameters": {"code": "1+1"}}'


def random_json(rng: random.Random, depth: int = 3) -> object:
    """Values with everything that may confuse a parser: braces, tags, quotes, escapes and fences in strings."""
    pieces = [
        "{",
        "}",
        '"',
        "\\",
        "\n",
        "<tool_call>",
        "</tool_call>",
        "```",
        "a",
        "é",
        "😀",
        ">",
        "<",
        ",",
        ":",
        "name",
    ]
    kind = rng.randrange(7 if depth else 5)
    if kind < 2:
        return "".join(rng.choices(pieces, k=rng.randrange(6)))
    if kind < 5:
        return [rng.randint(-9, 99), rng.uniform(-1, 1), rng.choice([True, False, None])][kind - 2]
    if kind == 5:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return random_arguments(rng, depth - 1)


def random_arguments(rng: random.Random, depth: int = 3) -> dict:
    return {rng.choice(["code", "{", "a b", "name", "arguments", "é"]): random_json(rng, depth) for _ in range(3)}


def written(rng: random.Random, key: str) -> tuple[str, dict]:
    arguments = random_arguments(rng)
    parts = [("name", "tool"), (key, arguments)]
    rng.shuffle(parts)  # Hermes 2 wrote the arguments first
    return json.dumps(dict(parts), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2])), arguments


def wrap(form: str, text: str, space: str = "\n") -> str:
    return f"<tool_call>{space}{text}{space}</tool_call>" if form == "hermes" else text


# --- the formats


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("<35*6>", "35*6"),
        ("35*6=<35*6>", "35*6"),
        ("<1+2><3+4>", "1+2"),
        ("<>", ""),
        ("<<1+2>", "<1+2"),
        ("<35*6", None),
        ("35*6>", None),
        (">35*6<", None),
        ("=98;", None),
        ("", None),
    ],
)
def test_tiny_calls_the_calculator_with_what_stands_between_the_first_signs(text, expression):
    assert find_call(text, "tiny") == (
        None if expression is None else Call("calculator", {"expression": expression}, "")
    )


@pytest.mark.parametrize(
    "text",
    [
        HERMES,
        HERMES.replace("\n", ""),
        "I compute it.\n" + HERMES + "<|im_end|>",
        HERMES + "\n" + HERMES.replace("1+1", "2+2"),
        '<tool_call>{"arguments": {"code": "1+1"}, "name": "python"}</tool_call>',
        '<tool_call>{"name": "python", "arguments": "{\\"code\\": \\"1+1\\"}"}</tool_call>',
        "<think>\n<tool_call>{}</tool_call>\n</think>\n\n" + HERMES,
        "so <tool_call>{}</tool_call>?\n</think>\n\n" + HERMES,  # <think> is in the prompt of some models
        '<tool_call>{"name": "python", "arg\n' + HERMES,  # opened, not closed, then done right
    ],
)
def test_hermes_finds_the_first_complete_call(text):
    assert find_call(text, "hermes") == CODE


@pytest.mark.parametrize(
    "text",
    [
        LLAMA,
        LLAMA.replace("parameters", "arguments"),
        '{"type": "function", "name": "python", "parameters": {"code": "1+1"}}',
        "<|python_tag|>" + LLAMA + "<|eom_id|>",
        LLAMA + "; " + LLAMA.replace("1+1", "2+2"),
        "[" + LLAMA + "]",
        "First:\n```json\n" + LLAMA + "\n```\nThen the answer.",
        "With {x} and \\boxed{2} and {'a'} and {\"a\", 1}: " + LLAMA,
        '{"answer": {"name": "python"}} ' + LLAMA,
        '{"name": "python", "parameters": "{\\"code\\": \\"1+1\\"}"}',
        "<think>" + LLAMA.replace("1+1", "2+2") + "</think>" + LLAMA,
    ],
)
def test_json_finds_the_first_complete_call(text):
    assert find_call(text, "json") == CODE


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", ""),
        ("hermes", "The answer is 2."),
        ("hermes", LLAMA),
        ("hermes", "<tool_call>"),
        ("hermes", HERMES.removesuffix("</tool_call>")),
        ("hermes", HERMES[:-1]),
        ("hermes", HERMES.removeprefix("<tool_call>")),
        ("hermes", "</tool_call>" + HERMES.removesuffix("</tool_call>")),
        ("hermes", "<think>" + HERMES),
        ("hermes", HERMES + "</think> The answer is 2."),
        ("json", ""),
        ("json", "The answer is \\boxed{2}."),
        ("json", '{"answer": 2}'),
        ("json", '{"name": "Ada", "age": 36}'),
        ("json", '{"a": {"arguments": {}}}'),
        ("json", '{"name": "python"'),
        ("json", '{"x": 1, "name": "python", "parameters": {"parameters": {}}'),
        ("json", "{" * 5000),
    ],
)
def test_no_call_or_one_that_is_not_closed_makes_the_turn_final(form, text):
    assert find_call(text, form) is None


@pytest.mark.parametrize("form", ["hermes", "json"])
@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ('{"name": "f", "arguments": {a: 1}}', "", "bad JSON"),
        ('{"name": "f" "arguments": {}}', "", "bad JSON"),
        ("{'name': 'f', 'arguments': {}}", "", "bad JSON"),
        ('{"name": "f", "arguments": {"code": "a\nb"}}', "", "bad JSON"),
        ('{"name": "f", "arguments": {"n": ' + "9" * 5000 + "}}", "", "bad JSON"),
        ('{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}", "", "bad JSON"),
        ('{"arguments": {}}', "", "no name"),
        ('{"name": "", "arguments": {}}', "", "no name"),
        ('{"name": 3, "arguments": {}}', "", "no name"),
        ('{"name": "f", "arguments": [1]}', "f", "must be an object"),
        ('{"name": "f", "arguments": null}', "f", "must be an object"),
        ('{"name": "f", "arguments": "1+1"}', "f", "must be an object"),
        ('{"name": "f", "arguments": "[1]"}', "f", "must be an object"),
    ],
)
def test_a_complete_call_that_is_wrong_says_why(form, text, name, words):
    call = find_call(wrap(form, text), form)
    assert call.name == name and call.arguments == {} and words in call.error and "\n" not in call.error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<tool_call></tool_call>", "bad JSON"),
        ("<tool_call>1+1</tool_call>", "bad JSON"),
        ("<tool_call>[1]</tool_call>", "JSON object"),
        ('<tool_call>{"name": "f", "arguments": {}} now</tool_call>', "bad JSON"),
        ('<tool_call>{"name": "f", "arguments": {</tool_call>' + HERMES, "bad JSON"),
    ],
)
def test_hermes_says_what_is_wrong_between_the_tags(text, words):
    call = find_call(text, "hermes")
    assert call.name == "" and words in call.error


def test_hermes_without_arguments_calls_with_none():
    assert find_call('<tool_call>{"name": "f"}</tool_call>', "hermes") == Call("f", {}, "")


@pytest.mark.parametrize(("form", "key"), [("hermes", "arguments"), ("json", "arguments"), ("json", "parameters")])
def test_any_call_is_found_whatever_its_strings_hold_and_whatever_follows(form, key):
    rng = random.Random(0)
    for _ in range(500):
        text, arguments = written(rng, key)
        call = wrap(form, text, rng.choice(["", "\n", " \n\t"]))
        before, after = rng.choice(["", "Well. ", "a}b\n"]), rng.choice(["", " done", call, "}", "{", "</tool_call>"])
        assert find_call(before + call + after, form) == Call("tool", arguments, "")


@pytest.mark.parametrize(("form", "key"), [("hermes", "arguments"), ("json", "parameters")])
def test_no_beginning_of_a_call_is_a_call(form, key):
    """Whatever the place at which a turn is cut: half a literal, an escape, a string, a tag."""
    rng = random.Random(1)
    for _ in range(100):
        text, _ = written(rng, key)
        text = text.replace("</tool_call>", "") if form == "hermes" else text
        call = wrap(form, text)
        for length in range(len(call)):
            assert find_call(call[:length], form) is None, call[:length]


def test_noise_never_raises():
    rng = random.Random(2)
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name"',
        '"arguments"',
        ":",
        ",",
        '"',
        "\\",
        "[",
        "]",
        "1",
        "<",
        ">",
    ]
    pieces += ["<think>", "</think>", " ", "null", "```json", HERMES, LLAMA]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        for form in ("tiny", "hermes", "json"):
            call = find_call(text, form)
            assert call is None or (isinstance(call.name, str) and isinstance(call.arguments, dict))
            assert call is None or call.error or call.name


# --- the calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("35*6", "210"),
        ("203-5", "198"),
        (" 2 + 3 * 4 ", "14"),
        ("(2+3)*4", "20"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("--3", "3"),
        ("7/2", "3.5"),
        ("6/2", "3"),
        ("0.1+0.2", "0.3"),
        ("-0.0", "0"),
        ("1/3", "0.333333333333"),
        (".5*4", "2"),
        ("999999999999", "999999999999"),
        ("999999*999999", "999998000001"),
        ("-" * 63 + "1", "-1"),
    ],
)
def test_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "not an expression"),
        ("35*", "not an expression"),
        ("1 2", "not an expression"),
        ("(1", "not an expression"),
        ("(" * 64, "not an expression"),
        ("05*6", "not an expression"),
        ("1.2.3", "not an expression"),
        ("()", "only numbers"),
        ("...", "only numbers"),
        ("+1", "only numbers"),
        ("2**3", "only numbers"),
        ("9**9**9**9", "only numbers"),
        ("(2)(3)", "only numbers"),
        ("1/0", "division by zero"),
        ("1//0", "division by zero"),
        ("1%0", "division by zero"),
        ("1.5/0.0", "division by zero"),
        ("1000000000000", "too large"),
        ("1000000*1000000", "too large"),
        ("-1000000*1000000", "too large"),
        ("1000000*1000000-1000000*1000000", "too large"),  # also on the way
        ("9" * 60 + ".0", "too large"),
        ("1+" * 32 + "1", "64 characters"),
        ("a+1", "'a'"),
        ("1e5", "'e'"),
        ("1j", "'j'"),
        ("0x10", "'x'"),
        ("1_000", "'_'"),
        ("True", "'T'"),
        ("'a'*3", '"\'"'),
        ("[1]", r"'['"),
        ("1<2", "'<'"),
        ("1,2", "','"),
        ("٣+1", "'٣'"),
        ("1\n+1", r"'\n'"),
        ("1\0", r"'\x00'"),
        ("1#2", "'#'"),
        ("__import__('os').system('ls')", "'_'"),
    ],
)
def test_calculator_refuses_with_a_short_reason(expression, words):
    with pytest.raises(ValueError) as error:
        calculate(expression)
    assert type(error.value) is ValueError and words in str(error.value) and len(str(error.value)) < 60


def exact(node: ast.expr) -> Fraction:
    """An independent evaluator in fractions, of what it is given below."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -exact(node.operand)
    a, b = exact(node.left), exact(node.right)
    floor = a // b if isinstance(node.op, (ast.FloorDiv, ast.Mod)) else 0
    return {"Add": a + b, "Sub": a - b, "Mult": a * b, "FloorDiv": Fraction(floor), "Mod": a - b * floor}[
        type(node.op).__name__
    ]


def test_calculator_agrees_with_exact_arithmetic_on_random_expressions():
    rng, compared = random.Random(3), 0

    def build(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 99))
        left, right, sign = build(depth - 1), build(depth - 1), rng.choice(["+", "-", "*", "//", "%"])
        return rng.choice(["", "-"]) + f"({left}{sign}{right})"

    for _ in range(2000):
        text = build(3)
        try:
            got = calculate(text)
        except ValueError as error:
            assert len(text) > 64 or "division" in str(error) or "large" in str(error), text
            continue
        assert Fraction(got) == exact(ast.parse(text, mode="eval").body), text
        compared += 1
    assert compared > 500


def test_calculator_raises_nothing_but_valueerror_on_noise():
    rng = random.Random(4)
    for _ in range(20_000):
        text = "".join(rng.choices("0123456789.+-*/%() ", k=rng.randrange(70)))
        try:
            assert abs(float(calculate(text))) < 1e12
        except ValueError as error:
            assert type(error) is ValueError


# --- shorten


def test_shorten_keeps_head_and_tail_and_never_exceeds_its_limit():
    text = "".join(chr(33 + i % 90) for i in range(1000))
    for limit in range(1100):
        short = shorten(text, limit)
        assert len(short) == min(limit, len(text))
        if limit >= len(text):
            assert short == text
        elif limit >= 9:
            head, tail = short.split(" [...] ")
            assert text.startswith(head) and text.endswith(tail) and 0 <= len(head) - len(tail) <= 1
        else:
            assert text.startswith(short)
    assert shorten("", 0) == ""
