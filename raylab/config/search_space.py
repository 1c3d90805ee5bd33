"""Distributions of a search space, written `loguniform(1e-5,1e-3)`."""

import ast
from typing import Any

from raylab.config.assignments import parse_value
from raylab.errors import UsageError, unknown

DISTRIBUTIONS = {
    "uniform": "uniform(0.1,0.5)",
    "loguniform": "loguniform(1e-5,1e-3)",
    "randint": "randint(1,4)",
    "choice": "choice(16,32)",
}
"""an example of each"""


def parse_dimension(path: str, text: str) -> tuple[str, list[Any]]:
    """A search dimension `loguniform(1e-5,1e-3)` as ("loguniform", [1e-5, 1e-3]).

    uniform(low,high), loguniform(low,high), randint(low,high) including high, choice(a,b,...).
    Raises UsageError for another distribution or wrong bounds.
    """
    name, arguments = _call(path, text)
    if name not in DISTRIBUTIONS:
        raise unknown("distribution", name, DISTRIBUTIONS)
    example = f"for example --space {path}={DISTRIBUTIONS[name]}"
    if name == "choice":
        if not arguments:
            raise UsageError(f"{path}={text}: choice needs at least one value", do=example)
        return name, arguments
    numbers = [a for a in arguments if isinstance(a, int | float) and not isinstance(a, bool)]
    if len(arguments) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise UsageError(f"{path}={text}: {name} takes two numbers, the lower one first", do=example)
    if name == "loguniform" and numbers[0] <= 0:
        raise UsageError(f"{path}={text}: loguniform needs bounds above zero", do=example)
    if name == "randint" and not all(isinstance(n, int) for n in numbers):
        raise UsageError(f"{path}={text}: randint needs whole numbers", do=example)
    return name, arguments


def _call(path: str, text: str) -> tuple[str, list[Any]]:
    """The name and the arguments of a call written as text. Unquoted words are text: `choice(gru,lstm)`."""
    text = text.strip()
    known = f"known: {', '.join(DISTRIBUTIONS)}"
    example = f"for example --space {path}={' or '.join(DISTRIBUTIONS.values())}"
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        quotes = "; text with characters such as : or / needs quotes, choice('a:b')"
        raise UsageError(f"{path}={text} is not a distribution", known + quotes, example) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise UsageError(f"{path}={text} is not a distribution", known, example)
    return call.func.id, [parse_value(ast.get_source_segment(text, argument) or "") for argument in call.args]
