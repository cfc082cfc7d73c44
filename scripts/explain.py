"""One real optimizer batch of a method as one HTML page that works offline: prompts, responses coloured token by token,
statistics of each group, the loss in its terms, and what one sees there, by the numbers of the file's own equations.

The method's own main runs, with its own flags, up to a step; what is shown are its variables at that moment, by the
names that they have in the file. Two things are added from outside:

push        -dL/dlogp of each sampled token: how hard the step pushes it up (blue) or down (red). A hook on what
            token_logps returns; of several passes over a batch the first counts.
divergence  the value at each token of a loss over the whole vocabulary, which no single log-prob carries.

Nothing in here has to know the method: a file of your own with a Config, a main and run.log(step, metrics, rollout) is
shown by its variables of shape [N, T], for the tokens, and [N], for the rows. VIEWS says which of ours matter most. A
run's folder instead of a file shows the samples that it stored, if the method stores values for each token.

Run: python scripts/explain.py methods/scope_opd.py --html scope.html
     python scripts/explain.py methods/grpo.py --preset dapo --at-step 3        (any flags of that method)
     python scripts/explain.py runs/sod-...
"""

import contextlib
import dataclasses
import importlib.util
import io
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import jinja2
import torch
from torch import Tensor

from posttrain.common.cli import UserError, cli, fail, first_line, require, writable
from posttrain.common.environments.episodes import Episode, Turn
from posttrain.common.models import load_tokenizer
from posttrain.common.rollout import Rollout, assemble
from posttrain.common.run import Run, read_json, write_atomically
from posttrain.common.tasks import CORRECT, Example, text_of

TEMPLATE = Path(__file__).resolve().with_suffix(".jinja")
MARK = b'<meta name="generator" content="posttrain scripts/explain.py">'  # of the template: a page of ours
LEAD, TOKENS, CELLS = 6, 8000, 48  # prompts that come first; tokens on the page, about; lines of a heat map
BRIEF = {"eval_every": 0, "eval_problems": 8, "eval_samples": 2}  # the page needs no evaluation


@dataclass
class Config:
    html: str = "explain.html"  # the page to write; it replaces nothing but another page of this script
    at_step: int = 0  # 0 = the first step at which all parts of the method act, or the last that a run has stored


# --- what the method computes


class Reached(BaseException):
    """The step has been logged: main need not go on."""


Scene = SimpleNamespace  # the variables of main, what run.log was given, and kept_by: a Kept


class Kept:
    """What is kept of the functions that main calls, since the step before was logged."""

    def __init__(self):
        self.values: dict[tuple, list[float]] = {}  # (name, id of a rollout, row) -> one for each sampled token
        self.roots: dict[int, Rollout] = {}  # these rollouts by id
        self.calls: dict[str, tuple] = {}  # function -> arguments and result of its first call

    def keep(self, name: str, rollout: Rollout, values: Tensor) -> None:
        """values [n, T] of n rows of a rollout; of each row the first counts."""
        root, rows = origin(rollout)
        self.roots[id(root)] = root
        for row, each in zip(rows, written(values.detach(), rollout), strict=True):
            self.values.setdefault((name, id(root), row), each)

    def of(self, name: str, rollout: Rollout) -> list | None:
        """What was kept under the name, row by row; None where nothing was."""
        root, rows = origin(rollout)
        found = [self.values.get((name, id(root), row)) for row in rows]
        return found if any(each is not None for each in found) else None


def origin(rollout: Rollout) -> tuple[Rollout, list[int]]:
    """The rollout that this one's rows were picked from, and which rows they are there."""
    return getattr(rollout, "picked", (rollout, list(range(len(rollout)))))


def written(values: Tensor, rollout: Rollout) -> list[list[float]]:
    """[N, T] -> of each row those on the tokens that the policy wrote, whether they carry a loss or not"""
    return [row[mask].tolist() for row, mask in zip(values.float(), rollout.turn >= 0, strict=True)]


