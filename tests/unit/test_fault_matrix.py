"""Every row of the fault matrix has a test."""

import ast
from pathlib import Path

from tests.fault_matrix import FAULTS

TESTS = Path(__file__).parents[1]


def test_every_fault_has_a_test():
    shown: set[int] = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                shown |= {ast.literal_eval(row) for row in node.args}
    assert shown == set(FAULTS)
