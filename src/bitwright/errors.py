"""Every error that bitwright raises on purpose, in one tree.

    BitwrightError
    ├── RecipeError       a recipe, scheme, method or override that cannot mean anything
    ├── PlanError         a recipe that cannot be applied to this checkpoint on this machine
    ├── CheckpointError   a source checkpoint that is missing, truncated, corrupt or inconsistent
    ├── CalibrationError  calibration text, tokens or activations that cannot be used
    ├── FallbackError     more tensors had to be rounded in another way than asked for than the run allows
    ├── WeightError       weights that cannot be quantized (NaN, Inf, out of the scale's range)
    ├── FormatError       a quantized artefact that does not follow its byte specification
    ├── ResumeError       an output folder that belongs to another job
    └── EvaluationError   a measurement that would not mean what it claims

A message says four things: which tensor, file or key; what was found; what was needed; what to do about it.
The command line prints the message and exits with status 2; a bug keeps its traceback and exits with 1.
"""

from __future__ import annotations


class BitwrightError(Exception):
    """Root of all deliberate errors."""


class RecipeError(BitwrightError):
    """A recipe, scheme, method or override that cannot mean anything."""


class PlanError(BitwrightError):
    """A recipe that cannot be applied to this checkpoint on this machine."""


class CheckpointError(BitwrightError):
    """A source checkpoint that is missing, truncated, corrupt or inconsistent."""


class CalibrationError(BitwrightError):
    """Calibration text, tokens or activations that cannot be used: too few, or not finite."""


class FallbackError(BitwrightError):
    """More tensors had to be rounded in another way than the recipe asks for than the run allows."""


class WeightError(BitwrightError):
    """Weights that cannot be quantized: NaN, Inf, or outside the range of the stored scale."""


class FormatError(BitwrightError):
    """A quantized artefact that does not follow its byte specification."""


class ResumeError(BitwrightError):
    """An output folder that belongs to another job."""


class EvaluationError(BitwrightError):
    """A measurement that would not mean what it claims."""