def watch(module: ModuleType, config: Any, step: int) -> Scene:
    """Runs module.main in a folder of its own until `step` is logged; all that the page shows was computed by it."""
    scene, kept, pick, log = Scene(), Kept(), Rollout.__getitem__, Run.log

    def picked(rollout: Rollout, rows: Tensor) -> Rollout:
        out, (root, known) = pick(rollout, rows), origin(rollout)
        out.picked = root, [known[i] for i in rows.tolist()]
        return out

    def token_logps(model: Any, rollout: Rollout, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        logps, entropy = real["token_logps"](model, rollout, *args, **options)
        kept.keep("logp", rollout, logps)
        kept.keep("entropy", rollout, entropy)
        if logps.requires_grad:
            logps.register_hook(lambda slope: kept.keep("push", rollout, -slope))
        return logps, entropy

    def scatter(values: Tensor, rollout: Rollout) -> Tensor:
        out = real["scatter"](values, rollout)
        if out.requires_grad:
            kept.keep("divergence", rollout, out)
        return out

    def transport(*args: Any) -> tuple[Tensor, Tensor]:
        out = real["transport"](*args)
        kept.calls.setdefault("transport", (args, out))
        return out

    def logged(run: Run, at: int, metrics: dict, rollout: Rollout | None = None, signals: dict | None = None) -> None:
        if at == step:
            given = {"metrics": metrics, "rollout": rollout, "signals": signals}
            vars(scene).update(sys._getframe(1).f_locals, kept_by=kept, **given)
            raise Reached
        log(run, at, metrics, rollout, signals)
        vars(kept).update(vars(Kept()))

    watchers = {each.__name__: each for each in (token_logps, scatter, transport)}
    real = {name: getattr(module, name) for name in watchers if hasattr(module, name)}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(patch.object(Rollout, "__getitem__", picked))
        stack.enter_context(patch.object(Run, "log", logged))
        for name in real:
            stack.enter_context(patch.object(module, name, watchers[name]))
        with contextlib.suppress(Reached):
            module.main(dataclasses.replace(config, out=f"{folder}/run", resume=False, wandb="off"))
    require(hasattr(scene, "metrics"), f"the run ended before step {step} was logged: raise --steps")
    return scene


def stored(folder: Path, step: int) -> Scene:
    """The samples of a run's step as a scene; step 0 = the last."""
    missing = [name for name in ("samples.jsonl", "metrics.jsonl", "config.json") if not (folder / name).is_file()]
    require(not missing, f"{folder} is no run's folder: it lacks {' and '.join(missing)}")
    mend = "name another run's folder"
    rows, lines = (read_json(folder / f"{name}.jsonl", {"step": int}, mend) for name in ("samples", "metrics"))
    require(rows, f"{folder}/samples.jsonl has no sample yet: let the run do a step first")
    rows = [row for row in rows if "ids" in row]
    require(rows, f"the samples of {folder} have no values for each token: this method does not write them")
    step = step or rows[-1]["step"]
    rows, lines = ([each for each in part if each["step"] == step] for part in (rows, lines))
    for part, name in ((rows, "samples"), (lines, "metrics")):
        require(part, f"{folder} has no {name} of step {step}: choose another by --at-step")
    flags = read_json(folder / "config.json", {"flags": dict}, mend)[0]["flags"]
    try:
        return shown_again(rows, lines[0], flags)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} is not as a run of this version writes it ({what}): run it again") from None


def shown_again(rows: list[dict], metrics: dict, flags: dict) -> Scene:
    """Stored samples of one step, back as what run.log was given."""
    parts, tokenizer, signals = {"prompts": [], "responses": [], "turns": []}, load_tokenizer(flags["model"]), {}
    for row in rows:
        start = next((t for t, turn in enumerate(row["turn"]) if turn >= 0), len(row["ids"]))
        for name, part in zip(parts, (row["ids"][:start], row["ids"][start:], row["turn"][start:]), strict=True):
            parts[name].append(part)
        for key, x in row.items():
            if isinstance(x, list) and key not in ("prompt", "ids", "turn"):
                x = [value for value, turn in zip(x, row["turn"], strict=True) if turn >= 0]
            signals.setdefault(key, []).append(x)
    told = [row.get("episode") or {"turns": [], "ending": ""} for row in rows]
    parts["episodes"] = [Episode([Turn(**turn) for turn in each["turns"]], each["ending"]) for each in told]
    parts |= {"texts": signals["text"], "examples": [Example(row["prompt"], "") for row in rows]}
    rollout = assemble(**parts, pad=tokenizer.pad_token_id, reward=torch.tensor(signals["reward"]))
    left = {"step", "prompt", "text", "reward", "ids", "turn", "episode"}
    shown = {"rollout": rollout, "signals": {k: x for k, x in signals.items() if k not in left}, "metrics": metrics}
    return Scene(**shown, kept_by=Kept(), step=metrics["step"], tokenizer=tokenizer, config=Scene(**flags))


