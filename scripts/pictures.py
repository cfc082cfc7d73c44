"""One small picture of each method's idea: methods/pictures/NAME.svg, for the README and for talks.

One language in all ten. A square is a token. Blue is pushed up, red pushed down, the deeper the more; grey carries no
loss. Orange is the student, purple the teacher or whoever else advises. What looks measured is measured: log-probs are
those of the built-in tiny models, on responses that the tiny students wrote; advantages, weights, margins, plans and
targets come from the methods' own functions. Made up are their other inputs: Skill-SD's moves and its bank's counts,
RLTF's rewards, SinKD's points. Text stays text, <desc> says what there is to see, the same models give the same bytes.

Run: python scripts/pictures.py
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from posttrain.common.cli import UserError, cli
from posttrain.common.environments.episodes import demonstrated
from posttrain.common.environments.summaries import with_skill
from posttrain.common.families.mnns import nearest_first, ways
from posttrain.common.models import load_model, load_tokenizer
from posttrain.common.rollout import Rollout, encode, under_prompts, written
from posttrain.common.run import write_atomically
from posttrain.common.scoring import carry, score
from posttrain.common.tasks import Example, make_task
from posttrain.methods import cot2, grpo, opd, rltf, scope_opd, sinkd, skill_sd, sod, uni_opd

FOLDER = Path(__file__).resolve().parents[1] / "methods" / "pictures"
WIDTH, HEIGHT, RIGHT = 720, 260, 696  # RIGHT: where all ends
INK, SOFT, LINE, EDGE = "#1f2328", "#59636e", "#9aa4ae", "#d8dee4"
GREY, PALE = "#eef1f4", "#fafbfc"
UP, DOWN, STUDENT, TEACHER = "#2f6fed", "#e5413a", "#d97706", "#8b3fd9"
TINT = {STUDENT: "#fff1dc", TEACHER: "#f4eafe", LINE: GREY}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


@dataclass
class Config:
    out: str = ""  # folder to write to; empty = methods/pictures of this checkout


# --- the language


def number(value: float) -> str:
    return f"{round(value, 1) + 0:g}"  # + 0: never -0


def say(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−")


def shade(value: float, full: float = 1.0) -> str:
    """Nearly white at 0, blue above, red below; deepest from `full` on."""
    end, share = (94, 146, 245) if value >= 0 else (240, 106, 98), min(1.0, abs(value) / full)
    mixed = [round(start + (to - start) * share) for start, to in zip((244, 246, 248), end, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


class Picture:
    """A list of SVG elements. Words may hold *italics* and subscripts, x_i and x_{ij}."""

    def __init__(self, name: str, idea: str, shows: str):
        self.name, self.shows, self.parts = name, shows, []
        self.add("rect", x=1, y=1, width=WIDTH - 2, height=HEIGHT - 2, rx=14, fill="#fff", stroke=EDGE)
        self.text(24, 40, name, 22, INK, "start", 700)
        self.text(RIGHT, 40, idea, 16, SOFT, "end")

    def add(self, tag: str, content: str = "", **attributes: float | str) -> None:
        pairs = [(key.replace("_", "-"), v if isinstance(v, str) else number(v)) for key, v in attributes.items()]
        inside = "".join(f' {key}="{value}"' for key, value in pairs if value)
        self.parts.append(f"<{tag}{inside}>{content}</{tag}>" if content else f"<{tag}{inside}/>")

    def text(self, x, y, words: str, size=16, fill=INK, anchor="middle", weight=400) -> None:
        spans, low, slant = "", False, False
        for part in re.split(r"(\*|_\{[^}]*\}|_\w)", words):
            if part == "*":
                slant = not slant
            elif part:
                sub = part[0] == "_"
                style = f' dy="{number(size / 4 * (sub - low))}"' * (sub != low) + ' font-style="italic"' * slant
                style += f' font-size="{number(size * 0.72)}"' * sub
                body, low = escape(part[1:].strip("{}") if sub else part), sub
                spans += f"<tspan{style}>{body}</tspan>" if style else body
        look = {"fill": fill, "text_anchor": anchor, "font_weight": weight}
        look = {key: value for key, value in look.items() if value not in (INK, "start", 400)}
        self.add("text", spans, x=x, y=y, font_size=size, **look)

    def box(self, x, y, w, h, words="", colour=LINE, size=16, fill="", radius=8) -> None:
        look = {"fill": fill or TINT[colour], "stroke": colour, "stroke_width": 1.5}
        self.add("rect", x=x, y=y, width=w, height=h, rx=radius, **look)
        if words:
            self.text(x + w / 2, y + h / 2 + size * 0.36, words, size)

    def line(self, *points, colour=LINE, width=1.5, dash="", opacity="") -> None:
        path = "M" + " ".join(f"{number(x)} {number(y)}" for x, y in points)
        look = {"stroke": colour, "stroke_width": width, "stroke_dasharray": dash, "stroke_opacity": opacity}
        self.add("path", d=path, fill="none", **look)

    def arrow(self, *points, colour=LINE, width=1.8, dash="", head=8) -> None:
        """Along the points; its tip is the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = head * (x1 - x0) / length, head * (y1 - y0) / length
        self.line(*points[:-1], (x1 - 0.9 * dx, y1 - 0.9 * dy), colour=colour, width=width, dash=dash)
        tip = (x1, y1, x1 - dx - 0.55 * dy, y1 - dy + 0.55 * dx, x1 - dx + 0.55 * dy, y1 - dy - 0.55 * dx)
        self.add("path", d="M" + " ".join(map(number, tip)) + "Z", fill=colour)

    def dot(self, x, y, r, colour) -> None:
        self.add("circle", cx=x, cy=y, r=r, fill=colour, stroke="#fff", stroke_width=1.5)

    def bar(self, x, y, w, h, colour, radius=2) -> None:
        self.add("rect", x=x, y=y, width=w, height=h, rx=radius, fill=colour)

    def mark(self, x, y, good: bool) -> None:
        """A tick or a cross, drawn, since not every font has them."""
        path = f"M{number(x)} {number(y)}" + ("m-6 0l4 5 8 -10" if good else "m-5 -5l10 10m0 -10l-10 10")
        self.add("path", d=path, fill="none", stroke=INK, stroke_width=2.2, stroke_linecap="round")

    def tokens(self, x, y, text: str, fills: str | list[str], w=20, h=24, size=14) -> None:
        """One square a character; one fill for all, or one each."""
        for i, fill in enumerate([fills] * len(text) if isinstance(fills, str) else fills):
            self.bar(x + i * w, y, w - 1.5, h, fill, 3)
        centres = " ".join(number(x + (i + 0.5) * w - 0.75) for i in range(len(text)))
        self.add("text", escape(text), x=centres, y=y + h / 2 + size * 0.36, font_size=size, text_anchor="middle")

    def scores(self, x, start, fork, end, w, n: int) -> None:
        """The teacher, above or below at height start, looks at each of n squares of width w."""
        self.line((x + n * w / 2, start), (x + n * w / 2, fork), colour=TEACHER)
        self.line((x + w / 2, fork), (x + (n - 0.5) * w, fork), colour=TEACHER)
        for i in range(n):
            self.arrow((x + (i + 0.5) * w, fork), (x + (i + 0.5) * w, end), colour=TEACHER, head=7)

    def start(self, prompt: str) -> None:
        """Left column of single-turn methods: the prompt, and the student that answers it."""
        self.text(80, 76, "prompt *x*", 14, SOFT)
        self.box(24, 84, 112, 32, prompt)
        self.arrow((80, 117), (80, 139))
        self.box(24, 140, 112, 44, "student", STUDENT)

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        head += f'width="{WIDTH}" height="{HEIGHT}" font-family="{FONT}" fill="{INK}">\n'
        head += f"<title>{escape(self.name)}</title>\n<desc>{escape(self.shows)}</desc>\n"
        return head + "\n".join([*self.parts, "</svg>"]) + "\n"


