"""`bench --device cuda`: all but CUDA itself, on a stand-in for the device; keys, errors and tokens, never times."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

import bitwright
import bitwright.cli as cli
from bitwright import bench_cuda as module
from bitwright.bench_cuda import StaticDecoder, bench_cuda
from bitwright.checkpoint.load import load_model
from bitwright.errors import EvaluationError
from bitwright.runtime.linear import PackedModule

# Calls that make the host wait for the device, or the device's work depend on the host.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "item", "unique", "masked_select")


class Host:
    """The CPU in the place of a GPU."""

    device, name = torch.device("cpu"), "stand-in"

    def __init__(self, captures: bool = True, free: int = 1 << 40) -> None:
        self.captures, self.free, self.replays = captures, free, 0

    def seconds(self, run: Callable[[], object]) -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            self.replays += 1
            run()

        return replay

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 1 << 20

    def free_bytes(self) -> int:
        return self.free


class Calls(TorchDispatchMode):
    """Remembers the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPY_BYTES", 1 << 16)


@pytest.fixture(scope="module")
def folders(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {"float": str(tiny_llama_folder)}
    for scheme in ("w4a16g32", "w8a8"):
        made[scheme] = str(tmp_path_factory.mktemp("bench") / scheme)
        bitwright.quantize(made["float"], Path(made[scheme]), recipe=bitwright.load_recipe("rtn", scheme))
    return made


def greedy(model: Any, ids: Tensor, tokens: int) -> list[int]:
    output = model.generate(
        input_ids=ids[None], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return output[0].tolist()


@pytest.mark.parametrize("kind", ["float", "w4a16g32", "w8a8"])
def test_steps_give_the_tokens_of_transformers_and_wait_for_nothing(folders: dict[str, str], kind: str) -> None:
    model = load_model(folders[kind]).model
    model.generation_config.eos_token_id = None
    ids = torch.tensor([5, 17, 300, 41, 77])
    decoder = StaticDecoder(model, 17)
    assert decoder.graph_reason is None
    # Nothing of an earlier text remains.
    for prompt in (torch.tensor([9, 8]), ids):
        decoder.prefill(prompt)
        for _ in range(12):
            with Calls() as calls:
                decoder.step()
        assert not [name for name in calls.names if any(part in name for part in WAITING)]
        with torch.no_grad():
            assert decoder.text[: prompt.numel() + 13].tolist() == greedy(model, prompt, 13)


def test_a_sliding_window_is_not_captured() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=50, num_hidden_layers=1, sliding_window=4, **sizes)
    torch.manual_seed(0)
    decoder = StaticDecoder(MistralForCausalLM(config).eval(), 12)
    host = Host()
    assert "sliding window" in str(decoder.graph_reason)
    step, reason = module._replayed(decoder, host)
    assert (step, reason) == (decoder.step, decoder.graph_reason)


def test_a_quantized_model_beside_itself_in_16_bits(folders: dict[str, str]) -> None:
    host = Host()
    found = bench_cuda(folders["w4a16g32"], prompt_tokens=5, new_tokens=3, accelerator=host)
    # One round to warm up and five, of two models.
    assert host.replays == 2 * 6 * 3
    assert (found.device, found.dtype, found.rounds) == ("stand-in", "bfloat16", 5)
    # 2 blocks of 7 linears in 4 products, and the head where it is quantized.
    assert sum(found.kernels.values()) == 9
    assert found.unquantized is not None
    assert found.unquantized_reason is None
    weights = 2 * (3 * 64 * 64 + 3 * 64 * 128) + 320 * 64
    assert found.unquantized.weight_bytes_per_token == 2 * weights
    assert found.measured.weight_bytes_per_token is not None
    assert found.measured.weight_bytes_per_token < weights * 5
    share = found.measured.weight_bytes_per_token * found.measured.decode_tokens_per_second
    assert found.measured.copy_bandwidth_share == pytest.approx(share / found.copy_bandwidth_bytes_per_second)
    labels = [label for label, _ in found.lines()]
    assert "unquantized: decode, 3 tokens" in labels
    assert "decode, times as fast" in labels
    assert json.loads(json.dumps(found.to_json()))["measured"].keys() == module.Speed.__dataclass_fields__.keys()


def test_what_is_left_out_is_said(folders: dict[str, str]) -> None:
    host = Host(captures=False, free=1000)
    found = bench_cuda(folders["w8a8"], prompt_tokens=2, new_tokens=2, dtype="float16", accelerator=host)
    assert found.unquantized is None
    assert "GB are free" in str(found.unquantized_reason)
    assert (
        found.measured.graph_reason == "the model cannot be captured: operation not permitted when stream is capturing"
    )
    said = dict(found.lines())
    assert said["without CUDA graph"] == found.measured.graph_reason
    assert "not measured: its weights take" in said["unquantized"]
    plain = bench_cuda(folders["float"], prompt_tokens=2, new_tokens=1, accelerator=Host())
    assert plain.unquantized_reason == "it is not quantized"
    assert plain.kernels == {"float weights": 15}


def test_packed_parts_stay_on_the_cpu(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(module, "_speed", lambda model, *_: moved.append(model) or module.Speed(1, 1, 1, 1, 1, 1, None))
    bench_cuda(folders["w4a16g32"], accelerator=Host(free=0))
    packed = [one for one in moved[0].modules() if isinstance(one, PackedModule)]
    assert packed
    assert all(one.packed_on_cpu for one in packed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"new_tokens": -1}, "new_tokens is -1"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"prompt_tokens": 250, "new_tokens": 10}, "250 \\+ 10 tokens"),
    ],
)
def test_refusals(folders: dict[str, str], arguments: dict, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        bench_cuda(folders["float"], accelerator=Host(), **arguments)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_is_missing(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "bench", folders["float"], "--device", "cuda") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "found no GPU" in said
    assert "needed one" in said
    assert "--device cpu" in said
    assert run(monkeypatch, "bench", folders["float"], "--device", "cuda", "--threads", "1") == 2
    assert "leave them out" in capsys.readouterr().err
    assert run(monkeypatch, "bench", folders["float"], "--dtype", "float16") == 2
    assert "leave it out" in capsys.readouterr().err


def test_the_command_shows_and_writes_what_was_measured(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "Cuda", Host)
    arguments = ("--device", "cuda", "--prompt-tokens", "3", "--new-tokens", "2", "--json", str(tmp_path / "j"))
    assert run(monkeypatch, "bench", folders["w8a8"], *arguments) == 0
    assert json.loads((tmp_path / "j").read_text())["new_tokens"] == 2
    shown = capsys.readouterr().out
    assert "decode, 2 tokens" in shown
    assert "peak memory, running" in shown
