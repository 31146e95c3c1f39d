"""Queries, keys and values of a pass, put where attention reads them: turned by their places, in one trip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastar.attention.rope import apply_rotation
from fastar.engines.augmented import EXTRA
from fastar.engines.plan import take_rows

_ROWS = 16  # tokens of a head a program


@dataclass(frozen=True)
class Placement:
    """Queries and keys [B, H, L, D] to be turned by `tables` and written to q_out and k_out; v goes to v_out as it is.

    Inputs are views with any strides, `tables` a cosine and a sine [L, D/2] (`RotaryEmbedding.tables`). Outputs
    [B, H, L, W] are views, too, such as a stretch of the working keys, with numbers of a row side by side. Where W
    exceeds D, the rest is the augmented head's (`fastar.engines.augmented`): of a query two ones, then zeros; of a key
    zeros, a log-count of 0. W may differ between q_out and k_out; v_out has D.

    With `q_order`, permutations int64 [B, H, L], row i of q_out is query q_order[i].

    Raises:
        ValueError: shapes do not fit, or an output's rows are not contiguous.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tables: tuple[Tensor, Tensor]
    q_out: Tensor
    k_out: Tensor
    v_out: Tensor
    q_order: Tensor | None = None

    def __post_init__(self) -> None:
        shape, width = self.q.shape, self.q.shape[-1]
        alike, wide = (self.k, self.v, self.v_out), {"q_out": self.q_out, "k_out": self.k_out}
        tables = [t.shape for t in self.tables]
        if any(x.shape != shape for x in alike) or any(t != (shape[2], width // 2) for t in tables):
            shapes = ", ".join(str(tuple(s)) for s in (shape, *(x.shape for x in alike), *tables))
            raise ValueError(
                "a placement needs q, k, v and v_out of one shape [B, H, L, D] and two tables [L, D/2], got "
                f"{shapes}."
            )
        if self.q_order is not None and self.q_order.shape != shape[:3]:
            raise ValueError(f"q_order must be {tuple(shape[:3])}, got {tuple(self.q_order.shape)}.")
        for name, out in wide.items():
            if out.shape[:3] != shape[:3] or not (out.shape[3] == width or out.shape[3] >= width + EXTRA):
                raise ValueError(
                    f"{name} must be {tuple(shape[:3])} and {width} or at least {width + EXTRA} wide, got "
                    f"{tuple(out.shape)}."
                )
        if any(out.stride(-1) != 1 for out in (*wide.values(), self.v_out)):
            raise ValueError(
                "a placement writes rows side by side: the last stride of each output must be 1."
            )

    def run(self) -> None:
        """On a GPU in one kernel, elsewhere plainly."""
        if self.q.device.type == "cuda":
            self.fused()
        else:
            self.plainly()

    def plainly(self) -> None:
        """The definition."""
        width = self.q.shape[-1]
        turned = apply_rotation(self.q, self.tables)
        self.q_out[..., :width] = take_rows(turned, self.q_order)
        self.k_out[..., :width] = apply_rotation(self.k, self.tables)
        self.v_out.copy_(self.v)
        self.q_out[..., width : width + EXTRA].fill_(1)
        self.q_out[..., width + EXTRA :].zero_()
        self.k_out[..., width:].zero_()

    def fused(self) -> None:
        """In one kernel, on a GPU or in Triton's interpreter."""
        batch, heads, length, width = self.q.shape
        cos, sin = (table.contiguous() for table in self.tables)
        outs = (self.q_out, self.k_out, self.v_out)
        strides = [stride for x in (self.q, self.k, self.v) for stride in x.stride()]
        strides += [stride for x in outs for stride in x.stride()[:3]]
        ordered = self.q_order is not None
        order = (
            cos if self.q_order is None else self.q_order.contiguous()
        )  # not read, or a pointer of another type
        _kernels().place[(-(-length // _ROWS), batch * heads)](
            self.q, self.k, self.v, cos, sin, order, *outs, heads, length, *strides, ORDERED=ordered,
            **tile(width, self.q_out.shape[-1], self.k_out.shape[-1]),
        )  # fmt: skip


def tile(width: int, q_width: int, k_width: int) -> dict[str, int]:
    """What the kernel is compiled for: heads `width` wide, written that wide."""
    tails = (_power_of_two(wide - width) for wide in (q_width, k_width))
    sizes = {"D": width, "Q_WIDTH": q_width, "K_WIDTH": k_width, "BLOCK": _power_of_two(width), "ROWS": _ROWS}
    return sizes | dict(zip(("Q_TAIL", "K_TAIL"), tails, strict=True))


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, count - 1).bit_length()


def _kernels() -> Any:
    """The module of the kernels, imported late: Triton is an optional package."""
    from fastar.attention import kernels

    return kernels
