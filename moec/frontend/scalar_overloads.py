"""torch.export writes `aten.mul.Tensor(x, 2.0)`; the overload whose schema says so is `aten.mul.Scalar`."""

from __future__ import annotations

SCALAR_OVERLOADS = {
    f"aten.{name}.Tensor{mode}": f"aten.{name}.Scalar{mode}"
    for name, mode in (
        *[(name, "") for name in ("add", "sub", "mul", "div", "remainder", "floor_divide", "rsub")],
        *[(name, "") for name in ("eq", "ne", "lt", "le", "gt", "ge")],
        *[(name, "") for name in ("bitwise_and", "bitwise_or", "bitwise_xor")],
        ("div", "_mode"),
    )
}
