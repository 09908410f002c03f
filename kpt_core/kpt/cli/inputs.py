"""Example inputs and dynamic dimensions, as they are written on the command line."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt.cli.output import CommandError, note, usage
from kpt.modelfiles import pickles
from kpt.plugins.status import one_line

if TYPE_CHECKING:
    import torch

    from kpt.specs import Adapter

_SPEC = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,\s]*)\](?::(?P<values>\S+))?", re.ASCII
)
_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)")
_EXAMPLE = "for instance --inputs 'input_ids=int64[1,128]:0..30522 attention_mask=int64[1,128]:ones'"
_FILES = (".pt", ".pth", ".safetensors", ".npz", ".npy", ".json")
_ELEMENT_LIMIT = 2**31
_SAVE = {
    ".json": 'Write {"NAME": [[…]]} or {"NAME": {"dtype": "int64", "data": [[…]]}}, or a list of these.',
    ".npz": "Save arrays of numbers with numpy.savez(path, NAME=array).",
    ".npy": "Save one array of numbers with numpy.save.",
    ".safetensors": "Save a dict of tensors with safetensors.torch.save_file.",
}


def dynamic_shapes(texts: Sequence[str]) -> dict[str, dict[int, str]] | None:
    """``["input_ids:0=batch,1=sequence"]`` as ``{"input_ids": {0: "batch", 1: "sequence"}}``."""
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        for part in text.split():
            name, colon, axes = part.partition(":")
            pairs = [pair.partition("=") for pair in axes.split(",")]
            if not colon or not name or not all(_is_axis(axis) and symbol for axis, _, symbol in pairs):
                raise usage(
                    f"--dynamic {part!r} cannot be read.",
                    "Write NAME:AXIS=SYMBOL,… as in input_ids:0=batch,1=sequence.",
                )
            found.setdefault(name, {}).update({int(axis): symbol for axis, _, symbol in pairs})
    return found or None


def _is_axis(text: str) -> bool:
    return text.removeprefix("-").isdigit()


def example_inputs(texts: Sequence[str], seed: int = 0) -> Any:
    """What `kpt.optimize` takes as example inputs, from specs or from one file."""
    files = [text for text in texts if text.endswith(_FILES) and "[" not in text]
    if files:
        if len(texts) > 1:
            raise usage("--inputs takes one file, or specs.", "Put several examples as a list into one file.")
        return _from_file(Path(files[0]))
    items = [item for text in texts for item in re.split(r"[\s;]+(?![^\[]*\])", text) if item]
    return _from_specs(items, seed)


def _from_specs(items: list[str], seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    named: dict[str, torch.Tensor] = {}
    positional: list[torch.Tensor] = []
    for item in items:
        match = _SPEC.fullmatch(item)
        if match is None:
            known = f", or name a file: {', '.join(_FILES)}" if Path(item).is_file() else ""
            raise usage(
                f"--inputs {item!r} cannot be read.", f"Write NAME=DTYPE[SHAPE]:VALUES, {_EXAMPLE}{known}."
            )
        tensor = _tensor(item, match["dtype"], match["shape"], match["values"], generator)
        if match["name"] is None:
            positional.append(tensor)
        elif match["name"] in named:
            raise usage(f"--inputs names {match['name']!r} twice.")
        else:
            named[match["name"]] = tensor
    if named and positional:
        raise usage("--inputs mixes named and unnamed tensors.", "Name all of them, or none.")
    if named:
        return named
    return tuple(positional)


def _tensor(
    item: str, dtype_name: str, shape_text: str, values: str | None, generator: torch.Generator
) -> torch.Tensor:
    import torch

    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise usage(
            f"--inputs {item!r}: {dtype_name!r} is not a dtype.",
            "Known are float32, bfloat16, int64, bool, …",
        )
    if dtype_name.startswith(("qint", "quint")):
        raise usage(
            f"--inputs {item!r}: quantised tensors need a scale.", "Save one example with torch.save."
        )
    shape = tuple(int(size) for size in shape_text.split(",") if size.strip())
    elements = 1
    for size in shape:
        elements *= size
    if elements > _ELEMENT_LIMIT:
        raise usage(f"--inputs {item!r} has {elements} elements.", "Is the shape meant?")
    if values in ("ones", "zeros"):
        return (torch.ones if values == "ones" else torch.zeros)(shape, dtype=dtype)
    limits = _RANGE.fullmatch(values) if values is not None else None
    if values is not None and limits is None:
        raise usage(f"--inputs {item!r}: {values!r} is neither LOW..HIGH nor ones nor zeros.", _EXAMPLE)
    if limits is not None:
        _check_limits(item, dtype, limits)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_complex and limits is None:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        if limits is None:
            return torch.randn(shape, generator=generator).to(dtype)
        low, high = float(limits[1]), float(limits[2])
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
    if dtype.is_complex:
        raise usage(f"--inputs {item!r}: complex numbers have no range.", "Leave it out.")
    if limits is None:
        raise usage(f"--inputs {item!r}: integers need their range LOW..HIGH (HIGH excluded).", _EXAMPLE)
    low, high = int(limits[1]), int(limits[2])
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def _check_limits(item: str, dtype: torch.dtype, limits: re.Match[str]) -> None:
    """Raise a usage error for a range that ``dtype`` cannot hold, or that holds nothing."""
    import torch

    if dtype == torch.bool or dtype.is_complex:
        kind = "flags" if dtype == torch.bool else "complex numbers"
        raise usage(f"--inputs {item!r}: {kind} have no range.", "Leave it out.")
    info: Any = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if not dtype.is_floating_point and ("." in limits[1] or "." in limits[2]):
        raise usage(f"--inputs {item!r}: the bounds of a range of {dtype} are whole numbers.")
    number = float if dtype.is_floating_point else int
    low, high = number(limits[1]), number(limits[2])
    if high <= low:
        raise usage(f"--inputs {item!r}: the range {low}..{high} is empty.", "Write the lower bound first.")
    # HIGH is excluded of whole numbers; randint draws int64 whatever the dtype is.
    most = info.max if dtype.is_floating_point else min(info.max + 1, 2**63 - 1)
    if low < info.min or high > most:
        raise usage(f"--inputs {item!r}: the range {low}..{high} goes beyond what {dtype} holds.")


def _from_file(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise usage(f"--inputs {path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".npz", ".npy"):
            return _from_numpy(path)
        if path.suffix == ".json":
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        # Tensors in containers need no code; a pickle that does is no list of inputs.
        return torch.load(path, map_location="cpu", weights_only=True)
    except CommandError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):  # torch's message asks to run whatever is in it
            named = ", ".join(pickles.inspect(path).globals) or "none"
            reason = f"it is a pickle that is more than tensors; globals: {named}"
        else:
            reason = one_line(error) if path.stat().st_size else "it is empty"
        raise CommandError(
            "bad-inputs",
            f"--inputs {path} cannot be read: {reason}.",
            _SAVE.get(
                path.suffix, "Save a tensor, a tuple, a dict of tensors, or a list of these with torch.save."
            ),
        ) from error


def _from_numpy(path: Path) -> Any:
    """The arrays of an archive by name, or one array; object arrays, which are pickles, are refused."""
    import numpy
    import torch

    found = numpy.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        return torch.from_numpy(found)
    return {name: torch.from_numpy(found[name]) for name in found.files}


def _from_json(value: Any) -> Any:
    """A JSON object is one example by name; an array of objects is several examples."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return [_from_json(entry) for entry in value]
    if not isinstance(value, Mapping) or not value:
        raise ValueError("expected an object of arrays by name, or an array of such objects")
    return {name: _json_tensor(name, entry) for name, entry in value.items()}


