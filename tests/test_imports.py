"""What importing costs: the package and the help of its commands load neither PyTorch nor transformers, and the public
names are what they should be, whatever was imported before; each in a process of its own.
"""

import subprocess
import sys

import pytest

import bitwright

HEAVY = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "gguf", "jinja2")
COMMANDS = ("plan", "quantize", "eval", "analyze", "inspect", "export", "import", "generate", "bench", "methods")
# Modules that have the name of a function, in the orders in which Python may come to set them as attributes.
ORDERS = {
    "names first": "",
    "modules first": "import bitwright.plan, bitwright.inspect, bitwright.generate",
    "one by one": "from bitwright import plan; import bitwright.plan; from bitwright.plan import Plan",
    "from a star": "from bitwright import *; import bitwright.generate",
    "command line first": "import bitwright.cli; bitwright.cli.bitwright.quantize",
    "transformers first": "import transformers",
}


def fresh(code: str) -> str:
    """What a new Python prints that runs `code`."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def after(arguments: list[str]) -> str:
    """Code that runs the command line with `arguments`."""
    return (
        f"import sys; sys.argv = {['bitwright', *arguments]!r}\nfrom bitwright.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import bitwright, bitwright.errors; dir(bitwright)",
        after(["--help"]),
        after(["--version"]),
        after(["methods"]),
        "".join(after([command, "--help"]) for command in COMMANDS),
    ],
    ids=["package", "help", "version", "methods", "help of every command"],
)
def test_what_needs_no_model_loads_no_heavy_module(code: str) -> None:
    shown = fresh(f"{code}\nimport sys; print('loaded', [name for name in {HEAVY} if name in sys.modules])")
    assert shown.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("order", ORDERS)
def test_public_names_whatever_was_imported_before(order: str) -> None:
    code = f"""
{ORDERS[order]}
import inspect, types, bitwright
from bitwright import *
for name in bitwright.__all__:
    value = getattr(bitwright, name)
    assert not isinstance(value, types.ModuleType), name
    assert value is globals()[name], name
    assert name in dir(bitwright), name
import bitwright.plan, bitwright.inspect, bitwright.generate
from bitwright.plan import plan as again
assert bitwright.plan is plan is again
assert callable(bitwright.inspect) and callable(bitwright.generate) and callable(bitwright.eval)
"""
    fresh(code)


def test_names_that_there_are_not() -> None:
    with pytest.raises(AttributeError, match="'bitwright' has no attribute 'quantise'"):
        bitwright.quantise  # noqa: B018


@pytest.mark.parametrize("order", ["import bitwright, transformers", "import transformers, bitwright"])
@pytest.mark.parametrize("loaded", ["", "import transformers.quantizers.auto"])
def test_transformers_knows_the_method(order: str, loaded: str) -> None:
    code = f"""
{order}
{loaded}
import bitwright
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers import auto
assert "bitwright" in AUTO_QUANTIZER_MAPPING and "bitwright" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert auto.__spec__.loader is auto.__loader__ and type(auto.__loader__).__name__ == "SourceFileLoader"
"""
    fresh(code)
