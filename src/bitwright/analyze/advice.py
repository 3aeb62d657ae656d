"""Advice: rules over the sections of a report. Every line prints the numbers that it rests on, or says what is missing.

The limits are conventions, not laws of nature; they stand here by name, and in the evidence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median

from bitwright.analyze.model import Advice, Interval, Report, SiteRow, VarianceRow
from bitwright.analyze.svg import number
from bitwright.analyze.thresholds import metrics, where
from bitwright.errors import RecipeError
from bitwright.recipe import Recipe, load_recipe

HEAVY_CHANNEL_KURTOSIS = 30.0
"""Median over blocks of the kurtosis of channels at inputs of linears: beyond, few channels hold most energy."""
FIRST_RATIO = 10.0
"""Position 0 over all others in the residual stream: beyond, its values need a range of their own."""
CLIP_RATE = 1e-3
"""Share of values that a static range from another set may clip at one site."""
SPIKE = 1000.0
"""max/median at the input of a linear: beyond, one range for the whole tensor leaves its bulk a handful of codes."""
TAU = 0.6
"""Kendall's tau from which a cheap measure is trusted to rank tensors."""
_LISTED = 4
_BITS = re.compile(r"w\d+a\d+(?:kv\d+)?")


def advise(report: Report) -> tuple[Advice, ...]:
    """Every piece of advice that the report's sections allow, in the order of `RULES`."""
    found = (rule(report) for rule in RULES)
    return tuple(advice for advice in found if advice is not None)


def has_heavy_channels(report: Report) -> bool:
    """Whether a few channels hold most of the energy of the inputs of linears."""
    if report.outliers is None:
        return False
    typical = _typical_channel_kurtosis(report)
    return bool(report.outliers.int8_channels) or (typical is not None and typical > HEAVY_CHANNEL_KURTOSIS)


def suggested_recipe(report: Report) -> Recipe:
    """A recipe at 4 bits that suits the activations: error feedback where channels are heavy, else data-free.

    Raises:
        RecipeError: a preset is missing from this installation.
    """
    heavy = has_heavy_channels(report)
    recipe = load_recipe("gptq" if heavy else "easyquant", "w4a16g64")
    if recipe.method is None:
        raise RecipeError("the presets gptq and easyquant have no method; install bitwright again")
    return recipe


def _outlier_channels(report: Report) -> Advice | None:
    if report.outliers is None:
        return None
    rows = report.outliers.int8_channels
    typical = _typical_channel_kurtosis(report)
    evidence = [
        f"LLM.int8's rule (at least 6 in 6 % of tokens, in 25 % of blocks) finds {len({row.channel for row in rows})} "
        f"channels of {report.model.hidden}",
        *(
            f"channel {row.channel}: {row.block_share:.0%} of blocks, up to {row.token_share:.0%} of tokens, absmax "
            f"{number(row.absmax)}, set {row.set}"
            for row in rows[:_LISTED]
        ),
    ]
    if typical is not None:
        evidence.append(
            f"kurtosis of channels at inputs of linears: median {number(typical)} (limit {HEAVY_CHANNEL_KURTOSIS:g})"
        )
    if has_heavy_channels(report):
        verdict = (
            "A few channels hold most of the energy of the linears' inputs. Prefer methods that weigh errors by "
            "activations (gptq, spqr, awq, omniquant) to data-free ones, and quantize activations only after smoothing."
        )
    else:
        verdict = "No outlier channels: at 4 bits and more, measure data-free methods (rtn, easyquant) first."
    return Advice(rule="outlier channels", verdict=verdict, evidence=tuple(evidence))


def _first_token(report: Report) -> Advice | None:
    figure = metrics(report).get("first_token_ratio")
    if figure is None or report.outliers is None:
        return None
    evidence = [
        f"largest |x| at position 0 is {number(figure.value)} times that of all others ({figure.where}; limit "
        f"{FIRST_RATIO:g})"
    ]
    evidence += [
        f"residual channel {row.channel}, from block {row.block}: {number(row.absmax)}, "
        f"{number(row.absmax / max(row.median, 1e-9))} medians, "
        f"{'mostly at' if row.first_position else 'not only at'} position 0, set {row.set}"
        for row in report.outliers.massive[:_LISTED]
    ]
    if figure.value > FIRST_RATIO:
        verdict = (
            "Massive activations at position 0. Give activations a range for each token (the default); a static range "
            "would be set by this one token."
        )
    else:
        verdict = "Position 0 is like all others: it needs no treatment of its own."
    return Advice(rule="first token", verdict=verdict, evidence=tuple(evidence))


