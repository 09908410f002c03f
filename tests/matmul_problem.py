"""What a product of matrices gives in three precisions."""

from __future__ import annotations

import torch


def problem(rows: int = 64, width: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matmul's fp64 reference, its eager fp32 result, and the result in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    w = torch.randn(width, 32, dtype=torch.float64, generator=generator)
    return x @ w, x.float() @ w.float(), (x.bfloat16() @ w.bfloat16()).float()


REFERENCE, EAGER, CAST = problem()
