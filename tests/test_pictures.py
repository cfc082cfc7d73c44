"""scripts/pictures.py: one picture a method, the stored ones are those made now, and the numbers are the methods'."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from posttrain.common.cli import UserError
from posttrain.methods import grpo, sod
from posttrain.scripts import pictures

METHODS = sorted(path.stem for path in Path(grpo.__file__).parent.glob("*.py") if path.stem != "posttrain")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A new folder two levels deep into which the script has written."""
    folder = tmp_path_factory.mktemp("pictures") / "a" / "b"
    pictures.main(pictures.Config(out=str(folder)))
    return folder


def rects(root, fill: str) -> list[dict[str, float]]:
    found = [node.attrib for node in root.iter(f"{SVG}rect") if node.get("fill") == fill]
    return [{key: float(each[key]) for key in ("x", "y", "width", "height")} for each in found]


def test_each_method_has_one_and_nothing_else_is_there(made):
    assert sorted(path.stem for path in pictures.FOLDER.iterdir()) == METHODS == sorted(pictures.PICTURES)
    assert sorted(path.name for path in made.iterdir()) == [f"{name}.svg" for name in METHODS]


@pytest.mark.parametrize("name", METHODS)
def test_the_stored_picture_is_the_one_made_now(name, made):
    stored, now = ((folder / f"{name}.svg").read_bytes() for folder in (pictures.FOLDER, made))
    assert stored == now, "out of date: python scripts/pictures.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_picture_is_small_well_formed_and_tells_what_it_shows(name):
    path = pictures.FOLDER / f"{name}.svg"
    assert path.stat().st_size < 15_000
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg" and root.get("viewBox") == "0 0 720 260"
    title, shows = root.find(f"{SVG}title").text, root.find(f"{SVG}desc").text
    assert title == next(root.iter(f"{SVG}text")).text and len(shows) > 100
    assert not re.search(r"href|<image|<script|url\(", path.read_text())  # stands alone


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_drawn_beyond_the_margins(name):
    """Boxes and starts of texts, and both edges of a text whose width is estimated from above."""
    root = ElementTree.parse(pictures.FOLDER / f"{name}.svg").getroot()
    for node in list(root.iter(f"{SVG}rect"))[1:]:  # the first is the paper
        x, y, width, height = (float(node.get(key)) for key in ("x", "y", "width", "height"))
        assert 24 <= x <= x + width <= 696.5 and 24 <= y <= y + height <= 250, node.attrib
    for node in root.iter(f"{SVG}text"):
        at, size = [float(x) for x in node.get("x").split()], float(node.get("font-size"))
        width = 0.7 * size * len("".join(node.itertext())) if len(at) == 1 else size
        share = {"start": 0.0, "middle": 0.5, "end": 1.0}[node.get("text-anchor", "start")]
        left, right = min(at) - share * width, max(at) + (1 - share) * width
        assert left >= 8 and right <= 712 and float(node.get("y")) <= 250, "".join(node.itertext())


def test_sod_bars_are_as_high_as_the_method_weighs(made):
    root = ElementTree.parse(made / "sod.svg").getroot()
    heights = [[bar["height"] for bar in rects(root, colour)] for colour in (pictures.LINE, pictures.TEACHER)]
    d = torch.tensor([[float(text) for text in re.findall(r">(\d\.\d\d)<", (made / "sod.svg").read_text())[::2]]])
    there = torch.ones_like(d, dtype=torch.bool)
    weights = sod.step_weights(d, there, ~there, sod.Config())[0]
    assert d.shape == (1, 4)
    torch.testing.assert_close(torch.tensor(heights[0]) / 6.3, d[0], atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(heights[1]) / 32, weights, atol=0.02, rtol=0)


def test_scope_weights_sum_to_one_on_each_path_and_grow_on_their_sides(made):
    root = ElementTree.parse(made / "scope_opd.svg").getroot()
    correct, wrong = ([bar["width"] / 150 for bar in rects(root, ink)] for ink in (pictures.STUDENT, pictures.TEACHER))
    assert sum(correct) == pytest.approx(1, abs=0.01) and sum(wrong) == pytest.approx(1, abs=0.01)
    assert correct == sorted(correct) and wrong == sorted(wrong, reverse=True)


def test_grpo_arrows_start_at_the_mean_of_the_rewards_that_the_task_gives(made):
    text = (made / "grpo.svg").read_text()
    shown = [float(value.replace("−", "-")) for value in re.findall(r">([+−]\d\.\d\d)<", text)]
    reward = torch.tensor([float(value > 0) for value in shown])
    advantages = grpo.group_advantages(reward, torch.zeros(5, dtype=torch.long), grpo.Config.adv)
    torch.testing.assert_close(torch.tensor(shown), advantages, atol=0.005, rtol=0)
    mean = pictures.number(476 + (604 - 476) * reward.mean().item())
    assert (
        len(re.findall(rf'd="M{re.escape(mean)} \d+ [\d.]+ \d+" fill="none" stroke="#\w+" stroke-width="4"', text)) == 5
    )


def test_words_become_spans_and_numbers_stay_short():
    picture = pictures.Picture("A & B", "idea", "what < shows")
    picture.text(1, 2, "*x*_{ij} = 1")
    last = ElementTree.fromstring(picture.svg())[-1]
    assert [(span.text, span.get("font-style")) for span in last] == [("x", "italic"), ("ij", None), (" = 1", None)]
    assert sum(float(span.get("dy", 0)) for span in last) == 0  # back on the line
    assert [pictures.number(x) for x in (-0.04, 2.0, 1 / 3, -1.25)] == ["0", "2", "0.3", "-1.2"]
    assert pictures.shade(0) == "#f4f6f8" and pictures.shade(9) == pictures.shade(1) != pictures.shade(-1)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        pictures.main(pictures.Config(out=str(tmp_path / "file" / "below")))
