"""Paired bootstrap over windows: how sure is a mean difference between two models?

Windows are resampled, not tokens, because tokens of one window depend on each other. The interval is the
percentile interval with the small-sample expansion of Hesterberg (2015, arXiv 1411.5279, section 4.2):
the nominal level is widened to Phi(-sqrt(n / (n - 1)) t), with t the Student quantile for n - 1 degrees
of freedom. Without it, an interval from the 8 windows of a quick evaluation covers about 89 %, not 95 %.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitwright.errors import EvaluationError

#: Resampled means never leave the range of the windows, and with fewer than 6 windows even that whole range
#: covers the centre of a symmetric distribution with less than 95 % (1 - 2 ** (1 - n)).
FEWEST_WINDOWS = 6
_CHUNK_ELEMENTS = 2**22


def paired_interval(
    differences: Tensor, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Confidence interval (low, high) for the mean of `differences` [windows], in their unit.

    None below `FEWEST_WINDOWS` windows: no bootstrap interval would keep its promise. The same seed gives
    the same interval. Raises EvaluationError on differences that are not a finite vector.
    """
    values = differences.detach().cpu().double()
    if values.ndim != 1 or not bool(values.isfinite().all()):
        raise EvaluationError(
            f"differences: found shape {tuple(values.shape)}, finite: {bool(values.isfinite().all())}; "
            "needed one finite number per window"
        )
    n = len(values)
    if n < FEWEST_WINDOWS:
        return None
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CHUNK_ELEMENTS // n)
    means = torch.cat(
        [
            values[torch.randint(n, (min(step, resamples - start), n), generator=generator)].mean(1)
            for start in range(0, resamples, step)
        ]
    )
    tail = _normal_cdf(-math.sqrt(n / (n - 1)) * student_quantile(0.5 + level / 2, n - 1))
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for whole `degrees` of freedom and 0.5 <= probability < 1, by bisection."""
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _student_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def _student_cdf(t: float, degrees: int) -> float:
    """Closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), t >= 0."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + central / 2


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
