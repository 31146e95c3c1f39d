"""cuDNN's attention through torch's scaled_dot_product_attention: dense, and log-counted through a wider head.

The kernel takes keys wider than the values and tensors as they lie, so that nothing is padded but the keys: to 192
for heads of 128, since other widths run slower. The first call of each shape plans for a few hundred milliseconds.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastar.engines.registry import AttentionCall, Engine, capability
from fastar.engines.unbiased import augmented, live_queries, name_of, silence, unfit_widths

_KEY_MULTIPLE = 64


def _run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    live = live_queries(call)
    call = augmented(call, CUDNN)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        out = scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
    return silence(out, None, live)


def _limits(call: AttentionCall) -> str | None:
    return unfit_widths(call, CUDNN)


@cache
def _missing(device: torch.device) -> str | None:
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    found = capability(device)
    if found is None or found[0] < 9:
        return f"keys wider than values need compute capability 9.0, not {name_of(found)}"
    return None


CUDNN = Engine(
    name="cudnn",
    run=_run,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    takes_plan=False,
    key_multiple=_KEY_MULTIPLE,
    counts_in_keys=frozenset({"cuda"}),
    missing=_missing,
    limits=_limits,
)
