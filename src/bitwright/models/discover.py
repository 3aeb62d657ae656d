"""Discovery: the adapter of an architecture that nobody described, found by running one of its blocks.

One block of the real `transformers` model is built with random weights, norms and biases (no checkpoint is
read). Hooks record what each linear reads and each norm returns; equal inputs mean a shared Hessian. Edges
are then proposed from values and sizes, and each is checked by applying random positive scales: it is kept
only if the output of the block stays where it is, while half of the same rescaling moves it.

Small blocks run in true float64 (`Float64`), where a wrong edge stands out by ten orders of magnitude. What
an edge cannot express (a fused query-key-value) has no edge; matrices outside `nn.Linear` are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bitwright.errors import PlanError
from bitwright.models.adapter import Adapter, block_count
from bitwright.models.edges import (
    BlockShape,
    Config,
    Edge,
    Factors,
    LinearEdge,
    NormEdge,
    RotaryEdge,
    apply_factors,
)

Groups = tuple[tuple[str, ...], ...]
Proposals = Iterator[Sequence[Edge]]  # alternatives, of which the first that holds is taken

FLOAT64_PARAMETERS = 50_000_000  # largest probe in float64: 0.4 GB of weights
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
OFFSETS = (0.0, 1.0)  # what norms add to their stored weight; Gemma adds one
PROBE_VOCABULARY, PROBE_TOKENS, PROBE_POSITIONS, SEED = 64, 12, 65536, 0
# what transformers raises for a config that it cannot build or run, besides errors of its own
BUILTIN = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ImportError)
BAD_CONFIG = (StrictDataclassError, *BUILTIN)
REMEDY = "describe the architecture by hand in bitwright.models, as llama.py does"


class Float64(TorchFunctionMode):
    """Computes in float64 where a model's code asks for float32 (norms, softmax, RoPE): exact comparisons."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace every float32 that is asked for by float64."""
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@dataclass
class Trace:
    """What one forward pass did, in order of execution; `inputs` and `outputs` only of the block."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # of linears, [tokens, in]
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of norms, [tokens, features]
    calls: list[str] = field(default_factory=list)  # whole names of linears, norms and the block
    block: list[Tensor] = field(default_factory=list)  # output of the block


@dataclass(frozen=True)
class Probe:
    """A model of one block with random weights, the tokens it runs on, and where its block is."""

    model: Any  # transformers classes are untyped
    tokens: Tensor  # [sequences, tokens]
    prefix: str  # of the block, with the dot
    dtype: torch.dtype

    @property
    def block(self) -> nn.Module:
        """The one block."""
        return self.model.get_submodule(self.prefix[:-1])

    def width(self, name: str) -> int:
        """Output channels of a linear or norm of the block; 0 for a norm without weight."""
        weight = getattr(self.block.get_submodule(name), "weight", None)
        return 0 if weight is None else int(weight.shape[0])

    @torch.no_grad()
    def run(self, factors: Mapping[str, Factors] | None = None) -> Trace:
        """One forward pass, with the block's tensors multiplied by `factors`."""
        trace = Trace()
        block = dict(self.block.named_parameters())
        scaled = {
            self.prefix + name: apply_factors(block[name], factor).to(self.dtype)
            for name, factor in (factors or {}).items()
            if name in block
        }
        handles = [
            module.register_forward_hook(_recorder(trace, name, self.prefix))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) or _is_norm(module) or name == self.prefix[:-1]
        ]
        try:
            with Float64() if self.dtype == torch.float64 else nullcontext():
                keywords = {"input_ids": self.tokens, "use_cache": False}
                torch.func.functional_call(self.model, scaled, (), keywords)
        finally:
            for handle in handles:
                handle.remove()
        return trace


