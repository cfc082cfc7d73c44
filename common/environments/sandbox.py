"""Runs Python that a model wrote, in a fresh process with limits of time, memory and output, without files or network.

This is a guard against accidents, not a security boundary: run untrusted code in a container. inside.py is the
process's own half: resource limits, what is refused and how, the value of a last expression.
"""

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from posttrain.common.environments.calls import shorten

INSIDE = Path(__file__).with_name("inside.py")
MARK = "\0"  # inside.py writes it when it has started and before the value or error with which the code ends
OUT_OF_MEMORY = 77  # exit code of inside.py: after a MemoryError there may be no room for a message
FLOOD = 1_000_000  # bytes of output, beyond which the process is stopped


def run_python(code: str, seconds: float = 5.0, memory_mb: int = 512, output_chars: int = 2000) -> tuple[str, bool]:
    """(what the code printed, then the value of its last expression, its error or why it was stopped; failed).

    seconds is wall-clock time, start of the process included; memory is address space. The text has at most
    output_chars characters, its middle left out. Several threads may call this at once. Whatever the code does is
    told in the text; RuntimeError means that the tool itself does not start.
    """
    command = [sys.executable, "-s", "-P", "-S", "-B", "-u", "-X", "utf8"]  # -I, but for the variable that it ignores:
    environment = {"PYTHONHASHSEED": "0"}  # sets print in the same order each time; inside.py removes it
    limits = [str(math.ceil(seconds) + 1), str(memory_mb * 2**20)]  # the first, CPU seconds, in case we are killed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as source:
        source.write(code.encode("utf-8", "replace"))
        source.seek(0)
        deadline = time.monotonic() + seconds
        process = subprocess.Popen(
            [*command, str(INSIDE), *limits], bufsize=0, cwd=folder, env=environment, start_new_session=True,
            stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, stopped = read(process, deadline)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # the whole group; as long as it has members, its id is theirs
            process.wait()
            process.stdout.close()
    status = process.returncode
    text = output.decode("utf-8", "replace")
    if not stopped and not text.startswith(MARK):
        raise RuntimeError(f"the Python tool does not start (exit code {status}): {shorten(text, 300)}")
    printed, _, end = text.removeprefix(MARK).rpartition(MARK)
    text = "\n".join(part for part in (printed.rstrip("\n"), end.rstrip("\n")) if part)
    if stopped == "time":
        reason = f"ran for more than {seconds:g} s"
    elif stopped == "flood":
        reason = f"it wrote more than {FLOOD} bytes"
    elif status == OUT_OF_MEMORY:
        reason = f"out of memory (limit {memory_mb} MB)"
    elif status < 0:
        reason = f"killed by signal {-status}"
    elif status == 0 or (status == 1 and text):  # with 1, inside.py has written the error
        return shorten(text, output_chars), status != 0
    else:
        reason = f"exit code {status}"
    return shorten(f"{text}\nstopped: {reason}".lstrip("\n"), output_chars), True


def read(process: subprocess.Popen, deadline: float) -> tuple[bytes, str]:
    """(output until the process ends, or is to be stopped; "" or why: "time" or "flood")."""
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            chunk = process.stdout.read(2**16)
            output += chunk
            if len(output) > FLOOD:
                return output, "flood"
            if not chunk:  # it has ended, or has closed its output
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, deadline - time.monotonic()))
                    return output, ""
    return output, "time"
