"""Distance of a model to its reference on the same tokens: KL(P_ref || Q) in nats, and top-1 agreement.

Both models read the same window one after the other; only scalars per token are kept, never logits. The
log-softmax is float32 and sums are float64. KL is summed as p (ln p - ln q) - p + q: the two extra terms
add up to zero for exact distributions, and otherwise cancel the first-order effect of a softmax whose sum
is not quite one, which shows as negative KL elsewhere. Positions are those that have a target, so the
last one of a window is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import EvaluationError
from bitwright.evaluate.logits import Model, logit_chunks
from bitwright.evaluate.perplexity import Progress, Windows, target_losses


@dataclass(frozen=True)
class Divergence:
    """What `compare` measured; token tensors are [windows, length - 1], losses [windows].

    `kl` (float64) is in nats; `agree` says that both models rank the same token first; `correct` and
    `reference_correct` that this token is the target. Losses are mean nats per target, float64.
    """

    protocol: str
    kl: Tensor
    agree: Tensor
    correct: Tensor
    reference_correct: Tensor
    losses: Tensor
    reference_losses: Tensor

    @property
    def kl_mean(self) -> float:
        """Mean KL over tokens, in nats."""
        return float(self.kl.mean())

    @property
    def kl_max(self) -> float:
        """Largest KL of a token, in nats."""
        return float(self.kl.max())

    def kl_quantiles(self, levels: Sequence[float] = (0.5, 0.9, 0.99, 0.999)) -> tuple[float, ...]:
        """Quantiles of KL over tokens in nats, linear between order statistics."""
        return tuple(float(value) for value in np.quantile(self.kl.numpy(), levels))

    @property
    def top1_agreement(self) -> float:
        """Share of tokens for which both models rank the same token first."""
        return float(self.agree.double().mean())

    @property
    def flips(self) -> tuple[int, int]:
        """Tokens (lost, gained): right only in the reference, and right only in the model."""
        lost = self.reference_correct & ~self.correct
        gained = self.correct & ~self.reference_correct
        return int(lost.sum()), int(gained.sum())


def compare(model: Model, reference: Model, windows: Windows, progress: Progress | None = None) -> Divergence:
    """Run both models on every window and measure how far `model` is from `reference`.

    `progress(done, total)` counts windows. Raises EvaluationError on NaN logits, on logits of the wrong
    shape and where the vocabularies differ.
    """
    shape = (windows.count, windows.length - 1)
    kl = torch.zeros(shape, dtype=torch.float64)
    agree, correct, reference_correct = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    losses, reference_losses = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for index in range(windows.count):
        ids = windows.ids[index]
        p = logit_chunks(reference, ids, f"reference, window {index}")
        q = logit_chunks(model, ids, f"model, window {index}")
        for (rows, p_rows), (_, q_rows) in zip(p, q, strict=False):  # as many chunks where the vocabularies are equal
            _check_vocabularies(p_rows.shape[-1], q_rows.shape[-1])
            q_rows = q_rows.to(p_rows.device)
            targets = ids[1:][rows].to(p_rows.device)
            reference_losses[index, rows] = target_losses(p_rows, targets, f"reference, window {index}").cpu().double()
            losses[index, rows] = target_losses(q_rows, targets, f"model, window {index}").cpu().double()
            kl[index, rows] = kl_divergence(p_rows, q_rows).cpu()
            p_top, q_top = p_rows.argmax(-1), q_rows.argmax(-1)
            agree[index, rows] = (p_top == q_top).cpu()
            correct[index, rows] = (q_top == targets).cpu()
            reference_correct[index, rows] = (p_top == targets).cpu()
        if progress is not None:
            progress(index + 1, windows.count)
    return Divergence(windows.protocol, kl, agree, correct, reference_correct, losses.mean(1), reference_losses.mean(1))


def _check_vocabularies(reference: int, model: int) -> None:
    if reference != model:
        raise EvaluationError(
            f"the vocabularies differ: {model} in the model, {reference} in the reference; "
            "KL needs the same tokens; remove the padding rows of the larger one"
        )


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(model)) per row in nats: logits [rows, vocabulary] -> [rows] float64.

    A token that the reference gives no probability adds none; one that only the model rules out adds inf.
    """
    log_p, log_q = reference.log_softmax(-1), model.log_softmax(-1)
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p)
    terms = terms.masked_fill_(p == 0, 0.0).sub_(p).add_(log_q.exp_())
    return terms.sum(-1, dtype=torch.float64)
