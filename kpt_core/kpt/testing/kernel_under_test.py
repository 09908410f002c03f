"""What a suite tests, and with which arguments: what its subclasses say and may override."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kpt.kernels import refusal_of
from kpt.ops import reference
from kpt.plugins import load
from kpt.specs import KernelSpec
from kpt.testing.models import op_arguments, op_site, other_arguments
from kpt.testing.suite import Suite, skip

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.ops import Site


class KernelUnderTest(Suite, standard=True):
    """One kernel, its op's reference, and typical arguments."""

    kernel: ClassVar[KernelSpec]
    device: ClassVar[str] = "cpu"
    rows: ClassVar[Sequence[int]] = (1, 7, 33)
    most_rows: ClassVar[int] = 70
    compute_dtype: ClassVar[torch.dtype | None] = None

    def arguments(self) -> Mapping[str, Any]:
        """Typical arguments of the op by name; tensors are drawn like these, in every dtype."""
        found = op_arguments(self.kernel.op, torch.Generator().manual_seed(0))
        if found is None:
            raise skip(f"the op {self.kernel.op!r} is not in the core's catalogue; override arguments()")
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in found.items()
        }

    def other_arguments(self) -> Mapping[str, Mapping[str, Any]]:
        """What the op may be called with in place of some of its `arguments`, by what is another.

        A kernel is right there, too, or refuses: by its ``supports``, or by a TypeError, ValueError or
        NotImplementedError (in C++ ``TORCH_CHECK_TYPE``, ``_VALUE`` or ``_NOT_IMPLEMENTED``).
        """
        return other_arguments(self.kernel.op, self.arguments())

    def reference(self) -> Callable[..., Any]:
        """The function in plain PyTorch that defines what is right."""
        return reference(self.kernel.op)

    def site(self, dtype: torch.dtype) -> tuple[Site, Call] | None:
        """A site that computes the op in ``dtype`` and a call of it; None where there is no typical one."""
        return op_site(self.kernel.op, dtype, self.device)

    def refusal(self, site: Site) -> str | None:
        """Why the kernel does not take ``site``; None where it does."""
        return refusal_of(self.kernel, site)

    def run(self) -> Callable[..., Any]:
        """The function under test, with the reference's signature."""
        return load(self.kernel.entry)

    def dtypes(self) -> list[torch.dtype]:
        """The dtypes that the kernel declares; fp32 where it declares none."""
        return [getattr(torch, name) for name in self.kernel.dtypes] or [torch.float32]