# --- what the pictures measure

PRODUCT = Example([{"role": "user", "content": "047*008="}], "376", {"a": 47, "b": 8, "domain": "mul"})
SUM = Example([{"role": "user", "content": "283+131="}], "414", {"a": 283, "b": 131, "domain": "add"})


@functools.cache
def tiny(name: str) -> tuple:
    return load_model(name, torch.device("cpu"), train=False), load_tokenizer(name)


def logps_of(name: str, rollout: Rollout) -> Tensor:
    return score(tiny(name)[0], rollout, 4096)[0]


def answered(example: Example, texts: list[str], teacher: str) -> tuple[Tensor, Tensor, Tensor]:
    """Responses of one group under student and teacher: their log-probs and the loss mask.  -> [N, T] each"""
    rollout = written(tiny("arithmetic-student")[1], [example] * len(texts), texts)
    return logps_of("arithmetic-student", rollout), logps_of(teacher, rollout), rollout.loss_mask


def graded(example: Example, texts: list[str]) -> Tensor:
    task = make_task("arithmetic", "", "")
    return torch.tensor([task.grade(example, text) for text in texts])


def of_row(values: Tensor, mask: Tensor) -> list[float]:
    return values[mask > 0].tolist()


# --- the pictures


def picture_grpo() -> Picture:
    texts = ["320+56=376", "48+320=368", "56+320=386", "56+320=376", "240+56=306"]
    reward, group = graded(PRODUCT, texts), torch.zeros(len(texts), dtype=torch.long)
    advantages = grpo.group_advantages(reward, group, grpo.Config.adv).tolist()
    p = Picture("GRPO", "raise what beats the group's mean reward", (
        "One prompt and five responses of the student, each with reward 0 or 1. An arrow leads from the group's mean "
        "reward to each response's own. The two correct responses lie above the mean, and all their tokens are pushed "
        "up; the three wrong ones lie below, and all theirs are pushed down."))  # fmt: skip
    p.start("47 × 8 =")
    low, high = 476, 604
    mean = low + (high - low) * reward.mean().item()
    p.text(283, 76, "responses *y*_i", 14, SOFT)
    for x, words in ((low, "0"), (mean, "mean *r*"), (high, "1")):
        p.text(x, 76, words, 14, SOFT)
    p.text(RIGHT, 76, "*A*_i", 14, SOFT, "end")
    p.line((137, 162), (160, 162))
    p.line((160, 98), (160, 226))
    for i, (text, r, a) in enumerate(zip(texts, reward.tolist(), advantages, strict=True)):
        y, colour = 98 + 32 * i, UP if a > 0 else DOWN
        p.arrow((160, y), (182, y))
        p.tokens(188, y - 12, text, shade(a, 1.6))
        p.mark(414, y, r > 0)
        p.line((low, y), (high, y), colour=EDGE, width=1)
        p.arrow((mean, y), (low + (high - low) * r, y), colour=colour, width=4, head=12)
        p.text(RIGHT, y + 5.5, say(a, "+.2f"), 16, colour, "end", 600)
    p.line((mean, 84), (mean, 240), colour=INK, dash="4 3")
    return p


