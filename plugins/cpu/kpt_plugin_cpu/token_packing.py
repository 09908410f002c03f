"""Running what treats tokens apart for the tokens of a padded batch that count, and for no others.

The forward is captured as a graph, in which `token_graph` packs tokens around linears, norms and the like.
Which tokens count is read off the mask before each call; attention sees the batch with its padding, and its
mask. A compiler that comes after compiles the packed graph. Exact where the mask keeps padding from all other
positions, which the referee checks with padded inputs; outputs are zero where the input was padding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from kpt.compiling import CapturedForward, FurtherInputs
from kpt.specs import Skip, Variant, replace_forward
from kpt_plugin_cpu import estimates
from kpt_plugin_cpu.inductor import declared_dims, dims_of
from kpt_plugin_cpu.masks import is_flags, sequence_masks
from kpt_plugin_cpu.token_graph import MARK, TokenGraph

if TYPE_CHECKING:
    from kpt.judge.leafspecs import LeafSpec
    from kpt.specs import HardwareProfile, Observation, Undo

TOKENS, PLACES = "kpt_tokens", "kpt_places"
#: The share of the positions that has to be padding.
_WORTH = 0.1
#: Share of the time of a compiler that capturing and trying the operations of the graph takes.
_SHARE = 0.2


class PackTokens:
    """Replaces the root's forward by its captured graph with packed tokens. Live weights are read."""

    def __init__(self) -> None:
        self.graphs = TokenGraph()
        self.dropped = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        masks = [(name, kept) for kept in (1, 0) for name in sequence_masks(observation, kept=kept)]
        if not masks:
            yield Skip("no input is a padding mask")
            return
        name, counting = masks[0]
        leaf = next(leaf for leaf in observation.spec.leaves if leaf.name == name)
        given = [call.kwargs[name] for call in observation.calls]
        share = 1.0 - sum(float(_counts(mask, counting).float().mean()) for mask in given) / len(given)
        if share < _WORTH:
            yield Skip(f"{share:.0%} of the positions are padding at the end of rows: too few to gain from")
            return
        like = [
            each.name
            for each in observation.spec.leaves
            if each.name != name
            and each.shape[:2] == leaf.shape
            and all(each.dims.get(axis) == leaf.dims.get(axis) for axis in (0, 1))
        ]
        why = _of_another_length(observation, leaf, counting)
        if why:
            yield Skip(why)
            return
        yield Variant(
            "at their places",
            {
                "mask": name,
                "kept": counting,
                "like": like,
                "varies": sorted(leaf.dims),
                "dims": declared_dims(observation),
            },
            estimates.without_padding(observation, hardware, share),
            _SHARE * estimates.compile_seconds(observation),
            sites=("",),
            touches_mask=True,
            reproducible=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        name, kept = variant.params["mask"], variant.params["kept"]
        self.graphs.kept = kept
        further = FurtherInputs(
            functools.partial(self._read, name, kept),
            functools.partial(_marking, name, tuple(variant.params.get("like", ()))),
            {TOKENS: {0: "tokens"}, PLACES: {axis: str(axis) for axis in variant.params["varies"]}},
        )
        captured = CapturedForward(
            model.forward,
            self.graphs,
            dynamic_dims=dims_of(variant.params),
            further=further,
            label=type(model).__name__,
        )
        put_back = replace_forward(model, captured)

        def undo() -> None:
            put_back()
            captured.dispose()

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        if not self.graphs.packed:
            raise RuntimeError(f"no tokens were packed: {self.graphs.reason}")
        return self.dropped > 0

    def effect(self) -> str:
        return f"{self.graphs.packed} operations run for the tokens alone that count"

    def _read(
        self, name: str, kept: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The tokens of a call that count, and the place of each position among them."""
        mask = kwargs.get(name)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return {}
        counts = _counts(mask, kept)
        flat = counts.flatten()
        tokens = flat.nonzero().flatten()
        # Padding has the place of its row's last token: what is wrong in one row shows in no other.
        places = (flat.cumsum(0) - 1).view(mask.shape)
        if len(tokens) < mask.numel():
            self.dropped += 1
        return {TOKENS: tokens, PLACES: places}


def _of_another_length(observation: Observation, mask: LeafSpec, counting: int) -> str:
    """Which input of the mask's sizes has lengths of its own, or may have; empty where none has.

    In padding such an input holds one and the same value in all examples.
    """
    for leaf in observation.spec.leaves:
        dims = (leaf.dims.get(0), leaf.dims.get(1))
        if leaf.name == mask.name or len(leaf.shape) < 2 or dims != (mask.dims.get(0), mask.dims.get(1)):
            continue
        if leaf.shape[:2] != mask.shape:
            continue
        values = []
        for call in observation.calls:
            given, kept = call.kwargs.get(leaf.name), call.kwargs[mask.name] == counting
            if not isinstance(given, torch.Tensor) or given.shape[:2] != kept.shape:
                return f"{leaf.name} has the sizes of {mask.name}, and may have tokens of other lengths"
            values.append(given[~kept].reshape(-1, given.shape[2:].numel()))
        padding = torch.cat(values)
        if leaf.role == "mask" and any(
            not torch.equal(call.kwargs[leaf.name], call.kwargs[mask.name]) for call in observation.calls
        ):
            return f"{leaf.name} is another mask of the sizes of {mask.name}"
        if leaf.role != "mask" and padding.numel() and bool((padding != padding[:1]).any()):
            return (
                f"{leaf.name} holds different values where {mask.name} says padding: its lengths are others"
            )
    return ""


def _counts(mask: torch.Tensor, counting: int) -> torch.Tensor:
    """The positions that count, with ``counting`` in the mask: the first ones of each row, one at least.

    All of them where padding is not at the ends of rows alone.
    """
    kept = mask == counting
    if mask.shape[1] == 0:
        return kept
    lengths = kept.sum(1, keepdim=True)
    first = torch.arange(mask.shape[1], device=mask.device) < lengths
    if not torch.equal(first, kept) or not is_flags(mask):
        return torch.ones_like(kept)
    first[:, 0] = True
    return first


def _marking(name: str, like: tuple[str, ...], forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, which marks the mask of a captured call with the tokens that it is given.

    Inputs called ``like`` have the mask's batch and length.
    """

    @functools.wraps(forward)
    def marking(*args: Any, **kwargs: Any) -> Any:
        tokens, places = kwargs.pop(TOKENS, None), kwargs.pop(PLACES, None)
        if tokens is not None and torch.compiler.is_compiling():
            others = [kwargs[each] for each in like if isinstance(kwargs.get(each), torch.Tensor)]
            kwargs[name] = MARK(kwargs[name], tokens, places, others)
        return forward(*args, **kwargs)

    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return marking
    marking.__signature__ = _with_further(signature)  # type: ignore[attr-defined]
    return marking


def _with_further(signature: inspect.Signature) -> inspect.Signature:
    kinds = inspect.Parameter
    own = list(signature.parameters.values())
    open_end = [each for each in own if each.kind is kinds.VAR_KEYWORD]
    named = [each for each in own if each.kind is not kinds.VAR_KEYWORD]
    further = [kinds(each, kinds.KEYWORD_ONLY, default=None) for each in (TOKENS, PLACES)]
    return signature.replace(parameters=[*named, *further, *open_end])
