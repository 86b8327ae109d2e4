"""docs/reliability.md: every fault that it lists is held by a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?P<fault>[^|]+) \| (?P<promised>[^|]+) \| (?P<tests>[^|]*) \|$", re.MULTILINE)
NAMED = re.compile(r"`(?P<file>test_\w+\.py)::(?P<test>test_\w+)`")
LEAST = 40


def rows() -> list[re.Match[str]]:
    return [row for row in ROW.finditer(PAGE.read_text()) if row["fault"] != "fault"]


@cache
def names_in(file: str) -> set[str]:
    path = ROOT / "tests" / file
    assert path.is_file(), file
    return {one.name for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.FunctionDef)}


def test_the_table_is_long_and_names_no_fault_twice() -> None:
    faults = [row["fault"] for row in rows()]
    assert len(faults) >= LEAST
    assert len(set(faults)) == len(faults)
    assert PAGE.read_text().count("\n| ") == len(faults) + 1, "every line of the table can be read"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["fault"][:40])
def test_every_row_has_a_test_that_exists(row: re.Match[str]) -> None:
    named = list(NAMED.finditer(row["tests"]))
    assert named, "no test"
    assert not NAMED.sub("", row["tests"]).strip(" ,"), "something that is no test"
    for one in named:
        assert one["test"] in names_in(one["file"]), one[0]
