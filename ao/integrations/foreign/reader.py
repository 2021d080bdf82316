"""`Reader`: which tensors of a foreign checkpoint make up a parameter, and the quantized tensor that they are.

A reader is made from the `quantization_config` of a model's config.json, and looks at names first (`sources`), so that a file
can be read tensor by tensor. What it gives decodes to what the format's own decoder gives; where that is not possible it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...dtypes import Intx, QTensor, Spec, blank, pack, pack_dim
from ...dtypes.checkpoint import fits


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

    metadata: of the files, all together.
    methods: the values of `quant_method` that it reads.
    main: what the name of the tensor ends with that says a parameter is quantized. others: what its other tensors may end with.
    integers, floats: parts that hold integers, and floating-point numbers; those in neither may hold both.
    """

    methods: ClassVar[tuple[str, ...]]
    main: ClassVar[str]
    others: ClassVar[tuple[str, ...]] = ()
    integers: ClassVar[tuple[str, ...]] = ()
    floats: ClassVar[tuple[str, ...]] = ()
    registry: ClassVar[dict[str, type[Reader]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in cls.methods:
            Reader.registry[method] = cls

    def __init__(self, config: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.metadata = metadata or {}
        self.checked: set[Hashable] = set()

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
            for part, t in parts.items():
                if (part in self.integers and (t.is_floating_point() or t.is_complex())) or (
                    part in self.floats and not t.is_floating_point()
                ):
                    raise ValueError(f"{part} is of {t.dtype}")
            made = self.make(source, parts, dtype, shape)
            self.check(made)
            if shape is not None and made.shape != shape:
                raise ValueError(f"they are of shape {tuple(made.shape)}, and the model's is {tuple(shape)}")
            return made
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            shapes = ", ".join(f"{part} {tuple(t.shape)} {str(t.dtype)[6:]}" for part, t in parts.items())
            raise ValueError(
                f"{source.parameter}: cannot read its {self.methods[0]} tensors ({shapes}): {error}"
            ) from error

    def check(self, made: Tensor) -> None:
        """Raise ValueError for a tensor whose fields do not fit one another."""
        if not isinstance(made, QTensor):
            return
        form = (made.spec, made.shape, *((name, t.shape, t.dtype) for name, t in made.fields().items()))
        if form in self.checked:
            return
        codes = [(name, t) for name, t in made.fields().items() if made.roles[name] == "elements"]
        wanted = blank(made.spec, tuple(made.shape)).fields() if codes else {}
        if any(t.dtype != wanted[name].dtype for name, t in codes) or not fits(made):
            raise ValueError("they do not fit one another")
        self.checked.add(form)

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        """The parameter of its tensors, by part."""
        raise NotImplementedError


def reader_for(config: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Reader:
    """The reader of a `quantization_config`. metadata: of the files. Raises ValueError for a method that none reads."""
    method = str(config.get("quant_method", ""))
    if method not in Reader.registry:
        raise ValueError(f"ao reads checkpoints of {', '.join(sorted(Reader.registry))}, and this one is of {method!r}")
    return Reader.registry[method](config, metadata)


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


def blocks_of(shape: Sequence[int], scale: Tensor) -> tuple[int, ...]:
    """The elements of a weight of `shape` that share a scale, per dim. Raises ValueError where they do not divide it."""
    if scale.dim() != len(shape) or any(n % max(g, 1) for n, g in zip(shape, scale.shape)):
        raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit a weight of shape {tuple(shape)}")
    return tuple(1 if g == n else -1 if g == 1 else n // g for n, g in zip(shape, scale.shape))


def integers(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> QTensor:
    """(codes - zero_point) * scale as an `Intx` tensor.

    codes: (..., N, K), signed. scale: one per block, of the rank of `codes`. zero_point: like it, integers or floating point;
        None, or all 0, makes a symmetric tensor.
    """
    if codes.is_floating_point():
        raise ValueError(f"codes are of {codes.dtype}")
    block = blocks_of(codes.shape, scale)
    scale_dtype = str(scale.dtype).removeprefix("torch.")
    if zero_point is not None and bits > 1 and bool((zero_point == 0).all()):
        zero_point = None
    kind: Any = "float" if zero_point is not None and zero_point.is_floating_point() else "int"
    spec = Intx(bits, block, symmetric=zero_point is None, zero_point=kind, scale_dtype=scale_dtype)
    qdata = codes.to(torch.int8)
    if bits < 8:
        qdata = pack((qdata + 2 ** (bits - 1)).view(torch.uint8), bits, pack_dim(qdata.shape, bits))
    if zero_point is not None:
        zero_point = zero_point.reshape(scale.shape).to(scale.dtype if kind == "float" else torch.int8)
    fields = {"qdata": qdata.contiguous(), "scale": scale, "zero_point": zero_point}
    return spec.wrap(fields, dtype, codes.shape)


def with_activation(q: QTensor, act: Spec | None, act_scale: Tensor | None) -> QTensor:
    """The same weight, whose activations are quantized."""
    if act is None:
        return q
    fields = {name: t for name, t in q.fields().items() if name != "act_scale"}
    return replace(q.spec, act=act).wrap(fields, q.dtype, q.shape, act_scale=act_scale)