# --- what to show of it


@dataclass
class View:
    """What matters in one method. A value is the name of a variable of main or of what is kept, or a function of the
    scene; those that are not there under the flags given are left out. The words stand in explain.jinja."""

    step: int = 1  # the first step at which all parts act
    tokens: dict[str, Any] = field(default_factory=dict)  # colouring -> [N, T] or N lists; the first is shown first
    rows: dict[str, Any] = field(default_factory=dict)  # -> [N]
    groups: dict[str, Any] = field(default_factory=dict)  # -> [P]
    turn: Callable | None = None  # (scene, row, turn) -> what stands behind a turn
    terms: dict[str, str] = field(default_factory=dict)  # metric -> name, in the order in which main adds them
    weights: Callable = lambda s: {}  # metric -> weight, for those that are logged before they are weighted
    rest: str = "not logged by itself"  # name of what no metric holds
    rollout: Callable = lambda s: s.rollout  # that and more rows behind it,
    owner: Callable = lambda s: []  # which stand under these rows of it
    tiles: tuple[str, ...] = ()  # metrics to show large
    extra: Callable = lambda s: {}  # what methods without a rollout show instead


def teacher_gap(s: Scene) -> Tensor:
    """Teacher minus student, on the sampled token."""
    return s.teacher_logps - s.rollout.behaviour_logps


def where(condition: Tensor, values: Tensor) -> Tensor:
    """NaN, which is shown as nothing, elsewhere."""
    return torch.where(condition, values, math.nan)


def second(s: Scene, first: Tensor | None, later: Tensor) -> list[float]:
    """RLTF's values of first tries and, behind them, of the second ones."""
    return ([math.nan] * len(s.first) if first is None else first.tolist()) + later.tolist()


def distilled_push(s: Scene) -> list:
    """RLTF's Eq. 3 acts on the second tries behind the first prompts."""
    pushes = [s.kept_by.of("push", term.rows) for term in s.terms if term.name == "sd"]
    return [None] * len(s.first) + (pushes[0] if pushes and pushes[0] else [None] * len(s.retry))


def first_prompt_logps(s: Scene) -> list | None:
    """RLTF's second tries behind the first prompts."""
    return [None] * len(s.first) + written(s.bare_logps, s.bare) if s.distils else None


