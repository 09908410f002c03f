"""Masks that mask nothing are dropped and padded batches packed, where that changes no value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import applied, observe, skips, variants

from kpt_plugin_cpu.estimates import compile_seconds
from kpt_plugin_cpu.masks import DropMask
from kpt_plugin_cpu.packing import PackPadding


class Encoder(nn.Module):
    """Masked mean over embedded tokens, with a layer that mixes positions through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.project = nn.Linear(64, 64)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.project(self.embedding(input_ids))
        mask = attention_mask[:, None, None, :].bool() if attention_mask is not None else None
        heads = hidden.unflatten(-1, (4, 16)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return {"hidden": mixed.transpose(1, 2).flatten(2)}


def padded(lengths: list[int], width: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(0, 50, mask.shape) * mask, "attention_mask": mask}


DYNAMIC = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_a_mask_of_ones_is_dropped_and_any_other_is_kept():
    model = Encoder().eval()
    full, partial = padded([5, 5], 5), padded([5, 3], 5)
    (offer,) = variants(DropMask(), observe(model, [full, partial]))
    assert offer.touches_mask
    seen = []

    class Watched(Encoder):
        def forward(self, input_ids, attention_mask=None):
            seen.append(attention_mask is None)
            return super().forward(input_ids, attention_mask)

    watched = Watched().eval()
    watched.load_state_dict(model.state_dict())
    behaviour, space, undo = applied(DropMask, watched, offer)
    for call in (full, partial):
        torch.testing.assert_close(space.forward(**call)["hidden"], model(**call)["hidden"])
    assert seen == [True, False]
    assert behaviour.verify_applied(space)
    undo()
    assert "forward" not in space.__dict__
    assert skips(DropMask(), observe(model, partial))


@torch.no_grad()
def test_packing_agrees_where_the_mask_is_one_and_restores_the_shape():
    model = Encoder().eval()
    call = padded([12, 3, 4, 11, 2, 1], 12)
    offers = variants(PackPadding(), observe(model, call, dynamic_shapes=DYNAMIC))
    assert offers and offers[0].touches_mask and offers[0].predicted_gain > 1.1
    behaviour, space, undo = applied(PackPadding, model, offers[0])
    for lengths, width in (([12, 3, 4, 11, 2, 1], 12), ([2, 9], 9), ([1, 1, 1, 7], 7)):
        call = padded(lengths, width)
        got, expected = space.forward(**call)["hidden"], model(**call)["hidden"]
        assert got.shape == expected.shape
        kept = call["attention_mask"].bool()
        torch.testing.assert_close(got[kept], expected[kept])
    assert behaviour.verify_applied(space)
    undo()


@torch.no_grad()
def test_left_padding_and_full_batches_go_through_whole():
    model = Encoder().eval()
    offer = variants(PackPadding(), observe(model, padded([9, 2, 2], 9), dynamic_shapes=DYNAMIC))[0]
    behaviour, space, undo = applied(PackPadding, model, offer)
    left = {name: value.flip(1) for name, value in padded([9, 2, 2], 9).items()}
    for call in (left, padded([4, 4], 4)):
        torch.testing.assert_close(space.forward(**call)["hidden"], model(**call)["hidden"])
    assert not behaviour.verify_applied(space)


class Classifier(Encoder):
    """Logits [batch, sequence, labels], and whatever ``extra`` makes of them."""

    def __init__(self, labels: int, extra=None) -> None:
        super().__init__()
        self.head = nn.Linear(64, labels)
        self.extra = extra

    def forward(self, input_ids, attention_mask=None):
        logits = self.head(super().forward(input_ids, attention_mask)["hidden"])
        return {"logits": logits, **({"extra": self.extra(logits)} if self.extra else {})}


@pytest.mark.parametrize("lengths", [[12, 12, 8, 8], [8, 8, 8, 8], [8, 12, 3, 3, 2, 8]])
@torch.no_grad()
def test_packing_tells_labels_from_positions(lengths):
    """Eight labels and groups of eight tokens: the axis of labels must not be taken for the sequence."""
    model = Classifier(labels=8).eval()
    offer = variants(PackPadding(), observe(model, padded([12, 2, 3, 1], 12), dynamic_shapes=DYNAMIC))[0]
    behaviour, space, undo = applied(PackPadding, model, offer)
    call = padded(lengths, 13)
    got, expected = space.forward(**call)["logits"], model(**call)["logits"]
    assert got.shape == expected.shape
    kept = call["attention_mask"].bool()
    torch.testing.assert_close(got[kept], expected[kept])
    assert behaviour.split == (len(set(lengths)) > 1)


@pytest.mark.parametrize("extra", [torch.mean, lambda x: x.transpose(0, 1), lambda x: x[:, 1:]])
@torch.no_grad()
def test_outputs_that_cannot_be_joined_are_computed_whole(extra):
    model = Classifier(5, extra).eval()
    call = padded([12, 2, 3, 1], 12)
    offer = variants(PackPadding(), observe(model, call, dynamic_shapes=DYNAMIC))[0]
    behaviour, space, _ = applied(PackPadding, model, offer)
    for _ in range(2):
        torch.testing.assert_close(space.forward(**call), model(**call))
    assert (behaviour.split, behaviour.whole) == (0, 2)
    assert not behaviour.verify_applied(space)


@torch.no_grad()
def test_packing_leaves_static_axes_of_inputs_alone():
    class Scaled(Encoder):
        def forward(self, input_ids, attention_mask=None, factors=None):
            return super().forward(input_ids, attention_mask)["hidden"] * factors.prod(1)[:, None, None]

    model = Scaled().eval()
    call = {**padded([9, 2, 3, 1], 9), "factors": torch.rand(4, 9) + 0.5}
    shapes = {**DYNAMIC, "factors": {0: "batch"}}
    offer = variants(PackPadding(), observe(model, call, dynamic_shapes=shapes))[0]
    behaviour, space, _ = applied(PackPadding, model, offer)
    kept = call["attention_mask"].bool()
    torch.testing.assert_close(space.forward(**call)[kept], model(**call)[kept])
    assert behaviour.verify_applied(space)


class Segments(nn.Module):
    """Counts, for each token, the tokens of its segment (0 is padding)."""

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        same = attention_mask[:, :, None] == attention_mask[:, None, :]
        return (same & (attention_mask != 0)[:, None, :]).sum(-1).float()


@torch.no_grad()
def test_segment_ids_are_neither_dropped_nor_packed():
    model = Segments().eval()
    full, partial = padded([6, 6], 6), padded([6, 2], 6)
    segments = {**full, "attention_mask": torch.tensor([[1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2]])}
    padded_segments = {**full, "attention_mask": torch.tensor([[1, 1, 2, 2, 3, 3], [1, 2, 0, 0, 0, 0]])}
    for kind, seen in ((DropMask, full), (PackPadding, partial)):
        observation = observe(model, seen, dynamic_shapes=DYNAMIC)
        _, space, _ = applied(kind, model, variants(kind(), observation)[0])
        for call in (segments, padded_segments):
            torch.testing.assert_close(space.forward(**call), model(**call))
        assert skips(kind(), observe(model, [seen, segments], dynamic_shapes=DYNAMIC))


def test_a_mask_of_what_to_ignore_is_not_taken_for_one_of_what_counts():
    class Ignores(nn.Module):
        def forward(self, x, key_padding_mask=None):
            return x

    mask = torch.zeros(2, 4, dtype=torch.bool)
    call = {"x": torch.randn(2, 4), "key_padding_mask": mask}
    assert "no input" in skips(DropMask(), observe(Ignores(), call))[0]


def test_packing_announces_the_graphs_of_groups_that_are_smaller_than_the_batch():
    """A compiler sets one up for each size that is not dynamic: groups of 2 and of 1 beside 5 rows."""
    call, lengths = padded([9, 2, 2, 2, 2], 9), {name: {1: "sequence"} for name in DYNAMIC}
    fixed = observe(Encoder().eval(), call, dynamic_shapes=lengths)
    (offer,) = variants(PackPadding(), fixed)
    assert offer.setup_seconds == 2 * compile_seconds(fixed)
    (offer,) = variants(PackPadding(), observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC))
    assert offer.setup_seconds == 0.0


