"""Padding that torch's encoder leaves out in eager code, and computes with once it is compiled.

`nn.TransformerEncoder` takes a padded batch apart before its layers where all padding is at the end, and puts
zeros in its place behind them: only in eager code, since that is decided by the mask's values. In captured
graphs the layers leave something else in padded places, so that no graph would be what the model computes.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn import TransformerEncoder, functional

_FORWARD = TransformerEncoder.forward
#: Where eager code takes batches apart; a backend from outside of torch is another one of these.
_DEVICES = ("cpu", "cuda", "xpu", torch.utils.backend_registration._privateuse1_backend_name)


def zero_padding(model: torch.nn.Module) -> None:
    """Let the encoders in ``model``, a private copy, put zeros where eager code does when they are captured.

    Eager calls run the encoder's own code. Encoders with a forward of another class's, or of their own, stay
    as they are.
    """
    for module in model.modules():
        if isinstance(module, TransformerEncoder) and module.forward == types.MethodType(_FORWARD, module):
            if getattr(module, "use_nested_tensor", False):
                module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(
    self: Any,
    src: torch.Tensor,
    mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,
) -> torch.Tensor:
    if (
        not torch.compiler.is_compiling()
        or src_key_padding_mask is None
        or mask is not None
        or not _takes_apart(self, src)
    ):
        return _FORWARD(self, src, mask, src_key_padding_mask, is_causal)
    dropped = functional._canonical_mask(
        mask=src_key_padding_mask,
        mask_name="src_key_padding_mask",
        other_type=None,
        other_name="mask",
        target_type=src.dtype,
    )
    assert dropped is not None
    kept = dropped.logical_not()
    places = torch.arange(kept.shape[1], device=kept.device)
    first = places < kept.sum(1, keepdim=True)
    if getattr(self, "mask_check", True):
        padded = ~kept & (kept == first).all()
    else:  # as many as are kept are taken from the front, wherever the mask has them
        padded = ~first
        dropped = torch.zeros_like(dropped).masked_fill(padded, float("-inf"))
    causal = torch.nn.modules.transformer._detect_is_causal_mask(None, is_causal, None)
    output = src
    for layer in self.layers:
        output = layer(output, is_causal=causal, src_key_padding_mask=dropped)
    output = output.masked_fill(padded.unsqueeze(-1), 0.0)
    return output if self.norm is None else self.norm(output)


def _takes_apart(encoder: Any, src: torch.Tensor) -> bool:
    """Whether eager code would look at the mask's values, by all else that it asks."""
    first = encoder.layers[0]
    if (
        not torch.backends.mha.get_fastpath_enabled()
        or not encoder.use_nested_tensor
        or first.training
        or src.dim() != 3
        or src.is_nested
        or src.device.type not in _DEVICES
        or torch.is_autocast_enabled()
    ):
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = (src, *first.parameters())
    return not any(tensor.requires_grad for tensor in tensors)
