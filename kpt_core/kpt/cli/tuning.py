"""``kpt bench --tune``: let kernels find their block sizes on the device that is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kpt.cli.output import CommandError, note, usage

if TYPE_CHECKING:
    from kpt.plugins import Registry


def tune(registry: Registry, names: tuple[str, ...], seconds: float, folder: str | None) -> dict[str, Any]:
    """Run every tuner that a kernel names, each once; returns what each chose, by tuner."""
    from kpt.plugins import load

    tuners = dict.fromkeys(
        registered.spec.tuner for registered in registry.specs("kpt_kernels") if registered.spec.tuner
    )
    if not tuners:
        raise CommandError(
            "no-tuner",
            "No installed plugin has kernels that can be tuned.",
            "Install one: pip install kpt-plugin-triton",
        )
    found: dict[str, Mapping[str, Any]] = {}
    for tuner in tuners:
        try:
            found[tuner] = load(tuner)(names, seconds, folder, note)
        except ValueError as error:
            raise usage(
                f"--contenders {','.join(names)}: {error}", "Name kernels, or none for all."
            ) from error
        except RuntimeError as error:
            raise CommandError(
                "no-device", str(error), "Run it on the machine that the kernels will run on."
            ) from error
    return found
