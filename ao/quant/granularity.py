"""Granularity: the words of configs for which elements share a scale. Each is a name for a `block` of the Spec."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale."""

    def block(self) -> tuple[int, ...]:
        """The Spec's `block` for a 2-D tensor, -1 for a whole dim."""
        raise NotImplementedError


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale."""

    def block(self) -> tuple[int, ...]:
        return (-1, -1)


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale per row, over the last dim. dim: -1, the only one."""

    dim: int = -1

    def __post_init__(self) -> None:
        if self.dim != -1:
            raise ValueError(f"PerRow: dim must be -1, the last dim, got {self.dim}")

    def block(self) -> tuple[int, ...]:
        return (1, -1)


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per token of an activation: `PerRow` by another name."""

    def block(self) -> tuple[int, ...]:
        return (1, -1)


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per index of `axis`: 0 for an output channel of a linear weight, 1 for an input channel."""

    axis: int = 0

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise ValueError(f"PerAxis: axis must be 0 or 1, got {self.axis}")

    def block(self) -> tuple[int, ...]:
        return (1, -1) if self.axis == 0 else (-1, 1)


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per `group_size` consecutive elements of a row."""

    group_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or (self.group_size < 1 and self.group_size != -1):
            raise ValueError(
                f"PerGroup: group_size must be a number such as 128, or -1 for the whole row, got {self.group_size!r}"
            )

    def block(self) -> tuple[int, ...]:
        return (1, self.group_size)


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale per block of `block_size`, one entry per dim, -1 for a whole dim."""

    block_size: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", tuple(self.block_size))

    def block(self) -> tuple[int, ...]:
        return self.block_size


class MappingType(Enum):
    """How a range of numbers is laid over the integers (formulas: `ao.dtypes.Intx`)."""

    SYMMETRIC = "symmetric"
    """No zero point; scale = max|x| / ((qmax - qmin) / 2), so that the largest positive number may clip."""
    SYMMETRIC_NO_CLIPPING_ERR = "symmetric_no_clipping_err"
    """No zero point; scale = max(min(x) / qmin, max(x) / qmax), so that nothing clips."""
    ASYMMETRIC = "asymmetric"
    """With a zero point."""


class ZeroPointDomain(Enum):
    """What a zero point is."""

    INT = "int"
    """An integer, so that 0 is exact."""
    FLOAT = "float"
    """A fraction, so that the range need not include 0."""
    NONE = "none"
    """None asked for: the config's usual one."""
