"""The standard tests of one kernel against its op's reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge.kernels import inputs_like, judge_kernel
from kpt.kernels import callable_for
from kpt.plugins.validation import spec_faults
from kpt.specs import KernelSpec
from kpt.testing.accelerator_tests import AcceleratorTests
from kpt.testing.kernel_tensors import cast, detached, gradients, lacking, tensors
from kpt.testing.models import op_site
from kpt.testing.suite import skip

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.ops import Site


class KernelSuite(AcceleratorTests, standard=True):
    """Tests ``kernel``, a `KernelSpec`, against the reference of its op in fp64.

    Override `arguments` for an op that is not in the core's catalogue or for other shapes, `site` for
    a kernel that prepares sites of another kind, and ``device`` for a kernel of an accelerator.
    ``rows`` are the numbers of rows that are always tried, ``most_rows`` bounds those drawn at random. Where
    ``rows`` is empty none are drawn: for an op whose integers would point past the rows of another argument.
    ``compute_dtype`` is what the kernel's arithmetic drops to, for one that quantises and is judged by the
    rule of its level; None where dtypes stay.
    """

    def verdict(self, **probes: Any) -> None:
        """Judge the kernel with the given probes alone; without any, on ordinary inputs.

        Fails with the rule and the detail.

        Ordinary inputs are the same in each call: `test_values` judges them for the tests of probes.
        """
        judged = 0
        for dtype in self.dtypes():
            place = self.site(dtype)
            refusal = None if place is None else self.refusal(place[0])
            if refusal is None:
                judged += 1
                others: dict[str, Any] = {"rows": (), "layouts": (), "scales": ()}
                self._judge(dtype, place, {"ordinary": not probes, **others, **probes})
        if not judged:
            raise skip(f"the kernel refuses the typical site: {refusal}; override site()")

    def _judge(self, dtype: torch.dtype, place: tuple[Site, Call] | None, probes: dict[str, Any]) -> None:
        if self.kernel.setup is None:
            run, make, fixed = self.run(), inputs_like(self.arguments()), frozenset[str]()
            probes["dtypes"] = (dtype,)
        elif place is None:
            raise skip(f"there is no typical site of the op {self.kernel.op!r}; override site()")
        else:
            site, call = place
            run = callable_for(self.kernel, site)
            # What was packed stays as it is; only the activations are drawn.
            packed = {name for name, value in site.weights().items() if isinstance(value, torch.Tensor)}
            arguments = site.arguments(*call.args, **call.kwargs)
            fixed = frozenset(packed)
            make = inputs_like({name: detached(value) for name, value in arguments.items()}, fixed=fixed)
        rest = {"compute_dtype": self.compute_dtype, **probes}
        found = judge_kernel(run, self.reference(), make, level=self.kernel.level, fixed=fixed, **rest)
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
        self.verdict(ordinary=True)

    def test_other_arguments(self) -> None:
        """Another epsilon, mask, number of axes or the like: values are right, or the kernel refuses."""
        if self.kernel.setup is not None:
            raise skip("a prepared kernel is tried on its site's arguments")
        dtype = min(self.dtypes(), key=lambda each: each is not torch.float32)
        typical, judged, refused = self.arguments(), 0, ""
        for other, changed in self.other_arguments().items():
            place = op_site(self.kernel.op, dtype, self.device, other)
            if self.kernel.supports is not None:
                refused = f"no site with another {other}" if place is None else self.refusal(place[0]) or ""
                if refused:
                    continue
            given = {**typical, **changed}
            if unknown := lacking(self.run(), given):
                refused = f"the op is registered without {', '.join(unknown)}"
                continue
            try:
                self.run()(**{name: cast(value, dtype) for name, value in given.items()})
            except (TypeError, ValueError, NotImplementedError) as error:
                refused = f"{type(error).__name__}: {error}"
                continue
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                raise AssertionError(
                    f"{self.kernel.op}/{self.kernel.name} in {dtype} with another {other} fails by {said}; "
                    "compute it, or refuse it by `supports` or a TypeError, ValueError or NotImplementedError"
                ) from error
            judged += 1
            probes: dict[str, Any] = {"rows": (), "layouts": (), "scales": (), "dtypes": (dtype,)}
            found = judge_kernel(
                self.run(),
                self.reference(),
                inputs_like(given),
                level=self.kernel.level,
                compute_dtype=self.compute_dtype,
                **probes,
            )
            assert found.passed, (
                f"{self.kernel.op}/{self.kernel.name} in {dtype} with another {other}: {found.rule}: "
                f"{found.detail}; compute it, or refuse it by `supports` or an error"
            )
        if not judged:
            said = f"the kernel refuses all other arguments of its op, the last one by: {refused}"
            raise skip(
                said if refused else "no other arguments of the op are known; override other_arguments()"
            )

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

        def call() -> Any:
            return run(**arguments)

        # Dynamo compiles a code object eight times and then no more: every kernel needs one of its own.
        call.__code__ = call.__code__.replace(co_name=f"call_{self.kernel.op}")
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), expected)

    def test_error_like_eager(self) -> None:
        """In half precision, errors against fp64 stay within 1.3 times those of the reference run eagerly."""
        for dtype, given in self._in_half_precision():
            true = self.reference()(**{name: cast(value, torch.float64) for name, value in given.items()})
            eager, mine = self.reference()(**given), self.run()(**given)
            for one, other, right in zip(tensors(mine), tensors(eager), tensors(true)):
                self._assert_close_to_eager("", dtype, one, other, right)

    def test_gradient_error_like_eager(self) -> None:
        """The same of the gradients of every floating-point argument."""
        if not self.kernel.backward:
            raise skip("the kernel declares no backward")
        for dtype, given in self._in_half_precision():
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                template = list(tensors(self.reference()(**given)))
            # Of this dtype's own numbers: what fp64 is given must not be more exact.
            upstream = [torch.randn(t.shape, generator=generator).to(t.device, dtype) for t in template]
            wide = {name: cast(value, torch.float64) for name, value in given.items()}
            true, eager, mine = (
                gradients(run, arguments, upstream)
                for run, arguments in (
                    (self.reference(), wide),
                    (self.reference(), given),
                    (self.run(), given),
                )
            )
            for name, right in true.items():
                assert name in mine, f"{self.kernel.op}/{self.kernel.name} gives {name} no gradient"
                self._assert_close_to_eager(f"the gradient of {name} ", dtype, mine[name], eager[name], right)

    def _in_half_precision(self) -> Iterator[tuple[torch.dtype, dict[str, Any]]]:
        """Each half precision that the kernel declares, with arguments in it."""
        low = [dtype for dtype in self.dtypes() if dtype in (torch.bfloat16, torch.float16)]
        if not low or self.kernel.setup is not None:
            raise skip("the kernel has no half precision of its own")
        for dtype in low:
            yield dtype, {name: cast(value, dtype) for name, value in self.arguments().items()}

    def _assert_close_to_eager(
        self, what: str, dtype: torch.dtype, mine: torch.Tensor, eager: torch.Tensor, true: torch.Tensor
    ) -> None:
        right = true.double()
        if right.norm() == 0:  # nothing to be relative to
            right = right + torch.finfo(dtype).tiny
        floor = torch.finfo(dtype).eps * 0.5  # rounding the result alone costs about this
        error, usual = (float((t.double() - true.double()).norm() / right.norm()) for t in (mine, eager))
        assert error <= 1.3 * max(usual, floor), (
            f"{self.kernel.op}/{self.kernel.name} in {dtype}: {what}error {error:.2e}, eager's {usual:.2e}"
        )

    def test_no_rows(self) -> None:
        """Inputs without rows give outputs without rows, or an error that says so; never a crash."""
        if self.kernel.setup is not None:
            raise skip("a prepared kernel is tried on its site's inputs")
        make = inputs_like(self.arguments())
        given = make(torch.Generator().manual_seed(0), 1)
        first = next(value for value in given.values() if isinstance(value, torch.Tensor))
        if first.dim() < 2:
            raise skip("the op has no rows")
        empty = {
            name: value[:0]
            if isinstance(value, torch.Tensor) and value.shape[:1] == first.shape[:1]
            else value
            for name, value in given.items()
        }
        try:
            expected = self.reference()(**empty)
        except (RuntimeError, IndexError, ValueError):
            raise skip("the reference itself has no answer for no rows") from None
        for mine, true in zip(tensors(self.run()(**empty)), tensors(expected)):
            assert mine.shape == true.shape, f"shape {tuple(mine.shape)}, expected {tuple(true.shape)}"

    def test_random_sizes(self) -> None:
        """Hypothesis looks for numbers of rows, scales and layouts that go wrong."""
        from kpt.judge.layouts import LAYOUTS

        try:
            from hypothesis import given, settings
            from hypothesis import strategies as st
        except ImportError:
            raise skip("hypothesis is not installed") from None

        numbers = st.integers(1, self.most_rows) if self.rows else st.none()

        @settings(max_examples=6, deadline=None, database=None, derandomize=True)
        @given(numbers, st.sampled_from((0.03, 1.0, 6.0)), st.sampled_from(tuple(LAYOUTS)))
        def holds(rows: int | None, scale: float, layout: str) -> None:
            self.verdict(rows=() if rows is None else (rows,), scales=(scale,), layouts=(layout,))

        holds()
