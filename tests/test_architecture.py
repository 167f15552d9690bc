"""The house: rooms, the arrows between them, and what a room can reach; read from the source, and tried in a process.

A room is a folder or a file right below the package. It imports from rooms to its left only:

    errors, faults <- files, depth, ops <- processes, config <- data, model, tables <- interventions, statistics
    <- training, probe, report <- commands
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnres"
LEFT_TO_RIGHT = (
    ("errors", "faults"),
    ("files", "depth", "ops"),
    ("processes", "config"),
    ("data", "model", "tables"),
    ("interventions", "statistics"),
    ("training", "probe", "report"),
    ("commands",),
)
# Inside the data room: text <- corpus <- windows.
DATA = ("text", "corpus", "windows")
# library -> where it may be imported
CONFINED = {
    "hydra": ("commands/hydra_door.py",),
    "omegaconf": ("commands/hydra_door.py",),
    "lightning": ("training/", "data/windows/", "processes/"),
    # Peers' kernels run in Triton's interpreter too.
    "triton": ("ops/triton_", "ops/conformance/adapters"),
    "wandb": ("training/",),
    "torchmetrics": ("training/",),
    "jinja2": ("report/",),
    "matplotlib": ("report/",),
}
# Rooms that never reach one of these libraries, however far one follows their imports.
LIGHT_ROOMS = ("errors", "faults", "depth", "tables", "statistics", "report")
HEAVY = ("torch", "transformers", "lightning", "hydra")
LARGEST_SHARE = 0.2

Sources = Mapping[str, str]


def read_sources() -> dict[str, str]:
    """Every module of the package: its dotted name -> its text."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(text: str) -> Iterator[str]:
    """Every name that a module imports, wherever the import stands; what only type checkers see is left out."""
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        nodes += ast.iter_child_nodes(node)


def edges(sources: Sources) -> dict[str, set[str]]:
    """Module -> what it imports: modules of the package, the packages around them, and top names of libraries."""
    found: dict[str, set[str]] = {}
    for module, text in sources.items():
        targets: set[str] = set()
        for name in imported(text):
            if name.split(".")[0] != "attnres":
                targets.add(name.split(".")[0])
                continue
            target = name if name in sources else name.rpartition(".")[0]
            # Importing a module runs the packages that it is in, but for those that the importer is in as well.
            packages = [target.rsplit(".", cut)[0] for cut in range(1, target.count(".") + 1)]
            targets |= {target} | {package for package in packages if not f"{module}.".startswith(f"{package}.")}
        found[module] = targets - {module}
    return found


def against_the_drawing(sources: Sources) -> list[str]:
    """Imports that go against an arrow: to a room beside or to the right, or from text to corpus to windows."""
    place = {name: number for number, names in enumerate(LEFT_TO_RIGHT) for name in names}
    wrong = []
    for module, targets in edges(sources).items():
        mine = room(module)
        for target in targets:
            if target.split(".")[0] != "attnres" or mine == "__init__" or target == "attnres":
                continue
            theirs = room(target)
            if mine != theirs and place[theirs] >= place[mine]:
                wrong.append(f"{module} -> {target}")
            inside = [name.split(".")[2] if name.count(".") > 1 else "" for name in (module, target)]
            within = mine == theirs == "data" and all(name in DATA for name in inside)
            if within and DATA.index(inside[1]) > DATA.index(inside[0]):
                wrong.append(f"{module} -> {target}")
    return sorted(wrong)


def circles(sources: Sources) -> list[list[str]]:
    """Modules of the package that import each other, directly or around corners."""
    graph = {module: {t for t in targets if t in sources} for module, targets in edges(sources).items()}
    reach = {module: reachable(module, graph) for module in graph}
    together = {frozenset({m} | {other for other in reach[m] if m in reach[other]}) for m in graph if m in reach[m]}
    return sorted(sorted(group) for group in together)


def reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph.get(module, ())
    return found


def heavy_reached(sources: Sources) -> list[str]:
    """Modules of the light rooms from which a heavy library can be reached, also by imports inside functions."""
    graph = edges(sources)
    return sorted(
        f"{module} reaches {library}"
        for module in sources
        if room(module) in LIGHT_ROOMS
        for library in reachable(module, graph) & set(HEAVY)
    )


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_sources()


def test_every_room_stands_in_the_drawing(sources):
    drawn = {name for names in LEFT_TO_RIGHT for name in names}
    assert {room(module) for module in sources} - {"__init__"} == drawn


def test_rooms_import_along_the_arrows(sources):
    assert against_the_drawing(sources) == []


def test_no_module_imports_itself_around_a_corner(sources):
    assert circles(sources) == []


def test_light_rooms_never_reach_a_heavy_library(sources):
    assert heavy_reached(sources) == []


@pytest.mark.parametrize(
    ("module", "line", "seen"),
    [
        ("attnres.statistics.cells", "import attnres.probe.runner", against_the_drawing),
        ("attnres.probe.runner", "from attnres.report.page import render_html", against_the_drawing),
        ("attnres.data.text.sources", "from attnres.data.corpus.shards import open_tokens", against_the_drawing),
        ("attnres.tables.names", "def lazily():\n    import torch", heavy_reached),
        ("attnres.tables.names", "if __name__ == '__main__':\n    import transformers", heavy_reached),
        ("attnres.tables", "from attnres.model.state import Trace", heavy_reached),
        ("attnres.depth.places", "def lazily():\n    from attnres.depth.families import cell", circles),
    ],
)
def test_an_arrow_against_the_drawing_is_seen(sources, module, line, seen):
    assert module in sources
    assert seen(sources | {module: f"{sources[module]}\n{line}\n"}) != []


def test_libraries_stay_in_their_rooms(sources):
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        for name in imported(path.read_text(encoding="utf-8")):
            allowed = CONFINED.get(name.split(".")[0])
            assert allowed is None or where.startswith(allowed), f"{where} imports {name}"


@pytest.mark.parametrize("name", LIGHT_ROOMS)
def test_light_rooms_are_imported_without_a_heavy_library(sources, name):
    modules = [module for module in sources if room(module) == name]
    check = f"assert not set({HEAVY!r}) & set(sys.modules), sorted(set({HEAVY!r}) & set(sys.modules))"
    code = "\n".join(["import sys", *(f"import {module}" for module in modules), check])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_room_is_larger_than_a_fifth_of_the_package(sources):
    lines: dict[str, int] = {}
    for module, text in sources.items():
        lines[room(module)] = lines.get(room(module), 0) + text.count("\n")
    largest = max(lines, key=lambda name: lines[name])
    assert lines[largest] <= LARGEST_SHARE * sum(lines.values()), f"{largest}: {lines[largest]}"
