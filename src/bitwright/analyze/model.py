"""The report as data: what `report.json` holds, and what the page, the CSV files and the thresholds are made from.

Sections that were not measured are None and left out of the page. Every number is finite or None; None means that it
was not measured or does not exist (a ratio to zero), never zero.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bitwright.execute.shown import Shown
from bitwright.numeric.settings import Settings

VERSION: Literal[1] = 1
"""Of `report.json`. Fields may be added under one version; a changed meaning takes the next."""

SiteKind = Literal["linear_input", "residual", "keys", "values"]
Measure = Literal["kl", "delta_nll"]
CheapMeasure = Literal["weight_error", "hessian_error", "fisher"]


class Interval(Settings):
    """A 95 % interval."""

    low: float
    high: float

    @staticmethod
    def of(bounds: tuple[float, float] | None) -> Interval | None:
        """From (low, high); None where there is none."""
        return None if bounds is None else Interval(low=bounds[0], high=bounds[1])


class ModelSection(Settings):
    """The model: `weights` counts those of the linears of all blocks."""

    label: str
    model_type: str
    fingerprint: str
    blocks: int
    hidden: int
    weights: int


class RunSection(Settings):
    """How the report was made; `text_python` is the version that the built-in text came from."""

    bitwright: str
    torch: str
    transformers: str
    text_python: str
    budget: str
    seeds: tuple[int, ...]
    dtype: str = "float32"
    seconds: float
    peak_rss_bytes: int
    phases: dict[str, float] = Field(default_factory=dict)
    """Seconds by phase."""


class SetRow(Settings):
    """One draw of a calibration set; `sha256` is of the token ids as little-endian int64."""

    name: str
    kind: str
    label: str
    seed: int
    windows: int
    window_tokens: int
    sha256: str


# --- outliers ----------------------------------------------------------------------------------------------


class Spread(Settings):
    """How large the values of one site are, over some tokens.

    `p999` and `median` are of |x|, from a histogram whose bins are 3 % wide. `max_median` is absmax / median.
    Kurtosis is excess kurtosis (0 for a Gaussian): `kurtosis` of all values, `channel_kurtosis` of the root mean
    squares of the channels.
    """

    tokens: int
    absmax: float
    p999: float
    median: float
    max_median: float | None
    kurtosis: float | None
    channel_kurtosis: float | None


class TopChannel(Settings):
    """A channel of one site: share of tokens in which it is among the largest, its absmax and root mean square."""

    channel: int
    persistence: float
    absmax: float
    rms: float
    rms_ratio: float | None
    """To the median channel's root mean square."""


class SiteRow(Settings):
    """What one calibration set, all seeds together, shows at one site.

    `block` counts from 0; the residual stream has one more, the last block's output. `site` is the linear relative
    to the block (its group's first member), `residual`, `keys` or `values`. `first` is position 0 of each window,
    `rest` all others; `first` is None where tokens have no known position, as at inputs of experts.
    `absmax_by_seed` is of `rest`, in the order of the seeds.
    """

    set: str
    block: int
    kind: SiteKind
    site: str
    channels: int
    first: Spread | None
    rest: Spread
    absmax_by_seed: tuple[float, ...]
    top: tuple[TopChannel, ...]


class ProfileRow(Settings):
    """Largest |x| of one set over positions `start` to `stop` - 1 in the residual stream, by block."""

    set: str
    start: int
    stop: int
    absmax: tuple[float, ...]


class OutlierChannel(Settings):
    """A channel that keeps LLM.int8's rule (Dettmers et al. 2022), with the shares that made it so."""

    set: str
    channel: int
    block_share: float
    token_share: float
    absmax: float


class MassiveActivation(Settings):
    """A residual channel beyond 100 and 1000 medians of its block (Sun et al. 2024), at the first block that has it."""

    set: str
    block: int
    channel: int
    absmax: float
    median: float
    first_position: bool
    """It is larger at position 0 than anywhere else."""


class ChannelMap(Settings):
    """log2 of the channels' root mean square over the median channel's: [blocks][channels], of one set."""

    set: str
    site: str
    channels: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]


class OutlierSection(Settings):
    """What the streaming pass saw."""

    sites: tuple[SiteRow, ...]
    profiles: tuple[ProfileRow, ...] = ()
    channel_maps: tuple[ChannelMap, ...] = ()
    int8_channels: tuple[OutlierChannel, ...] = ()
    massive: tuple[MassiveActivation, ...] = ()


class TransferRow(Settings):
    """What static settings of set `calibration` do on set `evaluation`, without quantizing anything.

    Attributes:
        clip_rate: mean over sites of the share of values beyond the per-tensor absmax of `calibration`.
        worst_clip_rate, worst_site: at the site where it is largest.
        outlier_jaccard: mean over sites of the Jaccard index of the top channels.
        hessian_rank_correlation: mean over sites of Spearman's correlation of the Hessians' diagonals.
    """

    calibration: str
    evaluation: str
    clip_rate: float
    worst_clip_rate: float
    worst_site: str
    outlier_jaccard: float
    hessian_rank_correlation: float | None


class TransferSection(Settings):
    """Every pair of calibration sets."""

    rows: tuple[TransferRow, ...]


# --- calibration-sensitivity matrix ------------------------------------------------------------------------