VIEWS = {
    "grpo": View(
        tokens={"push (5)": "push", "w (4)": lambda s: s.weights if s.config.tis != "off" else None,
                "log-prob": "logp", "reference's": "ref_logps", "entropy": "entropy"},
        rows={"A (1)": "advantages"},
        terms={"loss/kl": "KL to the reference (5)"},
        weights=lambda s: {"loss/kl": s.config.beta},
        rest="policy (3)",
    ),
    "opd": View(
        tokens={"divergence (1, 2)": "divergence", "teacher - student": teacher_gap, "push (4, 5)": "push",
                "student": "logp", "teacher": "teacher_logps"},
        rest="as --est says (1-5)",
        tiles=("teacher/kl",),
    ),
    "scope_opd": View(
        tokens={"push (5)": "push", "divergence (4)": "divergence",
                "teacher - student": lambda s: where(s.on["opd"][:, None], teacher_gap(s)),
                "student": "logp", "teacher": lambda s: where(s.on["opd"][:, None], s.teacher_logps)},
        rows={"path": lambda s: ["imitated" if a else "distilled" if b else "neither"
                                 for a, b in zip(s.on["mle"], s.on["opd"], strict=True)],
              "w (1, 2)": lambda s: s.weights["mle"] + s.weights["opd"],
              "student's perplexity": lambda s: (-s.s).exp(),
              "teacher's": lambda s: where(s.on["opd"], (-s.q).exp())},
        terms={"loss/mle": "imitation of correct rows (3)", "loss/opd": "distillation of wrong rows (4)"},
        tiles=("scope/mixed", "scope/mle_ess", "scope/opd_ess"),
    ),
    "uni_opd": View(
        tokens={"push (6)": "push", "A (3, 4)": "advantages", "r (1)": "token_reward",
                "student": "old_logps", "teacher": "teacher_logps"},
        rows={"side": lambda s: ["correct" if a else "wrong" if b else "neither"
                                 for a, b in zip(s.correct, s.incorrect, strict=True)],
              "G (1)": "returns", "shift (3)": "shift", "(5)": lambda s: ["" if a else "dropped" for a in s.keep]},
        groups={"domain": lambda s: s.domains[:: s.config.group_size], "M (2)": "margin",
                "lambda (3)": lambda s: (s.delta - s.margin).clamp(min=0)},
        rest="clipped policy loss (6)",
        tiles=("uni/mixed_groups", "uni/shifted_groups", "uni/lambda"),
    ),
    "sod": View(
        tokens={"w (3)": "weights", "Adv (4)": "signal", "push (5)": "push",
                "teacher - student": lambda s: s.teacher_logps - s.old_logps, "student": "old_logps",
                "teacher": "teacher_logps"},
        rows={"A (1)": "advantages"},
        turn=lambda s, i, k: f"d {s.d[i, k]:.3g}, w {s.by_turn[i, k]:.3g}",
        rest="clipped policy loss (5)",
        tiles=("sod/failed_calls",),
    ),
    "skill_sd": View(
        step=10,
        tokens={"push (4)": "push", "teacher - student, -l": lambda s: where(s.sdl_mask > 0, -s.gap),
                "student": "logp", "teacher": lambda s: where(s.sdl_mask > 0, s.teacher_logps)},
        rows={"A (1)": "advantages"},
        groups={"skill (5)": "texts"},
        terms={"loss/grpo": "policy (2)", "loss/sdl": "self-distillation (3)"},
        weights=lambda s: {"loss/grpo": s.config.adv_grpo, "loss/sdl": s.config.sdl_coef},
        tiles=("skill/told", "skill/bank"),
    ),
    "pi_distill": View(
        step=21,
        tokens={"push on S (4, 6)": "push", "push on T (3)": lambda s: s.kept_by.of("push", s.seen),
                "T - S": lambda s: s.k if s.pi and s.config.kl_est == "k1" else None, "KL (4, 6)": "divergence",
                "S": "logp", "T": lambda s: s.kept_by.of("logp", s.seen)},
        rows={"K (1)": "kl", "A (2)": "advantages", "A_S (4)": "student_advantages"},
        groups={"T reads": lambda s: [text_of(example) for example in s.told]},
        terms={"loss/teacher": "T, alpha L_T (3)", "loss/student": "S, policy (4, 6)", "loss/kl": "S, KL to T (4, 6)"},
        tiles=("pi/alpha", "pi/kl"),
    ),
    "rltf": View(
        tokens={"push (2)": lambda s: s.kept_by.of("push", s.sampled), "push (3)": distilled_push,
                "behind its prompt": lambda s: s.kept_by.of("logp", s.sampled),
                "behind the first": first_prompt_logps},
        rows={"A0, A1 (1)": lambda s: second(s, s.a0, s.a1[s.again]),
              "r1 - mean r0 (3)": lambda s: second(s, None, s.a_sd[s.again]),
              "critique": lambda s: [""] * len(s.first) + [critique for _, critique, _ in s.retry]},
        terms={"loss/rl": "both tries (2)", "loss/sd": "second try without critique (3)", "loss/fm": "critique (4)"},
        rollout=lambda s: s.sampled,
        owner=lambda s: s.again.tolist(),
        tiles=("rltf/second_share", "rltf/second_accuracy"),
    ),
    "sinkd": View(
        step=200,
        terms={"loss/ce": "labels (1)", "loss/kd": "teacher's outputs (2)", "loss/sinkhorn": "transport (6)"},
        weights=lambda s: {f"loss/{name}": weight for name, (weight, _) in s.terms.items()},
        extra=lambda s: labelled(s),
        tiles=("train/accuracy", "sinkd/grad_ratio"),
    ),
    "cot2": View(
        step=800,
        terms={"loss/kl": "thoughts, KL (3)", "loss/answer": "answer (3)"},
        extra=lambda s: traces(s),
        tiles=("train/accuracy", "train/entropy"),
    ),
}  # fmt: skip


# --- the page


