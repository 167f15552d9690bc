"""The arrows between rooms: who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnres"
SHARED = {"errors", "faults"}
TOOLS = {"errors", "faults"}
# room -> the other rooms and modules of the package that it may import
ARROWS = {
    "files": set(),
    "depth": set(),
    "ops": set(),
    "processes": {"files"},
    "config": set(),
    "model": {"ops", "depth", "files"},
    "data": {"config", "files"},
    "tables": {"depth", "files"},
    "interventions": {"config", "model", "depth", "data", "tables"},
    "statistics": {"config", "depth", "files", "tables"},
    "training": {"ops", "depth", "model", "data", "config", "files", "processes"},
    "probe": {"ops", "depth", "model", "data", "config", "files", "processes", "tables", "interventions", "statistics",
              "report"},
    "report": {"depth", "files", "tables", "statistics"},
    "commands": {"training", "probe", "report", "statistics", "data", "config", "files", "processes"},
}  # fmt: skip
TABLES_ONLY = tuple(
    str(path.relative_to(PACKAGE))
    for room in ("statistics", "report")
    for path in sorted((PACKAGE / room).rglob("*.py"))
)
# library -> where it may be imported
CONFINED = {
    "hydra": {"commands/hydra_door.py"},
    "omegaconf": {"commands/hydra_door.py"},
    "lightning": {"training", "data/windows", "probe/runner.py"},
    "triton": {"ops/triton_"},
    "wandb": {"training"},
    "torchmetrics": {"training"},
    "jinja2": {"report/page.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, lazy ones included, except where it is run as a command.

    `if __name__ == "__main__"` stands above the rooms, like train.py.
    """
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_along_the_arrows(path):
    mine = room(path)
    if mine in ("__init__", *SHARED):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "attnres" and len(parts) > 1:
            other = parts[1]
            assert other == mine or other in ARROWS[mine] | TOOLS, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path):
    where = str(path.relative_to(PACKAGE))
    for name in imports(path):
        allowed = CONFINED.get(name.split(".")[0])
        assert allowed is None or any(where.startswith(place) for place in allowed), f"{where} imports {name}"


@pytest.mark.parametrize("name", TABLES_ONLY)
def test_tables_never_import_the_model(name):
    for imported in imports(PACKAGE / name):
        assert not imported.startswith(("torch", "transformers", "attnres.model", "attnres.data")), imported
        assert imported not in {f"attnres.probe.{name}" for name in ("runner", "run", "viewer", "measure")}, imported


def test_every_room_has_its_arrows():
    assert {room(path) for path in FILES} - {"__init__"} == set(ARROWS) | SHARED
