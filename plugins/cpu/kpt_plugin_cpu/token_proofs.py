"""Whether an operation of a captured graph treats every token by itself, found out by trying it.

A token tensor is [B, S, ...], or [B*S, ...]; packed, it is [1, T, ...], or [T, ...], and has the tokens that
count alone. An operation may run packed if what it makes of a selection of tokens is the same selection of
what it makes of all of them. That is tried once for each kind of call with random numbers, for sizes of which
no two are equal, so that no table of operations is needed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from kpt.compiling import value_of
from kpt_plugin_cpu.packed_weights import of_the_call

#: Batch and length of each trial, where the graph is captured for any, and the share of tokens that count.
_TRIALS = ((2, 5, 0.7), (3, 7, 0.6), (4, 6, 0.5))
#: Elements of one tensor in a trial at most, and of a weight that random numbers take the place of.
_LARGEST, _DRAWN = 1 << 24, 1 << 22
#: Largest relative difference that the order of summation makes, in the dtypes it depends on.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 4e-3}


#: Where operations are known to check what they are given, and who wants weights in a form of its own.
_CHECKED = ("aten", "prims")
_PREPARED = ("onednn", "mkldnn", "kpt_cpu", "quantized_decomposed")


class Unknown(Exception):
    """A shape or a value is not one that a trial can be made with."""


@dataclass(frozen=True)
class Axes:
    """Batch and length of a graph: symbols, or numbers where it is captured for one size."""

    batch: Any
    length: Any
    trial: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, length and tokens that count in this trial, of which no two are equal where that can be.

        Raises:
            Unknown: too few tokens for a trial.
        """
        batch, length, share = _TRIALS[self.trial]
        batch = self.batch if isinstance(self.batch, int) else batch
        length = self.length if isinstance(self.length, int) else length
        for tokens in range(int(batch * length * share), 1, -1):
            if tokens not in (batch, length):
                return batch, length, tokens
        raise Unknown(f"a batch of {batch} with {length} positions is too small for a trial")

    def layout(self, value: Any) -> str:
        """``rows`` of [B, S, ...], ``flat`` of [B*S, ...], else empty."""
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return ""
        sizes = [expression(size) for size in value.shape[:2]]
        if len(sizes) == 2 and sizes[0] == self.batch and sizes[1] == self.length:
            return "rows"
        return "flat" if sizes and sizes[0] == self.batch * self.length else ""

    def across(self, value: torch.Tensor) -> bool:
        """Whether ``value`` is [1 or B, 1 or S, ...], as numbers for positions and for rows are."""
        sizes = [expression(size) for size in value.shape[:2]]
        if len(sizes) < 2 or value.layout is not torch.strided or sizes == [1, 1]:
            return False
        return sizes[0] in (1, self.batch) and sizes[1] in (1, self.length)

    def depends(self, size: Any) -> bool:
        """Whether a size is computed from the two axes, for all that is known."""
        return bool({self.batch, self.length} & set(getattr(expression(size), "free_symbols", ())))

    def number(self, size: Any) -> int:
        """``size`` in a trial."""
        found = expression(size)
        if hasattr(found, "subs"):
            numbers = zip((self.batch, self.length), self.sizes)
            found = found.subs({each: number for each, number in numbers if not isinstance(each, int)})
        try:
            return int(found)
        except TypeError:
            raise Unknown(f"{size} is another symbolic size") from None

    def packed(self, size: Any) -> str | None:
        """What takes the place of a size in a packed call: ``one``, ``tokens``, or itself (None)."""
        found = expression(size)
        if isinstance(found, int):
            return None
        if found == self.batch:
            return "one"
        if found in (self.length, self.batch * self.length):
            return "tokens"
        if self.depends(size):
            raise Unknown(f"{size} is no size of packed tokens")
        return None


def expression(size: Any) -> Any:
    """A size as a number or an expression of symbols."""
    if isinstance(size, torch.SymInt):
        found = size.node.shape_env.simplify(size.node.expr)
        return int(found) if found.is_Integer else found
    return size


