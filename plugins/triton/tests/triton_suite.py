"""The conformance suite as the Triton kernels run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kpt.ops.sites import Site
from kpt.testing import KernelSuite
from kpt_plugin_triton.launch import INTERPRETED


class TritonSuite(KernelSuite):
    """On the GPU where there is one, otherwise in the interpreter, whose bfloat16 is wrong."""

    device = "cpu" if INTERPRETED else "cuda"

    def dtypes(self) -> list[torch.dtype]:
        return [d for d in super().dtypes() if not (INTERPRETED and d is torch.bfloat16)]

    def site(self, dtype: torch.dtype) -> None:
        return None  # the functions are tested; what sites they take is the business of other tests

    def refusal(self, site: Site) -> str | None:
        """What is refused on a GPU: an interpreted kernel stands for one that runs there."""
        return super().refusal(replace(site, devices=("cuda:0",)) if INTERPRETED else site)


class InOneDtype(TritonSuite):
    """In fp32 only while interpreted: addresses differ from another suite of the op, not arithmetic."""

    def dtypes(self) -> list[torch.dtype]:
        return [torch.float32] if INTERPRETED else super().dtypes()


def gradcheck(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> bool:
    """Whether gradients are those by differences: of each element, if interpreted along a random direction.

    The interpreter would run the kernels twice for each element of each input.
    """
    return torch.autograd.gradcheck(function, tuple(inputs), fast_mode=INTERPRETED)
