"""Calls of a compiled model with torch's tensors: small ones are copied, large ones share their memory."""

from __future__ import annotations

from typing import Any

import torch

#: Bytes up to which a tensor is copied into or out of the request's own memory: to set another costs more.
_COPIED = 1 << 16
#: What OpenVINO calls dtypes in which results are large.
_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64"}


class _Request:
    """One inference request, and tensors over the memory of its own inputs and outputs."""

    def __init__(self, compiled: Any, shared_in: list[bool], shared_out: list[bool]) -> None:
        self.raw = compiled.create_infer_request()
        with torch.inference_mode(False):  # tensors made in it may not be written to outside of it
            self.inputs = [
                None if shared else torch.from_numpy(self.raw.get_input_tensor(n).data)
                for n, shared in enumerate(shared_in)
            ]
            self.outputs = [
                None if shared else torch.from_numpy(self.raw.get_output_tensor(n).data)
                for n, shared in enumerate(shared_out)
            ]


class Requests:
    """A function of lists of tensors. Calls may come from several threads: each has a request of its own.

    ``inputs`` and ``outputs`` are those of one call, and say what later ones have; where OpenVINO knows no
    sizes others may come. ``kept`` holds the constants whose memory it reads.

    Raises:
        TypeError: another number of outputs was compiled.
    """

    def __init__(
        self, compiled: Any, inputs: tuple[torch.Tensor, ...], outputs: list[torch.Tensor], kept: Any
    ) -> None:
        import openvino

        self._tensor, self._bfloat16 = openvino.Tensor, openvino.Type.bf16
        self._compiled, self._kept = compiled, kept
        self._free = any(place.partial_shape.is_dynamic for place in (*compiled.inputs, *compiled.outputs))
        self._dtypes = [output.dtype for output in outputs]
        self._shapes = [output.shape for output in outputs]
        self._shared_in = [self._free or not _small(value) for value in inputs]
        if len(compiled.outputs) != len(outputs):
            raise TypeError(f"OpenVINO made {len(compiled.outputs)} outputs of {len(outputs)}")
        same = [str(place.element_type.to_string()) for place in compiled.outputs]
        self._shared_out = [
            self._free or (not _small(value) and _NAMES.get(value.dtype) == name)
            for value, name in zip(outputs, same)
        ]
        self._idle: list[_Request] = [_Request(compiled, self._shared_in, self._shared_out)]

    def __call__(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = _Request(self._compiled, self._shared_in, self._shared_out)
        results = self._run(request, given)
        self._idle.append(request)  # one that raised is not used again
        return results

    def _run(self, request: _Request, given: list[torch.Tensor]) -> list[torch.Tensor]:
        raw, held = request.raw, []
        for number, value in enumerate(given):
            place = request.inputs[number]
            if place is not None:
                place.copy_(value.detach())
            else:
                held.append(value.detach().contiguous().resolve_neg())  # only its address is, by OpenVINO
                raw.set_input_tensor(number, self._over(held[-1]))
        results: list[torch.Tensor] = []
        for number, own in enumerate(request.outputs):
            if own is None and not self._free:
                result = torch.empty(self._shapes[number], dtype=self._dtypes[number])
                raw.set_output_tensor(number, self._over(result))
                results.append(result)
        raw.infer(share_outputs=True)  # read below
        if self._free:
            return [
                self._copied(raw.get_output_tensor(n).data, dtype) for n, dtype in enumerate(self._dtypes)
            ]
        shared = iter(results)
        return [
            next(shared) if own is None else own.to(dtype, copy=True)
            for own, dtype in zip(request.outputs, self._dtypes)
        ]

    def _over(self, value: torch.Tensor) -> Any:
        """OpenVINO's tensor over the memory of a contiguous one."""
        if value.dtype is torch.bfloat16:  # which numpy has not: handed over as its bits
            return self._tensor(value.view(torch.int16).numpy(), value.shape, self._bfloat16)
        return self._tensor(value.numpy(), shared_memory=True)

    def _copied(self, array: Any, dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.bfloat16 and array.dtype.itemsize == 2:
            return torch.from_numpy(array.view("int16")).view(dtype).clone()
        return torch.from_numpy(array).to(dtype, copy=True)


def _small(value: torch.Tensor) -> bool:
    return value.nbytes <= _COPIED and value.dtype is not torch.bfloat16
