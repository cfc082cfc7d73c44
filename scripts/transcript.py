"""An episode of a run as a transcript: what the policy wrote, token by token in the colour of its weight or advantage,
and what the environment answered. In the terminal, and as one HTML file that works offline.

Blue is positive, red negative, the deeper the larger; grey text carries no loss. Each turn's line ends with the mean of
the signal over its tokens. Methods write these samples while they train: the best, the worst and one other row a step.

Run: python scripts/transcript.py --run runs/sod-... --signal advantage --kind worst
"""

import html
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from posttrain.common.cli import cli, require
from posttrain.common.models import load_tokenizer
from posttrain.common.run import write_atomically

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 60em;
  padding: 0 1em; color: #222; background: #fff }}
pre {{ font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; margin: 0; overflow-wrap: anywhere }}
.turn {{ border-left: 3px solid #bbb; margin: .6em 0; padding: .1em .8em }} .failed {{ border-color: #c33 }}
.said {{ color: #777 }} small {{ color: #555 }} span[title] {{ border-radius: 3px; padding: 1px 0 }}
</style><h1>{title}</h1><p>{about}</p>{body}
"""


@dataclass
class Config:
    run: str  # the run's folder
    step: int = 0  # a step of samples.jsonl; 0 = the last
    kind: Literal["best", "worst", "other"] = "best"  # by reward, of that step's rows
    signal: str = "weight"  # one of the values that the method writes for each token
    html: str = ""  # the page to write; empty = transcript.html in the run's folder


def read(config: Config) -> tuple[dict, str]:
    """The row of samples.jsonl and the name of the model whose tokenizer made it."""
    folder = Path(config.run)
    found = (folder / "samples.jsonl").is_file() and (folder / "config.json").is_file()
    require(found, f"{folder} is no run's folder: it lacks samples.jsonl or config.json")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "ids" in row]
    require(bool(rows), f"the samples of {folder} have no values for each token: this method does not write them")
    step = config.step or rows[-1]["step"]
    rows = [row for row in rows if row["step"] == step and row["kind"] == config.kind]
    require(bool(rows), f"{folder} has no samples of step {step}")
    known = [key for key, value in rows[0].items() if isinstance(value, list) and key not in ("prompt", "ids", "turn")]
    require(config.signal in known, f"--signal {config.signal!r}: this run has {', '.join(known)}")
    return rows[0], json.loads((folder / "config.json").read_text())["flags"]["model"]


def colour(value: float, largest: float) -> tuple[int, int, int]:
    """White at 0, blue above, red below."""
    share = min(1.0, abs(value) / largest) if largest else 0.0
    end = (90, 150, 255) if value >= 0 else (255, 110, 100)
    return tuple(round(255 + (part - 255) * share) for part in end)


def segments(row: dict, texts: list[str], signal: list[float]) -> list[tuple[int, list[tuple[str, float]]]]:
    """Consecutive tokens of one turn, or of the environment (-1).  -> [(turn, [(text, value), ...]), ...]"""
    tokens = zip(row["turn"], texts, signal, strict=True)
    return [(turn, [(text, value) for _, text, value in part]) for turn, part in groupby(tokens, key=lambda t: t[0])]


def main(config: Config) -> None:
    row, model = read(config)
    tokenizer = load_tokenizer(model)
    texts = [tokenizer.decode([token]) for token in row["ids"]]
    signal = row[config.signal]
    largest = max(map(abs, signal), default=0.0)
    turns = (row.get("episode") or {}).get("turns", [])
    title = f"{Path(config.run).name}, step {row['step']}, {row['kind']}: reward {row['reward']:g}"
    about = f"{config.signal} on each token, at most {largest:.3g} in size"
    about += f"; ended by: {row['episode']['ending']}" if turns else ""
    console, body = Console(highlight=False), []
    console.print(f"{title}\n{about}", style="bold")
    if row.get("skill"):
        console.print(Text(f"skill: {row['skill']}", "dim"))
        body.append(f'<pre class="said">skill: {html.escape(row["skill"])}</pre>')
    for turn, tokens in segments(row, texts, signal):
        line = Text()
        if turn < 0:
            said = "".join(text for text, _ in tokens)
            line.append(said, "dim")
            body.append(f'<pre class="said">{html.escape(said)}</pre>')
        else:
            failed = turn < len(turns) and turns[turn]["failed"]
            spans = []
            for text, value in tokens:
                red, green, blue = colour(value, largest)
                line.append(text, f"black on rgb({red},{green},{blue})")
                style = f"background:rgb({red},{green},{blue})"
                spans.append(f'<span style="{style}" title="{value:.3g}">{html.escape(text)}</span>')
            mean = f"turn {turn + 1}{', failed' if failed else ''}: mean {sum(v for _, v in tokens) / len(tokens):.3g}"
            line.append(f"   {mean}", "red" if failed else "dim")
            kind = "turn failed" if failed else "turn"
            body.append(f'<div class="{kind}"><pre>{"".join(spans)}</pre><small>{mean}</small></div>')
        console.print(line)
    page = Path(config.html or Path(config.run) / "transcript.html")
    write_atomically(page, PAGE.format(title=html.escape(title), about=html.escape(about), body="\n".join(body)))
    print(f"page: {page}")


if __name__ == "__main__":
    cli(main, Config)
