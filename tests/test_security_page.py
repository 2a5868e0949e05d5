"""SECURITY.md names the code that keeps each class of trouble out: what it names must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = sorted(set(re.findall(r"`([a-z_/]+\.py):([A-Za-z_.]+)`", (ROOT / "SECURITY.md").read_text())))


def _names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(prefix + name)
            case ast.ClassDef(name=name, body=inner):
                found |= {prefix + name} | _names(inner, f"{prefix}{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(prefix + name)
    return found


def test_the_page_names_something() -> None:
    assert len(NAMED) > 25


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_page_names_is_there(file: str, name: str) -> None:
    assert name in _names(ast.parse((ROOT / file).read_text()).body)


def test_pickle_and_eval_are_forbidden() -> None:
    """By the linter, whose rules these are, and by nobody's exception."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{rule}"' in settings for rule in ("S301", "S302", "S307"))
    forbidden = re.compile(r"noqa: S30|^\s*(import|from) (pickle|marshal|shelve|dill)\b", re.MULTILINE)
    for package in ("protos", "scheduler_svc", "worker_svc", "client", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert not forbidden.search(path.read_text()), path
