"""`Params4bit` and `Int8Params`: float parameters that quantize when they move to a device.

What they become is a QTensor of ao, with the attributes that users of bitsandbytes read; so it multiplies, compiles, is
sharded and merged as any other of ao. Its numbers are those of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...dtypes import Codebook, CodebookTensor, Intx, IntxTensor, QTensor, dense, pack, pack_dim, packed_dim, unpack
from ...integrations.foreign.bitsandbytes import BitsAndBytes
from ...integrations.foreign.reader import Source
from .functional import _nibbles, absmax_of, codes_of, int8_vectorwise_quant, quantize_4bit
from .maps import codes_of_ranks, get_4bit_type
from .state import QuantState


class Quantized4bit(CodebookTensor):
    """What a `Params4bit` becomes."""

    bnb_quantized = True

    @property
    def quant_type(self) -> str:
        """ "nf4" or "fp4"."""
        return str(self.spec.table)

    @property
    def compress_statistics(self) -> bool:
        """Whether the largest magnitudes are quantized too."""
        return isinstance(self.scale, QTensor)

    @property
    def blocksize(self) -> int:
        """The elements that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def absmax(self) -> Tensor:
        """The largest magnitudes, or their codes."""
        scale: Any = self.scale
        return (scale.qdata if self.compress_statistics else scale).detach().flatten()

    @property
    def quant_state(self) -> QuantState:
        """What it takes beside `packed` to dequantize."""
        scale: Any = self.scale
        code = get_4bit_type(self.quant_type, self.device)
        state = QuantState(self.absmax, self.shape, code, self.blocksize, self.quant_type, self.dtype)
        if self.compress_statistics:
            state.offset = scale.offset.detach().reshape(())
            state.state2 = QuantState(
                scale.scale.detach().flatten(), code=scale.table.detach(), blocksize=256, dtype=torch.float32
            )
        return state

    @property
    def packed(self) -> Tensor:
        """The codes as bitsandbytes stores them: uint8 (elements / 2, 1)."""
        ranks = unpack(self.qdata.detach(), 4, packed_dim(self.qdata.shape, self.shape))
        return _nibbles(codes_of_ranks(self.quant_type).to(self.device)[ranks.flatten().int()], torch.uint8)


class Quantized8bit(IntxTensor):
    """What an `Int8Params` becomes."""

    has_fp16_weights = False

    @property
    def CB(self) -> Tensor:
        """The codes, int8 (N, K)."""
        return self.qdata.detach()

    @property
    def SCB(self) -> Tensor:
        """The largest magnitude of each row, float32 (N,)."""
        return dense(self.scale).detach().flatten() * 127


class _Meta(type(nn.Parameter)):  # type: ignore[misc]
    """Counts as instances the tensors that parameters of a class have become."""

    becomes: type

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, cls.becomes)