def picture_opd() -> Picture:
    text = "56+320=386"
    student, teacher, mask = answered(PRODUCT, [text], "arithmetic-mul-teacher")
    signal = of_row(opd.distillation_advantages(student - teacher, mask), mask)
    p = Picture("OPD", "the student writes, the teacher scores each token", (
        "The student answers 47 × 8 with 56+320=386. The teacher writes nothing. It scores the student's tokens, and "
        "each gets its own log-ratio of teacher to student: blue where the teacher finds it likelier, deep red on the "
        "wrong digit 8."))  # fmt: skip
    p.start("47 × 8 =")
    x, w = 184, 51.2
    p.arrow((137, 162), (176, 162))
    p.box(x + 5 * w - 62, 62, 122, 36, "teacher", TEACHER)
    p.scores(x, 99, 116, 136, w, len(text))
    for i, value in enumerate(signal[: len(text)]):
        if abs(value) >= 0.1:
            p.text(x + (i + 0.5) * w - 1, 205, say(value, "+.1f"), 16, UP if value > 0 else DOWN, weight=600)
    p.tokens(x, 140, text, [shade(value) for value in signal[: len(text)]], w, 44, 20)
    p.text(x + 5 * w, 238, "*A*_t = log *p*_{teacher}(*y*_t) − log *p*_{student}(*y*_t)", 16)
    return p


