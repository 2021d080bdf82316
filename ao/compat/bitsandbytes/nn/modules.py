"""bitsandbytes' layers over quantized tensors of ao. A weight quantizes when the layer moves to a device, or at its first
call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....dtypes import QTensor
from ....matmul import QuantizedLayer
from ..functional import int8_vectorwise_dequant, int8_vectorwise_quant
from ..optim import GlobalOptimManager
from ..parameters import Int8Params, Params4bit, tensor_4bit, tensor_8bit
from ..state import QuantState, is_state_name


class _Quantizing:
    """A layer whose weight waits to be quantized."""

    _parameters: dict[str, Any]
    training: bool

    def quantize_weight(self, device: Any = None) -> None:
        """Quantize the weight, where it is or on `device`, if it is not quantized yet."""
        weight = self._parameters["weight"]
        if not isinstance(weight, QTensor):
            self._parameters["weight"] = self.waiting(weight).quantized(device)

    def waiting(self, weight: Tensor) -> Any:
        """The parameter that knows how to quantize `weight`."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight = self._parameters["weight"]
        if isinstance(weight, QTensor):
            return super()._apply(fn, recurse)  # type: ignore[misc]
        waiting = self.waiting(weight)
        with torch.no_grad():
            moved = fn(waiting)
        if not isinstance(moved, QTensor):  # the same parameter, which an optimizer may hold
            waiting.data, moved = moved.data, waiting
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            self._parameters["weight"] = moved
        return self

    def extra_repr(self) -> str:
        """The layer, and the format of its weight."""
        weight = self._parameters["weight"]
        said = weight.spec if isinstance(weight, QTensor) else f"{weight.dtype}, not quantized yet"
        return f"{super().extra_repr()}, weight={said}"  # type: ignore[misc]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        weight = self._parameters["weight"]
        if weight is not None and not isinstance(weight, QTensor):
            self._parameters["weight"] = self.waiting(weight)


class _FourBit(_Quantizing):
    """What 4-bit layers have in common."""

    quant_type: str
    blocksize: int
    compress_statistics: bool
    quant_storage: torch.dtype
    weight: Any

    def _set_up(self, quant_type: str, compress_statistics: bool | None, quant_storage: torch.dtype) -> None:
        self.quant_type, self.quant_storage, self.blocksize = quant_type, quant_storage, 64
        self.compress_statistics = bool(compress_statistics)
        self._parameters["weight"] = self.waiting(self._parameters["weight"])

    def waiting(self, weight: Tensor) -> Any:
        """The parameter that knows how to quantize `weight`."""
        if isinstance(weight, Params4bit):
            return weight
        return Params4bit(
            weight,
            weight.requires_grad,
            None,
            self.blocksize,
            self.compress_statistics,
            self.quant_type,
            self.quant_storage,
        )

    @property
    def quant_state(self) -> QuantState | None:
        """That of the weight; None before it is quantized."""
        return getattr(self.weight, "quant_state", None)

    # As bitsandbytes stores it: codes, and the tensors of the state.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        weight = self._parameters["weight"]
        if isinstance(weight, QTensor):
            destination[f"{prefix}weight"] = weight.packed  # type: ignore[attr-defined]
            for name, t in weight.quant_state.as_dict(packed=True).items():  # type: ignore[attr-defined]
                destination[f"{prefix}weight.{name}"] = t

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        start = f"{prefix}weight."
        names = [key for key in state_dict if key.startswith(start) and is_state_name(key.removeprefix(start))]
        if names:
            codes = state_dict[f"{prefix}weight"]
            device = self.weight.device if self.weight.device.type != "meta" else codes.device
            state = QuantState.from_dict({key: state_dict[key] for key in names}, device)
            self._parameters["weight"] = nn.Parameter(tensor_4bit(codes.to(device), state), requires_grad=False)
            known = {key: t for key, t in state_dict.items() if key not in names}
            state_dict = known | {f"{prefix}weight": self._parameters["weight"]}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)  # type: ignore[misc]


class Linear4bit(_FourBit, QuantizedLayer, nn.Linear):
    """`nn.Linear` with a 4-bit weight.

    compute_dtype: of the product; None is that of the input.
    compress_statistics: double quantization. quant_type: "nf4" or "fp4". quant_storage: accepted; bytes are uint8.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.compute_dtype = compute_dtype
        self._set_up(quant_type, compress_statistics, quant_storage)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) -> (..., N), of the dtype of x."""
        self.quantize_weight()
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        _cast(self, dtype)
        return self.product(x.to(dtype)).to(x.dtype)


def _cast(layer: nn.Module, dtype: torch.dtype) -> None:
    """Have the weight dequantize to `dtype`, and the bias be of it: at the first call, and where inputs change."""
    for p in layer._parameters.values():
        if p is not None and p.dtype != dtype:
            p.data = p.data.to(dtype)


class LinearFP4(Linear4bit):
    """`Linear4bit` with quant_type="fp4"."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """`Linear4bit` with quant_type="nf4"."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class Embedding4bit(_FourBit, nn.Embedding):
    """`nn.Embedding` with a 4-bit weight, without double quantization."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._set_up(quant_type, False, quant_storage)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the weight, of the dtype that it had."""
        self.quantize_weight()
        return super().forward(input).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with quant_type="fp4"."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quant_type="nf4"."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


