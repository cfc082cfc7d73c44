"""Answers in written texts: where one stands, and whether it equals another, in a process that may hang or die."""

import logging
import multiprocessing
import re
import site
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pebble import ProcessPool

from posttrain.common.tasks import stable_hash

NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][+-]?\d+)?(?:/\d+)?")


def final_answer(completion: str, numeric: bool) -> str:
    """The text of the last <answer> tag; else the last number (numeric) or the last line that is not empty."""
    if tagged := re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL):
        return tagged[-1].strip()
    if numeric:
        return (NUMBER.findall(completion) or [""])[-1]
    return (completion.strip().splitlines() or [""])[-1].strip()


def same_mathematics(gold: str, completion: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limits are off: ours is on
    written = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    golds = parse(written, parsing_timeout=None) or parse(gold, parsing_timeout=None)
    return verify(golds, parse(completion, parsing_timeout=None), timeout_seconds=None)


GRADERS: list[ProcessPool] = []  # one process that graders run in, started when first needed


def limited(function: Callable, *args: Any, seconds: float = 5.0) -> Any:
    """function(*args) in another process, or None if it raises, hangs or kills that process."""
    if not GRADERS:
        home = str(Path(__file__).parents[2] / "methods")  # where posttrain.py lies: the child imports this module too
        spawn = multiprocessing.get_context("spawn")
        GRADERS.append(ProcessPool(1, context=spawn, initializer=site.addsitedir, initargs=(home,)))
        GRADERS[0].schedule(stable_hash).result()  # outside the try: a child that cannot start must not look like 0
    try:
        return GRADERS[0].schedule(function, args=args, timeout=seconds).result()
    except Exception:
        return None
