"""Run code in fp64 although it casts to narrower floats inside, and watch what it calls.

RMSNorm implementations upcast to fp32, so that plain ``.double()`` is 1e-7 off and proves nothing.
`Promoted` rewrites every low float dtype that an operation asks for into float64. It also refuses
operations outside an allow-list: randomness, reading a value into Python, communication and custom
kernels all make a proof by examples worthless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}

#: Pure, deterministic operations of the ``aten`` namespace, without overloads.
ALLOWED = frozenset(
    """
    _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data _to_copy _unsafe_view
    abs add add_ addcdiv addcmul addmm alias all amax amin any arange argmax as_strided baddbmm
    bitwise_and bitwise_not bitwise_or bmm cat ceil clamp clamp_max clamp_min clone constant_pad_nd
    copy copy_ cos cumsum detach diagonal div div_ dot elu elu_backward empty empty_like
    empty_strided eq erf exp exp2 expand expm1 eye fill fill_ flip floor full full_like gather ge
    gelu gelu_backward gt hardswish hardtanh index index_add index_put index_select isfinite isinf
    isnan le leaky_relu leaky_relu_backward lift_fresh linalg_vector_norm linear linear_backward log
    log1p log2 log_sigmoid_forward logical_and logical_not logical_or logit logsumexp lt masked_fill
    masked_fill_ matmul max maximum mean min minimum mish mish_backward mm mul mul_ mv
    embedding embedding_dense_backward native_group_norm native_group_norm_backward
    native_layer_norm native_layer_norm_backward ne neg new_empty new_empty_strided new_full
    new_ones new_zeros nll_loss_backward nll_loss_forward nll_loss2d_forward nll_loss2d_backward
    norm ones ones_like permute pow prod promote_types reciprocal relu relu_ relu_backward repeat
    reshape roll rsqrt rsub scalar_tensor scatter scatter_add select select_backward select_scatter
    sgn sigmoid sigmoid_backward sign silu silu_ silu_backward sin slice slice_backward
    slice_scatter softplus softplus_backward split split_with_sizes sqrt squeeze stack std sub sub_
    sum t tan tanh tanh_backward threshold threshold_backward transpose tril triu unbind unfold
    unsqueeze var var_mean view view_as_complex view_as_real where zero zero_ zeros zeros_like
    _fused_rms_norm _fused_rms_norm_backward _reshape_alias _conj
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    _scaled_dot_product_attention_math scaled_dot_product_attention _safe_softmax
    _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
    """.split()
)


class Refused(Exception):
    """The code does something that a proof by examples cannot cover."""


class Promoted(TorchDispatchMode):
    """Operations that ask for a low float dtype get float64; operations off the list are refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        base = name.partition(".")[0]
        if base not in ALLOWED or func.namespace not in ("aten", "prim", "prims"):
            raise Refused(f"it calls {func.namespace}::{base}, which no proof by examples covers")
        if kwargs:
            dtype = kwargs.get("dtype")
            if dtype in _WIDER:
                kwargs = {**kwargs, "dtype": _WIDER[dtype]}
        if base in ("_softmax", "_log_softmax") and len(args) == 3 and args[2]:
            args = (args[0], args[1], False)  # half_to_float does not apply to float64
        return func(*args, **(kwargs or {}))


#: Calls that differ between dtypes, modes and strides without changing what is computed.
_IGNORED = frozenset(
    """
    to float half bfloat16 double type type_as contiguous __get__ __set__ detach clone dim size stride
    is_floating_point is_contiguous is_complex numel get_device element_size requires_grad_ finfo alias
    data_ptr __len__ __hash__ is_autocast_enabled unbind __iter__ cpu view reshape
    """.split()
)


class Trace(TorchFunctionMode):
    """Names of the torch functions that are called, without casts: equal traces took equal branches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _IGNORED:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
