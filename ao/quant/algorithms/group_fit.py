"""Scale and zero point of a group of columns, for given codes, of the least error under a quadratic form.

The error of values x is x H x - 2 b x, row by row. With units u = q - zero_point, values are scale * u - offset: a quadratic
form in the two, whose least value is the solution of two linear equations. An integer zero point is tried on both sides of that
solution, each with the best scale there is for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...dtypes import QTensor, Spec, dense


def fit_group(
    spec: Spec,
    values: Tensor,
    square: Tensor,
    b: Tensor,
    now: dict[str, Tensor],
    size: Tensor,
    held: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The best of a few qparams for one group of columns: new values and qparams, no worse than those given.

    values: (n, group), those of the codes under the qparams now. square: (group, group), H. b: (n, group).
    now: scale and perhaps zero_point, (rows, 1) each, where n / rows rows of values share them; floats in float32.
    size: a power of two of about the largest value; beside it, sums of squares stay within the range of float32.
    held: what a scale is after it was stored, for formats without a zero point: a power of two is far from what was asked for.
    """
    heaviest = square.diagonal().amax()
    square, b = square / heaviest, b / heaviest / size
    n, rows_of = values.shape[0], now["scale"].shape[0]

    def total(x: Tensor) -> Tensor:  # (n, group) -> (rows_of, 1)
        return x.sum(1).view(rows_of, -1).sum(1, keepdim=True)

    def spread(x: Tensor) -> Tensor:  # (rows_of, 1) -> (n, 1)
        return x.repeat_interleave(n // rows_of, 0)

    inverse = torch.where(now["scale"] == 0, 0.0, 1 / now["scale"].float())
    scale = now["scale"].float() / size
    zero = now.get("zero_point")
    unit = values * spread(inverse)  # q - zero_point
    candidates: list[dict[str, Tensor]] = []

    def scaled(zero_point: Tensor | None, unit: Tensor) -> dict[str, Tensor]:
        """The best scale for given units."""
        best = total(unit * b) / total((unit @ square) * unit)
        best = torch.where(best.isfinite() & (best > 0), best, scale)
        return {"scale": best} if zero_point is None else {"scale": best, "zero_point": zero_point}

    if zero is None:
        best = scaled(None, unit)["scale"]
        candidates.append({"scale": held(best * size) / size})
    else:
        # [u H u, -u H 1; -u H 1, 1 H 1] (scale, offset) = (u b, -1 b), with u the units: offset moves the zero point
        uh = unit @ square
        uu, u1 = total(uh * unit), -total(uh)
        ones = square.sum() * (n // rows_of)
        ub, b1 = total(unit * b), -total(b)
        determinant = uu * ones - u1 * u1
        best = (ub * ones - u1 * b1) / determinant
        fine = (determinant > 1e-6 * uu * ones) & best.isfinite() & (best > 0)
        best = torch.where(fine, best, scale)
        if zero.is_floating_point():
            best = spec.stored(scale=best * size, zero_point=zero)["scale"].float() / size
        # The best offset for that scale.
        shift = torch.where(fine, (b1 - u1 * best) / ones / best, 0.0)
        if zero.is_floating_point():
            candidates.append(spec.stored(scale=best, zero_point=zero + shift) | {"scale": best})
        else:
            for move in (shift.floor(), shift.floor() + 1, torch.zeros_like(shift)):
                moved = spec.stored(scale=best, zero_point=zero + move)["zero_point"]
                candidates.append(scaled(moved, unit + spread(zero.float() - moved.float())))

    def error(x: Tensor) -> Tensor:
        return total((x @ square) * x - 2 * x * b)

    made, kept, least = values, now, error(values / size)
    for tried in candidates:
        moved = unit if zero is None else unit + spread(zero.float() - tried["zero_point"].float())
        x = moved * spread(tried["scale"])
        e = error(x)
        better = e < least
        least = torch.where(better, e, least)
        made = torch.where(spread(better), x * size, made)
        found = {**tried, "scale": tried["scale"] * size}
        kept = {name: torch.where(better, found[name].to(t.dtype), t) for name, t in kept.items()}
    return made, kept


def _own(kept: QTensor) -> dict[str, Tensor]:
    """The qparams of a qparam that is quantized itself."""
    return {
        name: dense(t) for name, t in kept.fields().items() if kept.roles[name] == "per_block" and name != "pre_scale"
    }


def held_as(kept: Tensor, group: int, x: Tensor) -> Tensor:
    """`x`, (rows, 1), as it comes back from a column of a stored qparam `kept`, (rows, groups), whose own qparams stay."""
    if not isinstance(kept, QTensor):
        return x.to(kept.dtype).float()
    own = {name: t[:, group * t.shape[1] // kept.shape[1], None] for name, t in _own(kept).items()}
    return kept.spec.round(x, **own)


def stored_as(kept: Tensor, x: Tensor) -> Tensor:
    """`x`, of the shape of `kept`, stored as that is, under the same qparams."""
    if not isinstance(kept, QTensor):
        return x.to(kept.dtype)
    return kept.spec.quantize(x, **_own(kept))
