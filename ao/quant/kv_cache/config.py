"""How keys and values are kept: a Spec for each, and what stays as it is. The presets have names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...dtypes import Float8, Intx, Spec

TOKENS = 32
"""The tokens of a channel that share a scale in KIVI's grouping, and the channels of a token."""


@dataclass(frozen=True)
class KVCacheConfig:
    """How to keep keys and values of shape (B, kv_heads, tokens, head_dim).

    k, v: Specs. `block` (1, -1) is per token and head, (1, 32) per token and group of 32 channels, (32, 1) per channel and group
        of 32 tokens, which needs a `residual` of at least as many.
    rotate: store keys and values times a Hadamard matrix with random signs, which spreads outliers; queries are rotated as the
        keys are, so that scores stay as they were, and the output is rotated back (arXiv:2404.00456).
    residual: the newest tokens that stay in floating point, a multiple of the tokens of a block. Of so many, up to one block less
        are kept at a time.
    first: the first tokens that stay in floating point, which often draw much of the attention (arXiv:2309.17453).
    full_layers: layers that are not quantized at all; negative ones count from the end.

    Raises ValueError for blocks over tokens without a residual that holds them.
    """

    k: Spec
    v: Spec
    rotate: bool = False
    residual: int = 0
    first: int = 0
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, spec in (("k", self.k), ("v", self.v)):
            if spec.act is not None:
                raise ValueError(f"KVCacheConfig: {name} must be a Spec without act, got {spec}")
            if tokens_of(spec) < 1:
                raise ValueError(
                    f"KVCacheConfig: {name}={spec} has one scale for all tokens, and those to come are not known; use a block "
                    "of (1, -1) or (32, 1)"
                )
        if self.residual < 0 or self.residual % self.tokens or (self.tokens > 1 and not self.residual):
            raise ValueError(
                f"KVCacheConfig: blocks of {self.tokens} tokens are quantized when they are full; residual must be a multiple of "
                f"{self.tokens} that keeps the others, such as {4 * self.tokens}, got {self.residual}"
            )
        if self.first < 0:
            raise ValueError(f"KVCacheConfig: first must be 0 or more tokens, got {self.first}")

    @property
    def tokens(self) -> int:
        """The tokens of a block, of keys or values."""
        return max(tokens_of(self.k), tokens_of(self.v))

    def is_full(self, layer: int, layers: int) -> bool:
        """Whether layer `layer` of `layers` stays in floating point."""
        return layer in self.full_layers or layer - layers in self.full_layers


def tokens_of(spec: Spec) -> int:
    """The tokens of a block of `spec` over (..., tokens, head_dim); -1 for all."""
    block = spec.block
    if all(b == -1 for b in block):
        return -1
    return block[-2] if len(block) > 1 else 1


def _integers(bits: int, block: tuple[int, int]) -> Intx:
    return Intx(bits, block, signed=False, symmetric=False, zero_point="float", scale_dtype="bfloat16")


def _kivi(bits: int) -> KVCacheConfig:
    return KVCacheConfig(_integers(bits, (TOKENS, 1)), _integers(bits, (1, TOKENS)), residual=4 * TOKENS)


_INT8 = Intx(8, (1, -1), narrow=True, scale_dtype="bfloat16")
_INT4 = _integers(4, (1, -1))

KV_CACHES: dict[str, KVCacheConfig] = {
    "int8": KVCacheConfig(_INT8, _INT8),
    "float8": KVCacheConfig(Float8(), Float8()),
    "int4": KVCacheConfig(_INT4, _INT4, rotate=True),
    "kivi4": _kivi(4),
    "kivi2": _kivi(2),
}
"""Presets by name. "kivi4" and "kivi2": arXiv:2402.02750."""


def kv_cache_config(
    scheme: str | KVCacheConfig | Spec | None = None, *, k: Spec | None = None, v: Spec | None = None
) -> KVCacheConfig:
    """The config of a name, of a Spec for both keys and values, or with Specs of their own for keys (`k`) and values (`v`).

    Raises ValueError for an unknown name, with those that there are, and where nothing is given.
    """
    if isinstance(scheme, str):
        if scheme not in KV_CACHES:
            raise ValueError(f"unknown KV cache {scheme!r}; there are {', '.join(KV_CACHES)}, or give a KVCacheConfig")
        scheme = KV_CACHES[scheme]
    if isinstance(scheme, Spec):
        scheme = KVCacheConfig(scheme, scheme)
    if scheme is None:
        if k is None or v is None:
            raise ValueError(f"KV cache: give a name ({', '.join(KV_CACHES)}), a KVCacheConfig, or both k= and v=")
        return KVCacheConfig(k, v)
    return replace(scheme, k=k or scheme.k, v=v or scheme.v)
