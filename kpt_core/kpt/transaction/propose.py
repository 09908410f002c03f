"""Stage 3: ask every plugin what it offers for this observation."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kpt import graph_kernels, kernels, plugins
from kpt.error_text import summary
from kpt.interruption import deadline
from kpt.plugins.validation import field_fault
from kpt.specs import LEVELS, PassSpec, Phase, PolicySpec, Skip, Variant
from kpt.transaction import forward_graph
from kpt.transaction.plan import Candidate, Plan, Proposals, plain

if TYPE_CHECKING:
    from kpt.specs import Level
    from kpt.transaction.observe import Observation

#: What the names of quantised dtypes begin with.
_QUANTISED = ("int", "uint", "float8", "float4")
#: More variants than any pass has; what an endless ``propose`` runs into.
_VARIANTS = 1000


def propose(observation: Observation, registry: Any) -> Proposals:
    """Candidates of all passes, precision policies and kernels that may serve here, and all skips.

    An exception in one plugin's ``propose`` loses only that proposal.
    """
    proposals = Proposals()
    for hook in ("kpt_passes", "kpt_precision_policies"):
        for registered in registry.specs(hook):
            _propose_one(registered, observation, proposals)
    _propose_kernels(observation, registry, proposals)
    return proposals


def _propose_kernels(
    observation: Observation, registry: Any, proposals: Proposals, only: Collection[str] | None = None
) -> None:
    """Kernels for what modules and functions compute, then for what is written out inline.

    ``only`` names the kernels for which the forward's graph is worth capturing, by default all.
    """
    siteless = kernels.propose(observation, registry, proposals)
    if only is not None:
        siteless = [r for r in siteless if f"{r.spec.op}/{r.spec.name}" in only]
    look = functools.partial(forward_graph.look, observation, registry)
    graph_kernels.propose(siteless, observation, registry, proposals, look)


def _propose_one(registered: Any, observation: Observation, proposals: Proposals) -> None:
    spec: PassSpec | PolicySpec = registered.spec
    phase = spec.phase if isinstance(spec, PassSpec) else "precision"
    reason = unfit(spec, observation)
    if reason is not None:
        proposals.skip(spec.name, registered.plugin, phase, reason)
        return
    try:
        behaviour = plugins.instantiate(spec.entry)
        # One that hangs must not take the time of all others.
        with deadline(max(5.0, 0.3 * observation.budget_left)):
            offered = list(_checked(behaviour.propose(observation, observation.hardware)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything; it loses its own proposal only
        proposals.skip(spec.name, registered.plugin, phase, f"propose raised {summary(error)}")
        return
    if not offered:
        proposals.skip(spec.name, registered.plugin, phase, "nothing to offer")
    for offer in offered:
        if isinstance(offer, Skip):
            proposals.skip(spec.name, registered.plugin, phase, offer.reason)
            continue
        level = _level(offer, spec.level)
        if _above(level, observation):
            proposals.skip(f"{spec.name}:{offer.name}", registered.plugin, phase, f"needs level={level!r}")
            continue
        proposals.candidates.append(_candidate(registered, offer, phase))


def _candidate(registered: Any, variant: Variant, phase: Phase) -> Candidate:
    spec = registered.spec
    return Candidate(
        variant=variant,
        phase=phase,
        plugin=registered.plugin,
        source=spec.name,
        make=functools.partial(plugins.instantiate, spec.entry),
        level=_level(variant, spec.level),
        provides=frozenset(getattr(spec, "provides", ())),
        requires=frozenset(getattr(spec, "requires", ())),
        conflicts=frozenset(spec.conflicts),
        priority=spec.priority,
    )


def _level(variant: Variant, declared: Level) -> Level:
    """The level by whose rules a variant is judged: what computes in integers or in fp8 quantises, whatever
    its plugin calls it. No eager model in such a dtype tells how large an error is in order."""
    if variant.compute_dtype is not None and variant.compute_dtype.startswith(_QUANTISED):
        return "aggressive"
    return variant.level or declared


def unfit(spec: Any, observation: Observation) -> str | None:
    """Why a spec does not apply to this observation at all, or None."""
    if observation.mode not in getattr(spec, "modes", (observation.mode,)):
        return f"not for {observation.mode}"
    if spec.hardware and not {observation.hardware.name, observation.device_type} & set(spec.hardware):
        return f"needs {' or '.join(spec.hardware)}; this is {observation.hardware.name}"
    if _above(spec.level, observation):
        return f"needs level={spec.level!r}"
    return None


def _checked(offered: Any) -> Iterable[Variant | Skip]:
    if isinstance(offered, (Variant, Skip)):
        raise TypeError(f"propose returned one {type(offered).__name__}; expected an iterable of them")
    for number, offer in enumerate(offered or ()):
        if not isinstance(offer, (Variant, Skip)):
            raise TypeError(f"propose returned {type(offer).__name__}; expected Variant or Skip")
        fault = _fault(offer)
        if fault:
            name = getattr(offer, "name", "")
            raise ValueError(
                f"{type(offer).__name__} {name!r}: {fault}" if name else f"{type(offer).__name__}: {fault}"
            )
        if isinstance(offer, Variant):
            plain(offer.params)
        if number >= _VARIANTS:
            raise ValueError(f"more than {_VARIANTS} variants; is it endless?")
        yield offer


def _fault(offer: Variant | Skip) -> str:
    """What is wrong with a field of ``offer``, or an empty string."""
    for field in fields(offer):
        value = getattr(offer, field.name)
        if field.name == "params":
            fault = (
                ""
                if isinstance(value, Mapping)
                else f"params={value!r} is a {type(value).__name__}; write a dict"
            )
        elif field.name == "name":
            right = isinstance(value, str) and value and value.isprintable()
            fault = (
                "" if right else f"name={value!r} is not a name; write a text that can be printed on a line"
            )
        elif field.name == "setup_seconds":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            right = number and math.isfinite(value) and value >= 0
            fault = "" if right else f"setup_seconds={value!r} is not a number of seconds"
        elif field.name == "compile_ratio":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            right = number and math.isfinite(value) and value > 0
            fault = "" if right else f"compile_ratio={value!r} is not a positive number"
        else:
            fault = field_fault(field.name, str(field.type), value)
        if fault:
            return fault
    return ""


def rebuild(
    data: dict[str, Any], observation: Observation, registry: Any
) -> tuple[Plan, list[dict[str, str]]]:
    """The plan of a recipe, from the plugins that are installed here, and what was skipped.

    A recipe only chooses. What a step promises and how it is judged (its level, dtype, sites, whether it
    derives copies) is what its plugin offers here and now, never what the file says.

    Raises:
        RecipeError: a step names a plugin, pass or kernel that is not here or does not apply, a variant
            that is not offered here, or one beyond the level that was asked for.
    """
    from kpt.transaction.recipe import RecipeError, variant_of

    steps: list[Candidate] = []
    offered = Proposals()
    for step in data["steps"]:
        variant = variant_of(step["variant"])
        if variant.level is not None and _above(variant.level, observation):
            raise RecipeError(f"{step['source']}:{variant.name} needs level={variant.level!r}")
        passes = {(registered.spec.name, registered.plugin) for registered in registry.specs("kpt_passes")}
        if step["phase"] == "kernels" and (step["source"], step.get("plugin")) not in passes:
            if not offered.candidates:
                _propose_kernels(observation, registry, offered, {s["source"] for s in data["steps"]})
            found = [
                c for c in offered.candidates if c.source == step["source"] and c.plugin == step["plugin"]
            ]
            if not found or found[0].variant.sites != variant.sites:
                raise RecipeError(f"kernel {step['source']} has no such sites here")
            left_out = variant.params.get("left_out", ())
            if not isinstance(left_out, list) and left_out or not all(isinstance(k, str) for k in left_out):
                raise RecipeError(f"what kernel {step['source']} leaves out is malformed in the recipe")
            found[0].left_out.update(left_out)
            steps.append(found[0])
            continue
        steps.append(_rebuilt(step, variant, observation, registry))
    return Plan.of(steps), []


def _rebuilt(step: dict[str, Any], variant: Variant, observation: Observation, registry: Any) -> Candidate:
    """What the plugin offers now under the name and with the parameters of a recipe's variant."""
    from kpt.transaction.recipe import RecipeError

    hook = "kpt_precision_policies" if step["phase"] == "precision" else "kpt_passes"
    for registered in registry.specs(hook):
        spec = registered.spec
        if spec.name != step["source"] or registered.plugin != step.get("plugin"):
            continue
        proposals = Proposals()
        _propose_one(registered, observation, proposals)
        for candidate in proposals.candidates:
            if candidate.phase == step["phase"] and _same_choice(candidate.variant, variant):
                return candidate
        reasons = "; ".join(skip["reason"] for skip in proposals.skipped)
        raise RecipeError(
            f"{spec.name} does not offer {variant.name} with these parameters here"
            + (f" ({reasons})" if reasons else "")
        )
    raise RecipeError(f"{step['source']} of plugin {step.get('plugin')!r} is not installed")


def _same_choice(offered: Variant, stored: Variant) -> bool:
    return offered.name == stored.name and plain(offered.params) == plain(stored.params)


def _above(level: str, observation: Observation) -> bool:
    return LEVELS.index(level) > LEVELS.index(observation.level)
