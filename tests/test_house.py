"""The house itself: imports point one way, files and functions keep their size, the public names are pinned."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bitwright"

# A room may import rooms of a lower floor, and itself. From the ground up:
FLOORS = [
    {"errors", "words", "__about__"},
    {"untrusted"},
    {"execute"},
    {"numeric"},
    {"models", "ranges", "formats", "recipes"},
    {"rounding", "runtime"},
    {"checkpoint"},
    {"calibration", "transforms"},
    {"learning", "scheme"},
    {"method"},
    {"recipe"},
    {"rows"},
    {"budget"},
    {"plan", "inspect", "generate", "bench", "bench_cuda"},
    {"journey", "evaluate", "shares", "prepare", "export"},
    {"walk", "machine"},
    {"publish"},
    {"pipeline"},
    {"analyze"},
    {"__init__"},
    {"terminal"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Operator schemas, the command line's options and the arguments of GPU kernels are lists by nature.
MANY_PARAMETERS = {
    SOURCE / "runtime" / "ops.py",
    SOURCE / "cli.py",
    *(SOURCE / "runtime" / "triton").glob("*.py"),
}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bitwright":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {"__init__" for alias in node.names if alias.name == "bitwright"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} is a new room: give it a floor"
    for other in imports_of(ast.parse(path.read_text())) & FLOOR.keys():
        assert other == room or FLOOR[other] < FLOOR[room], f"{path.name} ({room}) imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    assert path.stem not in ("utils", "helpers", "misc", "common")
    assert len(path.relative_to(SOURCE).parent.parts) <= 2
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 62, f"{node.name} is long"
            count = len(node.args.args) + len(node.args.posonlyargs) + len(node.args.kwonlyargs)
            assert count <= 7 or path in MANY_PARAMETERS, f"{node.name} has {count} parameters"


def test_public_names_are_pinned() -> None:
    import bitwright

    assert sorted(bitwright.__all__) == [
        "BitwrightError",
        "CalibrationError",
        "CheckpointError",
        "EvalOptions",
        "EvaluationError",
        "FallbackError",
        "FormatError",
        "Inspection",
        "Method",
        "Plan",
        "PlanError",
        "Recipe",
        "RecipeError",
        "ResumeError",
        "Rule",
        "RunOptions",
        "Scheme",
        "Summary",
        "WeightError",
        "__version__",
        "eval",
        "generate",
        "inspect",
        "load_recipe",
        "plan",
        "quantize",
    ]
    assert all(hasattr(bitwright, name) for name in bitwright.__all__)
