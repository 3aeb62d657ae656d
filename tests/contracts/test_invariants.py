"""Invariants of error feedback and outliers, numbered as in the research notes, over nearest, gptq and spqr.

(10), (13) and (14) need whole runs and are in `test_pipeline_calibrated.py`; (12) is about the mse range and is in
`test_ranges.py`.
"""

from itertools import pairwise

import pytest
import torch

from bitwright.formats.layout import TensorEntry
from bitwright.formats.native import pack, unpack
from bitwright.numeric.outliers import NoOutliers
from bitwright.numeric.qtensor import QTensor
from bitwright.numeric.spec import Bilevel, WeightSpec
from bitwright.ranges import Minmax, Mse, Ranging
from bitwright.rounding.factor import factorize
from bitwright.rounding.gptq import Gptq, quantize_gptq
from bitwright.rounding.nearest import quantize_nearest
from bitwright.rounding.sensitivity import Obs, leave_one_out

OUT, IN = 48, 96
ROW = Bilevel(axis="row", size=16, scale_bits=3, zero_bits=3)
SPECS = {
    "channel": WeightSpec(bits=4, group_size=None),
    "g32": WeightSpec(bits=3, group_size=32),
    "sym": WeightSpec(bits=4, group_size=32, symmetric=True),
    "ragged": WeightSpec(bits=4, group_size=40),
    "spqr": WeightSpec(bits=3, group_size=16, zero="float", bilevel=ROW),
}
PLAIN = Gptq(order="natural", importance="none")


def weights(seed: int = 0, out: int = OUT, columns: int = IN) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def hessian(seed: int = 0, columns: int = IN) -> torch.Tensor:
    """Of correlated inputs with a few loud channels, as in language models."""
    generator = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(columns))
    inputs[:, ::17] *= 8
    return inputs.T @ inputs / len(inputs)


