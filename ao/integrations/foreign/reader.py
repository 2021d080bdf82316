"""`Reader`: which tensors of a foreign checkpoint make up a parameter, and the quantized tensor that they are.

A reader is made from the `quantization_config` of a model's config.json, and looks at names first (`sources`), so that a file
can be read tensor by tensor. What it gives decodes to what the format's own decoder gives; where that is not possible it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...dtypes import Intx, QTensor, pack, pack_dim


@dataclass(frozen=True)
class Source:
    """What a checkpoint stores of one parameter.

    parameter: its full name, as the model has it. parts: what a stored tensor is -> its name.
    """

    parameter: str
    parts: Mapping[str, str]

    @property
    def module(self) -> str:
        """The full name of the layer."""
        return self.parameter.rpartition(".")[0]


class Reader:
    """One way in which another library stores quantized weights.

    methods: the values of `quant_method` that it reads.
    main: what the name of the tensor ends with that says a parameter is quantized. others: what its other tensors may end with.
    """

    methods: ClassVar[tuple[str, ...]]
    main: ClassVar[str]
    others: ClassVar[tuple[str, ...]] = ()
    registry: ClassVar[dict[str, type[Reader]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in cls.methods:
            Reader.registry[method] = cls

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def sources(self, names: Collection[str]) -> Iterator[Source]:
        """The quantized parameters among stored names. A stored name is in one of them, or is that of a plain tensor."""
        known = set(names)
        for name in sorted(known):
            if not name.endswith(self.main):
                continue
            stem = name.removesuffix(self.main)
            parts = {end.strip("."): stem + end for end in (self.main, *self.others) if stem + end in known}
            if self.is_quantized(parts):
                yield Source(self.parameter_of(stem), parts)

    def is_quantized(self, parts: Mapping[str, str]) -> bool:
        """Whether the tensors of a parameter are those of a quantized one."""
        return True

    def parameter_of(self, stem: str) -> str:
        """The parameter whose tensors' names begin with `stem`."""
        return f"{stem}weight" if stem.endswith(".") or not stem else f"{stem}.weight"

    def ignored(self, names: Collection[str]) -> set[str]:
        """Stored names that are of no use to the model, beside those of quantized parameters."""
        return set()

    def read(
        self, source: Source, get: Callable[[str], Tensor], dtype: torch.dtype, shape: torch.Size | None = None
    ) -> Tensor:
        """The parameter, which dequantizes to `dtype`. get: what is stored under a name. shape: of the parameter, where it is
        known.

        Raises ValueError, with the parameter's name, for tensors that do not fit together, or not the shape.
        """
        parts = {part: get(name) for part, name in source.parts.items()}
        try:
            made = self.make(source, parts, dtype, shape)
            if shape is not None and made.shape != shape:
                raise ValueError(f"they are of shape {tuple(made.shape)}, and the model's is {tuple(shape)}")
            return made
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            shapes = ", ".join(f"{part} {tuple(t.shape)} {str(t.dtype)[6:]}" for part, t in parts.items())
            raise ValueError(
                f"{source.parameter}: cannot read its {self.methods[0]} tensors ({shapes}): {error}"
            ) from error

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        """The parameter of its tensors, by part."""
        raise NotImplementedError


def reader_for(config: Mapping[str, Any]) -> Reader:
    """The reader of a `quantization_config`. Raises ValueError for a method that none reads."""
    method = str(config.get("quant_method", ""))
    if method not in Reader.registry:
        raise ValueError(f"ao reads checkpoints of {', '.join(sorted(Reader.registry))}, and this one is of {method!r}")
    return Reader.registry[method](config)


def transposed(t: Tensor) -> Tensor:
    """(K, N) -> (N, K), in memory of its own."""
    return t.t().contiguous()


def affine(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> QTensor:
    """(codes - zero_point) * scale as an `Intx` tensor.

    codes: (N, K) uint8. scale: (N, G) of a 16-bit dtype or float32. zero_point: (N, G) uint8, or None for 2**(bits - 1).
        Where all zero points are that one, the tensor is symmetric, and stores none.
    """
    middle = 2 ** (bits - 1)
    symmetric = zero_point is None or bool((zero_point == middle).all())
    block = (1, codes.shape[1] // scale.shape[1])
    if scale.shape[0] != codes.shape[0] or block[1] * scale.shape[1] != codes.shape[1]:
        raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit codes of shape {tuple(codes.shape)}")
    block = (1, -1) if scale.shape[1] == 1 else block
    scale_dtype = str(scale.dtype).removeprefix("torch.")
    spec = Intx(bits, block, signed=symmetric, symmetric=symmetric, scale_dtype=scale_dtype)
    if bits == 8:
        qdata = (codes ^ 128).view(torch.int8) if symmetric else codes
    else:
        qdata = pack(codes, bits, pack_dim(codes.shape, bits))
    fields = {"qdata": qdata, "scale": scale, "zero_point": None if symmetric else zero_point}
    return spec.wrap(fields, dtype, codes.shape)
