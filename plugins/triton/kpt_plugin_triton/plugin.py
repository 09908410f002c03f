"""What the triton plugin offers; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from kpt import hookimpl
from kpt.specs import KernelSpec, OpSpec

_HOME = "kpt_plugin_triton"
_FLOATS = ("bfloat16", "float16", "float32")
_SUPPORTS = f"{_HOME}.sites:on_gpu"
_TUNER = f"{_HOME}.tuner:tune"


def _kernel(op: str, entry: str, **more: object) -> KernelSpec:
    """One kernel for every GPU; most are differentiable, traceable and the same bits from run to run."""
    options = {
        "hardware": ("cuda",),
        "dtypes": _FLOATS,
        "backward": True,
        "compile_safe": True,
        "reproducible": True,
        "supports": _SUPPORTS,
        "tuner": _TUNER,
        **more,
    }
    return KernelSpec(op, "triton", f"{_HOME}.{entry}", **options)  # type: ignore[arg-type]


@hookimpl
def kpt_ops() -> Iterator[OpSpec]:
    references, found = f"{_HOME}.references", f"{_HOME}.recognisers"
    yield OpSpec(
        "add_layer_norm",
        "(x, residual, weight=None, bias=None, eps=1e-5) -> (y, x + residual)",
        f"{references}.norms:add_layer_norm",
        f"{found}.norms:AddLayerNorms",
        summary="add a residual and normalise the sum to mean 0 and variance 1",
    )
    yield OpSpec(
        "qk_norm_rope",
        "(q, k, q_weight, k_weight, cos, sin, eps=1e-6, offset=0.0, interleaved=False) -> (q, k)",
        f"{references}.qk_norm_rope:qk_norm_rope",
        f"{found}.qk_norm_rope:QkNormRopes",
        summary="rms_norm over each head of queries and keys, then rope",
    )
    yield OpSpec(
        "glu",
        "(gate, up, activation='silu') -> y",
        f"{references}.glu:glu",
        f"{found}.activations:Glus",
        summary="activation(gate) * up",
    )
    yield OpSpec(
        "bias_activation",
        "(x, bias=None, activation='gelu') -> y",
        f"{references}.activations:bias_activation",
        f"{found}.activations:BiasActivations",
        summary="an activation function of x + bias",
    )
    yield OpSpec(
        "group_norm",
        "(x, groups, weight=None, bias=None, eps=1e-5, activation=None) -> y",
        f"{references}.group_norm:group_norm",
        f"{found}.group_norm:GroupNorms",
        summary="normalise groups of channels to mean 0 and variance 1; silu may follow",
    )
    yield OpSpec(
        "embedding_sum_norm",
        "(ids, words, position_ids=None, positions=None, type_ids=None, types=None, weight=None, bias=None, "
        "eps=1e-12, padding_idx=None) -> y",
        f"{references}.embedding:embedding_sum_norm",
        f"{found}.embedding:EmbeddingSumNorms",
        summary="the layer norm of the sum of word, position and type embeddings",
    )
    fp8 = "mode='row', scale=None, dtype=None) -> (fp8, scale"
    for name, arguments, summary in (
        ("quantise_fp8", "x", "with a scale for each row, block of 128 columns or tensor"),
        ("silu_mul_fp8", "gate, up", "of silu(gate) * up"),
        ("rms_norm_fp8", "x, weight=None, eps=1e-6, offset=0.0, residual=None", "of rms_norm"),
        (
            "layer_norm_fp8",
            "x, weight=None, bias=None, eps=1e-5, residual=None",
            "of layer_norm",
        ),
    ):
        total = "[, x + residual])" if "residual" in arguments else ")"
        signature = f"({arguments}, {fp8}{total}"
        yield OpSpec(name, signature, f"{references}.quantise:{name}", summary=f"fp8 {summary}")
    packed = "cu_seqlens_q, cu_seqlens_k, max_q, max_k"
    how = "is_causal=False, scale=None, softcap=None, sinks=None, window=None"
    yield OpSpec(
        "attention_varlen",
        f"(q, k, v, {packed}, {how}) -> y",
        f"{references}.attention:attention_varlen",
        summary="attention within each of the sequences that are packed one behind the other",
    )
    yield OpSpec(
        "attention_block_sparse",
        f"(q, k, v, block_mask, {how}) -> y",
        f"{references}.attention:attention_block_sparse",
        summary="attention over the blocks of queries x keys that a mask keeps",
    )
    yield OpSpec(
        "decode_attention",
        "(q, k, v, lengths=None, scale=None, softcap=None, sinks=None) -> y",
        f"{references}.attention:decode_attention",
        summary="attention of the last queries to a cache of keys and values that is filled in part",
    )
    yield OpSpec(
        "linear_cross_entropy",
        "(hidden, weight, target, bias=None, ignore_index=-100, label_smoothing=0.0, reduction='mean', "
        "softcap=None, z_loss=0.0) -> loss",
        f"{references}.losses:linear_cross_entropy",
        f"{found}.losses:LinearLosses",
        summary="cross entropy of a linear layer's output with class indices, logits never stored as a whole",
    )
    for width in ("int8", "fp8"):
        yield OpSpec(
            f"linear_{width}",
            "(x, weight, scale, bias=None) -> y",
            f"{references}.skinny:linear_{width}",
            summary=f"matrix product with a weight (N, K) in {width}, scaled by output feature, plus a bias",
        )


@hookimpl
def kpt_kernels() -> Iterator[KernelSpec]:
    for op in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"):
        yield _kernel(op, f"norms:{op}")
    yield _kernel("rope", "rope:rope")
    yield _kernel("qk_norm_rope", "qk_norm_rope:qk_norm_rope")
    yield _kernel("gated_mlp", "gated_mlp:gated_mlp")
    yield _kernel("glu", "glu:glu")
    yield _kernel("bias_activation", "activations:bias_activation")
    yield _kernel("group_norm", "group_norm:group_norm")
    yield _kernel("embedding_sum_norm", "embedding:embedding_sum_norm")
    coded: dict[str, object] = {"backward": False, "level": "aggressive"}
    for op in ("quantise_fp8", "silu_mul_fp8"):
        yield _kernel(op, f"quantise:{op}", **coded)
    for op in ("rms_norm_fp8", "layer_norm_fp8"):
        yield _kernel(op, f"norms_fp8:{op}", **coded)
    yield _kernel("softmax", "softmax:softmax")
    yield _kernel("cross_entropy", "losses:cross_entropy")
    yield _kernel("linear_cross_entropy", "linear_losses:linear_cross_entropy")
    yield _kernel("attention", "attention:attention", supports=f"{_HOME}.attention:supports")
    yield _kernel("attention_varlen", "varlen:attention_varlen")
    yield _kernel("attention_block_sparse", "block_sparse:attention_block_sparse")
    yield _kernel("decode_attention", "decode:decode_attention", backward=False)
    yield KernelSpec(
        "attention",
        "sdpa-cudnn",
        f"{_HOME}.sdpa:attention",
        hardware=("cuda",),
        dtypes=("bfloat16", "float16"),
        backward=True,
        compile_safe=True,
        supports=f"{_HOME}.sdpa:supports",
        # The fastest at every causal size in benchmarks/results/gpu_kernels-*.json. attention/triton is
        # predicted to gain less, and so tried after it.
        predicted_gain=1.1,
    )
    half: dict[str, object] = {"dtypes": ("bfloat16", "float16"), "backward": False}
    # Ahead of cuBLAS by as little as that with 16 rows in benchmarks/results/gpu_kernels-*.json.
    of_rows: dict[str, object] = {"supports": f"{_HOME}.skinny_sites:supports", "predicted_gain": 1.02}
    yield _kernel("linear", "skinny:linear", **half | of_rows)
    for width in ("int8", "fp8"):
        yield _kernel(f"linear_{width}", f"skinny:linear_{width}", **half)
        # The weights of a model's own linear layers, quantised once.
        yield KernelSpec(
            "linear",
            f"triton-{width}",
            f"{_HOME}.skinny:linear",
            hardware=("cuda",),
            dtypes=("bfloat16", "float16"),
            level="aggressive",
            compile_safe=True,
            reproducible=True,
            supports=f"{_HOME}.skinny_sites:supports_quantised",
            setup=f"{_HOME}.skinny_sites:prepare_{width}",
            tuner=_TUNER,
            predict=f"{_HOME}.skinny_sites:predict_quantised",
        )
