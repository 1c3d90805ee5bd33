"""Every row of the fault matrix has a test."""

import re
from pathlib import Path

from tests.fault_matrix import FAULTS

TESTS = Path(__file__).parents[1]
MARK = re.compile(r"^\s*@pytest\.mark\.fault\(([\d, ]+)\)$", re.M)


def test_every_fault_has_a_test():
    # by its text, because ast.parse of Python 3.11 fails now and then in a process that has other threads
    marks = [rows for path in TESTS.rglob("test_*.py") for rows in MARK.findall(path.read_text())]
    assert {int(row) for rows in marks for row in rows.split(",")} == set(FAULTS)