def number(value: float) -> str:
    """Three digits; what is left of a sum that rounding alone keeps from 0 is 0."""
    return "–" if value is None or math.isnan(value) else f"{value:.3g}" if abs(value) > 1e-8 else "0"


class Colouring:
    """A value for each sampled token of each row, and the colours of the values."""

    def __init__(self, key: str, label: str, rows: list[list[float] | None]):
        self.key, self.label = key, label
        flat = [v for row in rows if row for v in row if math.isfinite(v)]
        self.negative, self.positive = min(flat) < 0, max(flat) > 0
        sizes = sorted(abs(v) for v in flat if v)
        largest = sizes[int(0.97 * (len(sizes) - 1))]  # a few outliers must not pale the others
        self.power = 0 if 0.01 <= largest < 1000 else 3 * math.floor(math.log10(largest) / 3)
        self.largest = largest / 10.0**self.power
        self.rows = [row and [v / 10.0**self.power for v in row] for row in rows]

    def at(self, row: int, k: int) -> float:
        """In units of 10^power; NaN where there is none."""
        return self.rows[row][k] if self.rows[row] else math.nan

    def css(self, value: float) -> str:
        share = 0 if math.isnan(value) else min(1, abs(value) / self.largest)
        return f"{self.key}{'p' if value > 0 else 'n'}{math.ceil(4 * math.sqrt(share))}" if share > 0.002 else ""

    def legend(self) -> list[tuple[str, str]]:
        """Colours with the value up to which they reach; by its root, since most values are small."""
        reach = {level: number((level / 4) ** 2 * self.largest) for level in range(1, 5)}
        down = [(f"n{level}", f"-{text}") for level, text in reversed(reach.items())] if self.negative else []
        return [*down, ("", "0"), *((f"p{level}", text) for level, text in reach.items() if self.positive)]


def resolve(scene: Scene, what: Any, rollout: Rollout | None = None) -> Any:
    """A View's value; None where the flags given leave nothing to show."""
    if callable(what):
        return what(scene)
    return (rollout is not None and scene.kept_by.of(what, rollout)) or getattr(scene, what, None)


def unknown(scene: Scene, shape: tuple[int, ...], words: bool) -> dict[str, Any]:
    """Of a file that VIEWS does not know: the signals that it logs, and its variables of this shape."""
    signals = {key: x for key, x in (scene.signals or {}).items() if isinstance(x[0], str) == words}
    shaped = {key: x for key, x in vars(scene).items() if torch.is_tensor(x) and x.shape == shape}
    return {key: lambda s, x=x: x for key, x in {**signals, **shaped}.items() if key not in ("mask", "m", "group")}


def colourings(scene: Scene, view: View, rollout: Rollout) -> list[Colouring]:
    kept = {"push": "push", "divergence": "divergence", "log-prob": "logp", "entropy": "entropy"}
    named = view.tokens or kept | unknown(scene, rollout.tokens.shape, False)
    found = {label: resolve(scene, what, rollout) for label, what in named.items()}
    found = {label: written(x, rollout) if torch.is_tensor(x) else x for label, x in found.items() if x is not None}
    acts = [label for label, rows in found.items() if any(v == v and v for row in rows if row for v in row)]
    return [Colouring("abcdefgh"[i], label, found[label]) for i, label in enumerate(acts[:8])]


def listed(scene: Scene, named: dict[str, Any], n: int) -> dict[str, list]:
    """label -> n values; those that are no variable, or of another length, are left out."""
    found = {label: resolve(scene, what) for label, what in named.items()}
    found = {label: x.tolist() if torch.is_tensor(x) else x for label, x in found.items() if x is not None}
    return {label: x for label, x in found.items() if len(x) == n}


def facts(columns: dict[str, list], i: int) -> list[tuple[str, str]]:
    """What is known of row or group i, as text."""
    told = {label: number(x[i]) if isinstance(x[i], int | float) else str(x[i]) for label, x in columns.items()}
    return [(label, text) for label, text in told.items() if text not in ("", "–", "None")]


