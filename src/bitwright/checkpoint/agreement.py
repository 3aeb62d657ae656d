"""Agreement: `config.json` against the headers of the tensors against the model that transformers builds.

It stands before every command that reads a checkpoint, and reads no weight. Tensors that the model needs and the files
lack, tensors of modules that the model has in another form, and sizes that contradict each other are refused by name,
with the key of `config.json` that says otherwise. What the model computes itself (the RoPE frequencies that old
checkpoints store) and what belongs to modules that it does not have (value heads, vision towers, heads for several
tokens) is left out, as transformers leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bitwright.checkpoint.bounds import check_bounds
from bitwright.checkpoint.clues import block_key, missing_key, size_keys, unexpected_key
from bitwright.checkpoint.shard import TensorInfo
from bitwright.checkpoint.skeleton import build_skeleton
from bitwright.errors import CheckpointError
from bitwright.models.edges import Config
from bitwright.untrusted.boundary import reading

Shape = tuple[int, ...]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = "the checkpoint is incomplete, or its config.json belongs to another: download it again or correct the file"
# What models of today compute, and stored once: frequencies and tables of RoPE, positions, masks of attention.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|causal_mask)$")


@dataclass(frozen=True)
class Agreement:
    """What the model makes of the tensors of a checkpoint, all of which are in order.

    Attributes:
        shapes: what the model needs, by the checkpoint's name of each tensor that it takes as it is stored.
        left_out: tensors that the model has no use for, sorted.
        head: the weight that gives logits, by its name in the checkpoint; None where it is not known.
        embedding: the weight of the token embedding, likewise.
        ties: config and class share the two weights, where only one is stored or both are equal.
        flag: `tie_word_embeddings` with the default of the class; None for an architecture that is not known.
    """

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    head: str | None = None
    embedding: str | None = None
    ties: bool = False
    flag: bool | None = None


def agree(
    label: str, config: Config, tensors: Mapping[str, TensorInfo], quantized: Mapping[str, Shape | None] | None = None
) -> Agreement:
    """Check that `config` (the content of config.json) and the headers `tensors` are of one model.

    Args:
        label: what the user calls the checkpoint, for messages.
        config: without the settings of a quantizer.
        tensors: of a quantized checkpoint, those in float only.
        quantized: weights that a quantized checkpoint holds in another form, with their shapes where these are known.

    Raises:
        CheckpointError: a tensor is missing, unknown to a module of the model, of another shape, or not of floats.
        PlanError: transformers cannot build the model of `config`.
    """
    with reading(label, CheckpointError, _REMEDY):
        return _agree(label, config, tensors, quantized or {})


def _agree(
    label: str, config: Config, tensors: Mapping[str, TensorInfo], quantized: Mapping[str, Shape | None]
) -> Agreement:
    stored: dict[str, Shape | None] = {**{name: info.shape for name, info in tensors.items()}, **quantized}
    check_bounds(label, config, stored)
    buffers = {name for name, info in tensors.items() if _is_buffer(name, info)}
    if not _is_known(config):
        # an architecture of others: what is not a tensor of its own is all that can be told
        return Agreement(left_out=tuple(sorted(buffers)))
    model = _Model(build_skeleton(config), stored.keys() - buffers)
    problems = [
        *_blocks(model, config),
        *_mismatched(model, stored),
        *_missing(model),
        *_unexpected(model),
        *_not_floats(model, tensors),
        *_frequencies(model, {name: tensors[name].shape for name in buffers}),
    ]
    if problems:
        raise CheckpointError(f"{label}: {'; '.join(problems)}; {_REMEDY}")
    return Agreement(
        {name: model.shapes[theirs] for name, theirs in model.names.items() if name not in model.converted},
        tuple(sorted({*model.strangers, *buffers})),
        model.stored_name(model.head),
        model.stored_name(model.embedding),
        model.head is not None and model.pairs.get(model.head) == model.embedding,
        bool(getattr(model.skeleton.config, "tie_word_embeddings", False)),
    )


class _Model:
    """The skeleton of a model, and the tensors of a checkpoint by the names that it gives them."""

    def __init__(self, skeleton: Any, stored: Iterable[str]):
        # importing transformers takes seconds
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.skeleton = skeleton
        mapping = get_model_conversion_mapping(skeleton)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = skeleton.state_dict()
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
        self.pairs: dict[str, str] = dict(skeleton.all_tied_weights_keys)
        self.head = _weight_of(skeleton, skeleton.get_output_embeddings())
        self.embedding = _weight_of(skeleton, skeleton.get_input_embeddings())
        self.names: dict[str, str] = {}
        self.converted: set[str] = set()
        self.unexpected: list[str] = []
        self.strangers: list[str] = []
        found: set[str] = set()
        for name in sorted(stored):
            theirs, made = self._renamed(name, state)
            if not state.keys() & {theirs, *made}:
                self._place_unexpected(name, theirs)
                continue
            found |= {theirs, *made}
            self.names[name] = theirs
            if made:
                self.converted.add(name)
        shared = {name for pair in self.pairs.items() if found.intersection(pair) for name in pair}
        absent = self.shapes.keys() - found - shared
        self.missing = _natural(_unmatched(absent, skeleton._keys_to_ignore_on_load_missing))

    def _renamed(self, name: str, state: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The name in the model of a stored tensor; and of all that it is a part of, where tensors are converted."""
        from transformers.core_model_loading import rename_source_key

        theirs, pattern = rename_source_key(
            name, self._renamings, self._converters, self.skeleton.base_model_prefix, state
        )
        if theirs not in state and name in state:
            return name, []
        if pattern is None:
            return theirs, []
        first, *others = next(entry for entry in self._converters if pattern in entry.source_patterns).target_patterns
        return theirs, [theirs, *(theirs.replace(first, other) for other in others)]

    def stored_name(self, name: str | None) -> str | None:
        """The name in the checkpoint of a tensor of the model: as it is stored, or as it would be."""
        from transformers.core_model_loading import revert_weight_conversion

        if name is None:
            return None
        stored = next((stored for stored, theirs in self.names.items() if theirs == name), None)
        if stored is None and name in self.shapes:
            alone = revert_weight_conversion(self.skeleton, {name: self.skeleton.state_dict()[name]})
            return str(next(iter(alone), name))
        return stored or name

    def ancestor(self, name: str) -> str:
        """The nearest module around a tensor called `name` that the model has; empty for the model itself."""
        module = name.rpartition(".")[0]
        while module:
            try:
                self.skeleton.get_submodule(module)
            except AttributeError:
                module = module.rpartition(".")[0]
            else:
                break
        return module

    def _place_unexpected(self, name: str, theirs: str) -> None:
        ignored = not _unmatched([theirs], self.skeleton._keys_to_ignore_on_load_unexpected)
        foreign = self.ancestor(theirs) in ("", self.skeleton.base_model_prefix)
        (self.strangers if ignored or foreign else self.unexpected).append(name)