def test_a_dynamic_batch_is_compiled_for_a_single_row_too():
    call, lengths = padded([9, 2, 2], 9), {name: {1: "sequence"} for name in DYNAMIC}
    one = compile_seconds(observe(Encoder().eval(), call, dynamic_shapes=lengths))
    assert compile_seconds(observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC)) == 2 * one


def test_packing_asks_for_declared_lengths_and_enough_padding():
    model = Encoder().eval()
    assert skips(PackPadding(), observe(model, padded([9, 2, 2], 9)))
    assert skips(PackPadding(), observe(model, padded([9, 9, 9], 9), dynamic_shapes=DYNAMIC))


def test_a_batch_is_split_where_it_saves_more_than_reading_the_weights_again():
    """Calls of few positions take as long as it takes to read the weights and to get through the modules."""
    call = padded([40, 3, 3, 4], 40)
    small, large = (
        observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC, baseline_seconds=seconds)
        for seconds in (1.5e-4, 1e-2)
    )
    (reason,) = skips(PackPadding(), small)
    assert "69% of the positions are padding" in reason and "about 81% of a call" in reason
    (offer,) = variants(PackPadding(), large)
    assert offer.params["groups"] == 4 and 2.0 < offer.predicted_gain < 3.2
    few = variants(
        PackPadding(), observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC, baseline_seconds=1e-3)
    )
    assert few[0].params["groups"] < 4 and few[0].predicted_gain < offer.predicted_gain


def test_padding_that_cannot_be_split_is_named_as_that():
    """It is not the cost of further calls that speaks against padding on the left, or rows of one length."""
    left = padded([40, 3, 3, 4], 40)
    left["attention_mask"] = left["attention_mask"].flip(1)
    for call in (left, padded([9, 9, 9], 40)):
        (reason,) = skips(PackPadding(), observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC))
        assert "padded on the right" in reason and "of a call" not in reason


@torch.no_grad()
def test_a_batch_too_small_to_be_split_goes_through_whole():
    model = Encoder().eval()
    observation = observe(model, padded([40, 3, 3, 4], 40), dynamic_shapes=DYNAMIC, baseline_seconds=1e-3)
    behaviour, space, undo = applied(PackPadding, model, variants(PackPadding(), observation)[0])
    for lengths, width, split in (([40, 3, 3, 4], 40, 1), ([4, 1, 1], 4, 1), ([60, 2], 60, 2)):
        call = padded(lengths, width)
        got, expected = space.forward(**call)["hidden"], model(**call)["hidden"]
        kept = call["attention_mask"].bool()
        torch.testing.assert_close(got[kept], expected[kept])
        assert behaviour.split == split
    undo()
