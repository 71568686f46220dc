"""Who may import whom (docs/architecture.md): rooms import downward only, every outside tool has
one home. Imports within functions, in `__init__.py` and under TYPE_CHECKING count like the others.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lorasweep

PACKAGE = Path(lorasweep.__file__).parent

FLOORS = [
    {"core"},
    {"models", "adapters"},
    {"data", "lora_files"},
    {"training", "judging", "tracking"},
    {"config"},
    {"runs"},
    {"sweeps", "reproduce", "export"},
    {"cli"},
]
"""The rooms, lowest floor first; a room imports from the floors below it, and from itself."""

HOMES = {
    "hydra": {"config", "sweeps", "cli"},
    "omegaconf": {
        "config",
        "sweeps",
        "runs/doctor_probes",
        "runs/doctor",
        "reproduce",
        "cli/choose_folder",
    },
    "mlflow": {"tracking"},
    "optuna": {"sweeps/study"},
    "optuna_dashboard": {"sweeps/study"},
    "onnxruntime": {"data/captions", "runs/doctor_probes"},
    "lycoris": {"adapters/lycoris_module"},
}
"""Where each outside tool may be imported: a room, or a folder or file of one."""

FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE]
LEVEL = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: Path):
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_its_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == LEVEL.keys()
    assert len(FLOORS) <= 8


@pytest.mark.parametrize("path", FILES, ids=place)
def test_rooms_import_downward_only(path):
    own = place(path).split("/")[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lorasweep" and parts[1] in LEVEL and parts[1] != own:
            assert LEVEL[parts[1]] < LEVEL[own], f"{place(path)} imports {name}"


def test_files_import_without_a_circle():
    """A name of a face counts as the face itself; `TopologicalSorter` raises for a circle."""
    modules = {
        f"lorasweep.{place(p)}".replace("/", ".").removesuffix(".__init__"): p for p in FILES
    }
    graph = {}
    for module, path in modules.items():
        found = (name if name in modules else name.rpartition(".")[0] for name in imports(path))
        graph[module] = {one for one in found if one in modules and one != module}
    for face in [name for name, path in modules.items() if path.name == "__init__.py"]:
        for module in graph:  # a face that shows a name is no reason to import the face
            if module.startswith(f"{face}."):
                graph[module].discard(face)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=place)
def test_outside_tools_stay_at_home(path):
    own = place(path)
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        at_home = homes is None or any(own == h or own.startswith(f"{h}/") for h in homes)
        assert at_home, f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_torchvision_and_timm_are_never_imported(path):
    if place(path) != "runs/doctor_probes":  # which says when they are in the way
        assert not {name.split(".")[0] for name in imports(path)} & {"torchvision", "timm"}