class Proofs:
    """What was tried, by operation and kinds of arguments; ``inputs`` holds what the graph is called with.

    Weights are never tokens, whatever their sizes.
    """

    def __init__(self, axes: Axes, inputs: Mapping[fx.Node, Any]) -> None:
        self.axes = axes
        self._actual: dict[fx.Node, Any] = dict(inputs)
        self._weights = {
            node
            for node, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.dim() <= 2 and not of_the_call(node)
        }
        self._known: dict[Any, bool] = {}

    def form(self, node: fx.Node) -> str:
        """``rows`` or ``flat`` of tokens, ``across`` of what is added up with them, else empty."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or node in self._weights:
            return ""
        return self.axes.layout(value) or ("across" if self.axes.across(value) else "")

    def holds(self, node: fx.Node) -> bool:
        """Whether ``node`` makes token tensors of token tensors, each token by itself."""
        try:
            key = self._key(node)
            if key not in self._known:
                before = self.axes
                try:
                    self._known[key] = all(self._tried(node, number) for number in range(len(_TRIALS)))
                finally:
                    self.axes = before
            return self._known[key]
        except Unknown:
            return False

    def _key(self, node: fx.Node) -> Any:
        def described(value: Any) -> str:
            if isinstance(value, fx.Node):
                return self.form(value) + described(value_of(value))
            if isinstance(value, torch.Tensor):
                return f"{value.dtype}{[str(expression(size)) for size in value.shape]}{value.layout}"
            if isinstance(value, (tuple, list)):
                return f"{type(value).__name__}{[described(each) for each in value]}"
            return repr(expression(value))

        target = node.target if isinstance(node.target, str) else id(node.target)
        arguments = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda each: described(each))
        return node.op, target, repr(arguments)

    def _tried(self, node: fx.Node, number: int) -> bool:
        self.axes = replace(self.axes, trial=number)
        home = _home(node)
        if home not in ("torch", "prepared"):
            return False
        generator = torch.Generator().manual_seed(number)
        batch, length, tokens = self.axes.sizes
        chosen = torch.randperm(batch * length, generator=generator)[:tokens].sort().values
        whole, some = {}, {}
        for argument in node.all_input_nodes:
            value = value_of(argument)
            if home == "prepared" and isinstance(value, torch.Tensor) and not self.form(argument):
                whole[argument] = some[argument] = self._as_it_is(argument)
            else:
                whole[argument], some[argument] = self._values(argument, value, chosen, generator)
        state = torch.random.get_rng_state()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                expected = self._called(node, whole)
                got = self._called(node, some)
                if not torch.equal(torch.random.get_rng_state(), state):
                    return False  # other random numbers for each token
        except Unknown:
            raise
        except Exception:  # noqa: BLE001 - an operation that takes no fewer tokens
            return False
        expected, got = tree_leaves(expected), tree_leaves(got)
        recorded = tree_leaves(value_of(node))
        if not len(expected) == len(got) == len(recorded):
            return False
        tensors = [part for part in got if isinstance(part, torch.Tensor)]
        if any(part.is_floating_point() and not _varies(part) for part in tensors):
            return False  # weights that are zero hide what they are multiplied with
        for value, full, part in zip(recorded, expected, got, strict=True):
            layout = self.axes.layout(value)
            if not _same(selected(full, layout, chosen), part, 1 if layout == "flat" else 2):
                return False
        return True

    def _values(
        self, node: fx.Node, value: Any, chosen: torch.Tensor, generator: torch.Generator
    ) -> tuple[Any, Any]:
        """What an argument is in a trial: of all tokens, and of the chosen ones."""
        if isinstance(value, (tuple, list)):
            pairs = [self._drawn(each, self.axes.layout(each), chosen, generator) for each in value]
            return type(value)(pair[0] for pair in pairs), type(value)(pair[1] for pair in pairs)
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            packed = self.axes.packed(value)
            number = self.axes.number(value)
            return number, {"one": 1, "tokens": len(chosen), None: number}[packed]
        if not isinstance(value, torch.Tensor):
            raise Unknown(f"an argument is a {type(value).__name__}")
        form = self.form(node)
        if not form and math.prod(map(self.axes.number, value.shape)) > _DRAWN:
            weight = self._as_it_is(node)
            return weight, weight
        return self._drawn(value, form, chosen, generator)

    def _drawn(
        self, value: Any, form: str, chosen: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = [self.axes.number(size) for size in value.shape]
        if math.prod(shape) > _LARGEST or value.layout is not torch.strided or value.is_quantized:
            raise Unknown("a tensor is too large for a trial, or not a plain one")
        whole = _random(shape, value.dtype, generator, self.axes.trial)
        if form and value.dtype.is_floating_point:  # a sum over tokens that is added shows beside small ones
            flat = whole.reshape(-1, *shape[2 if form != "flat" else 1 :])
            flat[:: 3 + self.axes.trial] *= 8.0 if value.dtype is torch.float16 else 1e3
        if form in ("rows", "flat"):
            return whole, selected(whole, form, chosen)
        if form == "across":
            return whole, selected(whole.expand(*self.axes.sizes[:2], *whole.shape[2:]), "rows", chosen)
        if any(self.axes.depends(size) for size in value.shape):
            raise Unknown("a tensor varies with the position, and not as tokens do")
        return whole, whole

    def _as_it_is(self, node: fx.Node) -> Any:
        """What a weight is, or what the graph makes of weights."""
        if node not in self._actual:
            if node.op == "get_attr" and node.graph.owning_module is not None:
                self._actual[node] = operator.attrgetter(str(node.target))(node.graph.owning_module)
            elif node.op.startswith("call_") and node.op != "call_module":
                inputs = {each: self._as_it_is(each) for each in node.all_input_nodes}
                with torch.no_grad():
                    self._actual[node] = self._called(node, inputs)
        value = self._actual.get(node)
        if value is None or isinstance(value, FakeTensor):
            raise Unknown(f"{node.name} is not known before the call")
        return value

    def _called(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)


def selected(value: torch.Tensor, layout: str, tokens: torch.Tensor) -> torch.Tensor:
    """The packed form of a token tensor; raises `Unknown` for others."""
    if layout == "flat":
        return value.index_select(0, tokens)
    if layout == "rows":
        return value.flatten(0, 1).index_select(0, tokens).unsqueeze(0)
    raise Unknown("not a token tensor")


def _home(node: fx.Node) -> str:
    """Whose operation it is: ``torch``, ``prepared`` (it takes weights in a form of its own), or empty."""
    target = node.target
    if node.op == "call_method":
        return "torch"
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        space = name.partition("::")[0]
        return "torch" if space in _CHECKED else "prepared" if space in _PREPARED else ""
    module = getattr(target, "__module__", None) or "torch"
    return "torch" if module.partition(".")[0] in ("torch", "_operator", "builtins", "math") else ""


def _varies(value: torch.Tensor) -> bool:
    return value.numel() > 0 and bool((value != value.flatten()[0]).any())


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator, trial: int) -> torch.Tensor:
    """Normal numbers; integers 0 and 1, mostly 1 in later trials."""
    if dtype.is_floating_point and dtype in _CLOSE:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype is torch.bool or not (dtype.is_floating_point or dtype.is_complex):
        return (torch.rand(shape, generator=generator) < (0.5, 0.95, 0.8)[trial]).to(dtype)
    raise Unknown(f"{dtype} numbers are not drawn")


def _same(expected: torch.Tensor, got: Any, axes: int) -> bool:
    """Whether two packed forms agree; the first ``axes`` axes tell tokens apart."""
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    close = _CLOSE.get(got.dtype)
    if close is None:
        return torch.equal(expected, got)
    finite = torch.where(torch.isfinite(expected), expected, 0.0).abs()
    own = finite.flatten(axes).amax(-1) if finite.dim() > axes else finite
    own = own.reshape(own.shape + (1,) * (finite.dim() - own.dim()))
    # Each token by its own size: what leaks from a large one shows in a small one.
    bound = close * (own + finite + 1e-7 * float(finite.max() if finite.numel() else 0.0))
    agree = (got == expected) | (got.isnan() & expected.isnan()) | ((got - expected).abs() <= bound)
    return bool(agree.all())
