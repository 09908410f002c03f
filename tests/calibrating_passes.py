"""Passes that take a constant from what flows through the model."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from kpt.specs import Variant
from slow_models import DirectScale, SlowScale


class Calibrated(DirectScale):
    """Notes the inputs of every `SlowScale` and only then takes out the detour."""

    variant = Variant("calibrated", predicted_gain=5.0, sites=())
    #: The inputs' shapes, in the order in which trials saw them.
    seen: list[tuple[int, ...]] = []

    def calibrate(self, model: torch.nn.Module, variant: Variant, run: Callable[[], None]) -> None:
        def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            type(self).seen.append(tuple(args[0].shape))

        scales = [module for module in model.modules() if isinstance(module, SlowScale)]
        hooks = [scale.register_forward_pre_hook(note) for scale in scales]
        run()
        for hook in hooks:
            hook.remove()

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        if not self.seen:
            raise ValueError("nothing was seen")
        return super().apply(model, variant)


class FailingToCalibrate(DirectScale):
    def calibrate(self, model: torch.nn.Module, variant: Variant, run: Callable[[], None]) -> None:
        raise ValueError("no ranges")


class LeavingItsHook(DirectScale):
    """The hook that it leaves scales the output by a half."""

    def calibrate(self, model: torch.nn.Module, variant: Variant, run: Callable[[], None]) -> None:
        for module in model.modules():
            if isinstance(module, SlowScale):
                module.register_forward_hook(
                    types.MethodType(lambda self, module, args, out: 0.5 * out, self)
                )
        run()
