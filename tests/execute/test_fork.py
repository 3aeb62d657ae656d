"""A child forked from a process that has computed on all threads computes too, and ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, warnings
from pathlib import Path
import bitwright, torch
from bitwright.checkpoint.load import load_model
from bitwright.errors import PlanError
from bitwright.execute.local import default_workers, torch_threads

warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
source, place = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(2)
_ = torch.ones(1 << 20) + 1  # starts PyTorch's own threads
bitwright.quantize(source, place / "parent", "easyquant", "w4a16g32", options=bitwright.RunOptions(workers=2))
model = load_model(str(place / "parent")).model
ids = torch.arange(2, 20).unsqueeze(0)
with torch.no_grad():
    wanted = model(ids).logits
child = os.fork()
if child == 0:
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    _ = torch.ones(1 << 20) + 1
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    bitwright.quantize(source, place / "child", "easyquant", "w4a16g32", options=bitwright.RunOptions(workers=2))
    assert default_workers() == 1
    try:
        with torch_threads(2):
            pass
    except PlanError as error:
        assert "spawn" in str(error)
    else:
        raise AssertionError("not refused")
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_runs_and_quantizes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny_llama_folder), str(tmp_path)]
    # The limit is for a child that waits for ever; kill its whole session then.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
    assert process.returncode == 0, errors
    made = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("parent", "child")]
    assert made[0] == made[1]
