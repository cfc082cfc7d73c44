"""Runs commands of ours one after the other, each a process of its own: [[script, flag, ...], ...] on stdin -> a JSON
line [exit code, end of its output] each.

Imports take a process ten seconds. So the first command runs in this process, and the others in forks of it.
"""

import json
import os
import runpy
import sys
import traceback


def call(argv: list[str]) -> int:
    """The script with its output in the file `output`; its exit code."""
    kept = [os.dup(stream) for stream in (1, 2)]
    sink = os.open("output", os.O_CREAT | os.O_TRUNC | os.O_RDWR)
    for stream in (1, 2):
        os.dup2(sink, stream)
    sys.argv, code = argv, 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for stream, old in zip((1, 2), kept, strict=True):
        os.dup2(old, stream)
    return code


def main() -> None:
    for i, argv in enumerate(json.load(sys.stdin)):
        sys.path[0] = os.path.dirname(argv[0])
        if i == 0:
            code = call(argv)
        elif child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            os._exit(call(argv))
        with open("output", errors="replace") as output:
            print(json.dumps([code, output.read()[-500:]]), flush=True)


if __name__ == "__main__":
    main()
