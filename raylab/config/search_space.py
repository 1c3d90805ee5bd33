"""Distributions of a search space, written `loguniform(1e-5,1e-3)`."""

import re
from typing import Any

from raylab.config.overrides import parse_value
from raylab.errors import UsageError, unknown

DISTRIBUTIONS = {
    "uniform": 2,
    "loguniform": 2,
    "randint": 2,
    "choice": None,
}


def parse_dimension(path: str, text: str) -> tuple[str, list[Any]]:
    """A search dimension `loguniform(1e-5,1e-3)` as ("loguniform", [1e-5, 1e-3]).

    uniform(low,high), loguniform(low,high), randint(low,high) with high included, choice(a,b,...).
    Raises UsageError for another distribution or wrong bounds.
    """
    example = f"for example --space {path}=loguniform(1e-5,1e-3)"
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if not match:
        raise UsageError(f"{path}={text} is not a distribution", f"known: {', '.join(DISTRIBUTIONS)}", example)
    name, inside = match.groups()
    if name not in DISTRIBUTIONS:
        raise unknown("distribution", name, DISTRIBUTIONS)
    arguments = [parse_value(part.strip()) for part in _split(inside)]
    count = DISTRIBUTIONS[name]
    if count is None:
        if not arguments:
            raise UsageError(f"{path}={text}: choice needs at least one value", do=example)
        return name, arguments
    numbers = [a for a in arguments if isinstance(a, int | float) and not isinstance(a, bool)]
    if len(arguments) != count or len(numbers) != count or not numbers[0] < numbers[1]:
        raise UsageError(f"{path}={text}: {name} takes two numbers, the lower first", do=example)
    if name == "loguniform" and numbers[0] <= 0:
        raise UsageError(f"{path}={text}: loguniform needs bounds above zero", do=example)
    if name == "randint" and not all(isinstance(n, int) for n in numbers):
        raise UsageError(f"{path}={text}: randint needs whole numbers", do=example)
    return name, arguments


def _split(text: str) -> list[str]:
    """At commas that stand outside brackets and quotes."""
    parts, depth, start, quote = [], 0, 0, ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]] if text.strip() else []