def _weight_of(skeleton: Any, module: Any) -> str | None:
    """Name of the weight of `module`, as the model's state spells it."""
    return next((f"{name}.weight" for name, found in skeleton.named_modules() if found is module), None)


def _is_known(config: Config) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is one that models compute: by name, and a mask [1, 1, n, n] besides by shape."""
    return _BUFFER.search(name) is not None or (_MASK.search(name) is not None and len(info.shape) == 4)


# --- what is wrong, in words -------------------------------------------------------------------------------


def _blocks(model: _Model, config: Config) -> Iterable[str]:
    """Blocks that the config has and the files lack altogether, or the other way round."""
    key, count = block_key(config)
    prefix = re.compile(r"^(.*?\.)(\d+)\.")
    held = {match.groups() for name in (*model.names.values(), *model.unexpected) if (match := prefix.match(name))}
    for group in dict.fromkeys(first for first, _ in held):
        found = 1 + max(int(index) for first, index in held if first == group)
        lost = [name for name in model.missing if (match := prefix.match(name)) and match[1] == group]
        beyond = [name for name in lost if int(prefix.match(name)[2]) >= found]  # type: ignore[index]
        above = [name for name in model.unexpected if model.ancestor(name) == group[:-1]]
        if beyond or above:
            yield (
                f"config.json says {key} = {count}, and the files hold {found} blocks "
                f"({(beyond or above)[0]} is {'missing' if beyond else 'there'})"
            )
            model.missing = [name for name in model.missing if name not in beyond]
            model.unexpected = [name for name in model.unexpected if name not in above]


def _mismatched(model: _Model, stored: Mapping[str, Shape | None]) -> Iterable[str]:
    wrong = [
        name
        for name in _natural(model.names)
        if name not in model.converted and stored[name] not in (None, model.shapes[model.names[name]])
    ]
    if wrong:
        first, needed = wrong[0], model.shapes[model.names[wrong[0]]]
        found = stored[first]
        assert found is not None
        keys = size_keys(model.skeleton.config, first, found, needed)
        yield f"tensor {first} has shape {list(found)}, needed {list(needed)} ({len(wrong)} such){keys}"


def _missing(model: _Model) -> Iterable[str]:
    if model.missing:
        first = model.missing[0]
        # where other blocks have such a tensor, no key of the config asks for it
        local = ".".join(first.split(".")[-2:])
        alone = not any(name.endswith(f".{local}") for name in model.names)
        keys = missing_key(model.skeleton.config, first, first == model.head) if alone else ""
        stored = model.stored_name(first)
        yield f"tensor {stored} is missing ({len(model.missing)} such), needed {list(model.shapes[first])}{keys}"


def _unexpected(model: _Model) -> Iterable[str]:
    if model.unexpected:
        first = model.unexpected[0]
        keys = unexpected_key(model.skeleton.config, first)
        owner = type(model.skeleton).__name__
        yield f"tensor {first} is there ({len(model.unexpected)} such), and {owner} has no such tensor{keys}"


def _not_floats(model: _Model, tensors: Mapping[str, TensorInfo]) -> Iterable[str]:
    wrong = [
        name
        for name, theirs in model.names.items()
        if name in tensors and theirs in model.floating and tensors[name].dtype not in FLOATS
    ]
    if wrong:
        found = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        yield (
            f"tensor {wrong[0]} is {found}, needed float16, bfloat16, float32 or float64 ({len(wrong)} such; was it "
            "quantized by a program that config.json does not name?)"
        )


def _frequencies(model: _Model, buffers: Mapping[str, Shape]) -> Iterable[str]:
    """Stored frequencies of RoPE that are as many as another size of heads has."""
    computed = {tuple(b.shape) for name, b in model.skeleton.named_buffers() if name.endswith("rotary_emb.inv_freq")}
    wrong = [name for name in sorted(buffers) if name.endswith(".inv_freq") and buffers[name] not in computed]
    if wrong and len(computed) == 1:
        needed = next(iter(computed))
        keys = size_keys(model.skeleton.config, wrong[0], buffers[wrong[0]], needed)
        yield f"tensor {wrong[0]} has shape {list(buffers[wrong[0]])}, needed {list(needed)}{keys}"


def _unmatched(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """The names that none of the regular expressions finds."""
    expressions = [re.compile(pattern) for pattern in patterns or ()]
    return [name for name in names if not any(expression.search(name) for expression in expressions)]


def _natural(names: Iterable[str]) -> list[str]:
    """Sorted, numbers by value."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
