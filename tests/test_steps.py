"""common/families/steps.py: chains, critiques and lessons, worked out a second time."""

import random
import re
from collections import Counter

import pytest

from posttrain.common.cli import UserError
from posttrain.common.tasks import make_task, text_of

LESSON = re.compile(r"(\d)([a-f]{4})=(?:(\d{4})(?:!(\d):(\d)=|\?))?")


@pytest.fixture(scope="module")
def task():
    return make_task("steps")


@pytest.fixture(scope="module", params=["sure", "guess"])
def lessons(request):
    """(match of the prompt, target) of many lessons."""
    drawn = make_task(f"steps:lessons={request.param}").draw(1500, 0, 1)
    return [(LESSON.fullmatch(text_of(example)), example.answer) for example in drawn]


def facts_used(start, operators, values):
    """(operator, digit read, digit written) of each step."""
    return list(zip(operators, start + values, values, strict=False))


def walk(task, start, operators):
    out = ""
    for o in operators:
        start = task.facts[o][int(start)]
        out += start
    return out


def test_operators_are_permutations_and_the_same_in_every_process(task):
    assert sorted(task.facts) == list("abcdef") and all(sorted(f) == list("0123456789") for f in task.facts.values())
    assert task.facts == make_task("steps").facts and len({*task.facts.values()}) == 6
    assert len(task.known) == 42 and len(make_task("steps:known=0.5").known) == 30


def test_answers_and_grades(task):
    for example in task.draw(50, 0, 1) + task.heldout(50):
        start, operators = re.fullmatch(r"(\d)([a-f]{4})=", text_of(example)).groups()
        assert example.answer == walk(task, start, operators)
        assert task.grade(example, example.answer) == 1 == float(task.formed(example, example.answer))
        other = f"{(int(example.answer) + 1) % 10000:04}"
        assert task.grade(example, other) == 0 and task.formed(example, other)
        for text in ("", example.answer[:3], example.answer + "1", example.answer + " ", "12a4", "\u0661234"):
            assert task.grade(example, text) == 0 and not task.formed(example, text)
            assert task.critique(example, text) == "no answer"


def test_critiques_name_the_first_wrong_step_and_its_value(task):
    rng = random.Random(0)
    for example in task.draw(100, 0, 1):
        attempt = "".join(rng.choice((digit, rng.choice("0123456789"))) for digit in example.answer)
        said = task.critique(example, attempt)
        if attempt == example.answer:
            assert said == ""
            continue
        at, value = map(int, said.split(":"))
        assert attempt[: at - 1] == example.answer[: at - 1] and attempt[at - 1] != str(value)
        assert example.answer[at - 1] == str(value)
        assert (example.fields["reveals"] == said) == (at == 4)


def test_training_and_held_out_problems_never_overlap_lessons_included(task, lessons):
    held = {text_of(example) for example in task.heldout(800)}
    assert len(held) == 800 and not held & {text_of(example) for example in task.draw(2000, 0, 3)}
    assert not held & {match[1] + match[2] + "=" for match, _ in lessons}
    assert held == {text_of(e) for e in make_task("steps:lessons=guess").heldout(800)}


def test_lessons_are_half_answers_a_quarter_critiques_a_quarter_second_tries(lessons):
    kinds = Counter("answer" if not m[3] else "second" if m[4] else "critique" for m, _ in lessons)
    for kind, share in (("answer", 0.5), ("critique", 0.25), ("second", 0.25)):
        assert abs(kinds[kind] / len(lessons) - share) < 4 * (share * (1 - share) / len(lessons)) ** 0.5


def test_lessons_teach_known_facts_only_and_give_none_of_the_others_away(task, lessons, request):
    """What is written for a fact that is not known, as a guess or by a critique's order, is any digit equally often."""
    guessed, told = Counter(), Counter()
    for match, target in lessons:
        start, operators, attempt, at, value = match.groups()
        right = walk(task, start, operators) if attempt and not at else target
        facts = facts_used(start, operators, right)
        unknown = [i for i, (o, digit, _) in enumerate(facts) if (o, digit) not in task.known]
        true = [task.facts[o][int(digit)] == written for o, digit, written in facts]
        assert all(true[i] for i in range(4) if i not in unknown)
        if not attempt:
            guessed.update(true[i] for i in unknown)
            continue
        if at:
            assert unknown == [int(at) - 1]
            told[true[int(at) - 1]] += 1
        else:
            assert unknown == []
            at, value = target.split(":")
        at = int(at)
        assert right[at - 1] == value
        assert attempt[: at - 1] == right[: at - 1] and attempt[at - 1] != value  # wrong from that step on
        for o, digit, written in facts_used(start, operators, attempt)[at:]:
            assert (o, digit) not in task.known or task.facts[o][int(digit)] == written
    if request.node.callspec.params["lessons"] == "sure":
        assert not guessed
    for digits, least in ((guessed, 700), (told, 300)) if guessed else ((told, 300),):
        n = digits.total()
        assert n > least and abs(digits[True] / n - 0.1) < 4 * (0.09 / n) ** 0.5


def test_lessons_are_a_function_of_their_key():
    task = make_task("steps:lessons=sure")
    a, b, c = (task.draw(20, 0, key) for key in (1, 1, 2))
    assert a == b != c and all(task.demonstrate(e, random.Random(0)) == e.answer for e in a)


@pytest.mark.parametrize("options", ["known=0", "known=1", "known=many", "lessons=true", "now=1"])
def test_bad_options_are_one_line(options):
    with pytest.raises(UserError, match="steps"):
        make_task(f"steps:{options}")