def picture_scope_opd() -> Picture:
    texts = ["320+56=376", "56+320=376", "56+240=376", "48+320=368", "56+320=386", "32+320=372"]
    student, teacher, mask = answered(PRODUCT, texts, "arithmetic-mul-teacher")
    reward, group = graded(PRODUCT, texts), torch.zeros(len(texts), dtype=torch.long)
    s, q = scope_opd.mean_logps(student, mask), scope_opd.mean_logps(teacher, mask)
    on = scope_opd.paths(reward, torch.ones(len(texts), dtype=torch.bool), "correctness")
    weights = scope_opd.adaptive_weights(s, q, on, group, scope_opd.Config())
    p = Picture("SCOPE", "the verifier routes, perplexity weighs", (
        "A verifier splits the student's responses. Correct ones are imitated, with the more weight the more "
        "surprising the student found them. Wrong ones are distilled token by token from the teacher, with the more "
        "weight the more plausible the teacher finds them. Bars are the weights, 1 in sum on each path."))  # fmt: skip
    p.start("47 × 8 =")
    p.box(164, 140, 80, 44, "verifier", size=15)
    p.arrow((137, 162), (163, 162))
    lanes = (("mle", 58, STUDENT, -s, "imitate", "student"), ("opd", 156, TEACHER, -q, "distil", "teacher"))
    for path, top, colour, surprise, verb, who in lanes:
        good = path == "mle"
        p.arrow((204, 139 if good else 185), (204, top + 45), (272, top + 45), colour=colour)
        p.mark(232, top + 30 if good else top + 62, good)
        p.box(274, top, 422, 90, colour=colour)
        p.text(288, top + 19, verb, 14, INK, "start", 600)
        p.text(530, top + 19, f"{who}'s perplexity", 14, SOFT, "end")
        p.text(548, top + 19, "weight *w*_i", 14, SOFT, "start")
        for k, i in enumerate(on[path].nonzero().squeeze(1).tolist()):
            y, w = top + 26 + 20.5 * k, weights[path][i].item()
            signal = of_row((teacher - student)[i], mask[i])[: len(texts[i])]
            p.tokens(288, y, texts[i], shade(0.8) if good else [shade(v) for v in signal], 17, 18, 13)
            p.text(530, y + 14, f"{surprise[i].exp().item():.1f}", 14, colour, "end", 600)
            p.bar(548, y + 3, 150 * w, 12, colour)
            p.text(548 + 150 * w + 6, y + 14, f"{w:.2f}", 14, INK, "start")
    return p


def picture_uni_opd() -> Picture:
    right = ["300+110+4=414", "4+110+300=414", "200+110+4=414", "400+110+4=414"]
    wrong = ["9+110+400=419", "5+110+400=415", "2+110+300=412", "400+110+5=515"]
    delta = 0.4  # the paper's
    student, teacher, mask = answered(SUM, right + wrong, "arithmetic-add-teacher")
    returns = ((teacher - student) * mask).sum(1) / mask.sum(1)
    correct, group = graded(SUM, right + wrong) == 1, torch.zeros(len(returns), dtype=torch.long)
    margin = uni_opd.margins(returns, correct, ~correct, group, uni_opd.Config.margin_mode)
    shifted = returns + uni_opd.margin_shift(margin, correct, ~correct, group, delta, uni_opd.Config.margin_direction)
    p = Picture("Uni-OPD", "a teacher per domain, calibrated by the verifier", (
        "On the left each domain's prompts go to that domain's teacher. On the right the returns, mean log-ratios of "
        "teacher to student, of four correct and four wrong responses: before, they overlap; then the correct ones are "
        "moved up and the wrong ones down, all alike, until the two means lie delta apart."))  # fmt: skip
    for y, prompt, sign in ((68, "283 + 131", "+"), (120, "47 × 8", "×")):
        p.box(24, y, 100, 36, prompt)
        p.arrow((125, y + 18), (147, y + 18))
        p.box(148, y, 104, 36, f"teacher {sign}", TEACHER)
        p.line((253, y + 18), (270, y + 18), colour=TEACHER)
    p.line((270, 86), (270, 138), colour=TEACHER)
    p.arrow((270, 112), (294, 112), colour=TEACHER)
    p.text(24, 205, "*A* = *r* ± *λ*/2", 18, INK, "start")
    p.text(24, 232, "*λ* = max(0, *δ* − *M*)", 15, SOFT, "start")

    def at(value: float) -> float:
        return 486 + 430 * value

    for y, words in ((112, "before"), (200, "after")):
        p.line((300, y), (RIGHT, y), colour=EDGE)
        p.text(300, y - 14, words, 14, SOFT, "start")
    for before, after, good in zip(returns.tolist(), shifted.tolist(), correct.tolist(), strict=True):
        colour = UP if good else DOWN
        p.line((at(before), 112), (at(after), 200), colour=colour, opacity=".35")
        p.dot(at(before), 112, 7, colour)
        p.dot(at(after), 200, 7, colour)
    means = [at(shifted[side].mean().item()) for side in (~correct, correct)]
    for x in means:
        p.line((x, 211), (x, 227), colour=INK)
    p.line((means[0], 219), (means[1], 219), colour=INK)
    p.text(sum(means) / 2, 239, "margin *M* = *δ*", 15)
    p.text(means[0] - 10, 224, "wrong", 15, DOWN, "end", 600)
    p.text(means[1] + 10, 224, "correct", 15, UP, "start", 600)
    p.text(RIGHT, 82, "*G*_i, mean log-ratio of a response", 14, SOFT, "end")
    return p