def pieces(scene: Scene, view: View, rollout: Rollout, i: int, colours: list[Colouring], most: int) -> list[dict]:
    """What follows row i's prompt, turn by turn: the policy's with its tokens, the environment's (turn -1) as text."""
    ids, turns, out, k = rollout.tokens[i].tolist(), rollout.turn[i].tolist(), [], 0
    end, episode = int(rollout.attention_mask[i].sum()), rollout.episodes[i]
    start = next((t for t in range(end) if turns[t] >= 0), end)
    for turn, span in groupby(range(start, min(end, start + most)), key=lambda t: turns[t]):
        at, tokens, note = list(span), [], ""
        for t in at if turn >= 0 else ():
            values = [(colour, colour.at(i, k)) for colour in colours]
            words = [f"{c.label}: {number(v)}" + f"e{c.power}" * bool(c.power) for c, v in values if v == v]
            token = {"text": scene.tokenizer.decode([ids[t]]), "title": "\n".join(words)}
            tokens.append(token | {"css": [c.css(v) for c, v in values], "numbers": [number(v) for _, v in values]})
            k += 1
        if turn >= 0 and episode:
            failed = turn < len(episode.turns) and episode.turns[turn].failed
            note = view.turn(scene, i, turn) + ", failed" * failed if view.turn else "failed" * failed
        out.append({"turn": turn, "text": scene.tokenizer.decode([ids[t] for t in at]), "tokens": tokens, "note": note})
    left = end - start - most
    return out + [{"turn": -1, "text": f" … {left} more tokens", "tokens": [], "note": ""}] * (left > 0)


def prompt_of(scene: Scene, rollout: Rollout, i: int) -> str:
    """As the model read it, special tokens left out."""
    start = int((rollout.turn[i] >= 0).float().argmax())
    return scene.tokenizer.decode(rollout.tokens[i][:start].tolist(), skip_special_tokens=True)


