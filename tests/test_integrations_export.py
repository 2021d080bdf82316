"""torch.export and AOTInductor: what a quantized model becomes runs where `ao` is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ao

FORMATS = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int4": ao.Int4WeightOnlyConfig(group_size=32),
    "nf4": ao.NF4WeightOnlyConfig(),
    "float8": ao.Float8WeightOnlyConfig(),
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
}
QUICK = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
"""Headers take longer to compile ahead than a package does, and what calls the loops need not be fast."""
BATCH = ({0: torch.export.Dim("batch", min=1, max=1024)},)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated"
)  # torch.export, of its own


def net(form: str, dtype: torch.dtype, whole: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)] if whole else [nn.Linear(64, 64)]
    model = nn.Sequential(*layers).to(dtype).eval()
    ao.quantize_(model, FORMATS[form])
    return model


def elsewhere(code: str, tmp_path) -> None:
    """Run where `ao` cannot be imported."""
    refuse = "import sys\nsys.modules['ao'] = None\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", refuse + code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert result.stdout == "same\n", result.stderr


@torch.no_grad()
def programs(forms: list[str], tmp_path) -> None:
    expected = {}
    for form in forms:
        for dtype in (torch.float32, torch.bfloat16):
            model, x = net(form, dtype), torch.randn(4, 64, dtype=dtype)
            program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
            for batch in (1, 2, 100):
                more = torch.randn(batch, 64, dtype=dtype)
                assert ao.compute_error(model(more), program.module()(more)) > (100 if dtype == torch.float32 else 35)
            assert not any("ao." in str(node.target) for node in program.graph.nodes)
            plain = program.run_decompositions({})
            assert not any(isinstance(t, ao.QTensor) for t in plain.state_dict.values())
            torch.export.save(plain, tmp_path / f"{form}-{dtype}.pt2")
            expected[f"{form}-{dtype}"] = x, plain.module()(x)
    torch.save(expected, tmp_path / "expected")
    elsewhere(
        """
import torch
for name, (x, y) in torch.load("expected").items():
    out = torch.export.load(f"{name}.pt2").module()(x)
    assert torch.equal(out, y), name
print("same")
""",
        tmp_path,
    )


def test_an_exported_program(tmp_path):
    """One graph for all batch sizes, of plain ATen operators over plain tensors."""
    programs(["int4"], tmp_path)


@pytest.mark.parametrize("spec", [ao.NF4, ao.Intx(4, (1, 32))], ids=str)
def test_an_embedding(spec):
    """Rows are gathered packed, and decoded in the graph; of NF4 the scales are quantized, too."""
    model = nn.Sequential(nn.Embedding(96, 64)).eval()
    ao.quantize_(model, spec, lambda m, _: isinstance(m, nn.Embedding))
    ids = torch.tensor([[3, 5, 3], [0, 95, 1]])
    program = torch.export.export(model, (ids,), dynamic_shapes=BATCH)
    more = ids.repeat(4, 1)
    assert torch.equal(program.module()(more), model(more))


@pytest.mark.slow
def test_exported_programs(tmp_path):
    programs(list(FORMATS), tmp_path)


def package(forms: list[str], tmp_path, whole: bool = True) -> None:
    expected = {}
    with torch.no_grad():
        for form in forms:
            model, x = net(form, torch.float32, whole), torch.randn(4, 64)
            program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(tmp_path / f"{form}.pt2"),
                inductor_configs=QUICK,
            )
            expected[form] = x, model(x)
    torch.save(expected, tmp_path / "expected")
    elsewhere(
        """
import torch
for form, (x, y) in torch.load("expected").items():
    run = torch._inductor.aoti_load_package(f"{form}.pt2")
    assert (run(x) - y).abs().max() < 1e-5 and run(x.repeat(25, 1)).shape == (100, 64), form
print("same")
""",
        tmp_path,
    )


def test_a_package_of_aot_inductor(tmp_path):
    package(["int4"], tmp_path, whole=False)


@pytest.mark.slow
def test_packages_of_aot_inductor(tmp_path):
    package(list(FORMATS), tmp_path)