def _json_tensor(name: str, entry: Any) -> torch.Tensor:
    import torch

    dtype = None
    if isinstance(entry, dict):
        if set(entry) != {"data", "dtype"}:
            raise ValueError(
                f"{name!r} is an object of {', '.join(entry) or 'nothing'}; expected data and dtype"
            )
        dtype = getattr(torch, str(entry["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name!r}: {entry['dtype']!r} is not a dtype")
        entry = entry["data"]
    try:
        return torch.tensor(entry, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name!r} is no array of numbers ({one_line(error)})") from error


def default_inputs(model: torch.nn.Module, plugins: Any) -> Any:
    """Example inputs that the model's library knows, or that the first layer suggests.

    Raises a usage error where neither leads to a call that the model runs on.
    """
    import inspect

    from kpt.cli.guesses import guessed_inputs
    from kpt.judge.calls import as_calls
    from kpt.modelfiles.adapters import adapters_for
    from kpt.plugins.isolation import attempt

    def ask(adapter: Adapter) -> dict[str, Any]:
        modes = [(module, module.training) for module in model.modules()]
        try:
            found = adapter.example_inputs(model)
        finally:
            for module, training in modes:
                module.training = training
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            raise TypeError(f"its example_inputs returned {type(found).__name__}; expected a mapping or None")
        as_calls(dict(found))
        inspect.signature(model.forward).bind(**found)
        return dict(found)

    for registered, adapter in adapters_for(model, plugins, note):
        outcome = attempt(ask, adapter)
        if outcome.error is not None:
            note(f"{registered.owner} has no example inputs: {one_line(outcome.error)}")
        elif outcome.value:
            note(f"The example inputs are those of {registered.owner}: {_shapes(outcome.value)}.")
            return outcome.value
    dummy = attempt(getattr, model, "dummy_inputs", None).value
    if isinstance(dummy, Mapping) and dummy:
        note("The example inputs are the model's own dummy_inputs; give real shapes with --inputs.")
        return dict(dummy)
    guessed = guessed_inputs(model)
    if guessed is not None:
        note(
            f"The example inputs are guessed from the first layer: {_shapes(guessed)}. The plan serves this "
            "shape; give yours with --inputs, and what varies with --dynamic."
        )
        return guessed
    names = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
    raise usage(
        f"{type(model).__name__} needs example inputs; its forward takes {', '.join(names) or 'no names'}.",
        f"Give them with --inputs, {_EXAMPLE}.",
    )


def _shapes(inputs: Mapping[str, Any]) -> str:
    """Inputs as one would write them for ``--inputs``."""
    return " ".join(
        f"{name}={str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
        if hasattr(value, "dtype") and hasattr(value, "shape")
        else f"{name}={type(value).__name__}"
        for name, value in inputs.items()
    )