def discover(config: Config) -> Adapter:
    """The adapter of the architecture of `config` (the contents of `config.json`).

    Deterministic; leaves torch's random state alone. Takes the memory of one block in float32 (float64 if small).

    Raises:
        PlanError: transformers does not know the architecture or cannot run it, it is multimodal, its blocks
            differ, or a block holds matrices that are not in an `nn.Linear`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        probe, trace = _first_run(config)
        _refuse_unclaimed(config["model_type"], probe, trace)
        groups = _shared_inputs(trace)
        shape = _shape(probe, trace)
        edges = _edges(probe, trace, groups, shape)
    names = {id(module): name for name, module in probe.model.named_modules()}
    embedding = names[id(probe.model.get_input_embeddings())]
    head = names[id(probe.model.get_output_embeddings())]
    after = trace.calls[trace.calls.index(probe.prefix[:-1]) + 1 :]
    final_norm = next((name for name in after if _is_norm(probe.model.get_submodule(name))), None)
    stored = dict.fromkeys(name.rpartition(".")[0] for name in probe.model.state_dict())
    known = (embedding, head, final_norm)
    return Adapter(
        model_type=config["model_type"],
        blocks=probe.prefix.removesuffix(".0."),
        embedding=embedding,
        final_norm=final_norm,
        head=_stored_name(probe.model, f"{head}.weight").removesuffix(".weight"),
        shape=shape,
        shared_inputs=groups,
        edges=edges,
        norms=tuple(name for name in trace.outputs if probe.width(name)),
        kept=tuple(n for n in stored if n not in known and not n.startswith(probe.prefix[:-1])),
        tied_head=bool(probe.model.config.tie_word_embeddings),
    )


def _first_run(config: Config) -> tuple[Probe, Trace]:
    """A one-block model of this architecture, random but well scaled, and what it does."""
    model_type = config["model_type"]
    full = _transformers_config(config)
    try:
        with torch.device("meta"):
            skeleton = _build(full)
        model = _build(_shortened(full))
        blocks = _find_blocks(model, skeleton, block_count(full.to_dict()), model_type)
        _refuse_matrices(model_type, model.get_submodule(f"{blocks}.0"))
        small = sum(parameter.numel() for parameter in model.parameters()) <= FLOAT64_PARAMETERS
        dtype = torch.float64 if small else torch.float32
        _randomize(model.to(dtype).eval())
        length = min(PROBE_TOKENS, getattr(full, "max_position_embeddings", None) or PROBE_TOKENS)
        tokens = torch.randint(model.config.vocab_size, (2, length))
        probe = Probe(model, tokens, f"{blocks}.0.", dtype)
        return probe, probe.run()
    except BAD_CONFIG as error:
        raise PlanError(f"transformers cannot run {model_type} as a causal LM: {error}; {REMEDY}") from error


def _build(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _shortened(config: Any) -> Any:
    """The same model with one block and a short vocabulary."""
    one = deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    one.vocab_size = min(one.vocab_size, PROBE_VOCABULARY)
    one.max_position_embeddings = min(getattr(one, "max_position_embeddings", None) or 0, PROBE_POSITIONS)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(one, key, None)  # they may lie outside the short vocabulary
    return one


def _transformers_config(config: Config) -> Any:
    model_type = config["model_type"]
    if isinstance(config.get("text_config"), Mapping):
        raise PlanError(f"{model_type} is multimodal (config.json has text_config); quantize its text model")
    if config.get("num_kv_shared_layers"):
        raise PlanError(f"blocks of this {model_type} share keys and values (num_kv_shared_layers); {REMEDY}")
    if model_type not in CONFIG_MAPPING:
        raise PlanError(f"transformers does not know model_type {model_type!r}; upgrade it, or {REMEDY}")
    plain = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    try:
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except BAD_CONFIG as error:
        raise PlanError(f"transformers refuses config.json of {model_type}: {error}; correct it") from error


def _find_blocks(model: Any, skeleton: Any, count: int, model_type: str) -> str:
    """Name of the list of blocks, all of which must be alike; `skeleton` is the whole model without data."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and (len(module), len(skeleton.get_submodule(name))) == (1, count)
        and any(parameter.ndim >= 2 for parameter in module.parameters())
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise PlanError(f"{model_type} has {len(outer)} lists of {count} blocks {outer}, not one; {REMEDY}")
    layouts = [
        {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        for block in skeleton.get_submodule(outer[0])
    ]
    for index, layout in enumerate(layouts):
        if different := sorted({name for name, _ in layout.items() ^ layouts[0].items()}):
            raise PlanError(f"{model_type}: blocks 0 and {index} differ in {different[:3]}; {REMEDY}")
    return outer[0]


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Weights that keep activations near one; norms and biases far from one and zero, so that edges show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.5)
        else:
            parameter.uniform_(0.5, 1.5)


