"""Token ids that a tokenizer or a file gives: each must have a row in the embedding of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitwright.errors import BitwrightError

TOKENIZER_REMEDY = "copy the tokenizer files of the original checkpoint into the model's folder"


def embedding_rows(model: Any) -> int | None:
    """Rows of the token embedding of a transformers model, packed or not; None where that cannot be told."""
    find = getattr(model, "get_input_embeddings", None)
    embedding = None if find is None else find()
    rows = getattr(embedding, "num_embeddings", None)
    return getattr(embedding, "out_features", None) if rows is None else rows


def check_ids(ids: Tensor, rows: int | None, what: str, kind: type[BitwrightError]) -> None:
    """Refuse `ids` (integers of any shape) outside an embedding of `rows` rows; `what` they are goes into messages.

    Raises:
        BitwrightError: of `kind`.
    """
    if not ids.numel() or rows is None:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise kind(
            f"{what}: token ids from {low} to {high}, needed 0 to {rows - 1}, the rows of the model's embedding; "
            "use the tokenizer that belongs to this model"
        )
