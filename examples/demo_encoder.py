"""A trained sentence encoder on real sentences, before and after `kpt.optimize`.

Shows latency (one sentence a call), throughput (batches of eight, padded), what became of the similarity
scores, and the receipt: what was tried, kept, rejected and why.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

import kpt
from side_by_side import race, ratio
from trained_models import quiet, sentence_encoder, sentences, terminal

BATCH = 8


def tokenised(tokenizer: Any, texts: list[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of ``size`` texts, each padded to its longest."""
    return [
        dict(tokenizer(texts[start : start + size], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), size)
    ]


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence vectors [batch, 384] of length one: the mean over the tokens that are not padding."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


def similarities(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Cosine similarity of every sentence with every other, [sentences, sentences]."""
    vectors = torch.cat([embed(model, batch) for batch in batches])
    return vectors @ vectors.T


def nearest(scores: torch.Tensor) -> torch.Tensor:
    """For each sentence, the index of the one that is most like it."""
    return scores.clone().fill_diagonal_(-1.0).argmax(1)


def examples(singles: list[Any], batches: list[Any]) -> Iterator[dict[str, torch.Tensor]]:
    """What the optimiser is shown: both kinds of call; plans are timed by the commoner one, batches."""
    yield from singles[:2]
    yield from batches[:4]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", default="production", choices=("exact", "production", "aggressive"))
    parser.add_argument("--budget", type=float, default=100.0, help="seconds to search (default 100)")
    parser.add_argument("--seconds", type=float, default=12.0, help="seconds for each measurement")
    arguments = parser.parse_args()
    quiet()
    console = terminal()

    model, tokenizer = sentence_encoder()
    texts = sentences()
    singles, batches = tokenised(tokenizer, texts, 1), tokenised(tokenizer, texts, BATCH)
    original = copy.deepcopy(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"all-MiniLM-L6-v2, {parameters / 1e6:.1f}M parameters, {len(texts)} sentences of "
        f"{min(b['input_ids'].shape[1] for b in singles)} to {max(b['input_ids'].shape[1] for b in singles)} "
        f"tokens, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(f"optimising for at most {arguments.budget:.0f} s at level {arguments.level} …")
    started = time.perf_counter()
    model = kpt.optimize(
        model,
        examples(singles, batches),
        level=arguments.level,
        budget=arguments.budget,
        dynamic_shapes={
            name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask", "token_type_ids")
        },
    )
    spent = time.perf_counter() - started
    console.print(kpt.report(model))

    before, after = similarities(original, batches), similarities(model, batches)
    table = Table(title="The sentence encoder, before and after")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("ratio (95 %)", justify="right")
    contenders = {"before": lambda batch: embed(original, batch), "after": lambda batch: embed(model, batch)}
    for title, calls in (("one sentence a call", singles), (f"{BATCH} sentences a call", batches)):
        times = race(contenders, lambda n, calls=calls: calls[n % len(calls)], seconds=arguments.seconds)
        middle = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
        gain = str(ratio(times["before"], times["after"]))
        table.add_row(
            f"latency, {title}", f"{middle['before'] * 1e3:.2f} ms", f"{middle['after'] * 1e3:.2f} ms", gain
        )
        per_second = {name: 1 / (len(calls) * sum(t) / len(t) / len(texts)) for name, t in times.items()}
        table.add_row(
            f"throughput, {title}", f"{per_second['before']:.0f}/s", f"{per_second['after']:.0f}/s", ""
        )
    console.print(table)
    same = int((nearest(before) == nearest(after)).sum())
    console.print(
        f"similarity scores: largest difference {float((before - after).abs().max()):.2e}; "
        f"the most similar sentence is the same for {same} of {len(texts)}"
    )
    for index in (0, 4, 12):
        console.print(
            f"  “{texts[index]}” ~ “{texts[int(nearest(after)[index])]}” "
            f"{float(before[index, nearest(before)[index]]):.4f} → "
            f"{float(after[index, nearest(after)[index]]):.4f}"
        )
    original_again = similarities(kpt.restore(model), batches)
    console.print(
        f"optimised in {spent:.0f} s; restored: "
        + ("bit for bit the original" if torch.equal(original_again, before) else "NOT the original")
    )


if __name__ == "__main__":
    main()
