"""Public functions with three or more parameters explain each of them under `Args:`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedprompt

PACKAGE = Path(fedprompt.__file__).parent


def public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its public classes, without those inside functions."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def is_command(function: ast.FunctionDef) -> bool:
    """Whether `click` makes a command of it: its docstring is the help, its options have theirs."""
    return any(re.search(r"\bcommand\b", ast.unparse(each)) for each in function.decorator_list)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Their names without `self` and `cls`."""
    spec = function.args
    names = [each.arg for each in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def unexplained(source: str) -> list[str]:
    """Functions whose docstrings lack a parameter.

    >>> unexplained("def f(a, b, c):\\n    '''Text.\\n\\n    Args:\\n        a: x.\\n    '''")
    ['f: b, c']
    >>> unexplained("def f(a, b): ...")
    []
    """
    found = []
    for function in public_functions(ast.parse(source)):
        names = parameters(function)
        text = (ast.get_docstring(function) or "").partition("Args:")[2]
        missing = [name for name in names if not re.search(rf"^\s+{name}: ", text, re.MULTILINE)]
        if len(names) >= 3 and missing and not is_command(function):
            found.append(f"{function.name}: {', '.join(missing)}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_parameters_are_explained(path: Path) -> None:
    assert unexplained(path.read_text(encoding="utf-8")) == []