def _spikes(report: Report) -> Advice | None:
    if report.outliers is None:
        return None
    inputs = [row for row in report.outliers.sites if row.kind == "linear_input" and row.rest.max_median is not None]
    if not inputs:
        return None
    worst: dict[tuple[int, str], SiteRow] = {}
    for row in sorted(inputs, key=lambda row: -(row.rest.max_median or 0.0)):
        worst.setdefault((row.block, row.site), row)
    over = [row for row in worst.values() if (row.rest.max_median or 0.0) > SPIKE]
    shown = (over or list(worst.values()))[:_LISTED]
    evidence = tuple(
        f"{where(row)}: max/median {number(row.rest.max_median or 0.0)} (limit {SPIKE:g})" for row in shown
    )
    if not over:
        return Advice(rule="spikes", verdict="No input of a linear has spikes beyond the limit.", evidence=evidence)
    names = ", ".join(sorted({row.site for row in over}))
    verdict = (
        f"{len(over)} of {len(worst)} inputs of linears have spikes ({names}). With 8-bit activations leave these in "
        "float or give them a range for each token; weights alone are not concerned."
    )
    return Advice(rule="spikes", verdict=verdict, evidence=evidence)


def _static_ranges(report: Report) -> Advice | None:
    figure = metrics(report).get("clip_rate")
    if figure is None or report.transfer is None:
        return None
    evidence = [f"worst: {figure.value:.4%} of values clipped at {figure.where} (limit {CLIP_RATE:.1%})"]
    evidence += [
        f"{row.calibration} on {row.evaluation}: {row.clip_rate:.5%} clipped over all sites, outlier channels "
        f"{row.outlier_jaccard:.2f} alike"
        for row in sorted(report.transfer.rows, key=lambda row: -row.clip_rate)[:2]
    ]
    if figure.value > CLIP_RATE:
        verdict = "Static ranges of one set clip another: calibrate on text like that of use, or leave ranges dynamic."
    else:
        verdict = "Static ranges carry over between these sets."
    return Advice(rule="static ranges", verdict=verdict, evidence=tuple(evidence))


def _corpus(report: Report) -> Advice:
    rule = "calibration corpus"
    rows = report.matrix.variance_ratio if report.matrix else ()
    known = [row for row in rows if row.ratio is not None]
    if not known:
        missing = "no calibration-sensitivity matrix with several sets and seeds was measured"
        return Advice(rule=rule, verdict="Whether the corpus matters is not known.", evidence=(missing,), withheld=True)
    evidence = tuple(
        f"{row.recipe} on {row.evaluation}, {row.measure}: variance between sets is {number(row.ratio or 0.0)} times "
        "that between seeds" + _within(row.interval)
        for row in sorted(known, key=lambda row: -(row.ratio or 0.0))[:_LISTED]
    )
    material = sorted({row.recipe for row in known if _tells_sets_apart(row)})
    if not material:
        verdict = "The choice of corpus is immaterial: no recipe varies more from set to set than from seed to seed."
        return Advice(rule=rule, verdict=verdict, evidence=evidence)
    verdict = f"The corpus matters to {', '.join(material)}: calibrate on text like that of use."
    return Advice(rule=rule, verdict=verdict, evidence=evidence)


def _tells_sets_apart(row: VarianceRow) -> bool:
    """More variance between sets than between seeds, and not by chance."""
    return (row.ratio or 0.0) > 1 and (row.interval is None or row.interval.low > 0)


def _within(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 %: {number(interval.low)} to {number(interval.high)})"