class MatrixRow(Settings):
    """Model quantized by `recipe` with one draw of `calibration`, measured against the float model on `evaluation`.

    `kl` is the mean in nats per token, `delta_nll` the paired difference of mean negative log likelihoods in nats per
    token; their intervals are bootstrapped over evaluation windows.
    """

    recipe: str
    calibration: str
    evaluation: str
    seed: int
    kl: float
    kl_interval: Interval | None = None
    delta_nll: float
    delta_nll_interval: Interval | None = None
    data_free: bool = False


class VarianceRow(Settings):
    """Variance between calibration sets over variance between seeds, of one recipe on one evaluation set.

    Components of variance: `between_sets` is what the sets' means vary beyond what their draws explain.
    `ratio` is None where seeds do not vary (a data-free recipe), and `constant` says that no value varied at all.
    """

    recipe: str
    evaluation: str
    measure: Measure
    between_sets: float
    between_seeds: float
    ratio: float | None
    interval: Interval | None = None
    constant: bool = False


class MatrixSection(Settings):
    """Calibration set x evaluation set x seed, for every recipe."""

    protocol: str
    windows: int
    window_tokens: int
    rows: tuple[MatrixRow, ...]
    variance_ratio: tuple[VarianceRow, ...] = ()
    notes: tuple[str, ...] = ()


# --- sensitivity and allocation ----------------------------------------------------------------------------


class SensitivityRow(Settings):
    """One tensor (a linear's weight) at one number of bits; a rung that was not climbed is None.

    Attributes:
        tensor: whole name, `model.layers.3.mlp.down_proj.weight`.
        bits: of the codes.
        bits_per_weight: scales, zeros and outliers included.
        weight_error_db: 10 log10(|dW|^2 / |W|^2).
        hessian_error: tr(dW H dW^T) / tr(W H W^T), H the mean of x x^T.
        fisher: second-order estimate of the loss, in nats per token.
        measured_kl: of the model with only this tensor quantized, mean nats per token.
    """

    tensor: str
    block: int | None
    bits: int
    group_size: int | None = None
    method: str = "rtn"
    bits_per_weight: float | None = None
    weights: int | None = None
    weight_error_db: float | None = None
    hessian_error: float | None = None
    fisher: float | None = None
    measured_kl: float | None = None
    measured_kl_interval: Interval | None = None


class TauRow(Settings):
    """Kendall's tau-b of a cheap measure against the measured KL, over the rows where both are known.

    `bits` None: over the rows of all numbers of bits together.
    """

    measure: CheapMeasure
    tau: float | None
    rows: int
    bits: int | None = None
    interval: Interval | None = None


class SensitivitySection(Settings):
    """Sensitivity of tensors to bits; `withheld` tells why advice from it is not given."""

    rows: tuple[SensitivityRow, ...]
    kendall_tau: tuple[TauRow, ...] = ()
    set: str | None = None
    windows: int | None = None
    window_tokens: int | None = None
    withheld: str | None = None
    notes: tuple[str, ...] = ()


class AllocationRow(Settings):
    """What one tensor was given; `bits_per_weight` counts scales, zeros and outliers."""

    tensor: str
    block: int | None = None
    bits: int
    group_size: int | None
    method: str
    outlier_share: float = 0.0
    bits_per_weight: float
    bytes: int
    weights: int | None = None
    predicted_kl: float | None = None
    measured_kl: float | None = None


class AllocationPoint(Settings):
    """A whole model on the plane of size and KL: an allocation, or (`uniform`) the same bits everywhere."""

    label: str
    uniform: bool
    bytes: int
    bits_per_weight: float
    predicted_kl: float | None = None
    measured_kl: float | None = None
    measured_kl_interval: Interval | None = None


class AllocationSection(Settings):
    """Bits, groups, method and outliers of every tensor under a target.

    Attributes:
        target: as the user gave it, `loss 1%`, `bits 3.5` or `size 4GB`.
        met: whether the measurement keeps the promise; None before it was made.
        rows: one for each quantized tensor.
        points: what was tried, and uniform recipes beside it.
        recipe_toml: the recipe that does this; becomes `recipe.toml`.
    """

    target: str
    met: bool | None = None
    rows: tuple[AllocationRow, ...]
    predicted_kl: float | None = None
    measured_kl: float | None = None
    measured_kl_interval: Interval | None = None
    bits_per_weight: float
    bytes: int
    points: tuple[AllocationPoint, ...] = ()
    recipe_toml: str | None = None
    notes: tuple[str, ...] = ()


# --- the whole ---------------------------------------------------------------------------------------------


class Advice(Settings):
    """One piece of advice with the numbers it rests on; `withheld` ones say what is missing instead."""

    rule: str
    verdict: str
    evidence: tuple[str, ...] = Field(min_length=1)
    withheld: bool = False


class Report(Shown, Settings):
    """Everything that `analyze` found."""

    kind: Literal["bitwright-analysis"] = "bitwright-analysis"
    version: Literal[1] = VERSION
    model: ModelSection
    run: RunSection
    sets: tuple[SetRow, ...]
    outliers: OutlierSection | None = None
    transfer: TransferSection | None = None
    matrix: MatrixSection | None = None
    sensitivity: SensitivitySection | None = None
    allocation: AllocationSection | None = None
    advice: tuple[Advice, ...] = ()
    recipe_toml: str = ""
    notes: tuple[str, ...] = ()
    """What was left out or done otherwise than asked, and why."""

    def facts(self) -> dict[str, str]:
        """See `Shown.facts`; the report itself is a file."""
        advice = {one.rule: one.verdict for one in self.advice}
        return {"model": self.model.label, "sets": ", ".join(row.name for row in self.sets), **advice}
