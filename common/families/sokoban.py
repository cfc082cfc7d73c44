"""Sokoban: push every box onto a target. Small generated levels, each solvable within the horizon.

Cells are numbered row by row. A move into a box pushes it if the cell behind is free; else nothing happens. The reward
is the fraction of boxes on a target. Training levels and the 100 held-out ones are fixed, whatever the run's seed.

Shown as `cells` to the tiny models, a token a fact: the prompt `?mbG` names target m, player b and box G, an action is
one of ^ v < >, and `cG` is what the model reads next. A skill `[bG>+cG>-]` stands before the prompt: in the first state
go right, in the second do not. Shown as `text` to real models: a drawn board, answered by <action>up</action>.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from posttrain.common.cli import require
from posttrain.common.environments.episodes import Environment, Episode, Step, Turn
from posttrain.common.tasks import Example, text_of

ACTIONS = "^v<>"
WORDS = dict(zip(("up", "down", "left", "right"), ACTIONS, strict=True))
NAMES = {action: word for word, action in WORDS.items()}
TAG = re.compile(r"<action>\s*(up|down|left|right)\s*</action>")
ENTRY = re.compile(r"[a-y][A-Y][\^v<>][+-]")
MAX_ENTRIES = 8  # of a skill in cells
HELDOUT = 100
RULES = """You play Sokoban on this board:
{board}
# is wall, . floor, P you, B a box, T a target, * a box on a target, + you on a target. Push every box onto a target. \
You push a box by moving into it, one at a time, and cannot pull. You have {horizon} moves. Give one move a turn: \
<action>up</action>, <action>down</action>, <action>left</action> or <action>right</action>."""

State = tuple[int, frozenset[int]]  # the player's cell, the boxes' cells


@dataclass(frozen=True)
class Room:
    """What does not move: an open square of size x size cells without the walls, and the targets in it."""

    size: int
    walls: frozenset[int]
    targets: frozenset[int]

    @functools.cached_property
    def ways(self) -> dict[str, list[int]]:
        """action -> the cell that each cell leads to, -1 = wall"""
        n = self.size
        shifts = dict(zip(ACTIONS, ((-1, 0), (1, 0), (0, -1), (0, 1)), strict=True))
        out = {a: [(i + y) * n + j + x if 0 <= i + y < n and 0 <= j + x < n else -1
                   for i in range(n) for j in range(n)] for a, (y, x) in shifts.items()}  # fmt: skip
        return {action: [-1 if cell in self.walls else cell for cell in cells] for action, cells in out.items()}

    def move(self, state: State, action: str) -> State:
        player, boxes = state
        ahead = self.ways[action][player]
        if ahead in boxes:
            behind = self.ways[action][ahead]
            return state if behind < 0 or behind in boxes else (ahead, boxes - {ahead} | {behind})
        return state if ahead < 0 else (ahead, boxes)

    def corner(self, cell: int) -> bool:
        up, down, left, right = (self.ways[action][cell] < 0 for action in ACTIONS)
        return (up or down) and (left or right)

    def trace(self, state: State, actions: str) -> list[State]:
        """The states before each action and after the last."""
        return list(itertools.accumulate(actions, self.move, initial=state))

    def draw(self, state: State) -> str:
        n, look = self.size, {(False, True): "T", (True, True): "*", (True, False): "B", (False, False): "."}
        cells = ["#" if i in self.walls else look[i in state[1], i in self.targets] for i in range(n * n)]
        cells[state[0]] = "+" if state[0] in self.targets else "P"
        rows = ["#" + "".join(cells[i * n : i * n + n]) + "#" for i in range(n)]
        return "\n".join(["#" * (n + 2), *rows, "#" * (n + 2)])


@functools.lru_cache(maxsize=2**17)
def solve(room: Room, state: State, limit: int) -> str | None:
    """A shortest solution by breadth-first search over player x boxes, None if it takes more than limit moves."""
    seen, frontier = {state}, [(state, "")]
    for _ in range(limit + 1):
        reached = []
        for here, path in frontier:
            if here[1] == room.targets:
                return path
            for action in ACTIONS:
                there = room.move(here, action)
                pushed = there[1] - here[1]
                if there not in seen and not any(room.corner(cell) and cell not in room.targets for cell in pushed):
                    seen.add(there)
                    reached.append((there, path + action))
        frontier = reached
    return None


def position(example: Example) -> tuple[Room, State]:
    """Where an example's level begins."""
    f = example.fields
    return Room(f["size"], frozenset(f["walls"]), frozenset(f["targets"])), (f["player"], frozenset(f["boxes"]))