def _data_free(report: Report) -> Advice:
    rule = "data-free or calibrated"
    rows = report.matrix.rows if report.matrix else ()
    # by bits, so that like is compared with like: [without data, with data] by recipe
    means: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    for recipe in dict.fromkeys(row.recipe for row in rows):
        several = [row for row in rows if row.recipe == recipe]
        bits = _BITS.search(recipe)
        pair = means.setdefault(bits[0] if bits else "", ({}, {}))
        pair[0 if several[0].data_free else 1][recipe] = sum(row.kl for row in several) / len(several)
    compared = [(free, shown) for free, shown in means.values() if free and shown]
    if not compared:
        missing = "the matrix does not hold a data-free and a calibrated recipe of the same bits"
        return Advice(rule=rule, verdict="Which is closer was not measured.", evidence=(missing,), withheld=True)
    verdicts, evidence = [], []
    for pair in compared:
        free, shown = (min(found, key=lambda name: found[name]) for found in pair)
        ratio = pair[0][free] / max(pair[1][shown], 1e-12)
        evidence.append(
            f"mean KL of {free} (no data) {number(pair[0][free])} nats, of {shown} {number(pair[1][shown])}"
        )
        near = f"{free} needs no data and is within 10 % of {shown}: use it."
        verdicts.append(near if ratio <= 1.1 else f"Calibration pays: {shown} is {ratio:.1f} times closer than {free}.")
    return Advice(rule=rule, verdict=" ".join(verdicts), evidence=tuple(evidence))


def _sensitivity(report: Report) -> Advice | None:
    section = report.sensitivity
    if section is None:
        return None
    rule = "sensitive tensors"
    # over all bits together: a few rows of one number of bits agree by chance
    taus = [row for row in section.kendall_tau if row.tau is not None and row.bits is None]
    evidence = [
        f"Kendall's tau of {row.measure} against measured KL: {row.tau:.2f} over {row.rows} rows" for row in taus
    ]
    best = max(taus, key=lambda row: row.tau or -1.0, default=None)
    if section.withheld or best is None or (best.tau or -1.0) < TAU:
        why = section.withheld or f"no cheap measure ranks tensors as the measured KL does (tau limit {TAU:g})"
        evidence = [why, *evidence]
        return Advice(rule=rule, verdict="No ranking is given.", evidence=tuple(evidence), withheld=True)
    key = {"weight_error": "weight_error_db", "hessian_error": "hessian_error", "fisher": "fisher"}[best.measure]
    fewest = min(row.bits for row in section.rows)
    losses: dict[str, float] = {}
    for row in section.rows:
        if row.bits == fewest and (loss := getattr(row, key)) is not None:
            losses[row.tensor] = min(loss, losses.get(row.tensor, loss))
    ranked = sorted(((loss, name) for name, loss in losses.items()), reverse=True)[:_LISTED]
    evidence += [f"{name}: {best.measure} {number(value)} at {fewest} bits" for value, name in ranked]
    return Advice(rule=rule, verdict="Give these tensors more bits than others.", evidence=tuple(evidence))


def _allocation(report: Report) -> Advice | None:
    section = report.allocation
    if section is None:
        return None
    measured = "not measured" if section.measured_kl is None else f"{section.measured_kl:.5f} nats measured"
    predicted = "none" if section.predicted_kl is None else f"{section.predicted_kl:.5f} nats"
    evidence = (
        f"{section.bits_per_weight:.3f} bits per weight, {section.bytes / 1e6:.1f} MB",
        f"KL: predicted {predicted}, {measured}",
    )
    verdict = {
        True: f"The target {section.target} is kept, by measurement.",
        False: f"The target {section.target} cannot be kept with the choices given.",
        None: f"Chosen for the target {section.target}; not measured yet.",
    }[section.met]
    return Advice(rule="allocation", verdict=verdict, evidence=evidence, withheld=section.met is None)


def _typical_channel_kurtosis(report: Report) -> float | None:
    rows = report.outliers.sites if report.outliers else ()
    known = [
        row.rest.channel_kurtosis
        for row in rows
        if row.kind == "linear_input" and row.channels == report.model.hidden and row.rest.channel_kurtosis is not None
    ]
    return median(known) if known else None


RULES: tuple[Callable[[Report], Advice | None], ...] = (
    _allocation,
    _outlier_channels,
    _first_token,
    _spikes,
    _static_ranges,
    _corpus,
    _data_free,
    _sensitivity,
)
