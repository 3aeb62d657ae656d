"""bitwright: post-training quantization of large language models.

    import bitwright
    bitwright.quantize("demo", "out", "easyquant", "w4a16g64")
    bitwright.eval("out", against="demo")

Importing bitwright also teaches `transformers` to load what it makes, whichever of the two is imported first:
`AutoModelForCausalLM.from_pretrained("out")`. It takes no time by itself: PyTorch and transformers are imported
by what needs them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
from bitwright.execute.fork import keep_children_alive
from bitwright.runtime.registration import register_with_transformers

if TYPE_CHECKING:
    from bitwright.evaluate import EvalOptions
    from bitwright.evaluate.quality import eval
    from bitwright.generate import generate
    from bitwright.inspect import Inspection, inspect
    from bitwright.method import Method
    from bitwright.pipeline import RunOptions, Summary, quantize
    from bitwright.plan import Plan, plan
    from bitwright.recipe import Recipe, Rule, load_recipe
    from bitwright.scheme import Scheme

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

# The modules of the names that are looked up when they are first asked for: those above that need PyTorch.
_PLACES = {
    "EvalOptions": "evaluate",
    "Inspection": "inspect",
    "Method": "method",
    "Plan": "plan",
    "Recipe": "recipe",
    "Rule": "recipe",
    "RunOptions": "pipeline",
    "Scheme": "scheme",
    "Summary": "pipeline",
    "eval": "evaluate.quality",
    "generate": "generate",
    "inspect": "inspect",
    "load_recipe": "recipe",
    "plan": "plan",
    "quantize": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which `plan` and the like are functions, though modules have the same names.

    Python sets a module as attribute of its package whenever it is imported, by whomever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_transformers()
keep_children_alive()
