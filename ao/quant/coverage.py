"""Which parameters are quantized where nothing else is said, and why the others are not: one rule for models in place, models
that load, and folders.

By default that is what multiplies as a linear layer does: the weight of an `nn.Linear`, that of transformers' `Conv1D`, and
the experts of a mixture, 3-D parameters that hold one linear layer per expert. A linear layer of few outputs or inputs is left
out of it: a classifier, a router.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..dtypes import QTensor
from .slots import Slot

Default = Callable[[Slot], str]
"""Why a parameter is not quantized where nothing else is said; "" for one that is."""

LARGE = 1000
"""A vector of more elements than this is told of, where it is not quantized; a matrix always is."""

FEW = 16
"""Linear layers of fewer outputs or inputs stay as they are, unless they are asked for: they save nothing, and decide much."""

VECTOR = "a vector, such as a norm's weight or a bias"

BY_RULE = "a rule by its name (FqnToConfig) takes it"


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether a module is an `nn.Linear`, other than attention's output projection, which PyTorch reads directly."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_plain(slot: Slot) -> bool:
    """Whether a parameter is the weight of an `nn.Linear` that is nothing more: most are, and nothing else need be asked."""
    return type(slot.owner) is nn.Linear and slot.name == "weight"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear layer whose weight has shape (K, N)."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.partition(".")[0] == "transformers" for c in type(module).__mro__
    )


def is_experts(module: nn.Module, p: Tensor) -> bool:
    """Whether a parameter holds the linear layers of the experts of a mixture, one per index of its first dim."""
    named = hasattr(module, "_apply_gate") or type(module).__name__.endswith("Experts")
    return named and p.dim() == 3 and min(p.shape[1:]) > 1


def is_matrix(p: Tensor) -> bool:
    """Whether two dims or more have more than one index."""
    return sum(n > 1 for n in p.shape) > 1


def qualifies(p: Tensor) -> bool:
    """Whether a parameter can be quantized: floating point of 16 bits or more, or quantized already, of two or more dims."""
    return p.dim() >= 2 and p.dtype.is_floating_point and (isinstance(p, QTensor) or p.element_size() > 1)


def few(module: nn.Module, name: str) -> str:
    """Why a linear layer is too small to be quantized where nothing asks for it; "" for others, and for one that is the model."""
    p = module._parameters.get("weight")
    if p is None or p.dim() != 2 or min(p.shape) >= FEW or not name:
        return ""
    n, k = reversed(p.shape) if is_conv1d(module) else p.shape
    size = f"{n} outputs, such as a classifier or a router" if n < FEW else f"{k} inputs"
    return f"of {size}: fewer than {FEW} save nothing and decide much; filter_fn or {BY_RULE}"


def by_default(slot: Slot, asked: bool = False) -> str:
    """The `Default` of `quantize_`. asked: whether somebody names the layer, whose size then does not count."""
    owner, leaf, p = slot.owner, slot.name, slot.parameter
    if is_plain(slot) and p.is_floating_point() and p.element_size() > 1 and (asked or min(p.shape) >= FEW):
        return ""
    if p.dim() < 2:
        return VECTOR
    kind = type(owner).__name__
    if computed := why_computed(owner, leaf):
        return computed
    takes = is_experts(owner, p) or (leaf == "weight" and (is_linear(owner, "") or is_conv1d(owner)))
    if takes and qualifies(p):
        return "" if asked or min(p.shape) >= FEW else few(owner, slot.module_fqn)
    if not is_matrix(p):
        return VECTOR
    if not qualifies(p):
        return f"of {p.dtype}, and not floating point of 16 bits or more"
    if isinstance(owner, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return f"a projection of PyTorch's attention, which reads it directly; {BY_RULE}"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return f"a convolution ({kind}); {BY_RULE}"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return f"an embedding ({kind}); {BY_RULE}"
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return f"of a recurrent layer ({kind})"
    return f"not a linear layer ({kind}); {BY_RULE}"


def why_computed(owner: nn.Module, leaf: str) -> str:
    """Why a parameter is only what a layer's weight is computed from, before each call, and how to end that; "" for others."""
    if isinstance(owner, ParametrizationList):
        return (
            "the layer's weight is computed by a parametrization; remove that first with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
        )
    base, _, end = leaf.rpartition("_")
    if end not in ("orig", "g", "v") or base in owner._parameters or not isinstance(getattr(owner, base, None), Tensor):
        return ""
    if end != "orig":
        how = "weight normalization; remove that first with torch.nn.utils.remove_weight_norm(layer, name)"
    elif f"{base}_mask" in owner._buffers:
        how = "pruning; end that first with torch.nn.utils.prune.remove(layer, name)"
    else:
        how = "spectral normalization; remove that first with torch.nn.utils.remove_spectral_norm(layer, name)"
    return f"the layer's weight is computed by {how}"


def why_no_parameter(module: nn.Module) -> str:
    """Why the weight of a layer is none of its parameters, and so cannot be quantized; "" where it is one, or there is none."""
    if "weight" in module._parameters:
        return ""
    computed = module._modules.get("parametrizations")
    if isinstance(computed, nn.ModuleDict) and "weight" in computed:
        return why_computed(computed["weight"], "original")
    for leaf in ("weight_orig", "weight_v"):
        if leaf in module._parameters and (why := why_computed(module, leaf)):
            return why
    weight = module._buffers.get("weight")
    return IS_BUFFER if weight is not None and qualifies(weight) else ""


IS_BUFFER = "a buffer; make it an nn.Parameter first"
