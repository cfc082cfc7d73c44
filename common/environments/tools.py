"""Tools for any task: a calculator or Python, in the tool-call formats of chat models; and the flag --environment."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from posttrain.common.cli import require
from posttrain.common.environments.calls import calculate, find_call, shorten
from posttrain.common.environments.episodes import Environment, Step, guard
from posttrain.common.environments.sandbox import run_python
from posttrain.common.tasks import Example, Task, from_file

Form = Literal["hermes", "json"]
TOOLS = {  # name -> what it does, its one argument, and an example of it
    "calculator": (
        "Works out an arithmetic expression of numbers, + - * / // % and parentheses.",
        "expression",
        "12*7",
    ),
    "python": ("Runs a Python program and returns what it prints. No files, no network.", "code", "print(12*7)"),
}
SHOWN = {
    "hermes": "<tool_call>{}</tool_call>",  # Qwen2.5, Qwen3 and Hermes
    "json": "{}",  # Llama 3
}


class ToolUse(Environment):
    """Problems of a task, solved with calls of one tool; the first turn without a call is the answer and is graded."""

    role = "tool"

    def __init__(self, task: Task, tool: str, form: Form, observation_chars: int = 256):
        self.task, self.tool, self.form, self.observation_chars = task, tool, form, observation_chars
        self.stops = ("</tool_call>",) if form == "hermes" else ()

    def reset(self, example: Example) -> list[dict[str, str]]:
        self.example = example
        about, argument, shown = TOOLS[self.tool]
        properties = {argument: {"type": "string"}}
        schema = {"name": self.tool, "description": about}
        schema["parameters"] = {"type": "object", "properties": properties, "required": [argument]}
        call = SHOWN[self.form].format(json.dumps({"name": self.tool, "arguments": {argument: shown}}))
        about = (
            f"You can use a tool:\n{json.dumps(schema)}\nTo call it, for 12*7 say, write\n{call}\nand nothing else; "
        )
        about += "the result comes back in the next message. Once you know the answer, give it without a call."
        own = [message for message in example.prompt if message["role"] != "system"]
        given = [message["content"] for message in example.prompt if message["role"] == "system"]
        return [{"role": "system", "content": "\n\n".join([*given, about])}, *own]

    def step(self, text: str) -> Step:
        call = find_call(text, self.form)
        if call is None:
            return Step(done=True, reward=self.task.grade(self.example, text))
        output, failed = self.run(call.name, call.arguments) if not call.error else (f"error: {call.error}", True)
        return Step(shorten(output, self.observation_chars), failed=failed)

    def run(self, name: str, arguments: dict) -> tuple[str, bool]:
        """What the tool says, and whether the call failed."""
        argument = TOOLS[self.tool][1]
        if name != self.tool:
            return f"error: there is no tool {name!r}; there is {self.tool!r}", True
        if not isinstance(arguments.get(argument), str):
            return f"error: {self.tool} takes one string named {argument!r}", True
        if self.tool == "python":
            return run_python(arguments[argument])
        try:
            return calculate(arguments[argument]), False
        except ValueError as error:
            return f"error: {error}", True


def make_environment(spec: str, task: Any, form: Form) -> Callable[[Example, int], Environment]:
    """task = the task's own | calculator | python | path/to/file.py:Class, an Environment or alike.  -> one a row"""
    if spec == "task":
        lacks = "this task has no environment of its own: --environment calculator, python or path/to/file.py:Class"
        require(hasattr(task, "environment"), lacks)
        return task.environment
    if spec in TOOLS:
        tool = partial(ToolUse, task, spec, form)
        return lambda example, seed: tool()
    kind = from_file(spec, "--environment", "task, calculator, python, or path/to/file.py:Class")
    missing = [name for name in ("reset", "step") if not callable(getattr(kind, name, None))]
    require(not missing, f"--environment: {spec} has no method {' or '.join(missing)}")
    return lambda example, seed: guard(kind)
