"""The standard tests of one kernel against its op's reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kpt.judge.kernels import inputs_like, judge_kernel
from kpt.ops import reference
from kpt.plugins import load
from kpt.plugins.validation import spec_faults
from kpt.specs import KernelSpec
from kpt.testing.models import op_arguments, op_site
from kpt.testing.suite import Suite, skip

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.ops import Site


class KernelSuite(Suite, standard=True):
    """Tests ``kernel``, a `KernelSpec`, against the reference of its op in fp64.

    Override `arguments` for an op that is not in the core's catalogue or for other shapes, `site` for
    a kernel that prepares sites of another kind, and ``device`` for a kernel of an accelerator.
    """

    kernel: ClassVar[KernelSpec]
    device: ClassVar[str] = "cpu"
    rows: ClassVar[Sequence[int]] = (1, 7, 33)

    def arguments(self) -> Mapping[str, Any]:
        """Typical arguments of the op by name; tensors are drawn like these, in every dtype."""
        found = op_arguments(self.kernel.op, torch.Generator().manual_seed(0))
        if found is None:
            raise skip(f"the op {self.kernel.op!r} is not in the core's catalogue; override arguments()")
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in found.items()
        }

    def reference(self) -> Callable[..., Any]:
        """The function in plain PyTorch that defines what is right."""
        return reference(self.kernel.op)

    def site(self, dtype: torch.dtype) -> tuple[Site, Call] | None:
        """A site that computes the op in ``dtype`` and a call of it; None where there is no typical one."""
        return op_site(self.kernel.op, dtype, self.device)

    def run(self) -> Callable[..., Any]:
        """The function under test, with the reference's signature."""
        return load(self.kernel.entry)

    def dtypes(self) -> list[torch.dtype]:
        """The dtypes that the kernel declares; fp32 where it declares none."""
        return [getattr(torch, name) for name in self.kernel.dtypes] or [torch.float32]

    def verdict(self, **probes: Any) -> None:
        """Judge the kernel with the given probes; fails with the rule and the detail."""
        judged = 0
        for dtype in self.dtypes():
            place = self.site(dtype)
            refusal = None if place is None else self._refusal(place[0])
            if refusal is None:
                judged += 1
                self._judge(dtype, place, {"rows": (), "layouts": (), "scales": (), **probes})
        if not judged:
            raise skip(f"the kernel refuses the typical site: {refusal}; override site()")

    def _refusal(self, site: Site) -> str | None:
        return None if self.kernel.supports is None else load(self.kernel.supports)(site)

    def _judge(self, dtype: torch.dtype, place: tuple[Site, Call] | None, probes: dict[str, Any]) -> None:
        if self.kernel.setup is None:
            run, make, fixed = self.run(), inputs_like(self.arguments()), frozenset[str]()
            probes["dtypes"] = (dtype,)
        elif place is None:
            raise skip(f"there is no typical site of the op {self.kernel.op!r}; override site()")
        else:
            site, call = place
            run = load(self.kernel.setup)(site)
            # What was packed stays as it is; only the activations are drawn.
            tensors = {name for name, value in site.weights().items() if isinstance(value, torch.Tensor)}
            arguments = site.arguments(*call.args, **call.kwargs)
            fixed = frozenset(tensors)
            make = inputs_like({name: _detached(value) for name, value in arguments.items()}, fixed=fixed)
        found = judge_kernel(run, self.reference(), make, level=self.kernel.level, fixed=fixed, **probes)
        assert found.passed, f"{self.kernel.op}/{self.kernel.name} in {dtype}: {found.rule}: {found.detail}"

    def test_spec_is_valid(self) -> None:
        """Names, dtypes and references of the spec are what the API says."""
        assert isinstance(self.kernel, KernelSpec), (
            f"kernel is a {type(self.kernel).__name__}; set a KernelSpec"
        )
        faults = list(spec_faults(self.kernel))
        assert not faults, faults[0]

    def test_values(self) -> None:
        """Values are right, memory is written in full, inputs stay as they were, nothing is replayed."""
        self.verdict()

    def test_small_and_large_values(self) -> None:
        """A wrong epsilon shows on small inputs, an overflow on large ones."""
        self.verdict(scales=(1e-2, 8.0))

    def test_odd_sizes(self) -> None:
        """One row, and numbers of rows that no power-of-two block divides."""
        self.verdict(rows=tuple(self.rows))

    def test_strides(self) -> None:
        """Transposed, sliced and misaligned inputs."""
        from kpt.judge.layouts import LAYOUTS

        self.verdict(layouts=LAYOUTS)

    def test_gradients(self) -> None:
        """Gradients of every floating-point argument, on odd sizes and every layout."""
        from kpt.judge.layouts import LAYOUTS

        if not self.kernel.backward:
            raise skip("the kernel declares no backward")
        self.verdict(backward=True, rows=tuple(self.rows), layouts=LAYOUTS)

    def test_reproducible(self) -> None:
        """Two runs give equal bits, if that is promised."""
        if not self.kernel.reproducible:
            raise skip("the kernel does not promise it")
        self.verdict(reproducible=True)

    def test_compile_safe(self) -> None:
        """Inside a compiled graph, without a break, values are those of the kernel itself."""
        if not self.kernel.compile_safe:
            raise skip("the kernel does not promise it")
        if self.kernel.setup is not None:
            raise skip("a prepared kernel is compiled together with its model")
        run, arguments = self.run(), dict(self.arguments())
        expected = run(**arguments)
        compiled = torch.compile(lambda: run(**arguments), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), expected)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
