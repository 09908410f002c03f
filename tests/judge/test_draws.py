"""Fresh inputs stay legal: what examples have in common is kept, the rest is drawn anew."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.export import Dim

from kpt.judge.calls import Call, as_calls
from kpt.judge.draws import InputSpec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoder_batch(left: bool = False) -> dict[str, Any]:
    """Ids with a first token 1 and a last token 2, padded with 0; labels ignore padding."""
    ids = torch.randint(5, 100, (4, 12), generator=generator(1))
    mask = torch.ones(4, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 9, 12)):
        start = 12 - length if left else 0
        mask[row] = 0
        mask[row, start : start + length] = 1
        ids[row, start], ids[row, start + length - 1] = 1, 2
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


AXES = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("left", [False, True])
def test_tokens_masks_and_labels_stay_consistent(left: bool) -> None:
    spec = InputSpec.from_calls(as_calls(encoder_batch(left)), AXES)
    ragged = 0
    for seed in range(10):
        call = spec.draw(generator(seed), sizes={"batch": 3, "sequence": 9})
        ids, mask, labels = (call.kwargs[name] for name in AXES)
        assert ids.shape == mask.shape == labels.shape == (3, 9)
        keep = mask == 1
        steps = mask.diff(dim=1)
        assert bool((steps >= 0).all()) if left else bool((steps <= 0).all())
        ragged += int((~keep).any())
        assert bool((ids[~keep] == 0).all()) and bool((labels[~keep] == -100).all())
        for row, kept in zip(ids, keep, strict=True):
            inside = row[kept]
            assert inside[0] == 1 or len(inside) == 1
            assert inside[-1] == 2
            assert bool(((inside[1:-1] >= 5) & (inside[1:-1] < 100)).all())
        assert spec.fits(call)
        assert torch.equal(spec.padding_masks(call)["attention_mask"], keep)
    assert ragged == 10


@pytest.mark.parametrize("equal", [False, True])
def test_masks_of_one_size_have_lengths_of_their_own_unless_they_are_equal(equal: bool) -> None:
    """An encoder's and a decoder's: drawn alike, a plan that takes one for the other would pass."""
    first = encoder_batch()
    second = first if equal else {name: value.flip(0) for name, value in first.items()}
    call = {**first, **{f"decoder_{name}": value.clone() for name, value in second.items()}}
    spec = InputSpec.from_calls(as_calls(call), {name: {0: "batch", 1: "sequence"} for name in call})
    same = 0
    for seed in range(10):
        drawn = spec.draw(generator(seed), sizes={"batch": 5, "sequence": 17}, padding=True).kwargs
        masks = [drawn[name] for name in ("attention_mask", "decoder_attention_mask")]
        same += torch.equal(*masks)
        for name, mask in zip(("input_ids", "decoder_input_ids"), masks):
            assert bool((drawn[name][mask == 0] == 0).all())
    assert same == 10 if equal else same <= 1


def test_draws_are_fresh_and_reproducible() -> None:
    spec = InputSpec.from_calls(as_calls((torch.randn(4, 8), torch.randint(0, 50, (4, 8)))))
    first, again, other = (spec.draw(generator(seed)) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()


def test_drawing_leaves_the_global_random_state_alone() -> None:
    spec = InputSpec.from_calls(as_calls(encoder_batch()), AXES)
    state = torch.get_rng_state()
    spec.draw(generator(), padding=True)
    spec.sizes(generator(), 4)
    assert torch.equal(state, torch.get_rng_state())


def test_padding_is_drawn_although_no_example_has_any() -> None:
    batch = {"input_ids": torch.randint(0, 9, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    spec = InputSpec.from_calls(as_calls(batch))
    assert spec.has_masks
    assert bool(spec.draw(generator()).kwargs["attention_mask"].all())
    for seed in range(5):
        mask = spec.draw(generator(seed), padding=True).kwargs["attention_mask"]
        assert bool((mask == 0).any()) and bool((mask.sum(1) > 0).all()) and bool((mask.sum(1) == 8).any())
    single = InputSpec.from_calls(as_calls({"attention_mask": torch.ones(1, 8, dtype=torch.long)}))
    assert bool((single.draw(generator(), padding=True).kwargs["attention_mask"] == 0).any())


_NAMES = ("mask", "src_mask", "head_mask", "attention_mask")
_SHAPES = ((), (1,), (4,), (4, 1), (1, 8), (4, 8), (6, 6), (2, 1, 6, 6))


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "names"),
    [(torch.bool, (*_NAMES, "flag")), (torch.int64, _NAMES), (torch.float32, _NAMES)],
    ids=["flags", "integers", "floats"],
)
def test_no_padded_draw_has_a_mask_or_flag_like_the_examples(
    dtype: torch.dtype, names: tuple[str, ...], shape: tuple[int, ...], value: int
) -> None:
    given = torch.full(shape, value).to(dtype)
    for name in names:
        spec = InputSpec.from_calls([Call((torch.randn(3),), {name: given})])
        assert spec.has_constant_flags
        for seed in range(20):
            assert torch.equal(spec.draw(generator(seed)).kwargs[name], given)
            drawn = spec.draw(generator(seed), padding=True).kwargs[name]
            assert drawn.shape == given.shape and drawn.dtype == dtype
            other = drawn != given
            assert bool(other.any())
            if given.numel() > 1:
                assert not bool(other.all(-1).all() if shape[-1] == 1 else other.all(-1).any())
            if shape[-2:] == (6, 6) and name == "src_mask":  # a query sees itself
                assert not bool(other.diagonal(dim1=-2, dim2=-1).any())


@pytest.mark.parametrize("name", ["mask", "src_mask", "flag"])
def test_expanded_masks_are_drawn_otherwise_where_their_memory_can_hold_it(name: str) -> None:
    for few, shape in (((1, 8), (4, 8)), ((4, 1), (4, 8)), ((1,), (3, 4, 4))):
        flags = torch.ones(few, dtype=torch.bool).expand(shape)
        spec = InputSpec.from_calls([Call((torch.randn(3),), {name: flags})])
        for seed in range(20):
            drawn = spec.draw(generator(seed), padding=True).kwargs[name]
            assert drawn.stride() == flags.stride() and not torch.equal(drawn, flags)


def test_masks_of_rows_are_drawn_as_they_are() -> None:
    for given in (torch.tensor([1, 1, 0, 0]), torch.tensor([[1], [1], [0], [0]]), torch.tensor(False)):
        spec = InputSpec.from_calls([Call((), {"x": torch.randn(3), "mask": given})])
        for seed in range(5):
            assert torch.equal(spec.draw(generator(seed)).kwargs["mask"], given)


def test_causal_and_additive_masks_keep_their_form_at_other_sizes() -> None:
    lowest = torch.finfo(torch.float32).min
    additive = torch.full((6, 6), lowest).triu(1)[None, None].expand(2, 1, 6, 6)
    flags = torch.ones(6, 6, dtype=torch.bool).tril()
    spec = InputSpec.from_calls(
        as_calls({"attn_mask": additive, "src_mask": flags, "x": torch.randn(2, 6, 4)}),
        {"attn_mask": {2: "s", 3: "s"}, "src_mask": {0: "s", 1: "s"}, "x": {1: "s"}},
    )
    drawn = spec.draw(generator(), sizes={"s": 4}).kwargs
    assert torch.equal(drawn["attn_mask"][0, 0], torch.full((4, 4), lowest).triu(1))
    assert torch.equal(drawn["src_mask"], torch.ones(4, 4, dtype=torch.bool).tril())
    assert drawn["x"].shape == (2, 4, 4)


def test_a_key_padding_mask_flags_what_to_ignore() -> None:
    spec = InputSpec.from_calls(as_calls({"src_key_padding_mask": torch.zeros(3, 6, dtype=torch.bool)}))
    call = spec.draw(generator(), padding=True)
    mask = call.kwargs["src_key_padding_mask"]
    assert bool(mask.any()) and not bool(mask.all(1).any())
    assert torch.equal(spec.padding_masks(call)["src_key_padding_mask"], ~mask)


def test_floats_keep_their_scale_and_their_kind() -> None:
    images = torch.rand(4, 3, 8, 8, generator=generator())
    one_hot = torch.nn.functional.one_hot(torch.arange(8) % 5, 5).float()
    binary = (torch.rand(40, 4, generator=generator()) > 0.5).float()
    soft = torch.softmax(torch.randn(6, 5, generator=generator()), -1)
    large = 1e4 + 100 * torch.randn(200, generator=generator())
    spec = InputSpec.from_calls(
        [Call((images, one_hot, binary, soft, large, torch.zeros(50, 50), torch.tensor(0.7)))]
    )
    drawn = spec.draw(generator(3)).args
    assert 0.0 <= drawn[0].min() and drawn[0].max() <= 1.0 and 0.4 < drawn[0].mean() < 0.6
    assert bool((drawn[1].sum(-1) == 1).all()) and set(drawn[1].unique().tolist()) == {0.0, 1.0}
    assert set(drawn[2].unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn[3].sum(-1), torch.ones(6)) and bool((drawn[3] > 0).all())
    assert 9.9e3 < drawn[4].mean() < 1.01e4 and 50 < drawn[4].std() < 200
    assert drawn[5].std() > 0  # a placeholder of zeros would make every call the same
    assert 0.5 < drawn[6] < 1.0


def test_integers_that_count_keep_their_order() -> None:
    calls = as_calls(
        {
            "x": torch.randn(2, 10),
            "position_ids": torch.arange(10)[None].expand(2, 10),
            "cu_seqlens": torch.tensor([0, 4, 10]),
            "steps": torch.arange(3, 13),
            "lengths": torch.tensor([10, 6]),
            "token_type_ids": torch.zeros(2, 10, dtype=torch.long),
            "bbox": torch.tensor([[0, 0, 5, 5], [1, 2, 3, 4]]).repeat(2, 5, 1),
        }
    )
    axes = {
        "x": {1: "s"},
        "position_ids": {1: "s"},
        "steps": {0: "s"},
        "token_type_ids": {1: "s"},
        "bbox": {1: "s"},
    }
    drawn = InputSpec.from_calls(calls, axes).draw(generator(), sizes={"s": 7}).kwargs
    assert torch.equal(drawn["position_ids"], torch.arange(7).expand(2, 7))
    assert torch.equal(drawn["steps"], torch.arange(3, 10))
    assert torch.equal(drawn["cu_seqlens"], torch.tensor([0, 4, 10]))
    assert drawn["lengths"].max() == 7 and drawn["lengths"].min() >= 1
    assert not drawn["token_type_ids"].any()
    boxes = {tuple(row) for row in drawn["bbox"].reshape(-1, 4).tolist()}
    assert drawn["bbox"].shape == (2, 7, 4) and boxes <= {(0, 0, 5, 5), (1, 2, 3, 4)}


def test_a_lone_counting_input_is_still_fresh() -> None:
    """Ids from torch.arange are a lazy example; repeated, they could not reveal a replay."""
    spec = InputSpec.from_calls([Call((torch.arange(32)[None],))])
    assert not torch.equal(spec.draw(generator(1)).args[0], spec.draw(generator(2)).args[0])


def test_labels_that_count_by_accident_stay_labels() -> None:
    calls = as_calls({"x": torch.randn(2, 4), "labels": torch.tensor([0, 1])})
    drawn = InputSpec.from_calls(calls, {"x": {0: "n"}, "labels": {0: "n"}}).draw(generator(), sizes={"n": 9})
    assert set(drawn.kwargs["labels"].tolist()) <= {0, 1}


def test_an_end_token_is_there_in_the_shortest_rows() -> None:
    ids = torch.randint(5, 50, (3, 8), generator=generator())
    ids[:, -1] = 2
    spec = InputSpec.from_calls(as_calls({"input_ids": ids}), {"input_ids": {1: "s"}})
    for size in (1, 2, 3):
        assert bool((spec.draw(generator(), sizes={"s": size}).kwargs["input_ids"][:, -1] == 2).all())


def test_integers_can_be_kept() -> None:
    ids = torch.randint(0, 99, (2, 6))
    spec = InputSpec.from_calls(as_calls({"input_ids": ids, "pixels": torch.randn(2, 4)}))
    drawn = spec.draw(generator(), keep_integers=True).kwargs
    assert torch.equal(drawn["input_ids"], ids)
    assert not torch.equal(drawn["pixels"], spec.draw(generator(5), keep_integers=True).kwargs["pixels"])


def test_strides_dtypes_and_gradients_are_those_of_the_examples() -> None:
    tensors = (
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(6, 1).expand(6, 5),
        torch.randn(6, 10)[:, ::2],
        torch.randn(4, 6).t(),
        torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(9)[1:],
        torch.randn(3, dtype=torch.complex64),
        torch.rand(4, 4) > 0.5,
    )
    spec = InputSpec.from_calls([Call(tensors)])
    for given, drawn in zip(tensors, spec.draw(generator()).args, strict=True):
        assert (given.dtype, given.shape, given.stride()) == (drawn.dtype, drawn.shape, drawn.stride())
        assert given.requires_grad == drawn.requires_grad
        assert given.storage_offset() % 16 == drawn.storage_offset()
        assert bool(torch.isfinite(torch.view_as_real(drawn) if drawn.is_complex() else drawn).all())


def test_channels_last_is_kept_at_other_sizes() -> None:
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    spec = InputSpec.from_calls([Call((images,))], ({0: "n", 2: "h", 3: "w"},))
    drawn = spec.draw(generator(), sizes={"n": 3, "h": 5, "w": 7}).args[0]
    assert drawn.shape == (3, 3, 5, 7)
    assert drawn.is_contiguous(memory_format=torch.channels_last)


def test_a_shared_tensor_stays_shared_and_caches_are_redrawn() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = [torch.randn(1, 2, 3, 4)]
            self.seen = 3

    x = torch.randn(2, 2)
    spec = InputSpec.from_calls([Call((x, x), {"past": Cache()})])
    call = spec.draw(generator())
    assert call.args[0] is call.args[1]
    assert call.kwargs["past"].seen == 3 and call.kwargs["past"].keys[0].shape == (1, 2, 3, 4)


def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None: ...


def test_names_come_from_the_signature() -> None:
    spec = InputSpec.from_calls(
        [Call((torch.ones(1, 2), torch.ones(1, 2)), {"k": [torch.ones(1)]})], None, forward
    )
    assert [leaf.name for leaf in spec.leaves] == ["input_ids", "attention_mask", "k[0]"]
    assert [leaf.role for leaf in spec.leaves] == ["float", "mask", "float"]

    class Module(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

    assert InputSpec.from_calls([Call((torch.ones(1),))], None, Module()).leaves[0].name == "pixels"


def test_every_way_to_declare_a_dimension_is_understood() -> None:
    calls = [Call((torch.ones(4, 8), torch.ones(4, 8)))]
    spec = InputSpec.from_calls(
        calls,
        {"input_ids": {0: Dim("batch", min=2, max=16), 1: ("s", 4, 64)}, "attention_mask": ("batch", "s")},
        forward,
    )
    batch, sequence = spec.dimensions["batch"], spec.dimensions["s"]
    assert (batch.low, batch.high, sequence.low, sequence.high) == (2, 16, 4, 64)
    assert spec.leaves[1].dims == {0: "batch", 1: "s"}
    unbounded = InputSpec.from_calls(calls, {"input_ids": {0: Dim("batch"), 1: Dim("s", min=2)}}, forward)
    bounds = [(d.low, d.high, d.declared) for d in unbounded.dimensions.values()]
    assert bounds == [(1, 8, False), (2, 16, False)]
    hinted = InputSpec.from_calls(calls, {"input_ids": {1: Dim.AUTO, 0: None}}, forward)
    assert list(hinted.dimensions) == ["input_ids.1"]
    assert not hinted.dimensions["input_ids.1"].declared
    nested = InputSpec.from_calls([Call(({"a": torch.ones(3)},))], {"args[0]": {"a": {0: "n"}}})
    assert nested.leaves[0].dims == {0: "n"}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"input_idz": {0: "b"}},
            "'input_idz', which is no tensor input; the inputs are input_ids, attention_mask",
        ),
        ({"input_ids": {2: "b"}}, r"axis 2, but input_ids has 2 axes \(0 to 1\)"),
        ({"input_ids": {"0": "b"}}, "axis '0'"),
        ({"input_ids": {0: 3.5}}, "expected a name"),
        ({"input_ids": {0: True}}, "is True; expected a name"),
        ({"input_ids": {0: ("b", "x", 5)}}, "expected a name"),
        ({"input_ids": "batch"}, "expected a dict from axis"),
        ({"input_ids": {0: ("b", 5, 2)}}, "empty range"),
        ({"input_ids": {0: ("b", 5, 9)}}, "declared as 5..9, but the examples have 4"),
        ({"input_ids": {0: 2 * Dim("h"), 1: None}}, "derived dimension"),
        ({"input_ids": {0: "n", 1: "n"}}, "is 4 in input_ids .axis 0. but 8 in input_ids .axis 1."),
        ({"input_ids": {0: ("b", 1, 9)}, "attention_mask": {0: ("b", 1, 8)}}, "two ranges"),
        (({0: "b"}, None, None), "3 entries for 2 inputs"),
    ],
)
def test_wrong_declarations_are_named(axes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputSpec.from_calls([Call((torch.ones(4, 8), torch.ones(4, 8)))], axes, forward)


def test_sizes_are_odd_first_and_reach_the_bounds() -> None:
    spec = InputSpec.from_calls(
        [Call((torch.ones(4, 8),))], ({0: ("batch", 1, 32), 1: ("sequence", 2, 100)},), forward
    )
    found = spec.sizes(generator(), 6)
    assert len(found) == 6 and len({tuple(sizes.items()) for sizes in found}) == 6
    assert all(size % 2 for size in found[0].values())
    for name, low, high in (("batch", 1, 32), ("sequence", 2, 100)):
        values = [sizes[name] for sizes in found]
        assert low in values and high in values
        assert all(low <= value <= high for value in values)
    assert InputSpec.from_calls([Call((torch.ones(4),))]).sizes(generator(), 3) == []


def test_sizes_in_proportion_are_those_of_one_example() -> None:
    shapes = {"x": {0: ("rows", 1, 64)}, "y": {0: ("groups", 1, 64)}}
    calls = [Call((), {"x": torch.ones(rows), "y": torch.ones(groups)}) for rows, groups in ((16, 4), (8, 6))]
    found = InputSpec.from_calls(calls, shapes).sizes_in_proportion()
    assert found[0] == {"rows": 32, "groups": 8}
    assert all(sizes["rows"] == 4 * sizes["groups"] for sizes in found)


def test_signatures_ignore_dynamic_sizes_and_nothing_else() -> None:
    spec = InputSpec.from_calls(
        [Call((torch.ones(4, 8),), {"flag": True})], {"input_ids": {0: ("batch", 1, 6)}}, forward
    )
    like = Call((torch.ones(5, 8),), {"flag": True})
    assert spec.fits(like) and hash(spec.signature(like)) == hash(
        spec.signature(Call((torch.ones(2, 8),), {"flag": True}))
    )
    assert spec.misfit(Call((torch.ones(7, 8),), {"flag": True})) == "batch is 7, outside 1..6"
    for other in (
        Call((torch.ones(4, 9),), {"flag": True}),
        Call((torch.ones(4, 8).double(),), {"flag": True}),
        Call((torch.ones(4, 8, 1),), {"flag": True}),
        Call((torch.ones(4, 8, device="meta"),), {"flag": True}),
        Call((torch.ones(4, 8),), {"flag": False}),
        Call((torch.ones(4, 8),)),
        Call((), {"input_ids": torch.ones(4, 8), "flag": True}),
        Call((torch.ones(4, 8, requires_grad=True),), {"flag": True}),
    ):
        assert not spec.fits(other)


def test_ragged_examples_without_declarations_all_fit() -> None:
    spec = InputSpec.from_calls([Call((torch.ones(4, size),)) for size in (3, 5)])
    assert spec.fits(Call((torch.ones(4, 3),))) and spec.fits(Call((torch.ones(4, 5),)))
    assert not spec.fits(Call((torch.ones(4, 4),)))
    assert {spec.draw(generator(seed)).args[0].shape[1] for seed in range(10)} == {3, 5}


def test_a_spec_survives_json() -> None:
    spec = InputSpec.from_calls(as_calls({**encoder_batch(), "use_cache": False}), AXES, forward)
    restored = InputSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert restored.leaves == spec.leaves and restored.dimensions == spec.dimensions
    call = restored.draw(generator(), sizes={"sequence": 5})
    assert spec.fits(call) and restored.fits(call) and call.kwargs["use_cache"] is False
    assert not restored.fits(Call((), {"input_ids": torch.ones(1, 2)}))
    images = InputSpec.from_calls([Call((torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),))])
    restored = InputSpec.from_dict(json.loads(json.dumps(images.to_dict())))
    assert images.fits(restored.draw(generator()))


def test_unknown_sizes_are_refused() -> None:
    spec = InputSpec.from_calls([Call((torch.ones(4, 8),))], ({0: "batch"},), forward)
    with pytest.raises(ValueError, match="unknown dimension 'n'; the dimensions are batch"):
        spec.draw(generator(), sizes={"n": 3})
