"""Tasks: training and held-out problems never meet, draws are functions of their key, grades mean what they say."""

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from posttrain.common import tasks
from posttrain.common.cli import UserError
from posttrain.common.families import answers
from posttrain.common.tasks import CORRECT, Example, grade_all, make_reward, make_task, text_of

SUM = "reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"  # at most 200 different problems


def write_rows(path, n=30):
    """n questions whose answers are written as in GSM8K, one of them twice."""
    rows = [{"prompt": f"{i} + 1 = ?", "answer": f"One more.\n#### {i + 1}", "level": i} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return str(path)


@pytest.fixture(params=["addition", "arithmetic", SUM, "reasoning_gym:spell_backward", "jsonl"])
def task(request, tmp_path):
    return make_task(write_rows(tmp_path / "sums.jsonl") if request.param == "jsonl" else request.param)


def prompts(examples):
    return [text_of(example) for example in examples]


def test_training_and_heldout_prompts_never_overlap(task):
    trained = {prompt for step in range(40) for prompt in prompts(task.draw(25, 0, step))}
    held = prompts(task.heldout(100))
    assert held and len(held) == len(set(held))
    assert not trained & set(held)


def test_draw_is_a_function_of_its_key_and_heldout_of_nothing(task):
    held = prompts(task.heldout(5))
    assert prompts(task.draw(20, 3, 1)) == prompts(task.draw(20, 3, 1))
    assert prompts(task.draw(20, 3, 1)) != prompts(task.draw(20, 3, 2)) != prompts(task.draw(20, 4, 2))
    assert prompts(task.heldout(8))[: len(held)] == held


def test_draws_and_split_are_the_same_in_another_process():
    code = f"""import sys; sys.path.append({os.path.dirname(sys.modules["posttrain"].__file__)!r})
from posttrain.common.tasks import make_task, text_of
task = make_task("addition")
print([text_of(e) for e in task.draw(6, 1, 2) + task.heldout(6)])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    task = make_task("addition")
    assert run.stdout.strip() == str(prompts(task.draw(6, 1, 2) + task.heldout(6)))


def test_a_tenth_of_a_procedural_task_is_held_out():
    task, rng = make_task("addition"), random.Random(0)
    problems = [task.problem(rng) for _ in range(4000)]
    share = sum(tasks.stable_hash(text_of(problem)) % 10 == 0 for problem in problems) / len(problems)
    assert 0.08 < share < 0.12


def test_finite_data_is_drawn_without_replacement_and_a_copy_counts_where_it_trains(tmp_path):
    task = make_task(write_rows(tmp_path / "sums.jsonl"))
    held = prompts(task.heldout(100))
    assert len(held) == len(set(held)) == 3  # a tenth of 30 different prompts
    copies = 1 + ("0 + 1 = ?" not in held)
    drawn = prompts(task.draw(26 + copies, 0))
    assert len(set(drawn)) == 27 and drawn.count("0 + 1 = ?") == 2 * (copies - 1)
    assert len(task.draw(60, 0)) == 60
    lines = (tmp_path / "sums.jsonl").read_text().splitlines(True)
    (tmp_path / "twice.jsonl").write_text("".join(lines * 2))
    twice = make_task(str(tmp_path / "twice.jsonl"))
    assert sorted(prompts(twice.heldout(100))) == sorted(held) and len(twice.train) >= 54


def test_two_rows_are_enough_to_train_on_one_and_hold_out_the_other(tmp_path):
    task = make_task(write_rows(tmp_path / "two.jsonl", n=2))
    assert len(task.heldout(9)) == 1 and prompts(task.draw(1, 0)) != prompts(task.heldout(9))


def test_a_split_of_the_data_s_own_is_used_and_leaks_are_dropped(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[2], {**rows[0], "prompt": "q"}]))
    task = make_task(str(folder))
    assert sorted(prompts(task.heldout(9))) == ["p2", "q"]
    assert sorted(prompts(task.draw(5, 0))) == ["p0", "p1", "p3", "p4", "p5"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_other_file_formats(tmp_path, kind):
    import datasets

    table = datasets.Dataset.from_list([{"q": f"{i} + 1", "a": str(i + 1), "n": i} for i in range(12)])
    {"csv": table.to_csv, "parquet": table.to_parquet, "json": table.to_json}[kind](tmp_path / f"t.{kind}")
    task = make_task(str(tmp_path / f"t.{kind}"), "q", "a")
    example = task.heldout(1)[0]
    assert example.prompt == [{"role": "user", "content": f"{example.fields['n']} + 1"}]
    assert task.grade(example, f"The sum is {example.answer}.") == CORRECT


def test_prompts_may_be_chat_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}]
    rows = [{"prompt": [*chat, {"role": "user", "content": str(i)}], "answer": "2"} for i in range(3)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_task(str(tmp_path / "chat.jsonl")).draw(1, 0)[0].prompt[:2] == chat


ADDITION = Example([{"role": "user", "content": "123+456="}], "579", {"a": 123, "b": 456})


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        ("500+70+9=579", 1),
        ("9+70+500=579", 1),
        ("500+70+8=579", 1),  # outcome only
        ("500+70+9=578", 0),
        ("500+70+9=57", 0),  # cut by length
        ("500+70+9=0579", 0),
        ("500+70+9=579=579", 0),
        ("500+70+9=579 ", 0),
        ("500+70+9=579\n", 0),
        ("500+79=579", 0),
        ("579", 0),
        ("=579", 0),
        ("٥+٧+٩=579", 0),
        ("", 0),
        ("+" * 50, 0),
        ("9" * 5000 + "+1+1=" + "9" * 5000, 0),
    ],
)
def test_addition_grades_the_number_behind_the_one_equals_sign(completion, grade):
    assert make_task("addition").grade(ADDITION, completion) == grade


def test_addition_demonstrations_are_correct_and_use_both_orders():
    task, rng = make_task("addition"), random.Random(0)
    problems = task.draw(2000, 0)
    texts = [task.demonstrate(problem, rng) for problem in problems]
    assert all(task.grade(p, text) == CORRECT for p, text in zip(problems, texts, strict=True))
    assert {task.demonstrate(ADDITION, rng) for _ in range(50)} == {"500+70+9=579", "9+70+500=579"}
    routes = [task.route(text) for text in texts]
    assert 0.61 < routes.count("high") / len(routes) < 0.69 and None not in routes
    assert task.route("500+70") is task.route("1+2+3=6") is None


def test_arithmetic_takes_turns_between_its_domains_and_grades_each_in_its_own_form():
    task, rng = make_task("arithmetic"), random.Random(0)
    held = [example.fields["domain"] for example in task.heldout(128)]
    assert held == ["add", "mul"] * 64 and [e.fields["domain"] for e in task.heldout(3)] == ["add", "mul", "add"]
    rest = task.heldout(1000)  # until there are no more products
    assert len(rest) % 2 == 0 and len({text_of(e) for e in rest}) == len(rest) < 200
    drawn = task.draw(2000, 0)
    assert 900 < sum(example.fields["domain"] == "mul" for example in drawn) < 1100
    texts = [task.demonstrate(example, rng) for example in drawn]
    assert all(task.grade(e, text) == CORRECT for e, text in zip(drawn, texts, strict=True))
    product = Example([{"role": "user", "content": "034*007="}], "238", {"a": 34, "b": 7, "domain": "mul"})
    assert {task.demonstrate(product, rng) for _ in range(50)} == {"210+28=238", "28+210=238"}
    for text, grade in [("210+28=238", 1), ("200+38=238", 1), ("210+28=239", 0), ("210+20+8=238", 0), ("238", 0)]:
        assert task.grade(product, text) == grade
    total = Example([{"role": "user", "content": "123+456="}], "579", {"a": 123, "b": 456, "domain": "add"})
    assert task.grade(total, "500+70+9=579") == 1 and task.grade(total, "570+9=579") == 0
    assert task.route("210+28=238") == "high" and task.route("28+210=238") == "low" and task.route("9=9") is None


def mathematics(gold):
    return Example([{"role": "user", "content": "?"}], gold)


@pytest.mark.parametrize(
    ("gold", "completion", "grade"),
    [
        ("42", r"so \boxed{42}", 1),
        ("42", r"so $\boxed{42}$.", 1),
        ("42", "#### 42", 1),
        ("42", "The answer is 42.", 1),
        ("42", r"\boxed{43}", 0),
        ("42", "I had 42, and now the answer is 17", 0),
        ("42", "", 0),
        ("1234", "It costs $1,234", 1),
        ("1/2", r"\boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1),
        (r"\frac{1}{2}", r"\boxed{2}", 0),
        ("x^2+1", r"\boxed{1+x^2}", 1),
        ("3x+5", "5", 0),
        ("-3", r"\boxed{3}", 0),
        ("B", "The answer is\nB", 1),
        ("B", "The answer is\nC", 0),
        ("Paris", "<answer> Paris </answer>", 1),
    ],
)
def test_rows_are_graded_as_mathematics(tmp_path, gold, completion, grade):
    assert make_task(write_rows(tmp_path / "sums.jsonl")).grade(mathematics(gold), completion) == grade


def test_gold_is_what_stands_behind_the_hashes_and_the_demonstration_is_the_whole_solution(tmp_path):
    task = make_task(write_rows(tmp_path / "sums.jsonl"))
    example = task.heldout(1)[0]
    assert task.demonstrate(example, random.Random(0)) == f"One more.\n#### {example.answer}"
    assert task.grade(example, task.demonstrate(example, random.Random(0))) == CORRECT


def test_a_grader_that_hangs_is_stopped_in_any_thread_and_the_next_one_works():
    assert answers.limited(answers.same_mathematics, "2", "2") is True  # also pays for the process's imports
    start, results = time.monotonic(), []
    hanging = lambda: results.append(answers.limited(pow, 9, 9**9, seconds=0.5))  # noqa: E731, one uninterruptible call
    hanging()
    thread = threading.Thread(target=hanging)
    thread.start()
    thread.join(20)
    assert results == [None, None] and time.monotonic() - start < 20
    assert not answers.limited(answers.same_mathematics, "2", r"\boxed{9^{9^{9^9}}}", seconds=0.5)
    assert answers.limited(divmod, 7, 0) is None
    assert answers.limited(divmod, 7, 2) == (3, 1)


def test_the_grading_process_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"""import sys; sys.path.append({os.path.dirname(sys.modules["posttrain"].__file__)!r})
import multiprocessing, os
from posttrain.common.families.answers import limited
if __name__ == "__main__":
    assert limited(divmod, 7, 2) == (3, 1)
    print(limited(os.getpid), flush=True)
    os.kill(os.getpid(), 9)
"""
    )
    run = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60)
    state = Path(f"/proc/{run.stdout.strip()}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the grading process outlived its parent")


def test_reasoning_gym_numbers_are_right_or_wrong():
    task = make_task(SUM)
    example = task.heldout(1)[0]
    gold = int(example.answer)
    for text in (
        f"<answer>{gold}</answer>",
        f"That is {gold}.",
        f"<answer>7777</answer> no: <answer> {gold} </answer>",
    ):
        assert task.grade(example, text) == CORRECT, text
    for text in (f"<answer>{gold}1</answer>", f"1{gold}", f"{gold} or {gold + 1}", "nonsense", "", "<answer></answer>"):
        assert task.grade(example, text) == 0, text


def test_reasoning_gym_words_are_taken_from_the_tag_or_the_last_line():
    task = make_task("reasoning_gym:spell_backward")
    example = task.heldout(1)[0]
    assert task.grade(example, f"Let me see.\n{example.answer}\n") == CORRECT
    assert task.grade(example, f"<answer>{example.answer}</answer> is it") == CORRECT
    assert task.grade(example, "Let me see.") < 0.5 < CORRECT  # the dataset counts letters in place


@pytest.mark.parametrize("name", ["countdown", "game_of_life_halting", "sentence_reordering", "power_function"])
def test_reasoning_gym_nonsense_earns_nothing(name):
    task = make_task(f"reasoning_gym:{name}")
    for example in task.heldout(3):
        assert [task.grade(example, text) for text in ("", "xyz nonsense", "?", "\n\n")] == [0, 0, 0, 0]
        assert task.grade(example, f"<answer>{example.answer}</answer>") == CORRECT


def test_random_reward_is_a_fair_coin_that_ignores_correctness():
    task = make_task("addition")
    coin = make_reward("random", task)
    texts = [f"{i}+0+0={i % 3}" for i in range(2000)]
    tosses = [coin(ADDITION, text) for text in texts]
    assert set(tosses) == {0.0, 1.0} and 0.46 < sum(tosses) / len(tosses) < 0.54
    assert tosses == [make_reward("random", task)(ADDITION, text) for text in texts]
    other = [coin(Example([{"role": "user", "content": "1+1="}], "2"), text) for text in texts]
    assert 0.4 < sum(a == b for a, b in zip(tosses, other, strict=True)) / len(tosses) < 0.6


def test_a_user_s_reward_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def short(example, completion):\n    return 1 / len(completion)\n")
    reward = make_reward(f"{path}:short", make_task("addition"))
    assert reward(ADDITION, "abcd") == 0.25
    scores = grade_all(reward, [ADDITION] * 3, ["ab", "", "a"])  # the middle one divides by zero
    assert scores[0] == 0.5 and math.isnan(scores[1]) and scores[2] == 1


def test_unscorable_rewards_become_nan_and_all_unscorable_is_an_error():
    values = iter([1, None, math.nan, math.inf, "no number", True])
    scores = grade_all(lambda example, text: next(values), [ADDITION] * 6, [""] * 6)
    assert scores[0] == scores[5] == 1.0 and all(math.isnan(score) for score in scores[1:5])
    with pytest.raises(UserError, match=r"none of 2 .*KeyError.*'colour'"):
        grade_all(lambda example, text: example.fields["colour"], [ADDITION] * 2, [""] * 2)
    assert grade_all(lambda example, text: 1.0, [], []) == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("reasoning_gym:chainsum", "chain_sum"),
        ("reasoning_gym:chain_sum,min_term=2", "min_terms"),
        ("reasoning_gym:chain_sum,min_terms=9", "max_terms must be"),
        ("reasoning_gym:chain_sum,min_terms=many", "chain_sum"),
        ("missing.jsonl", "no such file"),
        ("empty.jsonl", "empty.jsonl"),
        ("broken.jsonl", "broken.jsonl"),
        ("one.jsonl", "one.jsonl"),
        ("gap.jsonl", "row 1"),
        ("nobody/nothing-here", "cannot be loaded"),
        ("adition", "adition"),
    ],
)
def test_a_wrong_task_ends_in_one_line_that_names_it(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "a", "answer": "1"}
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{no")
    (tmp_path / "one.jsonl").write_text(json.dumps(good) + "\n")
    (tmp_path / "gap.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, "answer": None}) + "\n")
    with pytest.raises(UserError) as error:
        make_task(spec)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_column_is_answered_with_the_columns_there_are(tmp_path):
    path = write_rows(tmp_path / "sums.jsonl")
    with pytest.raises(UserError, match=r"'question'; --prompt-column .*prompt, answer, level"):
        make_task(path, prompt_column="question")
    with pytest.raises(UserError, match=r"'gold'; --answer-column .*prompt, answer, level"):
        make_task(path, answer_column="gold")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bleu", "task, random"),
        ("missing.py:f", "missing.py"),
        ("mine.py:g", "no function 'g'"),
        ("mine.py:limit", "no function 'limit'"),
        ("broken.py:f", "NameError"),
        ("mine.py", "mine.py"),
    ],
)
def test_a_wrong_reward_ends_in_one_line_that_names_it(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("limit = 3\ndef f(example, completion):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("undefined\n")
    with pytest.raises(UserError) as error:
        make_reward(spec, make_task("addition"))
    assert words in str(error.value) and "\n" not in str(error.value)