class Level(Environment):
    """One episode. An invalid action costs a move; what is solved stays solved."""

    def __init__(self, task: "Sokoban"):
        self.task = task
        self.stops, self.turn_tokens = ((), 1) if task.render == "cells" else (("</action>",), 0)

    def reset(self, example: Example) -> list[dict[str, str]]:
        (self.room, self.state), self.moves = position(example), 0
        return example.prompt

    def step(self, text: str) -> Step:
        action = self.task.action(text)
        if not self.over():
            self.moves += 1
            self.state = self.room.move(self.state, action) if action else self.state
        observation = self.task.look(self.room, self.state)
        if self.task.render == "text":
            observation = "\n" + "invalid action\n" * (not action) + observation + "\n"
        reward = len(self.state[1] & self.room.targets) / len(self.room.targets)
        return Step(observation, self.over(), reward, failed=not action)

    def over(self) -> bool:
        return self.state[1] == self.room.targets or self.moves >= self.task.horizon


def compact_skill(skill: dict[str, str]) -> str:
    """The entries that a skill's strings hold, the newest 8, as the tiny models read them; "" if there are none."""
    entries = ENTRY.findall(skill["golden_workflow"] + " " + skill["mistake_analysis"])
    return "[" + "".join(entries[-MAX_ENTRIES:]) + "]" if entries else ""


def without_oldest(skill: str) -> str:
    """A skill in cells without its first entry; "" if that was all."""
    rest = ENTRY.findall(skill)[1:]
    return "[" + "".join(rest) + "]" if rest else ""