def _is_norm(module: nn.Module) -> bool:
    """A leaf that holds vectors only, or calls itself a norm (that of OLMo has no weight)."""
    if isinstance(module, nn.Linear | nn.Embedding) or any(True for _ in module.children()):
        return False
    if isinstance(getattr(module, "weight", None), Tensor):
        return all(parameter.ndim == 1 for parameter in module.parameters())
    return "norm" in type(module).__name__.lower()


def _recorder(trace: Trace, name: str, prefix: str) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trace.calls.append(name)
        if name == prefix[:-1]:
            trace.block.append(output[0] if isinstance(output, tuple) else output)
        elif name.startswith(prefix) and isinstance(module, nn.Linear):
            trace.inputs[name.removeprefix(prefix)] = args[0].flatten(0, -2).clone()
        elif name.startswith(prefix):
            trace.outputs[name.removeprefix(prefix)] = output.flatten(0, -2).clone()

    return record


def _refuse_matrices(model_type: str, block: nn.Module) -> None:
    """Refuse a block with matrices outside `nn.Linear`: experts stacked in one tensor, convolutions."""
    vector = max(parameter.shape[0] for parameter in block.parameters())
    foreign = [
        f"{name}.{leaf} ({type(module).__name__})"
        for name, module in block.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        for leaf, parameter in module.named_parameters(recurse=False)
        # a norm may store a vector as [heads, head_dim] (Cohere); anything larger is a matrix
        if parameter.ndim >= 2 and parameter.numel() > vector
    ]
    if foreign:
        raise PlanError(f"{model_type} has matrices outside nn.Linear: {', '.join(foreign)}; {REMEDY}")


def _refuse_unclaimed(model_type: str, probe: Probe, trace: Trace) -> None:
    """Refuse linears that did not run exactly once, and tensors that checkpoints store otherwise."""
    linears = [name for name, module in probe.block.named_modules() if isinstance(module, nn.Linear)]
    if odd := [name for name in linears if trace.calls.count(probe.prefix + name) != 1]:
        raise PlanError(f"{model_type} runs linears of a block never or more than once: {odd}; {REMEDY}")
    inside = [name for name in probe.model.state_dict() if name.startswith(probe.prefix)]
    if renamed := [name for name in inside if _stored_name(probe.model, name) != name]:
        raise PlanError(f"checkpoints of {model_type} do not store {renamed[:3]} by these names; {REMEDY}")


def _stored_name(model: Any, name: str) -> str:
    """The name of a tensor in checkpoints, where it may differ from the module's (GPT-NeoX's head)."""
    return str(next(iter(revert_weight_conversion(model, {name: model.state_dict()[name]}))))