def damped(matrix: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return matrix + damping * matrix.diagonal().mean() * torch.eye(matrix.shape[0], dtype=torch.float64)


def objective(change: torch.Tensor, matrix: torch.Tensor) -> float:
    change = change.double()
    return float((change @ matrix * change).sum())


def gptq(weight: torch.Tensor, matrix: torch.Tensor, spec: WeightSpec, settings: Gptq = PLAIN, policy=None) -> QTensor:
    return quantize_gptq(weight, matrix, Ranging(spec, Minmax()), policy or NoOutliers(), settings).q


@pytest.mark.parametrize("order", ["natural", "activation", "grouped"])
def test_1_the_factor_is_that_of_the_inverse(order) -> None:
    matrix, spec = hessian(), SPECS["ragged"]
    factor = factorize(matrix, 0.01, order, spec)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    assert sorted(factor.order.tolist()) == list(range(IN))
    expected = torch.linalg.inv(damped(matrix))[factor.order][:, factor.order]
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    if order == "grouped":
        groups = (factor.order // 40).tolist()
        assert len([a for a, b in pairwise(groups) if a != b]) == 2  # each in one piece


@pytest.mark.parametrize("name", SPECS)
def test_2_errors_add_up_to_the_objective(name: str) -> None:
    weight, matrix = weights(), hessian()
    rounded = quantize_gptq(weight, matrix, Ranging(SPECS[name], Minmax()), NoOutliers(), PLAIN)
    expected = objective(weight - rounded.q.dequantize(), damped(matrix))
    assert rounded.details["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_3_independent_inputs_give_nearest_codes(name: str) -> None:
    weight, spec = weights(), SPECS[name]
    matrix = torch.diag(torch.rand(IN, dtype=torch.float64) + 0.1)
    found = gptq(weight, matrix, spec, Gptq(order="activation", importance="none"))
    expected = quantize_nearest(weight, None, Ranging(spec, Minmax()), NoOutliers())
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_4_blocks_do_not_matter(name: str, order) -> None:
    results = [
        gptq(weights(), hessian(), SPECS[name], Gptq(order=order, importance="none", block=block)).dequantize()
        for block in (1, 7, 32, 128)
    ]
    for other in results[1:]:
        # A code in a thousand may lie on a tie that float32 sums decide either way.
        assert float((results[0] != other).float().mean()) < 2e-3


def test_5_permuted_columns_give_permuted_codes() -> None:
    weight, matrix, spec = weights(), hessian(), SPECS["channel"]
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(3))
    settings = Gptq(order="activation", importance="none")
    straight = gptq(weight, matrix, spec, settings)
    permuted = gptq(weight[:, order], matrix[order][:, order], spec, settings)
    assert float((straight.codes[:, order] != permuted.codes).float().mean()) < 2e-3
    assert torch.equal(straight.grid.scale, permuted.grid.scale)


@pytest.mark.parametrize("name", SPECS)
def test_6_the_size_of_the_hessian_does_not_matter(name: str) -> None:
    policy = Obs(threshold=0.3)
    for settings in (PLAIN, Gptq(importance="hessian"), Gptq(importance="inverse")):
        one, other = (gptq(weights(), c * hessian(), SPECS[name], settings, policy) for c in (1.0, 2.0**-20))
        assert torch.equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize("order", ["natural", "activation", "grouped"])
@pytest.mark.parametrize("range_settings", [Minmax(), Mse()], ids=lambda r: r.name)
def test_7_weights_on_the_grid_return_exactly(order, range_settings) -> None:
    spec = WeightSpec(bits=4, group_size=16)
    steps = torch.randint(0, 16, (OUT, IN), generator=torch.Generator().manual_seed(1))
    steps[:, ::16], steps[:, 1::16] = 0, 15
    weight = 2.0**-6 * (steps - 7).float()
    found = quantize_gptq(weight, hessian(), Ranging(spec, range_settings), NoOutliers(), Gptq(order=order)).q
    assert torch.equal(found.dequantize(), weight)


@pytest.mark.parametrize("simplified", [False, True])
def test_8_no_threshold_keeps_nothing_and_none_keeps_all(simplified: bool) -> None:
    weight, spec = weights(), SPECS["spqr"]
    none = gptq(weight, hessian(), spec, policy=Obs(threshold=1e30, simplified=simplified))
    assert none.outliers is not None
    assert none.outliers.count == 0
    everything = gptq(weight, hessian(), spec, policy=Obs(share=1.0, simplified=simplified))
    assert everything.outliers is not None
    assert everything.outliers.count == weight.numel()
    torch.testing.assert_close(everything.dequantize(), weight, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["channel", "g32", "sym", "ragged"])
def test_9_leave_one_out_is_that_of_the_naive_loop(name: str) -> None:
    weight, spec = weights(out=5), SPECS[name]
    importance = torch.rand(IN) + 0.1
    found = leave_one_out(weight, importance, spec)

    def losses(group: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        one = spec.model_copy(update={"group_size": None})
        return (quantize_nearest(group, None, Ranging(one, Minmax()), NoOutliers()).dequantize() - group) ** 2 * loss

    width = spec.group_width(IN)
    for row in range(5):
        for start in range(0, IN, width):
            group, loss = weight[row : row + 1, start : start + width], importance[start : start + width]
            total = losses(group, loss).sum()
            for j in range(group.shape[1]):
                others = [k for k in range(group.shape[1]) if k != j]
                gain = total - losses(group[:, others], loss[others]).sum()
                assert float(found[row, start + j]) == pytest.approx(float(gain), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("value_bits", [8, 16])
def test_11_a_residual_decodes_to_the_value_that_was_kept(value_bits) -> None:
    spec = SPECS["spqr"]
    rounded = quantize_gptq(
        weights(), hessian(), Ranging(spec, Minmax()), Obs(share=0.02, value_bits=value_bits), PLAIN
    )
    q = rounded.q
    assert q.outliers is not None
    assert q.outliers.count > 20
    packed = pack(q)
    again = unpack("w", packed, TensorEntry.of(q))
    assert torch.equal(again.dequantize(), q.dequantize())
    # Replacing the value, as SpQR's evaluation does, is adding the residual, to 16 (8) bits of the residual.
    dense = q.grid.decode(q.codes)
    rows, columns = q.outliers.rows(), q.outliers.column
    whole = dense[rows, columns] + q.outliers.residual
    torch.testing.assert_close(q.dequantize()[rows, columns], whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (NoOutliers(), Gptq()),
        (NoOutliers(), Gptq(order="grouped", groups="updated")),
        (Obs(share=0.01), Gptq(importance="inverse")),
    ],
    ids=["gptq", "grouped", "spqr"],
)
def test_15_beats_nearest_on_an_ensemble(name: str, policy, settings: Gptq) -> None:
    ours = nearest = 0.0
    for seed in range(4):
        weight, matrix = weights(seed), hessian(seed)
        found = quantize_gptq(weight, matrix, Ranging(SPECS[name], Mse()), policy, settings).q
        ours += objective(weight - found.dequantize(), matrix)
        plain = quantize_nearest(weight, None, Ranging(SPECS[name], Mse()), NoOutliers())
        nearest += objective(weight - plain.dequantize(), matrix)
    assert ours < 0.8 * nearest


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("policy", [NoOutliers(), Obs(share=0.01)], ids=lambda p: p.name)
def test_sweeps_never_raise_the_objective(name: str, policy) -> None:
    weight, matrix = weights(), hessian()
    plain, swept = (
        quantize_gptq(weight, matrix, Ranging(SPECS[name], Minmax()), policy, Gptq(order="natural", sweeps=sweeps)).q
        for sweeps in (0, 3)
    )
    before, after = (objective(weight - q.dequantize(), damped(matrix)) for q in (plain, swept))
    assert after < before
    if plain.outliers is not None and swept.outliers is not None:
        assert torch.equal(plain.outliers.residual, swept.outliers.residual)


def test_the_same_job_gives_the_same_bits_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(gptq(weights(), hessian(), SPECS["spqr"], Gptq(), Obs(share=0.01)).dequantize())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_share_is_kept_within_a_few_percent() -> None:
    weight, matrix = weights(out=256, columns=IN), hessian()
    for share in (0.005, 0.02):
        found = gptq(weight, matrix, SPECS["g32"], Gptq(), Obs(share=share))
        assert found.outliers is not None
        assert found.outliers.count / weight.numel() == pytest.approx(share, rel=0.15)


def test_inputs_that_were_never_seen_keep_their_nearest_codes() -> None:
    weight, matrix = weights(), hessian()
    matrix[10], matrix[:, 10] = 0, 0
    found = quantize_gptq(weight, matrix, Ranging(SPECS["channel"], Minmax()), NoOutliers(), PLAIN)
    plain = quantize_nearest(weight, None, Ranging(SPECS["channel"], Minmax()), NoOutliers())
    assert found.details["dead_columns"] == 1
    assert torch.equal(found.q.codes[:, 10], plain.codes[:, 10])
    assert not found.fallbacks


def test_no_input_at_all_is_reported() -> None:
    found = quantize_gptq(weights(), torch.zeros(IN, IN), Ranging(SPECS["g32"], Minmax()), NoOutliers(), PLAIN)
    assert any("all inputs that calibration gave" in line for line in found.fallbacks)
    plain = quantize_nearest(weights(), None, Ranging(SPECS["g32"], Minmax()), NoOutliers())
    assert torch.equal(found.q.codes, plain.codes)


def test_the_failure_ladder_climbs_and_reports() -> None:
    indefinite = torch.diag(torch.ones(IN, dtype=torch.float64))
    indefinite[0, 1] = indefinite[1, 0] = 1.5  # eigenvalues 2.5 and -0.5: damping 1 mends it, 0.01 does not
    found = factorize(indefinite, 0.01, "natural", SPECS["g32"])
    assert found.attempts
    assert not found.failed
    assert found.damping == 1.0
    hopeless = torch.full((IN, IN), 1e6, dtype=torch.float64).fill_diagonal_(1.0)
    result = quantize_gptq(weights(), hopeless, Ranging(SPECS["g32"], Minmax()), NoOutliers(), PLAIN)
    assert any(line.startswith("rounded to nearest") for line in result.fallbacks)
