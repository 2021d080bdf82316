"""ONNX models of quantized models, with 4-bit weights as 4-bit initializers.

`torch.onnx.export(model, args, dynamo=True)` takes any quantized model, and gives standard operators only. PyTorch has no 4-bit
dtype, so that 4-bit codes stay in bytes there, two in each, which shifts and masks take apart. `export` puts ONNX's own types in
their place, and uses an opset whose `DequantizeLinear` knows groups, so that other tools know the weight for what it is.

    import ao.integrations.onnx

    ao.integrations.onnx.export(model, (x,), "model.onnx", dynamic_shapes=({0: "batch"},))

Needs the packages onnx and onnxscript.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dtypes.bits import packed_dim, unpack
from ..dtypes.onnx_integers import packs_int4

OPSET = 21
"""The first with 4-bit types and with blocks of `DequantizeLinear`."""


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    path: str | Path | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset_version: int = OPSET,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """`torch.onnx.export(model, args, path, dynamo=True)` of a quantized model, with `DequantizeLinear` wherever it fits.

    model: with quantized weights or not; call `.eval()` before.
    args, kwargs: with which it is called.
    path: the file to write; None writes none. Weights of more than 2 GB go to a file beside it.
    opset_version: at least 21.
    options: of `torch.onnx.export`, such as `dynamic_shapes`, `input_names`, `output_names`.

    Weights of integers of 8 bits, and float8, with one scale per row, per tensor or per group along a row, become
    `DequantizeLinear` over their codes; integers of 4 bits with an integer zero point or none become one over INT4 or UINT4.
    Other formats stay packed and are taken apart by operators such as `BitShift` and `Gather`; those of up to 8,192 bytes the
    exporter folds into dense weights. int8 by int8 is `MatMulInteger`.

    Returns the program, whose `.model_proto` is the model. Raises ValueError for an older opset.
    """
    if opset_version < OPSET:
        raise ValueError(
            f"export: opset_version must be at least {OPSET}, which has 4-bit types, got {opset_version}; "
            "torch.onnx.export(..., dynamo=True) exports quantized models for older ones"
        )
    given = {"kwargs": kwargs, "opset_version": opset_version, "verbose": False, **options, "dynamo": True}
    token = packs_int4.set(True)
    try:
        program = torch.onnx.export(model, args, **given)
    finally:
        packs_int4.reset(token)
    assert program is not None
    if not _fill_int4(program.model):
        program = torch.onnx.export(model, args, **given)  # codes that are computed on the way are taken apart there
        assert program is not None
    if path is not None:
        program.save(path)
    return program


def _fill_int4(model: Any) -> bool:
    """Put 4-bit initializers in the place of all `ao::Int4`. False if some have no initializer to be made from."""
    graph = model.graph
    made: dict[tuple[str, bool], Any] = {}
    nodes = [node for node in graph if node.domain == "ao"]
    if any(node.inputs[0].const_value is None for node in nodes):
        return False
    for node in nodes:
        source, target = node.inputs[0], node.outputs[0]
        key = source.name, bool(node.attributes["packed"].as_int())
        if key not in made:
            signed, shape = bool(node.attributes["signed"].as_int()), [int(d) for d in target.shape]
            made[key] = _int4_value(f"{source.name}.int4", source.const_value, shape, signed, key[1])
            graph.register_initializer(made[key])
        for user, index in tuple(target.uses()):
            user.replace_input_with(index, made[key])
        graph.remove(node, safe=True)
        if not source.uses() and not source.is_graph_output():
            graph.initializers.pop(source.name)
    graph.opset_imports.pop("ao", None)
    return True


def _int4_value(name: str, source: Any, shape: list[int], signed: bool, packed: bool) -> Any:
    """An ONNX value of 4-bit numbers. source: packed codes, or one number in a byte. They are converted when it is written."""
    import onnx_ir as ir

    dtype = ir.DataType.INT4 if signed else ir.DataType.UINT4

    def tensor() -> Any:
        codes = torch.from_numpy(source.numpy())
        if packed:
            codes = unpack(codes, 4, packed_dim(codes.shape, shape))
            codes = codes.to(torch.int8) - 8 if signed else codes
        return ir.Tensor(codes.numpy().astype(dtype.numpy()), dtype=dtype, name=name)

    value = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=value)
