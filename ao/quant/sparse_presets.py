"""Presets for weights that leave out zeros, and the way from any other preset to its 2:4 form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..dtypes import BlockSparse, Int4Prepacked, MarlinSparseLayout, PlainLayout, SemiSparseLayout, Sparse24, Spec
from .config import Config, SpecConfig
from .granularity import ZeroPointDomain
from .presets import (
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
)


@dataclass(frozen=True)
class SemiSparseWeightConfig(Config):
    """2:4 weights in their own dtype, 9 bits per element of a 16-bit one: `Sparse24()`, for weights that are 2:4.

    alg_id: accepted because other libraries have it. The algorithm is the one that was fastest for the shape.
    """

    alg_id: int = 0

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return Sparse24()


@dataclass(frozen=True)
class BlockSparseWeightConfig(Config):
    """Weights whose blocks of zeros are left out: `BlockSparse(blocksize)`.

    blocksize: rows and columns of a block, a multiple of 8.
    """

    blocksize: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.blocksize, int) or self.blocksize < 8 or self.blocksize % 8:
            raise ValueError(
                f"BlockSparseWeightConfig: blocksize must be a multiple of 8 such as 64, got {self.blocksize!r}"
            )

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return BlockSparse((self.blocksize, self.blocksize))


def two_of_four(config: Config | Spec | None) -> Config:
    """A config for weights that are 2:4, or become so by an algorithm that prunes, which stores what `config` does; None for
    plain numbers. Raises ValueError for one that scales activations by calibration, or whose layout is a device's own.
    """
    if config is None:
        return SemiSparseWeightConfig()
    if isinstance(config, Spec):
        return SpecConfig(Sparse24(replace(config, act=None), act=config.act))
    if isinstance(config, SpecConfig):
        return replace(config, spec=Sparse24(replace(config.spec, act=None), act=config.spec.act))
    usual = isinstance(config, Int4WeightOnlyConfig) and config.group_size in (128, -1)
    if usual and config.zero_point_domain is ZeroPointDomain.NONE and isinstance(config.layout, PlainLayout):  # type: ignore[attr-defined]
        return replace(config, layout=MarlinSparseLayout())  # type: ignore[call-arg]
    dynamic = isinstance(config, (Int8DynamicActivationInt8WeightConfig, Float8DynamicActivationFloat8WeightConfig))
    if dynamic and isinstance(config.layout, PlainLayout):  # type: ignore[attr-defined]
        return replace(config, layout=SemiSparseLayout())  # type: ignore[call-arg]
    if config.act_scale() is not None or config.act_range() is not None:
        raise ValueError(
            f"{type(config).__name__} has static activations, which are not stored beside 2:4; use a dynamic one"
        )
    weight = config.weight((1024, 1024))
    if isinstance(weight, (Sparse24, BlockSparse, Int4Prepacked)):
        raise ValueError(f"{type(config).__name__}: its layout cannot be that of 2:4 weights; use layout=PlainLayout()")
    return SpecConfig(
        Sparse24(replace(weight, act=None), act=config.act()),
        algorithm=config.algorithm,
        unsupported=config.unsupported,
    )
