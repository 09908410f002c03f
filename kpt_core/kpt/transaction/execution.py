"""Running a forward as the mode demands, and collecting all that the referee compares.

In training that is the outputs, the gradient of every parameter and the buffers that the forward
moved; a run leaves buffers and ``.grad`` as they were.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kpt.globalstate import seed_torch
from kpt.judge import bitwise, outputs, tree
from kpt.judge.calls import Call

Forward = Callable[..., Any]


@dataclass
class Execution:
    """What one call produced.

    ``gradients`` are those of the parameters and of the inputs that require one, ``differentiable`` the
    names of the outputs that have a history.
    """

    output: Any
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    differentiable: frozenset[str] = frozenset()


def scalar_loss(output: Any, seed: int) -> torch.Tensor | None:
    """The loss that a training step differentiates, or None if nothing in ``output`` has a gradient.

    The model's own ``loss`` if it returns one; else the sum of every differentiable output weighted
    by a fixed random direction, so that no gradient can hide in a symmetric sum.
    """
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, dict):
        loss = output.get("loss")
    if (
        isinstance(loss, torch.Tensor)
        and loss.requires_grad
        and loss.numel() == 1
        and loss.is_floating_point()
    ):
        return loss
    leaves = [_plain(t) for _, t in tree.walk(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves:
        return None
    if len(leaves) == 1 and leaves[0].numel() == 1:
        return leaves[0].reshape(())
    generator = torch.Generator().manual_seed(seed)
    total: torch.Tensor | None = None
    for leaf in leaves:
        direction = torch.randn(leaf.shape, generator=generator).to(leaf)
        term = (leaf * direction).sum() / max(1, leaf.numel()) ** 0.5
        total = term if total is None else total + term
    return total


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as real numbers of a dtype and layout that can be multiplied and added up."""
    if tensor.is_nested:
        tensor = torch.nested.to_padded_tensor(tensor, 0.0)
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.element_size() == 1 else tensor


class Runner:
    """Executes forwards of one model in one mode.

    ``module`` supplies names of parameters and buffers; the forwards it is given must use those
    very tensors (or copies listed in ``parameters``).
    """

    def __init__(self, module: torch.nn.Module, *, training: bool) -> None:
        self.training = training
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad} if training else {}
        self.buffers = dict(module.named_buffers())

    def step(self, forward: Forward, call: Call) -> Any:
        """One call as the user makes it: the forward, and in training the backward."""
        return self.run(forward, call.args, call.kwargs)

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `step`, with the arguments apart, so that nothing but the call is timed."""
        if not self.training:
            with torch.no_grad():
                return forward(*args, **kwargs)
        with torch.enable_grad():
            sources = [*self.parameters.values(), *_sources(Call(args, kwargs)).values()]
            output = forward(*args, **kwargs)
            loss = scalar_loss(output, 0)
            if loss is not None and sources:
                torch.autograd.grad(loss, sources, allow_unused=True)
        return output

    def collect(self, forward: Forward, call: Call, *, seed: int = 0, gradients: bool = True) -> Execution:
        """One call with everything that is to be compared; buffers are put back afterwards.

        Without ``gradients`` the backward of a training step, and its results, are left out.
        """
        with self.buffers_kept() as before:
            if not self.training:
                with torch.no_grad():
                    output = forward(*call.args, **call.kwargs)
                return Execution(detached(output), {}, self.moved(before), _with_history(output))
            with torch.enable_grad():
                sources = {**self.parameters, **_sources(call)}
                output = forward(*call.args, **call.kwargs)
                loss = scalar_loss(output, seed) if gradients else None
                found: dict[str, torch.Tensor | None] = dict.fromkeys(sources)
                if loss is not None and sources:
                    each = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
                    found = {
                        name: None if g is None else g.detach().clone() for name, g in zip(sources, each)
                    }
            return Execution(detached(output), found, self.moved(before), _with_history(output))

    @contextmanager
    def buffers_kept(self) -> Iterator[dict[str, torch.Tensor]]:
        """Put every buffer that the block writes to back to its value, and end the history of writes."""
        before = {name: buffer.detach().clone() for name, buffer in self.buffers.items()}
        leaves = [buffer for buffer in self.buffers.values() if buffer.is_leaf]
        try:
            yield before
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    if not same_bits(self.buffers[name], value):
                        self.buffers[name].copy_(value)
            for buffer in leaves:
                if not buffer.is_leaf and not buffer._is_view():
                    buffer.detach_()

    def moved(self, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The buffers that differ from ``before``, as they are now."""
        return {
            name: buffer.detach().clone()
            for name, buffer in self.buffers.items()
            if not same_bits(buffer, before[name])
        }


def _with_history(output: Any) -> frozenset[str]:
    return frozenset(name for name, tensor in outputs.tensors(output).items() if tensor.requires_grad)


def _sources(call: Call) -> dict[str, torch.Tensor]:
    """The inputs of a call that require a gradient."""
    return {f"the input {name}": t for name, t in call.tensors().items() if t.requires_grad}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bitwise equality; a NaN equals itself."""
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return False
    if left.layout is not torch.strided:  # which torch.equal takes none of
        return bitwise.bitwise_equal(left, right)
    if torch.equal(left, right):
        return True
    if left.is_floating_point() or left.is_complex():
        return torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True)
    return False


def detached(output: Any) -> Any:
    """``output`` with its tensors detached; storage stays shared, so that aliasing can be judged."""
    return tree.rebuild(output, lambda path, leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which torch, Python and NumPy draw from ``seed``, so that two forwards draw the same."""
    state, python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    seed_torch(seed)
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)
