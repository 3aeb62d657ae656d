"""The closed choices that options and arguments take as words; importable without PyTorch, for the command line."""

from __future__ import annotations

from typing import Literal

CpuMode = Literal["exact", "fast"]
"""Arithmetic of the compiled kernels: inputs as they are, or rounded to 8 bits."""
ComputeType = Literal["bfloat16", "float16"]
"""Of floats on a GPU."""
Device = Literal["cpu", "cuda"]
"""Where a model is timed."""
Protocol = Literal["gptq", "gptq+bos"]
"""How windows are cut from an evaluation text."""
Target = Literal["compressed-tensors", "gguf", "gptq", "awq", "hf"]
"""Formats to export to."""
Engine = Literal["vllm", "vllm-cpu"]
"""Engines whose limits a plan can be held against."""
BudgetName = Literal["quick", "standard", "full"]
"""How much an analysis looks at."""