def groups_of(scene: Scene, view: View, rollout: Rollout, colours: list[Colouring]) -> list[dict]:
    """The batch by prompt, the most instructive first: most mixed, best, worst, then by spread of rewards."""
    group = scene.rollout.group.unique(return_inverse=True)[1].tolist()
    n, owner, out = len(group), view.owner(scene), []
    rows = view.rows if view.tokens else unknown(scene, (n,), True)
    columns = listed(scene, {"reward": lambda s: rollout.reward, **rows}, len(rollout))
    heads = listed(scene, view.groups, max(group) + 1)
    under = {i: [i, *(n + k for k, first in enumerate(owner) if first == i)] for i in range(n)}
    for g in range(max(group) + 1):
        mine = [i for i in range(n) if group[i] == g]
        reward = scene.rollout.reward[mine].float()
        known, right = reward[~reward.isnan()], int((reward == CORRECT).sum())
        equal = len(known) < 2 or bool((known == known[0]).all())
        kinds = {"mixed": not equal, "all correct": right == len(mine), "all wrong": right == 0, "all alike": True}
        marks = ["●" if r == CORRECT else "·" if r != r else "○" if r <= 0 else "◐" for r in reward.tolist()]
        every = rollout.reward[[k for i in mine for k in under[i]]].float().nan_to_num(0)  # second tries too
        each = {"index": g, "rows": mine, "marks": "".join(marks), "right": right, "equal": equal}
        each |= {"mean": known.mean().item(), "std": known.std().item() if len(known) > 1 else math.nan}
        each |= {"kind": next(kind for kind, holds in kinds.items() if holds), "spread": every.std(correction=0).item()}
        each |= {"prompt": prompt_of(scene, rollout, mine[0]) or text_of(rollout.examples[mine[0]])}
        out.append(each | {"answer": rollout.examples[mine[0]].answer, "facts": facts(heads, g)})
    spread = sorted(out, key=lambda g: -g["spread"])
    ends = [max(out, key=lambda g: g["mean"]), min(out, key=lambda g: g["mean"])]
    order = list({g["index"]: g for g in (spread[0], *ends, *spread)}.values())
    room, most = TOKENS, max(40, TOKENS // sum(len(g["rows"]) for g in order[:LEAD]))
    for place, each in enumerate(order):
        shown = [(i, k) for i in each["rows"] for k in under[i]] if place < LEAD or room > 0 else []
        each["rows"] = [{"index": k, "nested": k != i, "facts": facts(columns, k), "cut": not rollout.finished[k],
                         "pieces": pieces(scene, view, rollout, k, colours, most)} for i, k in shown]  # fmt: skip
        room -= sum(len(piece["tokens"]) for row in each["rows"] for piece in row["pieces"])
    return order


def terms_of(scene: Scene, view: View) -> list[tuple[str, float, float, float]]:
    """Name, weight, value and what it adds to loss/total, to which the last column sums."""
    logged = {key: x for key, x in scene.metrics.items() if key.startswith("loss/") and key != "loss/total"}
    weights, total = view.weights(scene), scene.metrics.get("loss/total", 0.0)
    order = [*(key for key in view.terms if key in logged), *(key for key in logged if key not in view.terms)]
    out = [(view.terms.get(key, key), weights.get(key, 1.0), logged[key]) for key in order]
    rest = total - sum(weight * x for _, weight, x in out)
    if not out or abs(rest) > 1e-5 * max(1.0, abs(total)):
        out.insert(0, (view.rest, 1.0, rest))
    return [(name, weight, x, weight * x) for name, weight, x in out]


def heat(name: str, about: str, values: Tensor, lines: list[str], columns: list[str]) -> dict:
    """A matrix as squares, the darker the larger; the faintest are left out."""
    values, largest = values[:CELLS, :CELLS], max(values.max().item(), 1e-12)
    cells = [(i, j, v / largest, f"{lines[i]} → {columns[j]}: {v:.3g}")
             for i, line in enumerate(values.tolist()) for j, v in enumerate(line) if v > 0.01 * largest]  # fmt: skip
    size = {"height": values.shape[0], "width": values.shape[1]}
    return {"name": name, "about": about, "cells": cells, "largest": largest, **size}


def labelled(s: Scene) -> dict:
    """SinKD: examples with both models' outputs, in the order of the teacher's class, and the transport's matrices."""
    student, teacher = (x.softmax(-1) for x in (s.logits, s.target))
    readers = {"teacher": teacher, "student": student} if s.same else {"student": student}  # else two vocabularies
    order = readers.get("teacher", student).argmax(-1).argsort(stable=True).tolist()
    heats, examples, pixels = [], [], s.batch.inputs.get("features")

    def word(k: int | Tensor) -> str:
        return s.names[k] if s.names else s.tokenizer.decode([int(k)])

    for i in order:
        says = [(word(x[i].argmax()), number(x[i].max().item())) for x in readers.values()]
        about = {"text": s.table.describe("train", s.rows[s.owner[i]]), "label": word(s.labels[i]), "picture": None}
        if pixels is not None:
            about["picture"] = heat("digit", "", pixels[i].view(8, 8), [""] * 8, [""] * 8)
        examples.append(about | {"says": says, "loss": number(s.row_loss[i].item())})
    at = [f"{k}: {each['label']}" for k, each in enumerate(examples)]
    for who, x in readers.items():
        top = x.sum(0).topk(min(16, x.shape[1])).indices.sort().values.tolist()
        about = "a line for each example, a column for each class"
        heats.append(heat(f"{who}'s output", about, x[order][:, top], at, list(map(word, top))))
    if "transport" in s.kept_by.calls:
        (cost, *_), (_, plan) = s.kept_by.calls["transport"]
        for name, x in (("cost (4)", cost), ("plan (5)", plan)):
            about = "a line for each student output, a column for each teacher output"
            heats.append(heat(name, about, x.detach()[order][:, order], at, at))
    return {"examples": examples, "heats": heats, "readers": list(readers)}


def traces(s: Scene) -> dict:
    """CoT2: problems with the target's and the model's distribution over states at each step."""
    problems, alpha, words = [], s.logits.detach().softmax(-1), s.task.vocabulary
    target = getattr(s, "target", torch.zeros_like(alpha))  # of CSFT alone
    for i, row in enumerate(s.rows.tolist()[:16]):
        steps = []
        for goal, share in zip(target[i], alpha[i], strict=True):
            shown = sorted({*goal.nonzero().flatten().tolist(), *share.topk(5).indices.tolist()})
            steps.append([(words[j], goal[j].item(), share[j].item()) for j in shown])
        best, ways = s.paths[row, 0].tolist(), {*map(tuple, s.paths[row].tolist())}
        problem = {"prompt": " ".join(words[j] for j in s.prompts[row].tolist()[1:]), "steps": steps, "n": len(ways)}
        problem |= {"trace": " → ".join(words[j] for j in best), "answer": words[int(s.answers[row])]}
        problem |= {"guess": words[int(alpha[i, -1].argmax())], "facts": []}
        if s.mode == "grpo":
            told = {"said": [words[j] for j in s.said], "reward": s.reward.flatten(), "A (6)": s.advantages.flatten()}
            problem["facts"] = facts({k: x.tolist() if torch.is_tensor(x) else x for k, x in told.items()}, i)
        problems.append(problem)
    return {"problems": problems}


def page(scene: Scene, view: View, method: str, doc: str, command: str) -> str:
    """The whole page; jinja2 escapes whatever the models wrote."""
    about, _, notes = doc.strip().partition("\nGood to know\n")
    title, _, about = about.partition("\n")
    keys = ("train/reward", "train/accuracy", "train/zero_signal", "train/length", "loss/total", *view.tiles)
    known = {
        "method": method,
        "title": title,
        "about": about.strip("\n"),
        "notes": notes.strip("\n"),
        "step": scene.step,
    }
    known |= {"command": command, "config": scene.config, "metrics": scene.metrics, "lead": LEAD}
    known |= {"m": defaultdict(lambda: math.nan, scene.metrics), "terms": terms_of(scene, view)}
    known["tiles"] = {key: scene.metrics[key] for key in keys if key in scene.metrics}
    known |= dict.fromkeys(("colours", "groups", "heats", "examples", "problems"), ())
    if scene.rollout is not None:
        rollout = view.rollout(scene)
        known["colours"] = colourings(scene, view, rollout)
        known["groups"] = groups_of(scene, view, rollout, known["colours"])
    known |= view.extra(scene)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Environment(**options)
    template.filters["number"] = number
    return template.from_string(TEMPLATE.read_text()).render(known)


def load(source: Path) -> ModuleType:
    """A method's file as a module."""
    require(source.is_file() and source.suffix == ".py", f"{source} is neither a method's file nor a run's folder")
    spec = importlib.util.spec_from_file_location(f"explained_{source.stem}", source)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, KeyboardInterrupt) as error:
        raise UserError(f"{source} cannot be imported ({first_line(error)})") from None
    whole = hasattr(module, "main") and dataclasses.is_dataclass(getattr(module, "Config", None))
    require(whole, f"{source} has no Config and main: name a method's file")
    return module