def _shared_inputs(trace: Trace) -> Groups:
    """Linears grouped by the value that they read: views and copies of one tensor count as one."""
    groups: list[list[str]] = []
    for name, value in trace.inputs.items():
        group = next((group for group in groups if _same(trace.inputs[group[0]], value)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return tuple(tuple(group) for group in groups)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _shape(probe: Probe, trace: Trace) -> BlockShape:
    """Shape from the config as transformers completes it, or as the linears show it where the two differ."""
    config = probe.model.config.to_dict()
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        config["num_key_value_heads"] = 1  # Falcon's config says one per head
    shape = BlockShape.from_config(config)
    widths = [value.shape[-1] for value in trace.inputs.values()]
    others = [width for width in widths if width not in (shape.hidden, shape.heads * shape.head_dim)]
    return replace(shape, intermediate=others[-1]) if others and shape.intermediate not in widths else shape


def _edges(probe: Probe, trace: Trace, groups: Groups, shape: BlockShape) -> tuple[Edge, ...]:
    """Every proposed edge that holds, in order of execution."""
    norms = [name for name in trace.outputs if probe.width(name)]
    proposals: list[Sequence[Edge]] = [
        *(
            [NormEdge(norm, group, offset) for offset in OFFSETS]
            for norm, group in itertools.product(norms, groups)
            if probe.width(norm) == shape.hidden and _same(trace.outputs[norm], trace.inputs[group[0]])
        ),
        *_rotary_proposals(probe, list(trace.inputs), shape, norms=False),
        *_rotary_proposals(probe, norms, shape, norms=True),
        *_linear_proposals(probe, trace, groups, shape),
    ]
    held: list[Edge] = []
    paired: set[str] = set()  # without GQA, the mirror image of a query-key edge holds as well
    for alternatives in proposals:
        if isinstance(alternatives[0], RotaryEdge) and paired.intersection(alternatives[0].modules):
            continue
        holding = (edge for edge in alternatives if _holds(probe, trace.block[0], edge, shape))
        found = list(itertools.islice(holding, 1))
        held += found
        paired.update(*(edge.modules for edge in found if isinstance(edge, RotaryEdge)))
    return tuple(sorted(held, key=lambda edge: trace.calls.index(probe.prefix + edge.modules[0])))


def _rotary_proposals(probe: Probe, names: list[str], shape: BlockShape, norms: bool) -> Proposals:
    """Two linears, or two norms, that are as wide as query and key; the form with most scales first."""
    whole = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim)
    for query, key in itertools.permutations(names, 2):
        widths = (probe.width(query), probe.width(key))
        shared = norms and widths == (shape.head_dim, shape.head_dim)
        if shared or widths == whole:
            yield [
                RotaryEdge(query, key, rotary, pairing, shared, offset)
                for rotary in _rotaries(probe, shape)
                for pairing in (("half", "interleaved") if rotary != 0 else ("half",))
                for offset in (OFFSETS if norms else (0.0,))
            ]


def _rotaries(probe: Probe, shape: BlockShape) -> list[int | None]:
    """How many dims of a head RoPE may rotate, fewest first: none, the part that the config tells, all."""
    config = probe.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    part = int(getattr(config, "rotary_dim", None) or shape.head_dim * share)
    # where the config speaks of RoPE, some blocks may go without (SmolLM3) and this may be one of them
    none = [] if rope else [0]
    return [*none, part, None] if 0 < part < shape.head_dim and part % 2 == 0 else [*none, None]


def _linear_proposals(probe: Probe, trace: Trace, groups: Groups, shape: BlockShape) -> Proposals:
    value, heads = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    columns = {name: tensor.shape[-1] for name, tensor in trace.inputs.items()}
    for earlier, later in itertools.combinations(groups, 2):
        for producer, consumer in itertools.product(earlier, later):
            widths = (probe.width(producer), columns[consumer])
            if widths == (value, heads):
                yield [LinearEdge(producer, consumer, attention=True)]
            elif widths == (shape.intermediate, shape.intermediate):
                yield [LinearEdge(producer, consumer)]


def _holds(probe: Probe, reference: Tensor, edge: Edge, shape: BlockShape) -> bool:
    """Whether random scales leave the block's output alone, and half of the rescaling does not."""
    scale = torch.exp(0.5 * torch.randn(edge.width(shape), dtype=probe.dtype))
    factors = edge.factors(scale, shape)
    half = {name: by for name, by in factors.items() if name.startswith(f"{edge.modules[0]}.")}

    def moved(by: Mapping[str, Factors]) -> float:
        return ((probe.run(by).block[0] - reference).norm() / reference.norm()).item()

    # written so that NaN counts as not holding
    return moved(factors) <= TOLERANCE[probe.dtype] < 0.01 * moved(half)