EPISODE = [("<94-2>", "(X|2ee|51518)"), ("<94*2>", "(88)"), ("<88+2>", "(90)"), ("=90;", "")]  # by the tiny student


def picture_sod() -> Picture:
    tokenizer = tiny("chain-student")[1]
    prompt = encode(tokenizer, [{"role": "user", "content": "94*2+2?"}])
    rollout = demonstrated(tokenizer, [prompt], [EPISODE])
    s, q = logps_of("chain-student", rollout), logps_of("chain-teacher", rollout)
    d, there = sod.step_divergence(s, q, rollout.turn)
    failed = torch.tensor([[said.startswith("(X") for _, said in EPISODE]])
    w = sod.step_weights(d, there, failed, sod.Config())[0].tolist()
    p = Picture("SOD", "the teacher is heard less in turns where the two drift apart", (
        "An episode of four turns with a calculator. The first call fails. In the next turn the gap between student "
        "and teacher jumps, so its weight falls to a tenth; then the gap closes and the weight returns."))  # fmt: skip
    signal, x = of_row(q - s, rollout.loss_mask), 128
    p.box(24, 66, 86, 28, "94×2+2", size=15)
    p.text(24, 150, "gap *d*_k", 16, INK, "start")
    p.text(24, 218, "weight *w*_k", 16, INK, "start")
    p.text(24, 239, "*d*_1/*d*_k ≤ 1.2", 14, SOFT, "start")
    for k, (text, said) in enumerate(EPISODE):
        middle = x + 9 * len(text)
        p.tokens(x, 66, text.replace("*", "×"), [shade(v, 3) for v in signal[: len(text)]], 18, 28, 15)
        signal = signal[len(text) :]
        for value, scale, base, colour in ((d[0, k].item(), 6.3, 168, LINE), (w[k], 32, 242, TEACHER)):
            p.line((middle - 36, base), (middle + 36, base), colour=EDGE)
            p.bar(middle - 22, base - scale * value, 44, scale * value, colour)
            p.text(middle, base - scale * value - 6, f"{value:.2f}", 14, INK if base < 200 else colour, weight=600)
        x += 18 * len(text) + 4
        if said:
            wide = 62 if failed[0, k] else 40
            p.box(x, 66, wide, 28, "failed" if failed[0, k] else said, INK if failed[0, k] else EDGE, 14, GREY, 4)
            x += wide + 6
    return p


