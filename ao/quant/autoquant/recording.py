"""What a model asks of its linear layers: which weight met how many tokens, how often, and with which activations."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ...dtypes import QTensor
from ...matmul import set_parameter
from ..choice import few
from ..quantize import Filter, is_linear
from .timing import Product

SAMPLE_ROWS = 64
"""The activations kept per weight, at most."""

SHARING = 4
"""Weights that meet one activation, at most, as far as it is told apart."""

_SOURCES = {
    "layer_norm": "norm", "rms_norm": "norm", "rsqrt": "norm",
    "gelu": "activation", "silu": "activation", "sigmoid": "activation",
}  # fmt: skip
"""Functions by name, and what an activation that comes from them is after. Norms that are written out have a `rsqrt`."""

_PASSING = {
    "mul", "rmul", "add", "radd", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone", "view", "reshape",
    "flatten", "unflatten", "unsqueeze", "squeeze", "dropout",
}  # fmt: skip
"""Functions that a graph computes along with what they are of."""


@dataclass(eq=False)
class Weight:
    """A linear weight and what is known of it.

    slots: (module, its full name), for every module that holds the weight; several when it is tied.
    calls: how often each product ran.
    sample: (at most 64, K) activations that it met, or None.
    """

    parameter: nn.Parameter
    slots: list[tuple[nn.Module, str]]
    calls: Counter[Product] = field(default_factory=Counter)
    sample: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of the modules that hold it."""
        return tuple(name for _, name in self.slots)

    def install(self, parameter: nn.Parameter) -> None:
        """Put `parameter` wherever this weight is held."""
        for owner, _ in self.slots:
            set_parameter(owner, "weight", parameter)

    def product(self, x: Tensor, bias: bool) -> Product:
        """F.linear(x, weight) as a Product. x: (..., K)."""
        n, k = self.parameter.shape
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Product(x.numel() // k, n, k, x.dtype, self.parameter.dtype, bias, autocast, x.device)

    def forget_neighbours(self) -> None:
        """Count calls alike whatever computes x and whatever else meets it."""
        calls = Counter[Product]()
        for product, count in self.calls.items():
            calls[replace(product, sharing=1, after="")] += count
        self.calls = calls

    def keep(self, x: Tensor) -> None:
        """Add rows of an activation, evenly spaced, to the sample. x: (..., K)."""
        have = 0 if self.sample is None else self.sample.shape[0]
        if have < SAMPLE_ROWS:
            rows = x.detach().reshape(-1, x.shape[-1])  # (M, K)
            step = max(1, rows.shape[0] // SAMPLE_ROWS)
            rows = rows[::step][: SAMPLE_ROWS - have].clone()
            self.sample = rows if self.sample is None else torch.cat([self.sample, rows.to(self.sample.dtype)])

    def products(self) -> dict[Product, int]:
        """The products to measure, and how often each counts: those of nearly as many tokens go with the most frequent."""
        groups: dict[Product, list[Product]] = {}
        for product in self.calls:
            groups.setdefault(_rounded(product), []).append(product)
        chosen = {max(group, key=lambda p: (self.calls[p], p.tokens)): group for group in groups.values()}
        return {product: sum(self.calls[p] for p in group) for product, group in chosen.items()}


def _rounded(product: Product) -> Product:
    """The product with its tokens rounded up to a number of three binary digits: 1 to 8, 10, 12, 14, 16, 20, ..."""
    step = 1 << max(0, (product.tokens - 1).bit_length() - 3)
    return replace(product, tokens=-(-product.tokens // step) * step)


def find_weights(model: nn.Module, filter_fn: Filter | None) -> tuple[list[Weight], dict[str, str]]:
    """The weights that can be chosen for, and layer name -> why, for linear layers that are left out.

    A weight that several modules share is one weight. It is left out unless all of them are linear layers that
    `filter_fn` accepts, or embeddings. Without one, linear layers are taken, but for small ones.
    """
    holders: dict[int, list[tuple[nn.Module, str, str]]] = {}
    parameters: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append((module, name, key))
                parameters[id(p)] = p
    weights: list[Weight] = []
    skipped: dict[str, str] = {}
    for identity, held in holders.items():
        p = parameters[identity]
        linears = [h for h in held if h[2] == "weight" and not isinstance(h[0], nn.Embedding) and p.dim() == 2]
        small = next((found for h in linears if (found := few(h[0], h[1]))), "") if filter_fn is None else ""
        chosen = [h for h in linears if not small and (filter_fn or is_linear)(h[0], h[1])]
        others = [h for h in held if h not in chosen and not (isinstance(h[0], nn.Embedding) and h[2] == "weight")]
        why = ""
        if not chosen:
            why = small or "filter_fn leaves it out"
        elif isinstance(p, QTensor):
            why = "it is quantized already"
        elif not p.dtype.is_floating_point or p.element_size() == 1:
            why = f"its weight is of {p.dtype}"
        elif others:
            why = f"its weight is tied to {others[0][1]}.{others[0][2]}, which is left out"
        if why:
            skipped |= {name: why for module, name, _ in linears if chosen or isinstance(module, nn.Linear)}
            continue
        if p.is_meta:
            raise ValueError(
                f"autoquant measures, and {chosen[0][1]}.weight is on the meta device: load the weights first, without "
                "offloading them"
            )
        weights.append(Weight(p, [(module, name) for module, name, _ in held]))  # type: ignore[arg-type]
    return weights, skipped


class Recorder(TorchFunctionMode):
    """While it is entered, every `F.linear` on one of the weights is counted, through whatever module it comes."""

    def __init__(self, weights: list[Weight]) -> None:
        super().__init__()
        self.weights = {id(w.parameter): w for w in weights}
        self.calls: Counter[tuple[Weight, Product]] = Counter()
        self._after: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # what tensors come from, as `_SOURCES` says
        self._x: Tensor | None = None
        self._met: list[tuple[Weight, Product]] = []  # by x, one after the other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.linear:
            self._record(*args, **kwargs)
        elif isinstance(out, Tensor) and (after := self._after_of(getattr(func, "__name__", ""), args)):
            self._after[out] = after
        return out

    def __exit__(self, *error: Any) -> None:
        self._count()
        super().__exit__(*error)

    def _after_of(self, name: str, args: tuple[Any, ...]) -> str:
        name = name.strip("_")
        if name in _SOURCES:
            return _SOURCES[name]
        if name not in _PASSING:
            return ""
        given = {self._after.get(arg, "") for arg in args if isinstance(arg, Tensor)}
        return "activation" if "activation" in given else "norm" if "norm" in given else ""

    def _record(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if input is not self._x:
            self._count()
            self._x = input
        known = self.weights.get(id(weight))
        if known is not None and input.numel() > 0:
            product = known.product(input, bias is not None)
            self._met.append((known, replace(product, after=self._after.get(input, ""))))
            known.keep(input)

    def _count(self) -> None:
        """Those that met one activation."""
        for known, product in self._met:
            self.calls[known, replace(product, sharing=min(len(self._met), SHARING))] += 1
        self._met, self._x = [], None


class Call:
    """A call of the model, kept so that it can be repeated: its arguments, and the modes it ran in.

    count: how often the model was called like this.
    caller: the model as compiled code around it has it, where that made the call.
    plain: whether the arguments are only tensors, numbers, strings, and containers of them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: nn.Module | None = None) -> None:
        self.count = 1
        self.caller = caller
        self._arguments = _copied((args, dict(kwargs)))
        self._places = _SamePlaces()
        self.plain = all(
            isinstance(leaf, (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None)))
            for leaf in tree_leaves(self._arguments)
        )
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._autocast = {
            kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        }

    def fresh(self) -> Callable[[Callable[..., Any]], Any]:
        """A function that calls its argument with what this call had. Of arguments that are not plain, the one made before is
        of no use any more."""
        # The call may change what it is given: a list by appending to it, an object such as a cache in any way.
        if self.plain:
            args, kwargs = tree_map(lambda leaf: leaf, self._arguments)
        else:
            with self._places:
                args, kwargs = _copied(self._arguments)
        return lambda model: model(*args, **kwargs)

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Gradients, inference mode and autocast as the call had them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind in ("cpu", "cuda"):
                dtype = self._autocast.get(kind)
                if dtype is not None or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None))
            yield


def signature_of(arguments: Any) -> tuple[Any, ...]:
    """The shapes of the tensors, and the numbers and strings, among the arguments of a call."""
    leaves = tree_leaves(arguments)
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tuple(x for x in shapes if isinstance(x, (tuple, bool, int, float, str)))


def _copied(arguments: Any) -> Any:
    """A deep copy, in which tensors are cut from the autograd graph."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), arguments)


class _SamePlaces(TorchFunctionMode):
    """While it is entered, a tensor within an object that is copied again goes where its first copy is: a CUDA graph, which reads
    a cache where it lies, would be recorded anew for another place."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or type(args[0]) is not Tensor:
            return func(*args, **(kwargs or {}))
        of, memo = args  # kept with its copy, so that no other tensor can have its id
        before, size = self.copies.get(id(of)), of.untyped_storage().nbytes()
        if before is not None and before[0] is of and before[1].untyped_storage().nbytes() == size:
            before[1].untyped_storage().copy_(of.untyped_storage())
            return memo.setdefault(id(of), before[1])
        self.copies[id(of)] = of, func(of, memo)
        return self.copies[id(of)][1]
