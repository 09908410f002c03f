"""The standard tests of one kernel against its op's reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kpt.judge.kernels import inputs_like, judge_kernel
from kpt.kernels import callable_for, refusal_of
from kpt.ops import reference
from kpt.plugins import load
from kpt.plugins.validation import spec_faults
from kpt.specs import KernelSpec
from kpt.testing.models import op_arguments, op_site, other_arguments
from kpt.testing.suite import Suite, skip

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.ops import Site


class KernelSuite(Suite, standard=True):
    """Tests ``kernel``, a `KernelSpec`, against the reference of its op in fp64.

    Override `arguments` for an op that is not in the core's catalogue or for other shapes, `site` for
    a kernel that prepares sites of another kind, and ``device`` for a kernel of an accelerator.
    ``rows`` are the numbers of rows that are always tried, ``most_rows`` bounds those drawn at random. Where
    ``rows`` is empty none are drawn: for an op whose integers would point past the rows of another argument.
    ``compute_dtype`` is what the kernel's arithmetic drops to, for one that quantises and is judged by the
    rule of its level; None where dtypes stay.
    """

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
            tensors = {name for name, value in site.weights().items() if isinstance(value, torch.Tensor)}
            arguments = site.arguments(*call.args, **call.kwargs)
            fixed = frozenset(tensors)
            make = inputs_like({name: _detached(value) for name, value in arguments.items()}, fixed=fixed)
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
            if unknown := _unknown(self.run(), given):
                refused = f"the op is registered without {', '.join(unknown)}"
                continue
            try:
                self.run()(**{name: _cast(value, dtype) for name, value in given.items()})
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
            true = self.reference()(**{name: _cast(value, torch.float64) for name, value in given.items()})
            eager, mine = self.reference()(**given), self.run()(**given)
            for one, other, right in zip(_tensors(mine), _tensors(eager), _tensors(true)):
                self._assert_close_to_eager("", dtype, one, other, right)

    def test_gradient_error_like_eager(self) -> None:
        """The same of the gradients of every floating-point argument."""
        if not self.kernel.backward:
            raise skip("the kernel declares no backward")
        for dtype, given in self._in_half_precision():
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                template = list(_tensors(self.reference()(**given)))
            # Of this dtype's own numbers: what fp64 is given must not be more exact.
            upstream = [torch.randn(t.shape, generator=generator).to(t.device, dtype) for t in template]
            wide = {name: _cast(value, torch.float64) for name, value in given.items()}
            true, eager, mine = (
                _gradients(run, arguments, upstream)
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
            yield dtype, {name: _cast(value, dtype) for name, value in self.arguments().items()}

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
        for mine, true in zip(_tensors(self.run()(**empty)), _tensors(expected)):
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

    def test_two_streams(self) -> None:
        """Two streams at once give what one after the other gives, forward and backward."""
        streams = self._accelerator("Stream")
        run, make = self._ready()
        sets = [make(torch.Generator().manual_seed(seed), None) for seed in (1, 2)]
        if self.kernel.backward:
            sets = [_requiring_grad(given) for given in sets]
        upstream = [
            [
                torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t)
                for t in _tensors(run(**given))
            ]
            for given in sets
        ]

        def gradients(number: int, results: list[torch.Tensor]) -> list[torch.Tensor]:
            return list(_backward(sets[number], results, upstream[number]).values())

        expected: list[list[torch.Tensor]] = []
        expected_gradients: list[list[torch.Tensor]] = []
        for number, given in enumerate(sets):  # one after the other, its backward pass included
            expected.append(list(_tensors(run(**given))))
            expected_gradients.append(gradients(number, expected[-1]))
        module = torch.get_device_module(self.device)
        module.synchronize()
        lanes = [streams() for _ in sets]
        results: list[list[torch.Tensor]] = [[] for _ in sets]
        found: list[list[torch.Tensor]] = [[] for _ in sets]
        for _ in range(20):
            # Both forward passes come before the backward ones: scratch memory that they share would show.
            for number, (lane, given) in enumerate(zip(lanes, sets)):
                with module.stream(lane):
                    results[number] = list(_tensors(run(**given)))
            for number, lane in enumerate(lanes):
                with module.stream(lane):
                    found[number] = gradients(number, results[number])
        module.synchronize()
        for mine, true in zip(results, expected):
            torch.testing.assert_close(mine, true, rtol=0, atol=0)
        exact = {"rtol": 0, "atol": 0} if self.kernel.reproducible else {}
        for mine, true in zip(found, expected_gradients):
            torch.testing.assert_close(mine, true, **exact)

    def test_graph_capture(self) -> None:
        """Captured once and replayed on new values, the kernel reads the new ones."""
        graphed = self._accelerator("make_graphed_callables")
        run, make = self._ready()
        first, second = (make(torch.Generator().manual_seed(seed), None) for seed in (1, 2))
        names = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
        rest = {name: value for name, value in first.items() if name not in names}

        def call(*tensors: torch.Tensor) -> Any:
            return run(**dict(zip(names, tensors)), **rest)

        samples = tuple(first[name].clone() for name in names)
        replay = graphed(call, samples)
        mine = [value.clone() for value in _tensors(replay(*(second[name] for name in names)))]
        true = list(_tensors(call(*(second[name] for name in names))))
        torch.testing.assert_close(mine, true, rtol=0, atol=0)

    def _accelerator(self, name: str) -> Any:
        """What the device's module of torch calls ``name``; skips where the device has no such thing."""
        found = getattr(torch.get_device_module(self.device), name, None)
        if self.device == "cpu" or found is None:
            raise skip(f"the device {self.device!r} has no {name}")
        return found

    def _ready(self) -> tuple[Callable[..., Any], Callable[..., Mapping[str, Any]]]:
        if self.kernel.setup is not None:
            raise skip("a prepared kernel is tested within its model")
        dtype = self.dtypes()[0]
        make = inputs_like({name: _cast(value, dtype) for name, value in self.arguments().items()})
        return self.run(), make


def _unknown(kernel: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """The names among ``given`` that an op of `torch.library` has no argument for: a RuntimeError, there."""
    overload = getattr(kernel, "_opoverload", None) or getattr(kernel, "default", kernel)
    schema = getattr(overload, "_schema", None)
    return sorted(set(given) - {each.name for each in schema.arguments}) if schema is not None else []


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` in ``dtype`` if it is a floating-point tensor; codes of 8 bits are packed, and stay."""
    floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1
    return value.to(dtype) if floating else value


def _requiring_grad(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, floating-point tensors as leaves that require gradients; codes of 8 bits cannot."""
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1
        else value
        for name, value in given.items()
    }


def _gradients(
    run: Callable[..., Any], arguments: Mapping[str, Any], upstream: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    given = _requiring_grad(arguments)
    return _backward(given, _tensors(run(**given)), upstream)


def _backward(
    given: Mapping[str, Any], results: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of the leaves among ``given`` by name, those that there are."""
    leaves = {name: v for name, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    pairs = [
        (out, grad.to(out.dtype)) for out, grad in zip(results, upstream, strict=True) if out.requires_grad
    ]
    if not leaves or not pairs:
        return {}
    outs, grads = zip(*pairs)
    found = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found) if grad is not None}


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
