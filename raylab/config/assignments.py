"""`PATH=VALUE` of the command line, for recipes and labels. Loads no recipe types, which takes a third of a second."""

import ast
from collections.abc import Iterable
from typing import Any

from raylab.errors import UsageError


def parse_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=3e-4", ...]` as {"optim.lr": 3e-4, ...}."""
    pairs = {}
    for text in texts:
        path, equals, right = text.partition("=")
        if not equals or not path:
            raise UsageError(f"'{text}' is not PATH=VALUE", do="write for example --set optim.lr=3e-4")
        pairs[path.strip()] = parse_value(right.strip())
    return pairs


def parse_value(text: str) -> Any:
    """A command-line value as Python data: JSON or Python literals, else the text itself."""
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if text.lower() in {"none", "null"}:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval is known to raise
        return text
