"""The standard tests of a kernel that only an accelerator can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kpt.judge.kernels import inputs_like
from kpt.testing.kernel_tensors import backward, cast, requiring_grad, tensors
from kpt.testing.kernel_under_test import KernelUnderTest
from kpt.testing.suite import skip


class AcceleratorTests(KernelUnderTest, standard=True):
    """Streams and captured graphs; skipped where the device has none."""

    def test_two_streams(self) -> None:
        """Two streams at once give what one after the other gives, forward and backward."""
        streams = self._accelerator("Stream")
        run, make = self._ready()
        sets = [make(torch.Generator().manual_seed(seed), None) for seed in (1, 2)]
        if self.kernel.backward:
            sets = [requiring_grad(given) for given in sets]
        upstream = [
            [
                torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t)
                for t in tensors(run(**given))
            ]
            for given in sets
        ]

        def gradients_of(number: int, results: list[torch.Tensor]) -> list[torch.Tensor]:
            return list(backward(sets[number], results, upstream[number]).values())

        expected: list[list[torch.Tensor]] = []
        expected_gradients: list[list[torch.Tensor]] = []
        for number, given in enumerate(sets):  # one after the other, its backward pass included
            expected.append(list(tensors(run(**given))))
            expected_gradients.append(gradients_of(number, expected[-1]))
        module = torch.get_device_module(self.device)
        module.synchronize()
        lanes = [streams() for _ in sets]
        results: list[list[torch.Tensor]] = [[] for _ in sets]
        found: list[list[torch.Tensor]] = [[] for _ in sets]
        for _ in range(20):
            # Both forward passes come before the backward ones: scratch memory that they share would show.
            for number, (lane, given) in enumerate(zip(lanes, sets)):
                with module.stream(lane):
                    results[number] = list(tensors(run(**given)))
            for number, lane in enumerate(lanes):
                with module.stream(lane):
                    found[number] = gradients_of(number, results[number])
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

        def call(*given: torch.Tensor) -> Any:
            return run(**dict(zip(names, given)), **rest)

        samples = tuple(first[name].clone() for name in names)
        replay = graphed(call, samples)
        mine = [value.clone() for value in tensors(replay(*(second[name] for name in names)))]
        true = list(tensors(call(*(second[name] for name in names))))
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
        make = inputs_like({name: cast(value, dtype) for name, value in self.arguments().items()})
        return self.run(), make
