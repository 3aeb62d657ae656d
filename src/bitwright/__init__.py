"""bitwright: post-training quantization of large language models.

    import bitwright
    bitwright.quantize("demo", "out", "easyquant", "w4a16g64")
    bitwright.eval("out", against="demo")

Importing bitwright also teaches `transformers` to load what it makes:
`AutoModelForCausalLM.from_pretrained("out")`.
"""

from bitwright.__about__ import __version__
from bitwright.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    EvaluationError,
    FallbackError,
    FormatError,
    PlanError,
    RecipeError,
    ResumeError,
    WeightError,
)
from bitwright.evaluate import EvalOptions
from bitwright.evaluate.quality import eval
from bitwright.generate import generate
from bitwright.inspect import Inspection, inspect
from bitwright.method import Method
from bitwright.pipeline import RunOptions, Summary, quantize
from bitwright.plan import Plan, plan
from bitwright.recipe import Recipe, Rule, load_recipe
from bitwright.runtime.huggingface import register
from bitwright.scheme import Scheme

register()

__all__ = [
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