class _Waiting(nn.Parameter):
    """A float parameter that quantizes when it moves to a device, the CPU too, but for meta."""

    def quantized(self, device: Any = None) -> nn.Parameter:
        """The quantized parameter, on `device`."""
        raise NotImplementedError

    def again(self, data: Tensor) -> Any:
        """The same with other data."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tensor; quantized, if that names a device."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "meta":
            return self.again(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))
        return self.again(self.data if dtype is None else self.data.to(dtype)).quantized(device)

    def cpu(self) -> Any:  # type: ignore[override]
        """Quantized, on the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """Quantized, on a GPU."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """Quantized, on a GPU."""
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self.again(self.data.clone())
        return memo[id(self)]


class _Meta4(_Meta):
    becomes = Quantized4bit


class _Meta8(_Meta):
    becomes = Quantized8bit


class Params4bit(_Waiting, metaclass=_Meta4):
    """A weight that becomes 4-bit when it moves to a device.

    data: the weight; or the codes, with `quant_state` and bnb_quantized=True, which is then quantized from the start.
    requires_grad: accepted: a quantized weight has no gradient.
    blocksize, compress_statistics, quant_type: as of `functional.quantize_4bit`.
    quant_storage: accepted: the bytes of a QTensor are uint8.
    """

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Any:
        data = torch.empty(0) if data is None else data
        if isinstance(data, QTensor):
            return nn.Parameter(data, requires_grad=False)
        if bnb_quantized and quant_state is not None:
            return nn.Parameter(tensor_4bit(data, quant_state), requires_grad=False)
        codes_of_ranks(quant_type)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize, self.compress_statistics = 64 if blocksize is None else blocksize, bool(compress_statistics)
        self.quant_type, self.quant_storage, self.quant_state, self.bnb_quantized = (
            quant_type,
            quant_storage,
            None,
            False,
        )
        return self

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    quant_state: QuantState | None
    bnb_quantized: bool

    def again(self, data: Tensor) -> Any:
        """The same with other data."""
        return Params4bit(
            data,
            self.requires_grad,
            None,
            self.blocksize,
            self.compress_statistics,
            self.quant_type,
            self.quant_storage,
        )

    def quantized(self, device: Any = None) -> nn.Parameter:
        """The quantized parameter, on `device`."""
        data = self.data.to(device=device)
        codes, state = quantize_4bit(data, None, None, self.blocksize, self.compress_statistics, self.quant_type)
        return nn.Parameter(tensor_4bit(codes, state), requires_grad=False)

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """The parameter of codes and the dict of a state, as a checkpoint of bitsandbytes has them."""
        return cls(data.to(device), quant_state=QuantState.from_dict(quantized_stats, device), bnb_quantized=True)


class Int8Params(_Waiting, metaclass=_Meta8):
    """A weight that becomes int8, a scale per row, when it moves to a device; with has_fp16_weights it stays as it is.

    CB, SCB: codes and the largest magnitudes of the rows, of a weight that is quantized from the start.
    """

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        data = torch.empty(0) if data is None else data
        if isinstance(data, QTensor):
            return nn.Parameter(data, requires_grad=False)
        if SCB is not None:
            return nn.Parameter(tensor_8bit(data if CB is None else CB, SCB, torch.float16), requires_grad=False)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad and data.is_floating_point())
        self.CB, self.SCB, self.has_fp16_weights = None, None, has_fp16_weights
        return self

    def again(self, data: Tensor) -> Any:
        """The same with other data."""
        return Int8Params(data, self.requires_grad, self.has_fp16_weights)

    def quantized(self, device: Any = None) -> nn.Parameter:
        """The quantized parameter, on `device`. The rows are rounded to float16 first, as bitsandbytes does."""
        data = self.data.to(device=device)
        if self.has_fp16_weights:
            return self.again(data)
        codes, largest, _ = int8_vectorwise_quant(data.to(torch.float16))
        return nn.Parameter(tensor_8bit(codes, largest, self.dtype), requires_grad=False)


def tensor_4bit(codes: Tensor, state: QuantState) -> Quantized4bit:
    """The tensor of codes and a state of bitsandbytes, bit for bit. Where a block goes across rows, its scale is stored for each
    part of it. Raises ValueError where no dim is a multiple of 8."""
    assert state.shape is not None and state.blocksize is not None and state.dtype is not None
    shape, size = tuple(state.shape), state.blocksize
    if shape[-1] % size == 0:
        parts = {"weight": codes.contiguous().flatten().view(torch.uint8)}
        for name, t in state.as_dict(packed=True).items():
            parts["state" if name.startswith("quant_state") else name] = t
        q: Any = BitsAndBytes({}).make(Source("weight", {}), parts, state.dtype, None)
        return Quantized4bit(q.spec, q.dtype, q.shape, True, **q.fields())
    step = math.gcd(size, shape[-1])
    ranks = torch.argsort(codes_of_ranks(str(state.quant_type))).to(codes.device, torch.uint8)
    order = ranks[codes_of(codes, math.prod(shape)).int()].reshape(shape)
    place = torch.arange(0, math.prod(shape), step, device=codes.device) // size
    spec = Codebook(str(state.quant_type), (*[1] * (len(shape) - 1), step))
    fields = {
        "qdata": pack(order, 4, pack_dim(shape, 4, f"a weight of shape {shape}")),
        "scale": absmax_of(state)[place].reshape(*shape[:-1], -1),
        "table": torch.tensor(spec.values, dtype=torch.float32, device=codes.device),
    }
    return Quantized4bit(spec, state.dtype, torch.Size(shape), True, **fields)


ACT = Intx(8, (1, -1), narrow=True)
"""What LLM.int8 does to an activation: int8, a scale per row."""


def tensor_8bit(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Quantized8bit:
    """The tensor of rows of int8 and their largest magnitudes; its products take int8 activations."""
    scale = (largest.float() / 127).reshape(-1, 1)
    return Quantized8bit(Intx(8, (1, -1), narrow=True, act=ACT), dtype, codes.shape, True, qdata=codes, scale=scale)