@dataclass
class MatmulLtState:
    """The settings of an int8 product.

    threshold: input columns in which a magnitude reaches it are multiplied in floating point; 0 for none.
    has_fp16_weights: the weight is floating point, and quantized at each call.
    CB, SCB: codes and row maxima of a weight that is quantized.
    """

    threshold: float = 0.0
    has_fp16_weights: bool = True
    CB: Tensor | None = None
    SCB: Tensor | None = None


class _Int8(_Quantizing):
    """What int8 layers have in common."""

    has_fp16_weights: bool

    def waiting(self, weight: Tensor) -> Any:
        """The parameter that knows how to quantize `weight`."""
        return (
            weight
            if isinstance(weight, Int8Params)
            else Int8Params(weight, weight.requires_grad, self.has_fp16_weights)
        )


class Linear8bitLt(_Int8, QuantizedLayer, nn.Linear):
    """`nn.Linear` with int8 products (LLM.int8(), arXiv:2208.07339).

    has_fp16_weights: keep the weight in floating point and quantize it at each call, for training; False quantizes it for good.
    threshold: as of `MatmulLtState`. index: accepted.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.has_fp16_weights, self.threshold, self.index = has_fp16_weights, threshold, index
        self._parameters["weight"] = Int8Params(self.weight, has_fp16_weights, has_fp16_weights)

    @property
    def state(self) -> MatmulLtState:
        """The settings, and what the weight is made of."""
        weight = self._parameters["weight"]
        return MatmulLtState(
            self.threshold, self.has_fp16_weights, getattr(weight, "CB", None), getattr(weight, "SCB", None)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) -> (..., N), of the dtype of x."""
        if self.has_fp16_weights:
            return int8_product(x, self.weight, self.bias, self.threshold)
        self.quantize_weight()
        _cast(self, x.dtype)
        return int8_product(x, self.weight, self.bias, self.threshold, self.product)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters["weight"]
        if isinstance(weight, QTensor):
            destination[f"{prefix}weight"] = weight.CB  # type: ignore[attr-defined]
            destination[f"{prefix}SCB"] = weight.SCB  # type: ignore[attr-defined]
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        own = (f"{prefix}SCB", f"{prefix}weight_format")
        if own[0] in state_dict:
            if int(state_dict.get(own[1], torch.tensor(0, dtype=torch.int64))) != 0:
                raise ValueError(
                    f"{prefix}weight_format must be 0, rows, got {state_dict[own[1]]}; save with a newer version"
                )
            codes = state_dict[f"{prefix}weight"]
            device = self.weight.device if self.weight.device.type != "meta" else codes.device
            q = tensor_8bit(codes.to(device), state_dict[own[0]].to(device), self.weight.dtype)
            self._parameters["weight"] = nn.Parameter(q, requires_grad=False)
            known = {key: t for key, t in state_dict.items() if key not in own}
            state_dict = known | {f"{prefix}weight": self._parameters["weight"]}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class _Rounded(torch.autograd.Function):
    """int8 rows of `x` and what they stand for, with the gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        codes, largest, _ = int8_vectorwise_quant(x.reshape(-1, x.shape[-1]))
        return int8_vectorwise_dequant(codes, largest).to(x.dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def int8_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, product: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """x @ weight.T + bias with int8 rows of both, but for input columns in which a magnitude reaches `threshold`.

    product: x -> x @ weight.T + bias of a quantized weight; None for one in floating point, which is rounded here.
    """
    columns = None
    whole = x
    if threshold > 0:
        columns = (x.detach().abs() >= threshold).reshape(-1, x.shape[-1]).any(0)
        x = x.masked_fill(columns, 0.0)
    if product is not None:
        out = product(x)
    elif isinstance(weight, QTensor):
        out = F.linear(x, weight, bias)
    else:
        out = F.linear(
            _Rounded.apply(x), _Rounded.apply(Tensor.to(weight, x.dtype)), None if bias is None else bias.to(x.dtype)
        )
    if columns is not None:
        index = columns.nonzero().flatten()
        if index.numel():
            part = weight.detach().dequantize() if isinstance(weight, QTensor) else weight
            out = out + F.linear(whole[..., index], Tensor.to(part[:, index], x.dtype))
    return out


class Embedding8bit(_Int8, nn.Embedding):
    """`nn.Embedding` with rows of int8."""

    has_fp16_weights = False

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._parameters["weight"] = Int8Params(self.weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the weight, of the dtype that it had."""
        self.quantize_weight()
        return super().forward(input).to(self.dtype)


class Embedding(nn.Embedding):
    """`nn.Embedding` that starts from Xavier's uniform distribution, and whose optimizer states stay in 32 bits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Draw the weight anew; the padding row is 0."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` followed by a layer norm."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, device: Any = None, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, device=device, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Rows, normalized in float32, of the dtype of the weight."""
        rows = super().forward(input)
        return F.layer_norm(
            rows.float(), self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps
        ).to(self.weight.dtype)


__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
]