def require_place(html: Path) -> None:
    """Before the run, not after it: that the page can be written there, and replaces nothing but a page of ours."""
    writable(html.absolute().parent, "name another file by --html")
    try:
        ours = not os.path.lexists(html) or (html.is_file() and MARK in html.read_bytes()[:1000])
    except OSError as error:
        raise UserError(f"cannot read {html} ({error.strerror}): name another file by --html") from None
    require(ours, f"{html} exists and is no page of this script: name another file by --html, or remove it first")


def main(config: Config, source: Path, module: ModuleType | None, command: str) -> None:
    require_place(Path(config.html))
    try:
        explain(config, source, module, command)
    except KeyboardInterrupt:
        raise UserError("interrupted: no page was written; run the same command again") from None


def explain(config: Config, source: Path, module: ModuleType | None, command: str) -> None:
    if module:
        view, doc = VIEWS.get(source.stem, View()), module.__doc__ or source.name
        scene = watch(module, config, config.at_step or min(view.step, config.steps))
    else:
        view, doc = View(), f"{source.resolve().name}: samples that the run has stored"
        scene = stored(source, config.at_step)
    write_atomically(Path(config.html), page(scene, view, source.stem if module else "", doc, command))
    print(f"page: {config.html}")


def start() -> None:
    """The first argument is a file or a folder; behind it stand the file's own flags, and ours."""
    command = " ".join(["python scripts/explain.py", *sys.argv[1:]])
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        cli(lambda config: fail("name a method's file or a run's folder first, such as methods/grpo.py"), Config)
    source, module, kind = Path(sys.argv.pop(1)), None, Config
    if not source.is_dir():
        try:
            module = load(source)
        except UserError as error:
            fail(str(error))
        kind = dataclass(type("Config", (Config, module.Config), {"__module__": module.__name__}))
        known = {each.name for each in dataclasses.fields(kind)}
        sys.argv[1:1] = [f"--{key.replace('_', '-')}={value}" for key, value in BRIEF.items() if key in known]
    cli(partial(main, source=source, module=module, command=command), kind, getattr(module, "PRESETS", None))


if __name__ == "__main__":
    start()