class Sokoban:
    def __init__(
        self,
        name: str,
        *,
        size: int = 5,  # rows and columns of the room, its outer wall not counted
        boxes: int = 1,  # and as many targets
        walls: int = 0,  # cells of the room that are wall, others in each level
        low: int = 5,  # moves of a shortest solution, at least
        high: int = 9,  # and at most
        levels: int = 36,  # to train on; 0 = fresh ones without end
        horizon: int = 12,  # moves of an episode
        render: str = "cells",  # or text
        shown_skills: float = 0.0,  # fraction of drawn levels whose prompt holds a skill, for pretraining
    ):
        numbers = (size, boxes, walls, low, high, levels, horizon)
        require(all(type(n) is int and n >= 0 for n in numbers), f"task {name!r}: sokoban counts in whole numbers")
        require(render in ("cells", "text"), f"task {name!r}: render is cells or text")
        fits = size >= 2 and boxes >= 1 and 2 * boxes + walls < size**2
        require(fits, f"task {name!r}: the room is too small for its boxes, targets, walls and player; raise size")
        require(1 <= low <= high <= horizon, f"task {name!r} needs 1 <= low <= high <= horizon")
        simple = render == "text" or (boxes == 1 and walls == 0 and size <= 5)
        require(simple, f"task {name!r}: cells show one box in a room of size up to 5 without walls; give render=text")
        self.name, self.render, self.shown_skills = name, render, shown_skills
        self.size, self.boxes, self.walls, self.low, self.high, self.horizon = size, boxes, walls, low, high, horizon
        if render == "cells":
            self.skill_text, self.shorten = compact_skill, without_oldest
        self.test = list(itertools.islice(self.stream(random.Random("held out"), set()), HELDOUT))
        held = {text_of(example) for example in self.test}
        self.fresh = functools.partial(self.stream, without=held)
        self.train = list(itertools.islice(self.fresh(random.Random("train")), levels))
        few = f"task {name!r} has too few levels to train on and hold out {HELDOUT}; widen its options"
        require(len(self.test) == HELDOUT and len(self.train) == levels, few)

    def stream(self, rng: random.Random, without: set[str]) -> Iterator[Example]:
        """Random levels whose shortest solution has low to high moves, none twice; ends when they become rare."""
        seen, tries = set(without), 0
        while (tries := tries + 1) < 5000:
            cells = rng.sample(range(self.size**2), self.size**2)
            walls, free = cells[: self.walls], cells[self.walls :]
            boxes, player, targets = free[: self.boxes], free[self.boxes], rng.sample(free, self.boxes)
            room, state = Room(self.size, frozenset(walls), frozenset(targets)), (player, frozenset(boxes))
            answer = solve(room, state, self.high)
            if answer is None or len(answer) < self.low:
                continue
            board = self.look(room, state)
            shown = "?" + chr(97 + targets[0]) + board
            if self.render == "text":
                shown = RULES.format(board=board, horizon=self.horizon)
            if shown not in seen:
                seen.add(shown)
                where = {"walls": sorted(walls), "targets": sorted(targets), "boxes": sorted(boxes), "player": player}
                yield Example([{"role": "user", "content": shown}], answer, {"size": self.size, **where})
                tries = 0

    def draw(self, n: int, *key: int) -> list[Example]:
        rng, out = random.Random(repr(key)), []
        while len(out) < n:
            more = min(n - len(out), len(self.train) or n)
            out += rng.sample(self.train, more) if self.train else itertools.islice(self.fresh(rng), more)
        return [self.skilled(example, rng) if rng.random() < self.shown_skills else example for example in out]

    def heldout(self, n: int) -> list[Example]:
        return self.test[:n]

    def environment(self, example: Example, seed: int) -> Level:
        return Level(self)

    def action(self, text: str) -> str:
        """One of ACTIONS, or "" if invalid. Text: the last complete tag."""
        if self.render == "cells":
            return text if len(text) == 1 and text in ACTIONS else ""
        return WORDS[tags[-1]] if (tags := TAG.findall(text)) else ""

    def look(self, room: Room, state: State) -> str:
        return chr(97 + state[0]) + chr(65 + min(state[1])) if self.render == "cells" else room.draw(state)

    def grade(self, example: Example, text: str) -> float:
        """Of a transcript, its prompt left out: the reward of the episode, which is played again."""
        level, row = self.environment(example, 0), rf"[#.PBT*+]{{{self.size + 2}}}\n"
        level.reset(example)
        seen = r"[a-y][A-Y]" if self.render == "cells" else rf"\n(?:invalid action\n)?(?:{row}){{{self.size + 2}}}"
        turns = re.split(seen, text)  # what follows the last observation is a turn unless the episode was cut there
        return [Step(), *map(level.step, turns if turns[-1] else turns[:-1])][-1].reward

    def summarise(self, example: Example, episode: Episode) -> dict[str, str] | None:
        """The rules in place of a language model's summary. Solved: the way there without its loops. Not solved: the
        first push of a box into a corner that is no target; None without one."""
        room, start = position(example)
        actions = "".join(self.action(turn.text) for turn in episode.turns)
        states, way = room.trace(start, actions), {}
        if states[-1][1] == room.targets:
            for state, action in zip(states, actions, strict=False):
                if state in way:
                    way = dict(itertools.takewhile(lambda item: item[0] != state, way.items()))
                way[state] = action
            return self.skill(way.items(), "+")
        for state, action, after in zip(states, actions, states[1:], strict=False):
            if any(room.corner(cell) and cell not in room.targets for cell in after[1] - state[1]):
                return self.skill([(state, action)], "-")
        return None

    def oracle(self, example: Example) -> dict[str, str]:
        """The skill that a shortest solution makes."""
        room, start = position(example)
        return self.skill(zip(room.trace(start, example.answer), example.answer, strict=False), "+")

    def skill(self, way: Iterable[tuple[State, str]], flag: str) -> dict[str, str]:
        """What to do (+) or never to do (-) in which state: entries keyed by state hold wherever the player strays."""

        def place(cell: int) -> str:
            return f"({cell // self.size + 1}, {cell % self.size + 1})"

        entries, no = [], "not " * (flag == "-")
        for state, action in way:
            boxes = " ".join(map(place, sorted(state[1])))
            told = f"you {place(state[0])}, boxes {boxes}: {no}{NAMES[action]}; "
            entries.append(self.look(None, state) + action + flag if self.render == "cells" else told)
        told = (
            "".join(entries) if self.render == "cells" else "(row, column), from 0 at the top left: " + "".join(entries)
        )
        blank = dict.fromkeys(("success_analysis", "mistake_analysis", "golden_workflow"), "")
        return blank | {"golden_workflow" if flag == "+" else "mistake_analysis": told}

    # --- for pretraining, in cells: players between a random and a perfect one, half of them told what to do

    def player(self, room: Room, state: State, rng: random.Random, noise: float, never: str = "") -> str:
        best = rng.random() >= noise and solve(room, state, self.horizon)
        return best[0] if best and best[0] != never else rng.choice(ACTIONS.replace(never, ""))

    def skilled(self, example: Example, rng: random.Random) -> Example:
        """The level behind a skill: mostly the way of a good or sloppy player, else one thing to avoid."""
        (room, start), kind = position(example), rng.random()
        state, way, noise = start, [], rng.choice((0.0, 0.3))
        while state[1] != room.targets and len(way) < self.horizon:
            way.append(Turn(self.player(room, state, rng, noise)))
            state = room.move(state, way[-1].text)
        skill = self.summarise(example, Episode(way)) or self.oracle(example)
        if kind > 0.8:
            skill = self.skill([(rng.choice(room.trace(start, example.answer)[:-1]), rng.choice(ACTIONS))], "-")
        return replace(example, prompt=[{"role": "system", "content": compact_skill(skill)}, *example.prompt])

    def demonstrate(self, example: Example, rng: random.Random) -> list[tuple[str, str]]:
        """Turns and what they are answered. 97% of the moves keep to the skill in states that it lists, of the others
        65% are random."""
        level, turns = self.environment(example, 0), []
        level.reset(example)
        advice = {entry[:2]: (entry[2], entry[3]) for entry in ENTRY.findall(text_of(example))}
        while not level.over():
            action, flag = advice.get(self.look(level.room, level.state), ("", ""))
            if rng.random() > 0.97:
                action = flag = ""
            if flag != "+":
                action = self.player(level.room, level.state, rng, 0.65, never=action)
            step = level.step(action)
            turns.append((action, "" if step.done else step.observation))
        return turns