def picture_skill_sd() -> Picture:
    moves = "^<^^>>>"  # the fourth runs into the wall
    task, (_, tokenizer) = make_task("sokoban", "", ""), tiny("sokoban-student")
    example = task.train[5]
    level = task.environment(example, 0)
    level.reset(example)
    episode = [(move, level.step(move).observation) for move in moves]
    skill = task.skill_text(task.oracle(example))
    plain = demonstrated(tokenizer, [encode(tokenizer, example.prompt)], [episode])
    seen = under_prompts(plain, [encode(tokenizer, with_skill(example.prompt, skill))], tokenizer.pad_token_id)
    s, q = logps_of("sokoban-student", plain), carry(logps_of("sokoban-student", seen), seen, plain)
    bank = [{"n": 3, "reward_sum": 1.2}, {"n": 2, "reward_sum": 1.8}, {"n": 3, "reward_sum": 1.5}]
    chosen = skill_sd.choose(bank, skill_sd.Config.ucb)
    p = Picture("Skill-SD", "the teacher has read a skill, the student has not", (
        "The student plays Sokoban with the plain prompt. Its episodes are summarised into a bank of skills. The "
        "teacher, the same weights, reads one of them and scores the student's own moves: blue where the skill speaks "
        "for the move, red on the one that runs into the wall."))  # fmt: skip
    corner = [(24 + 13 * (cell % 5), 66 + 13 * (cell // 5)) for cell in range(25)]
    for x, y in corner:
        p.bar(x, y, 12, 12, GREY)
    (target,), (crate,), player = (example.fields[key] for key in ("targets", "boxes", "player"))
    p.box(corner[target][0] + 1, corner[target][1] + 1, 10, 10, colour=INK, fill="#fff", radius=1)
    p.bar(corner[crate][0] + 1, corner[crate][1] + 1, 10, 10, INK, 1)
    p.dot(corner[player][0] + 6, corner[player][1] + 6, 5, STUDENT)
    p.text(56, 148, "task", 14, SOFT)
    p.arrow((94, 96), (116, 96))
    p.box(117, 74, 104, 44, "student", STUDENT)
    p.arrow((222, 96), (246, 96))
    x, w = 254, 36
    fills = [shade(value) for value in of_row(q - s, plain.loss_mask)]
    p.tokens(x, 78, moves.translate(str.maketrans("^v<>", "↑↓←→")), fills, w, 36, 18)
    y = 163 + 26 * chosen  # of the skill that is read
    p.scores(x, y - 23, 142, 118, w, 7)
    p.box(x + 3.5 * w - 62, y - 22, 124, 44, "teacher", TEACHER)
    p.arrow((x + 7 * w + 4, 96), (632, 96), (632, 148))
    p.text(572, 88, "summarise", 14, SOFT)
    for i, kept in enumerate(bank):
        words = f"*n* = {kept['n']}, mean {kept['reward_sum'] / kept['n']:.1f}"
        colour, fill = (TEACHER, "") if i == chosen else (EDGE, "#fff")
        p.box(568, 151 + 26 * i, 128, 24, words, colour, 14, fill, 5)
    p.text(632, 245, "skill bank", 14, SOFT)
    p.arrow((567, y), (x + 3.5 * w + 64, y), colour=TEACHER)
    p.text(503, y - 8, "reads", 14, SOFT)
    p.arrow((169, 119), (169, y), (x + 3.5 * w - 63, y), dash="5 4")
    p.text(246, y - 8, "same weights", 14, SOFT)
    return p


def picture_pi_distill() -> Picture:
    p = Picture("π-Distill, OPSD", "one network, with and without a hint", (
        "Two panels, each with one network in two roles: the teacher reads a hint, the student does not. In π-Distill "
        "the teacher writes and both roles learn, with shares alpha and one minus alpha. In OPSD the student writes, "
        "the teacher only scores and the student learns."))  # fmt: skip
    up, down, pi = (204, 154), (151, 201), [(62, "writes"), (128, "learns *α*"), (217, "learns 1−*α*")]
    opsd = [(76, "scores"), (178, "writes"), (248, "learns")]
    panels = ((24, "π-Distill", "teacher", TEACHER, pi), (368, "OPSD", "student", STUDENT, opsd))
    for left, name, writer, colour, uses in panels:
        p.box(left, 58, 328, 188, colour=EDGE, fill=PALE, radius=10)
        p.text(left + 16, 81, name, 16, INK, "start", 600)
        p.text(left + 312, 81, f"the {writer} writes", 14, colour, "end", 600)
        p.box(left + 12, 92, 304, 58, fill="#fff")
        p.box(left + 20, 100, 140, 42, "teacher + hint", TEACHER)
        p.box(left + 168, 100, 140, 42, "student", STUDENT)
        p.tokens(left + 55, 206, "56+320=376", TINT[colour], 22, 26, 15)
        for x, words in uses:
            learns, scores = words.startswith("learns"), words == "scores"
            ink, (start, end) = UP if learns else TEACHER if scores else colour, up if learns else down
            dash = "4 3" if scores else ""
            p.arrow((left + x, start), (left + x, end), colour=ink, width=2.4, dash=dash, head=10)
            p.text(left + x + 9, 183, words, 14, ink, "start", 600)
    return p


def picture_rltf() -> Picture:
    r0, r1 = torch.tensor([0.0, 1, 0, 0]), torch.tensor([1.0, 0, 1, 0])  # of a group: first tries, second tries
    group, two = torch.zeros(4, dtype=torch.long), r0 == 0
    gain = rltf.turn_advantages(r0, r1, group, two, rltf.Config())[2][0].item()  # of the first row
    p = Picture("RLTF", "learn to answer as if the critique had been read", (
        "First row: a wrong first try is criticised and tried again, now right. Second row, RLTF-SD: the second try is "
        "placed behind the bare prompt and pushed up by its reward minus the mean reward of first tries. Third row, "
        "RLTF-FM: the critique is predicted from prompt and first try."))  # fmt: skip
    first, second, critique = "48+320=368", "56+320=376", "7 × 8 is not 48"
    for y, words in ((85, "try twice"), (155, "RLTF-SD"), (219, "RLTF-FM")):
        p.text(24, y, words, 15, INK, "start", 600)
        p.box(112, y - 18, 60, 26, "47×8", EDGE, 14, GREY, 4)
    p.arrow((173, 80), (184, 80), head=7)
    p.tokens(188, 67, first, TINT[STUDENT], 16, 26)
    p.arrow((350, 80), (365, 80), head=7)
    p.box(367, 67, 144, 26, critique, TEACHER, 14, radius=4)
    p.arrow((512, 80), (530, 80), head=7)
    p.tokens(536, 67, second, TINT[STUDENT], 16, 26)
    p.text(267, 111, "*r*_0 = 0", 14, SOFT)
    p.text(439, 111, "critique *c*", 14, SOFT)
    p.text(646, 111, "*r*_1 = 1", 14, SOFT)
    p.arrow((600, 95), (600, 123), (267, 123), (267, 134), colour=UP)
    p.tokens(188, 137, second, shade(gain), 16, 26)
    p.text(366, 155, f"*r*_1 − mean *r*_0 = {say(gain, '+.2f')}", 15, UP, "start", 600)
    p.tokens(188, 201, first, GREY, 16, 26)
    p.box(367, 201, 144, 26, critique, UP, 14, shade(0.8), 4)
    p.text(526, 219, "log *p*(*c* | *x*_0, *y*_0)", 15, UP, "start", 600)
    return p


def picture_sinkd() -> Picture:
    corners = torch.tensor([[0.0, 1], [1, 1], [0.5, 0]])  # of the simplex of three classes
    student = torch.tensor([30, 22, 48, 62, 14, 24, 22, 52, 26, 46, 32, 22, 32, 38, 30]).view(5, 3) / 100
    teacher = torch.tensor([6, 86, 8, 36, 6, 58, 84, 9, 7, 12, 20, 68, 62, 30, 8]).view(5, 3) / 100
    _, plan = sinkd.sinkhorn_loss(student.log(), teacher.log(), sinkd.Config())  # logits over tau
    p = Picture("SinKD", "the batch is moved as a cloud, not row by row", (
        "Outputs of a batch of five as points in the triangle of three classes, student in orange, teacher in purple. "
        "Left, soft labels: each student point is drawn to the teacher's output for the same example, however far. "
        "Right, the Sinkhorn distance: the lines of its plan join the clouds, the thicker the more mass."))  # fmt: skip
    size = torch.tensor([200.0, 164])
    panels = ((48, "soft labels: *i* to *i*", torch.eye(5), 1.5, "4 3"), (472, "Sinkhorn: cloud to cloud", plan, 6, ""))
    for left, name, masses, width, dash in panels:
        outline, ours, theirs = (
            (x @ corners * size + torch.tensor([left, 60])).tolist() for x in (torch.eye(3), student, teacher)
        )
        p.add("path", d="M" + " ".join(f"{number(x)} {number(y)}" for x, y in outline) + "Z", fill=PALE, stroke=EDGE)
        for (i, j), mass in zip(itertools.product(range(5), repeat=2), masses.flatten().tolist(), strict=True):
            if mass >= 0.02:
                p.line(ours[i], theirs[j], colour=INK, width=width * mass, dash=dash, opacity=".75")
        for colour, points in ((STUDENT, ours), (TEACHER, theirs)):
            for x, y in points:
                p.dot(x, y, 6, colour)
        p.text(left + 100, 245, name, 15, SOFT)
    for y, colour, words in ((96, STUDENT, "student"), (122, TEACHER, "teacher")):
        p.dot(318, y, 6, colour)
        p.text(332, y + 5.5, words, 16, INK, "start")
    p.text(WIDTH / 2, 172, "*S* = Σ *P*_{ij}*C*_{ij}", 18)
    p.text(WIDTH / 2, 201, "*P* plan, *C* distance", 14, SOFT)
    return p


def picture_cot2() -> Picture:
    digits = (2, 2, 1)
    every = ways(digits)
    target = cot2.soft_targets(torch.tensor([nearest_first(every)]) + 5, 0, 11)[0].tolist()  # states -5..5, [3, 11]
    one = next(path for path in every if path[-1] == 1)
    p = Picture("CoT2", "a thought is an average of tokens: all traces at once", (
        "Signs are sought for the digits 2, 2 and 1, so that their sum is the least that is not negative. A discrete "
        "chain of thought follows one trace of the search. A continuous one follows all: what it reads at each step "
        "is the average of the states' embeddings, weighted by the share of traces in each. Only the answer is a "
        "token."))  # fmt: skip
    steps = (128, 236, 344, 452)

    def at(t: int, state: int) -> tuple[int, int]:
        return steps[t], 122 - 9 * state

    edges = {(t, a, b) for path in every for t, (a, b) in enumerate(itertools.pairwise([0, *path]))}
    for t, a, b in sorted(edges, key=lambda edge: (edge[0] < 2 or edge[2] == 1, edge)):  # those that are learnt on top
        p.line(at(t, a), at(t + 1, b), colour=UP if t < 2 or b == 1 else EDGE, width=2)
    for t, (a, b) in enumerate(itertools.pairwise([0, *one])):
        p.line(at(t, a - 0.6), at(t + 1, b - 0.6), colour=INK, dash="4 3")
    p.box(24, 108, 82, 28, "2  2  1")
    for t, state in [(0, 0)] + [(3, path[-1]) for path in every]:
        p.dot(*at(t, state), 4.5, LINE)
    for t, shares in enumerate(target):
        middle, x = steps[t + 1], steps[t + 1] - 51
        p.text(middle - 54, 76, f"±{digits[t]}", 14, SOFT)
        p.box(middle - 16, 187, 32, 24, f"{one[t]}", EDGE, 14, GREY, 4)
        for state, share in reversed([(v - 5, share) for v, share in enumerate(shares) if share]):
            y, r = at(t + 1, state)[1], 12 * share**0.5
            p.dot(middle, y, r, UP)
            if t < 2:
                p.text(middle, y + r + 14 if state < 0 else y - r - 4, say(state, "d"), 14)
            p.bar(x, 218, 102 * share - 1.5, 26, shade(share * 1.2), 4)
            p.text(x + 51 * share - 0.75, 236, say(state, "d"), 14)
            x += 102 * share
    p.text(474, at(3, 1)[1] + 5, "answer 1", 15, UP, "start", 600)
    for y, words, reads in ((204, "discrete", "one token a step"), (236, "CoT2", "*z*_t = Σ_v *α*_t(*v*) *E*_v")):
        p.text(24, y, words, 15, INK, "start", 600)
        p.text(524, y, reads, 15, SOFT, "start")
    return p


PICTURES = {"grpo": picture_grpo, "opd": picture_opd, "scope_opd": picture_scope_opd, "uni_opd": picture_uni_opd,
            "sod": picture_sod, "skill_sd": picture_skill_sd, "pi_distill": picture_pi_distill, "rltf": picture_rltf,
            "sinkd": picture_sinkd, "cot2": picture_cot2}  # fmt: skip


def main(config: Config) -> None:
    folder = Path(config.out or FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); choose another --out") from None
    for name, make in PICTURES.items():
        write_atomically(folder / f"{name}.svg", make().svg())
    print(f"pictures: {len(PICTURES)} in {folder}")


if __name__ == "__main__":
    cli(main, Config)
