"""`rotate_`: turn the residual stream of a transformer, so that its outliers are spread before weights are quantized.

With an orthogonal R, a model whose residual stream is x R computes what it computed with x, as RMSNorm without its weight
commutes with R (QuaRot, arXiv:2404.00456; SliceGPT, arXiv:2401.15024):

    embedding      E R
    reads          W diag(g) R      g: the weight of the norm before it, which becomes 1
    writes         R^T W
    values         W_v and W_o of each head are turned by a matrix of their own, of the size of a head

All of it goes into the weights: nothing is computed at run time that was not before. R is a Hadamard matrix with random
signs (hadamard.py). A head that was tied to the embedding takes in the last norm, and becomes a weight of its own.

Then quantize as always, `quantize_(model, Int4WeightOnlyConfig(algorithm="gptq"), calibration_data=batches)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...dtypes import QTensor
from ..report import Report, progress
from .hadamard import random_hadamard


@dataclass
class RotationPlan:
    """Who touches the residual stream.

    embeddings: tables whose rows enter the stream.
    readers: (RMSNorm, the linear layers that read what it gives), the head among them.
    writers: linear layers whose output is added to the stream.
    values: (linear layer that makes values, the one that reads them after attention, size of a head, first row of the values
        in the former, and how many rows they are).
    """

    embeddings: list[nn.Embedding] = field(default_factory=list)
    readers: list[tuple[nn.Module, list[nn.Linear]]] = field(default_factory=list)
    writers: list[nn.Linear] = field(default_factory=list)
    values: list[tuple[nn.Linear, nn.Linear, int, int, int]] = field(default_factory=list)


BLOCK_NAMES = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")


def rotation_plan(model: nn.Module) -> RotationPlan:
    """The plan of a model that is built and named like Llama in the transformers library (Llama, Mistral, Qwen2, Qwen3, ...).

    Raises ValueError, with what is missing or does not fit, for another one.
    """
    inner = getattr(model, "model", model)
    for owner, name in ((inner, "embed_tokens"), (inner, "layers"), (inner, "norm"), (model, "lm_head")):
        if not isinstance(getattr(owner, name, None), nn.Module):
            raise ValueError(_unknown(f"the model has no {name}"))
    plan = RotationPlan([inner.embed_tokens])  # type: ignore[list-item]
    for i, block in enumerate(inner.layers):  # type: ignore[arg-type]
        where = f"layers.{i}"
        extra = [name for name, _ in block.named_children() if name not in BLOCK_NAMES]
        if extra or any(not hasattr(block, name) for name in BLOCK_NAMES):
            raise ValueError(_unknown(f"{where} has {', '.join(name for name, _ in block.named_children())}"))
        attention, mlp = block.self_attn, block.mlp
        layers = {name: getattr(attention, f"{name}_proj", None) for name in ("q", "k", "v", "o")}
        layers |= {name: getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down")}
        missing = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        if missing:
            raise ValueError(_unknown(f"{where} has no linear layer {missing[0]}_proj"))
        plan.readers.append((block.input_layernorm, [layers[name] for name in ("q", "k", "v")]))  # type: ignore[misc]
        plan.readers.append((block.post_attention_layernorm, [layers["gate"], layers["up"]]))  # type: ignore[list-item]
        plan.writers += [layers["o"], layers["down"]]  # type: ignore[list-item]
        rows = layers["v"].weight.shape[0]  # type: ignore[union-attr]
        plan.values.append((layers["v"], layers["o"], attention.head_dim, 0, rows))  # type: ignore[arg-type]
    plan.readers.append((inner.norm, [model.lm_head]))  # type: ignore[list-item, arg-type]
    return plan


def _unknown(why: str) -> str:
    return f"rotate_ knows models that are built and named like Llama, and {why}; give a RotationPlan that says what it has"


@torch.no_grad()
def rotate_(model: nn.Module, plan: RotationPlan | None = None, seed: int = 0, block: int | None = None) -> Report:
    """Rotate the weights of a model in place; its output stays the same, up to rounding to its dtype.

    plan: who touches the residual stream; by default that of `rotation_plan`.
    seed: of the signs.
    block: rotate so many numbers of the residual stream among themselves, rather than all. Where scales are powers of two, as
        in MXFP4, a rotation of all spreads an outlier over every block, and costs more than it saves; one of 32 stays inside
        (arXiv:2511.04214).

    Returns a report whose notes say what was untied. Everything is checked before anything changes. Raises ValueError for a
    model that no plan is known for, for a block that does not divide the width, for norms that are no RMSNorm, and for weights
    that are quantized already.
    """
    plan = rotation_plan(model) if plan is None else plan
    width = plan.embeddings[0].weight.shape[1]
    _check(model, plan, width)
    if block is not None and (block < 1 or width % block):
        raise ValueError(f"rotate_: block must divide the width {width} of the residual stream, got {block}")
    report = Report()
    rotation = _diagonal(width, width if block is None else block, seed)
    embedded = {id(e.weight): e for e in plan.embeddings}
    for _, layers in plan.readers:
        for layer in layers:
            if id(layer.weight) in embedded:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
                report.notes.append("the head was tied to the embedding, and has a weight of its own now")
    for table in {id(e.weight): e for e in plan.embeddings}.values():
        _set(table.weight, _wide(table.weight) @ rotation.to(table.weight.device))
    for norm, layers in progress(plan.readers, "rotate"):
        gain = _gain(norm)
        for layer in layers:
            _set(layer.weight, (_wide(layer.weight) * gain) @ rotation.to(gain.device))
        _reset_gain(norm)
    for layer in plan.writers:
        turned = rotation.to(layer.weight.device).t()
        _set(layer.weight, turned @ _wide(layer.weight))
        if layer.bias is not None:
            _set(layer.bias, turned @ _wide(layer.bias))
    for v, o, size, start, rows in plan.values:
        turn = _diagonal(size, size if block is None else math.gcd(block, size), seed + 1).to(v.weight.device)
        part = slice(start, start + rows)
        values = _wide(v.weight)[part].unflatten(0, (-1, size))  # (heads, size, K)
        _set(v.weight[part], (turn.t() @ values).flatten(0, 1))
        if v.bias is not None:
            _set(v.bias[part], (_wide(v.bias)[part].unflatten(0, (-1, size)) @ turn).flatten())
        heads = _wide(o.weight).unflatten(1, (-1, size))  # (N, heads, size)
        _set(o.weight, (heads @ turn).flatten(1))
    return report


def _diagonal(n: int, block: int, seed: int) -> Tensor:
    """Random Hadamard matrices of `block` along the diagonal of a matrix (n, n)."""
    return torch.block_diag(*(random_hadamard(block, seed + 1000 * i) for i in range(n // block)))


def _check(model: nn.Module, plan: RotationPlan, width: int) -> None:
    names = {module: name for name, module in model.named_modules()}
    layers = [*plan.embeddings, *plan.writers, *(layer for _, group in plan.readers for layer in group)]
    for layer in layers:
        if isinstance(layer.weight, QTensor):
            raise ValueError(f"rotate_: {names.get(layer)} is quantized already; rotate first")
    for norm, _ in plan.readers:
        weight = norm._parameters.get("weight")
        if (
            weight is None
            or weight.shape != (width,)
            or norm._parameters.get("bias") is not None
            or _subtracts_mean(norm)
        ):
            raise ValueError(f"rotate_: {names.get(norm)} must be an RMSNorm with a weight of {width}, and is {norm}")
    for v, o, size, _, rows in plan.values:
        if rows % size or o.in_features % size:
            raise ValueError(f"rotate_: {names.get(v)} and {names.get(o)} do not divide into heads of {size}")


def _subtracts_mean(norm: nn.Module) -> bool:
    """Whether a norm is no RMSNorm: it tells apart inputs that differ by a constant alone."""
    weight = norm._parameters["weight"]
    assert weight is not None
    x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    return not torch.allclose(
        norm(x).float(), (x / x.square().mean().sqrt() * _gain(norm)).float(), rtol=0.02, atol=0.02
    )


def _gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies by, float64. Some libraries store it less 1."""
    weight = _wide(norm.weight)  # type: ignore[arg-type]
    return weight + 1 if "Gemma" in type(norm).__name__ else weight


def _reset_gain(norm: nn.Module) -> None:
    norm.weight.fill_(0.0 if "Gemma" in type(norm).__name__ else 1.0)  # type: ignore[operator]


def _wide(t: Tensor) -> Tensor:
    return t.detach().double()


def _set(t: Tensor, value: Tensor) -> None:
    t.detach().copy_(value)
