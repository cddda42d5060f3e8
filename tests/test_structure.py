"""The floors of the house: imports run down only, and nothing below the shell talks to the terminal."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safesteer_lite

PACKAGE = Path(safesteer_lite.__file__).parent

# A module may import its own floor and those below it.
FLOORS = (
    ("children", "errors", "events", "foreign", "text", "config", "runs"),
    ("prompts", "hardware"),
    ("method",),
    ("sources",),
    ("models",),
    ("evaluation", "export"),
    ("report",),
    ("stages",),
    ("shell",),
    ("__main__",),
)
SHELL = {"shell", "__main__"}
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: `pipeline`, `models`, ..."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "safesteer_lite":
                yield from (f"safesteer_lite.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def outside(path: Path) -> set[str]:
    """The packages beyond this one and the standard library that a file imports."""
    tops = {name.partition(".")[0] for name in imports(path)}
    return tops - {"safesteer_lite"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_down(path: Path) -> None:
    own = FLOOR_OF[part_of(path)]
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("safesteer_lite.")} - {"__version__"}
    assert [name for name in sorted(parts) if FLOOR_OF[name] > own] == []


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in MODULES} <= FLOOR_OF.keys()


def test_the_ground_floor_needs_the_standard_library_only() -> None:
    found: dict[str, set[str]] = {name: set() for name in FLOORS[0]}
    for path in MODULES:
        if part_of(path) in FLOORS[0]:
            found[part_of(path)] |= outside(path)
    assert found == {**{name: set() for name in FLOORS[0]}, "runs": {"filelock"}}


def test_the_method_knows_torch_and_nothing_else() -> None:
    method = [path for path in MODULES if part_of(path) == "method"]
    assert len(method) >= 5
    for path in method:
        assert outside(path) <= {"torch"}, path
        named = {name for name in imports(path) if name.startswith("safesteer_lite.")}
        assert all(name.startswith("safesteer_lite.method") for name in named), path
        assert not {"pathlib", "json", "os"} & set(imports(path)), path


def test_terminal_libraries_stay_in_the_shell() -> None:
    for path in MODULES:
        if part_of(path) not in SHELL:
            assert not outside(path) & {"rich", "questionary", "tqdm"}, path
        if "questionary" in outside(path):
            assert path.parent.name == "wizard"


def test_model_libraries_stay_in_models_and_export() -> None:
    for path in MODULES:
        if part_of(path) not in {"sources", "models", "export", "hardware"}:
            assert not outside(path) & {"transformers", "peft", "bitsandbytes", "unsloth", "huggingface_hub"}, path


def test_nothing_below_the_shell_prints() -> None:
    for path in MODULES:
        if part_of(path) in SHELL:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Name) and node.id in {"print", "tqdm"}), f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr"}:
                taken_from = getattr(node.value, "id", "")
                assert taken_from != "sys", f"{path}:{node.lineno}"


def test_the_shell_speaks_through_two_files() -> None:
    """What is shown goes through the console or the streams that make it visible: nobody can forget to."""
    for path in MODULES:
        if part_of(path) not in SHELL or path.name in ("console.py", "streams.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "Console", "rich.print", "Text.from_markup"), f"{path}:{node.lineno}"
            assert called not in ("sys.stdout.write", "sys.stderr.write"), f"{path}:{node.lineno}"


def test_no_library_is_left_to_ask_whether_to_run_a_model_s_code() -> None:
    """Left out, `trust_remote_code` means: ask on the terminal, and run it on a y."""
    seen = 0
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if node.func.attr in {"from_pretrained", "from_config"} and name.startswith(("Auto", "Fast")):
                given = {entry.arg: entry.value for entry in node.keywords}
                said = given.get("trust_remote_code")
                assert isinstance(said, ast.Constant) and said.value is False, f"{path}:{node.lineno}"
                seen += 1
    assert seen >= 6


def test_nothing_works_at_import() -> None:
    """Module bodies define; they call nothing for its effect."""
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or not isinstance(node, (ast.Expr, ast.For, ast.While, ast.With)), path
