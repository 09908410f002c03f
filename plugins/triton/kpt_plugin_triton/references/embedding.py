"""embedding_sum_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kpt.ops import reference


def embedding_sum_norm(
    ids: torch.Tensor,
    words: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    types: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """The layer norm of ``words[ids] + types[type_ids] + positions[position_ids]``, as BERT begins.

    ``ids`` is [...], the other numbers broadcast to it; tables are [entries, D], ``weight`` and ``bias`` [D].
    The row ``padding_idx`` of ``words`` gets no gradient.
    """
    total = F.embedding(ids, words, padding_idx)
    if types is not None and type_ids is not None:
        total = total + F.embedding(type_ids, types)
    if positions is not None and position_ids is not None:
        total = total + F.embedding(position_ids, positions)
    return reference("layer_norm")(total, weight, bias, eps)  # type: ignore[no-any-return]
