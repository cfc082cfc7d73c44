"""Sums finished episodes up for later ones, in three short strings: by a task's own rules, or by a language model."""

import re
from typing import Any

from posttrain.common.rollout import HFEngine, Rollout, Sampling
from posttrain.common.tasks import CORRECT, Example, text_of

# part of a summary -> the kind of knowledge it is
PARTS = {"success_analysis": "workflow", "mistake_analysis": "mistakes", "golden_workflow": "workflow"}
ASK = """{task}
Attempt: {attempt}
Reward: {reward:.2f} of 1.
Sum this attempt up for the next one, in JSON: \
{{"success_analysis": "...", "mistake_analysis": "...", "golden_workflow": "..."}}"""


def best_rows(rollout: Rollout) -> list[int]:
    """Each group's row to learn from: highest reward, then fewest turns, then the first."""
    order = sorted(range(len(rollout)), key=lambda i: (-rollout.reward[i].item(), len(rollout.episodes[i].turns), i))
    return [next(i for i in order if rollout.group[i] == g) for g in rollout.group.unique()]


def summarise(
    rollout: Rollout, rows: list[int], task: Any, writer: HFEngine | None, sampling: Sampling, key: tuple
) -> list[dict[str, str] | None]:
    """A summary of each of the rows, None where there is nothing to say: by the writer's model, without one by
    task.summarise(example, episode). A failed episode never makes a workflow."""
    if writer and rows:
        facts = [(text_of(rollout.examples[i]), rollout.texts[i], rollout.reward[i].item()) for i in rows]
        asks = [ASK.format(task=task, attempt=attempt, reward=reward) for task, attempt, reward in facts]
        asked = [Example([{"role": "user", "content": ask}], "") for ask in asks]
        found = [parse_summary(text) for text in writer.generate(asked, 1, sampling, key).texts]
    else:
        found = [task.summarise(rollout.examples[i], rollout.episodes[i]) for i in rows]
    failed = {part: "" for part, kind in PARTS.items() if kind == "workflow"}
    return [s and (s if rollout.reward[i] == CORRECT else s | failed) for s, i in zip(found, rows, strict=True)]


def parse_summary(text: str) -> dict[str, str] | None:
    """The last of each of the three JSON strings in an answer, however broken the rest; None if all are empty."""
    out = {}
    for part in PARTS:
        strings = re.findall(rf'"{part}"\s*:\s*"((?:[^"\\]|\\.)*)"', text, re.DOTALL)
        string = (strings or [""])[-1].replace("\\n", "\n").replace('\\"', '"').strip()
        out[part] = string if string.strip(".") else ""  # "..." is what was asked
    return out if any(out.values()) else None


def skill_text(summary: dict[str, str], kind: str, task: Any) -> str:
    """What of a summary is kept (workflow, mistakes, both, none), as a model reads it; in the task's form if any."""
    kept = {part: text if kind in (PARTS[part], "both") else "" for part, text in summary.items()}
    if hasattr(task, "skill_text"):
        return task.skill_text(kept)
    return "\n".join(f"{part.replace('_', ' ')}: {text}" for part, text in kept.items() if text)
