"""Exports and imports among what others own: nothing of theirs is removed, followed or carried along."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_models import quantize_into

from bitwright.checkpoint.place import Place
from bitwright.errors import ResumeError
from bitwright.export.folder import ExportResult
from bitwright.export.targets import export_model, import_model

Writer = Callable[[Path, Path], ExportResult]
TARGETS = ("gguf", "compressed-tensors", "gptq", "awq", "hf")
SCHEMES = {"awq": "w4a16g32"}


@pytest.fixture(scope="module")
def natives(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A native folder by scheme."""
    place = tmp_path_factory.mktemp("natives")
    return {
        scheme: quantize_into(place / scheme, tiny_llama_folder, "llama", {"scheme": scheme}, num_hidden_layers=1)
        for scheme in ("w4a16g32-sym", "w4a16g32")
    }


@pytest.fixture(params=[*TARGETS, "import", "import gguf"])
def write(request: pytest.FixtureRequest, natives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Writer:
    """Writes a folder, or what was exported from it, into another place, as every export and import does."""
    if request.param in TARGETS:
        return lambda folder, out: export_model(folder, out, request.param)
    between = tmp_path_factory.mktemp("between") / ("model.gguf" if "gguf" in request.param else "model")
    export_model(natives["w4a16g32-sym"], between, "gguf" if "gguf" in request.param else "compressed-tensors")
    return lambda folder, out: import_model(between, out)


@pytest.fixture
def native(request: pytest.FixtureRequest, natives: dict[str, Path]) -> Path:
    return natives[SCHEMES.get(request.node.callspec.params["write"], "w4a16g32-sym")]


def someone_elses_folder(place: Path, theirs: Path) -> None:
    shutil.copytree(theirs, place)


def a_link(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs)


@pytest.mark.parametrize("suffix", [".exporting", ".tmp", ".partial"])
@pytest.mark.parametrize("plant", [someone_elses_folder, a_link])
def test_what_others_own_beside_the_result_stays(
    write: Writer, native: Path, tmp_path: Path, suffix: str, plant: Callable[[Path, Path], None]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    plant(tmp_path / f"out{suffix}", theirs)
    if suffix == ".exporting":
        with pytest.raises(ResumeError, match=r"out\.exporting.*left alone; move it away"):
            write(native, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        write(native, tmp_path / "out")
    assert (tmp_path / f"out{suffix}" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / f"out{suffix}").is_symlink() == (plant is a_link)
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_what_a_killed_export_left_is_tidied(write: Writer, native: Path, tmp_path: Path) -> None:
    place = Place(tmp_path / "out", ".exporting")
    place.output.mkdir()
    (place.output / "half.safetensors").write_bytes(b"half")
    place.close()
    write(native, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Place(tmp_path / "out", ".exporting").close()  # killed after the result had appeared
    with pytest.raises(ResumeError, match="out: exists"):
        write(native, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_really(natives: dict[str, Path], tmp_path: Path) -> None:
    native = natives["w4a16g32-sym"]
    script = (
        "import os, signal; from bitwright.export import folder; from bitwright.export.targets import export_model\n"
        "def killed(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folder.copy_side_files = killed; export_model({str(native)!r}, {str(tmp_path / 'out')!r}, 'hf')"
    )
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.exporting"]
    export_model(native, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", [*(target for target in TARGETS if target != "gguf"), "import"])
def test_side_files_travel_and_links_out_of_the_folder_do_not(
    natives: dict[str, Path], tmp_path: Path, target: str
) -> None:
    folder = tmp_path / "native"
    shutil.copytree(natives[SCHEMES.get(target, "w4a16g32-sym")], folder)
    if target == "import":
        export_model(folder, tmp_path / "foreign", "compressed-tensors")
        folder = tmp_path / "foreign"
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool_use.jinja", "LICENSE", "modeling_x.py", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (tmp_path / "passwd").write_text("root:x:0:0")
    (folder / "NOTICE").symlink_to(tmp_path / "passwd")
    out = tmp_path / "out"
    result = import_model(folder, out) if target == "import" else export_model(folder, out, target)  # type: ignore[arg-type]
    for name in ("additional_chat_templates/tool_use.jinja", "LICENSE", "modeling_x.py", "preprocessor_config.json"):
        assert (out / name).read_text() == "{}"
    assert not (out / "NOTICE").exists()
    assert any("NOTICE" in note and "link out of the folder" in note for note in result.notes)
