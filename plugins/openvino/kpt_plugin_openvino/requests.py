"""Calls of a compiled model with torch's tensors: small ones are copied, large ones share their memory."""

from __future__ import annotations

from typing import Any

import torch

#: Bytes up to which a tensor is copied into or out of the request's own memory: to set another costs more.
_COPIED = 1 << 16


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

    ``inputs`` and ``outputs`` are those of one call, and say what later ones have; where sizes are ``free``
    others may come.

    Raises:
        TypeError: numpy, through which tensors are handed over, has no such dtype.
    """

    def __init__(
        self, compiled: Any, inputs: tuple[torch.Tensor, ...], outputs: list[torch.Tensor], free: bool
    ) -> None:
        import openvino

        self._tensor = openvino.Tensor
        self._compiled = compiled
        self._free = free
        self._dtypes = [output.dtype for output in outputs]
        self._shapes = [output.shape for output in outputs]
        for value in (*inputs, *outputs):
            if value.dtype is torch.bfloat16 or value.is_complex():
                raise TypeError(f"a tensor of {value.dtype} can't be handed to OpenVINO")
        self._shared_in = [free or value.nbytes > _COPIED for value in inputs]
        self._shared_out = [free or value.nbytes > _COPIED for value in outputs]
        if len(compiled.outputs) != len(outputs):
            raise TypeError(f"OpenVINO made {len(compiled.outputs)} outputs of {len(outputs)}")
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
        raw, tensor = request.raw, self._tensor
        for number, value in enumerate(given):
            place = request.inputs[number]
            if place is not None:
                place.copy_(value.detach())
            else:
                array = value.detach().contiguous().numpy()
                raw.set_input_tensor(number, tensor(array, shared_memory=True))
        results: list[torch.Tensor] = []
        for number, own in enumerate(request.outputs):
            if own is None and not self._free:
                result = torch.empty(self._shapes[number], dtype=self._dtypes[number])
                raw.set_output_tensor(number, tensor(result.numpy(), shared_memory=True))
                results.append(result)
        raw.infer()
        if self._free:
            outputs = (torch.from_numpy(raw.get_output_tensor(n).data) for n in range(len(self._dtypes)))
            return [output.to(dtype, copy=True) for output, dtype in zip(outputs, self._dtypes)]
        shared = iter(results)
        return [next(shared) if own is None else own.clone() for own in request.outputs]
