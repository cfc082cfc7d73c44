"""Sums finished episodes up for later ones, in three short strings: by a task's own rules, or by a language model."""

import json
import re

from posttrain.common.models import plain
from posttrain.common.rollout import Engine, Rollout, Sampling, encode
from posttrain.common.tasks import CORRECT, Example, text_of

# part of a summary -> the kind of knowledge it is
PARTS = {"success_analysis": "workflow", "mistake_analysis": "mistakes", "golden_workflow": "workflow"}
ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})?')
ASK = """{task}
Attempt: {attempt}
Reward: {reward:.2f} of 1.
Sum it up for the next, as JSON: {{"golden_workflow": "...", "mistake_analysis": "...", "success_analysis": "..."}}"""


def best_rows(rollout: Rollout) -> list[int]:
    """Each group's row to learn from: highest reward, then fewest turns, then the first; without a reward, last."""
    reward, group = rollout.reward.nan_to_num(float("-inf")).tolist(), rollout.group.tolist()
    order = sorted(range(len(rollout)), key=lambda i: (-reward[i], len(rollout.episodes[i].turns), i))
    best = {group[i]: i for i in reversed(order)}
    return [best[g] for g in sorted(best)]


def room(engine: Engine, new_tokens: int) -> float:
    """The most tokens of a prompt that leave room for the new ones in the model's context."""
    return (getattr(plain(engine.model).config, "max_position_embeddings", None) or float("inf")) - new_tokens


def summarise(rollout: Rollout, rows: list[int], task, writer: Engine | None, sampling: Sampling, key) -> list:
    """A summary of each of the rows, None where there is nothing to say: by the writer's model, without one by
    task.summarise(example, episode). A failed episode never makes a workflow."""
    reward = rollout.reward.tolist()
    if writer:
        most = room(writer, sampling.max_new_tokens)
        asked = {i: example for i in rows if (example := ask(rollout, i, writer, most))}
        answers = writer.generate(list(asked.values()), 1, sampling, key).texts if asked else []
        found = dict.fromkeys(rows) | dict(zip(asked, map(parse_summary, answers), strict=True))
    else:
        found = {i: task.summarise(rollout.examples[i], rollout.episodes[i]) for i in rows}
    failed = {part: "" for part, kind in PARTS.items() if kind == "workflow"}
    return [s if reward[i] == CORRECT or not s else s | failed for i, s in found.items()]


def ask(rollout: Rollout, i: int, writer: Engine, most: float, cut: int = 0) -> Example | None:
    """The question for a summary of row i in at most so many tokens, of its end if need be; None if none fits."""
    attempt = writer.tokenizer(rollout.texts[i], add_special_tokens=False)["input_ids"]
    asked = {"task": text_of(rollout.examples[i]), "attempt": rollout.texts[i], "reward": rollout.reward[i].item()}
    asked |= {"attempt": writer.tokenizer.decode(attempt[cut:])} if cut else {}
    message = {"role": "user", "content": ASK.format(**asked)}
    if (excess := len(encode(writer.tokenizer, [message])) - most) <= 0:
        return Example([message], "")
    return ask(rollout, i, writer, most, cut + excess) if cut < len(attempt) else None


def parse_summary(text: str) -> dict[str, str] | None:
    """The last of each of the three JSON strings in an answer, however broken or cut; None if all are empty."""
    out = {}
    for part in PARTS:
        strings = re.findall(rf'"{part}"\s*:\s*"((?:[^"\\]|\\.)*)', text, re.DOTALL)  # of a cut one, what there is
        string = next((s for s in reversed(strings) if s.strip(" .")), "")  # "..." is what was asked
        string = ESCAPE.sub(lambda found: found[0] if found[1] else r"\\", string)  # a \ that escapes nothing is a \
        out[part] = json.loads(f'"{string}"', strict=False).encode(errors="ignore").decode().strip()  # no half emoji
    return out if any(out.values()) else None


def skill_text(summary: dict[str, str], kind: str, task) -> str:
    """What of a summary is kept (workflow, mistakes, both, none), as it stands before a prompt; in the task's form."""
    kept = {part: text if kind in (PARTS[part], "both") else "" for part, text in summary.items()}
    if hasattr(task, "skill_text"):
        return task.skill_text(kept)
    return "".join(f"{part.replace('_', ' ')}: {text}\n\n" for part, text in kept.items() if text)


def with_skill(prompt: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The skill before the system message's text; without one, which a template may refuse, before the user's."""
    at = next((i for role in ("system", "user") for i, m in enumerate(prompt) if m["role"] == role), 0)
    return [*prompt[:at], {**prompt[at], "content": text + prompt[at]["content"]}, *prompt[at + 1 :]]


def fit_skill(text: str, prompt: list, most: float, tokenizer, task) -> tuple[str, list[dict[str, str]]]:
    """The skill, shortened or else left out where it and the prompt exceed so many tokens; and the prompt with it."""
    while text and len(encode(tokenizer, with_skill(prompt, text))) > most:
        text = task.shorten(text) if hasattr(task, "shorten") else ""
    return text, with_skill(prompt, text)
