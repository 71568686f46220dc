"""Who may import whom (docs/architecture.md): every outside tool has one home, nothing goes up."""

import ast
from pathlib import Path

import pytest

import lorasweep

PACKAGE = Path(lorasweep.__file__).parent

LEVELS = [
    {"settings", "rng", "images", "progress", "staging", "interrupts"},
    {"dataset", "folders", "checkpoint", "header"},
    {"captions", "models", "model_files", "adapters", "optimizers", "lora_file"},
    {"latents", "sampling", "metrics", "provenance"},
    {"trainers"},
    {"tracking", "report", "study", "run_folder"},
    {"config"},
    {"judge", "prepare", "run", "composing", "pick", "doctor", "export", "reproduce"},
    {"worker", "fleet", "engines", "trials"},
    {"launcher", "search"},
    {"jobs"},
    {"limits"},
    {"flow"},
    {"batches"},
    {"sweeper"},
    {"cli"},
]
"""Lowest first; a module imports from its own level or below."""

HOMES = {
    "hydra": {"config", "composing", "launcher", "search", "batches", "cli", "doctor"},
    "omegaconf": {
        "config",
        "search",
        "trials",
        "jobs",
        "sweeper",
        "launcher",
        "composing",
        "doctor",
        "pick",
        "reproduce",
    },
    "mlflow": {"tracking"},
    "optuna": {"study"},
    "optuna_dashboard": {"study"},
    "onnxruntime": {"captions", "doctor"},
    "lycoris": {"adapters"},
}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path):
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    own = level[unit(path)]
    for name in imports(path, top_level_only=True):
        parts = name.split(".")
        if parts[0] == "lorasweep" and len(parts) > 1 and parts[1] in level:
            assert level[parts[1]] <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_tools_stay_at_home(path):
    for name in imports(path):
        tool = name.split(".")[0]
        if tool in HOMES:
            assert unit(path) in HOMES[tool], f"{path.name} imports {name}"


def test_torchvision_and_timm_are_never_imported():
    for path in FILES:
        if unit(path) == "doctor":  # which says when they are in the way
            continue
        assert not {name.split(".")[0] for name in imports(path)} & {"torchvision", "timm"}
