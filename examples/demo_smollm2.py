"""SmolLM2-135M on a real text, before and after `kpt.optimize`: perplexity, prefill latency, the receipt."""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch
from rich.table import Table

import kpt
from side_by_side import race, ratio
from trained_models import passage, quiet, smollm2, terminal

WINDOW = 256


def windows(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Consecutive pieces [1, up to WINDOW + 1] of ``tokens`` [n], each starting with the last one's end."""
    return [
        tokens[None, start : start + WINDOW + 1]
        for start in range(0, len(tokens) - 1, WINDOW)
        if len(tokens) - start > 2
    ]


def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """exp of the mean negative log likelihood of every token of ``tokens`` [n] but the first."""
    loss, count = 0.0, 0
    for window in windows(tokens):
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits
        loss += float(torch.nn.functional.cross_entropy(logits[0].double(), window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return math.exp(loss / count)


def next_tokens(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The model's guess for every next token, [n - 1]."""
    with torch.no_grad():
        return torch.cat([model(input_ids=window[:, :-1]).logits[0].argmax(-1) for window in windows(tokens)])


def prompts(tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Prompts of 64 to 192 tokens, cut from different places of the text."""
    lengths = (64, 96, 128, 192, 81, 150)
    step = (len(tokens) - max(lengths)) // len(lengths)
    return [{"input_ids": tokens[None, n * step : n * step + length]} for n, length in enumerate(lengths)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", default="production", choices=("exact", "production", "aggressive"))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds to search (default 120)")
    parser.add_argument("--seconds", type=float, default=25.0, help="seconds of measurement")
    arguments = parser.parse_args()
    quiet()
    console = terminal()

    model, tokenizer = smollm2()
    model.config.use_cache = False  # scoring a text needs no cache of keys and values
    tokens = tokenizer(passage(), return_tensors="pt")["input_ids"][0]
    original, calls = copy.deepcopy(model), prompts(tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"SmolLM2-135M-Instruct, {parameters / 1e6:.1f}M parameters, a text of {len(tokens)} tokens, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(f"optimising for at most {arguments.budget:.0f} s at level {arguments.level} …")
    started = time.perf_counter()
    model = kpt.optimize(
        model,
        calls,
        level=arguments.level,
        budget=arguments.budget,
        dynamic_shapes={"input_ids": {1: "sequence"}},
    )
    spent = time.perf_counter() - started
    console.print(kpt.report(model))

    def runner(which: torch.nn.Module) -> Any:
        def run(call: dict[str, Any]) -> object:
            with torch.no_grad():
                return which(**call)

        return run

    times = race(
        {"before": runner(original), "after": runner(model)},
        lambda n: calls[n % len(calls)],
        seconds=arguments.seconds,
    )
    middle = {name: sorted(samples)[len(samples) // 2] for name, samples in times.items()}
    agreement = (next_tokens(original, tokens) == next_tokens(model, tokens)).double().mean()
    table = Table(title="SmolLM2-135M, before and after")
    for column in ("", "before", "after", "ratio (95 %)"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "prefill of 64 to 192 tokens, median",
        f"{middle['before'] * 1e3:.1f} ms",
        f"{middle['after'] * 1e3:.1f} ms",
        str(ratio(times["before"], times["after"])),
    )
    table.add_row(
        f"perplexity, windows of {WINDOW} tokens",
        f"{perplexity(original, tokens):.4f}",
        f"{perplexity(model, tokens):.4f}",
        "",
    )
    table.add_row("most likely next token the same", "", f"{float(agreement):.2%}", "")
    console.print(table)
    console.print(f"optimised in {spent:.0f} s")


if __name__ == "__main__":
    main()
