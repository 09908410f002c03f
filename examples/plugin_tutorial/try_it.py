"""Optimise a small network with the tutorial's plugin alone, and show the receipt."""

from __future__ import annotations

import torch


def network() -> torch.nn.Module:
    """Convolutions with batch norms, in evaluation mode with running statistics that are not trivial."""
    layers: list[torch.nn.Module] = []
    channels = 3
    for width in (16, 32, 32):
        layers += [
            torch.nn.Conv2d(channels, width, 3, padding=1),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
        ]
        channels = width
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 32, 32))
    return model.eval()


def main() -> None:
    # --8<-- [start:use]
    import kpt
    from kpt_plugin_tutorial import hooks

    model = kpt.optimize(network(), torch.randn(1, 3, 64, 64), plugins=["cpu", hooks])
    print(kpt.report(model))
    # --8<-- [end:use]


if __name__ == "__main__":
    main()
