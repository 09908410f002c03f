"""A pass: in evaluation, a batch norm is a scale and a shift, which the convolution before it can absorb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kpt.specs import Skip, Variant

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Undo
    from kpt.transaction.observe import Observation


class Absorbed(torch.nn.Identity):
    """Stands where a batch norm was."""


class FoldBatchNorm:
    """Folds each `BatchNorm2d` that follows a `Conv2d` in a `Sequential`."""

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterable[Variant | Skip]:
        """One variant for all pairs, or the reason why there is none."""
        found = list(pairs(observation.model))
        if not found:
            yield Skip("no batch norm follows a convolution in a Sequential")
            return
        yield Variant(
            name="tutorial.fold_batch_norm",
            predicted_gain=1.05,
            setup_seconds=0.1,
            # Folded weights are copies: the core watches the originals and stops using stale copies.
            derives=True,
            reproducible=True,
            note=f"{len(found)} batch norms",
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        """Exchange the modules of each pair in the workspace; parameters stay as they are."""
        replaced = []
        for parent, name, norm_name in pairs(model):
            convolution, norm = parent._modules[name], parent._modules[norm_name]
            replaced.append((parent, name, convolution, norm_name, norm))
            # The function copies the convolution first, so the user's tensors are never written to.
            parent._modules[name] = fuse_conv_bn_eval(convolution, norm)
            parent._modules[norm_name] = Absorbed()

        def undo() -> None:
            for parent, name, convolution, norm_name, norm in reversed(replaced):
                parent._modules[name], parent._modules[norm_name] = convolution, norm

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        """Whether any batch norm was folded: a variant without effect must not be listed as applied."""
        return any(isinstance(module, Absorbed) for module in model.modules())


def pairs(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, str]]:
    """(parent, name of the convolution, name of the batch norm right after it)."""
    for parent in model.modules():
        if not isinstance(parent, torch.nn.Sequential):
            continue
        children = list(parent.named_children())
        for (name, first), (next_name, second) in zip(children, children[1:]):
            fits = isinstance(first, torch.nn.Conv2d) and isinstance(second, torch.nn.BatchNorm2d)
            if fits and second.track_running_stats:
                yield parent, name, next_name
