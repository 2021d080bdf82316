"""The layering of the package, and what `import ao` costs and touches."""

from __future__ import annotations

import ast
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ao

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ao").rglob("*.py"))

PURE = {
    "bits",
    "blocks",
    "caching",
    "cpp",
    "cpp_codes",
    "cpp_vectors",
    "rounding",
    "layouts",
    "onnx_integers",
    "operand",
    "pairs",
    "pieces",
    "running_layer",
    "tracing",
}
MACHINERY = {"base", "coalesced", "lattice", "ops", "sharding", "views"}
CONSUMERS = {"checkpoint"}
# What the modules of ao/integrations are for; each is imported by whoever has the library.
HOSTS = {"accelerate", "diffusers", "gguf", "onnx_ir", "peft", "safetensors", "transformers", "vllm"}
# What needs Triton or a C++ compiler, or is there for those, and is imported inside the functions that launch them.
KERNELS = {
    "adam_kernel",
    "column_order",
    "cpp_codes",
    "cpu_step",
    "launch",
    "ampere",
    "bf16_pairs",
    "decode_attention",
    "few_tokens",
    "hopper",
    "normalize_rows",
    "quantize_rows",
    "cast",
    "f16_products",
    "one_token",
    "one_token_mma",
    "several",
    "operators",
    "pair_products",
    "read_once",
    "reading",
    "relative_attention",
    "routed",
    "slices_of_k",
    "template",
    "joint_words",
    "made",
    "cpu_int8",
    "transposable",
    "two_of_four",
    "kept_blocks",
    "trits",
    "trits_ptx",
}
# Where the public names of ao are.
ROOMS = {
    "dtypes",
    "matmul",
    "optim",
    "quant",
    "quant.qat",
    "sparsity",
    "train",
    "integrations.foreign.bitsandbytes",
    "integrations.foreign.reader",
}
# A dtype that is made of another one says so here.
BUILT_ON = {
    "block_sparse": {"sparse24"},
    "codebook": {"intx"},
    "dynamic_tree": {"mapped"},
    "floatx": {"e8m0", "float8"},
    "int4_prepacked": {"intx"},
    "intx": {"joint"},
    "mxint": {"e8m0"},
    "positive_steps": {"mapped"},
}


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, absolute module, at the top level) of every import."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    tree = ast.parse(path.read_text())
    top = {id(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            top -= {id(node) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            by_name = node.module is None or module.endswith(".kernels")  # of modules, not of what is in one
            names = [f"{module}.{alias.name}" for alias in node.names] if by_name else [module]
            found += [(node.lineno, name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    name = path.stem
    folder = path.relative_to(ROOT / "ao").parts[0] if path.parent != ROOT / "ao" else ""
    for line, module, top in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        parts = module.split(".")
        if parts[0] != "ao":
            optional = parts[0] in {
                "safetensors",
                "tqdm",
                "triton",
                "transformers",
                "rich",
                "matplotlib",
                "numpy",
                "tokenizers",
            }
            wanted = (parts[0] == "triton" and name in KERNELS) or (parts[0] in HOSTS and folder == "integrations")
            assert parts[0] in {"torch", *sys.stdlib_module_names} or wanted or (optional and not top), where
            continue
        if module == "ao.installation":
            continue
        assert folder == "compat" or parts[1:2] != ["compat"], f"{where}: nothing in ao needs another library's names"
        if path.parent.name == "command_line":
            assert not top or parts[1:3] == ["integrations", "command_line"], f"{where}: torch would come along"
            continue
        needs_triton = any(part in KERNELS for part in parts) and name not in KERNELS
        assert top != needs_triton or (folder in {"integrations", "compat"} and not top), where
        if folder == "dtypes":
            assert parts[1:2] == ["dtypes"], where
            target = parts[2] if len(parts) > 2 else ""
            if name == "__init__":
                continue
            if name in PURE:
                assert target in PURE, where
            elif name in MACHINERY:
                assert target in PURE | MACHINERY, where
            elif name not in CONSUMERS:
                assert target in PURE | {"base", "lattice"} | BUILT_ON.get(name, set()), where
        elif folder == "matmul":
            assert parts[1] in {"dtypes", "matmul"}, where
        elif folder == "compat":
            # The public names of all of ao, and the names of the same library.
            library = path.relative_to(ROOT / "ao" / "compat").parts[0]
            mine = parts[1:2] == ["compat"] and (len(parts) < 3 or parts[2] == library)
            assert mine or parts in (["ao"], *(["ao", *room.split(".")] for room in ROOMS)), (
                f"{where}: use public names"
            )
        elif folder == "sparsity":
            assert parts[1] in {"dtypes", "matmul", "quant", "sparsity"}, where
        elif folder in {"quant", "optim", "train"}:
            assert parts[1] in {"dtypes", "matmul", folder}, where
            assert parts[1] == folder or len(parts) == 2, f"{where}: use the public names of ao.{parts[1]}"


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("statement", "most"), [("import ao", 55), ("import ao.dtypes", 55), ("from ao.optim import AdamW8bit", 66)]
)
def test_import_is_quiet_and_light(statement, most):
    """Most of the modules that it imports, and what it leaves for later. Time is 1 ms for 2 modules, 2 without bytecode."""
    out = run(
        f"import sys, torch; before = set(sys.modules); {statement}; new = set(sys.modules) - before;"
        "heavy = {'transformers', 'triton', 'torch._dynamo', 'torch._inductor', 'safetensors', 'matplotlib', 'statistics',"
        "'torch.distributed._functional_collectives', 'ao.quant', 'ao.train', 'ao.dtypes.checkpoint', 'ao.optim.offload'};"
        "print(sorted(heavy & new), sum(name.partition('.')[0] != 'ao' for name in new), len(new))"
    )
    *left_for_later, count = out.split()
    assert left_for_later == ["[]", "0"] and int(count) <= most, out


@pytest.mark.parametrize("module", ["ao", "ao.dtypes", "ao.optim"])
def test_names_that_come_later(module):
    """They are found by attribute, by dir and by `*`; no others are."""
    out = run(
        f"import {module} as m; listed = dir(m); names = m.__all__; assert set(names) <= set(listed), set(names) - set(listed);"
        f"space = {{}}; exec('from {module} import *', space); assert set(names) <= set(space);"
        "print(all(space[name] is getattr(m, name) for name in names), hasattr(m, 'quantise'), hasattr(m, '__wrapped__'))"
    )
    assert out == "True False False"


def test_what_was_pickled_needs_only_the_import(tmp_path):
    path = tmp_path / "weights.pt"
    state = ao.dtypes.Flat(ao.dtypes.DynamicTree()).quantize(torch.randn(256))
    torch.save({"q": ao.Intx(4).quantize(torch.randn(4, 64)), "s": state}, path)
    config = ao.Int8WeightOnlyConfig()
    out = run(
        f"import pickle, sys, torch, ao; t = torch.load({str(path)!r}, weights_only=True); print(type(t['q']).__name__,"
        "torch.nn.functional.linear(torch.ones(1, 64), t['q']).shape, type(t['s']).__name__, 'ao.quant' in sys.modules,"
        f"pickle.loads({pickle.dumps(config)!r}) == ao.Int8WeightOnlyConfig())"
    )
    assert out == "IntxTensor torch.Size([1, 4]) FlatTensor False True"


@pytest.mark.parametrize(
    ("init", "dist_info", "module", "error"),
    [
        (
            "def __getattr__(name): raise AttributeError(name)",
            None,
            "ao.dtypes",
            "ao/__init__.py is not that of ao-lowbit",
        ),
        (None, None, "ao.integrations.peft", "ao/__init__.py is not that of ao-lowbit"),
        ("ours", "ao-1.0.2.dist-info", "ao", "has another package called 'ao', ao-1.0.2.dist-info"),
        ("ours", "ao_lowbit-0.1.0.dist-info", "ao.installation", ""),
    ],
)
def test_another_package_called_ao(init, dist_info, module, error, tmp_path):
    """pip puts both into one folder: the other's ao/__init__.py in place of ours, or ours over it, or none after uninstalling."""
    shutil.copy(ROOT / "ao_command.py", tmp_path)
    (tmp_path / "ao").mkdir()
    for path in (ROOT / "ao").iterdir():
        if path.name != "__init__.py":
            (tmp_path / "ao" / path.name).symlink_to(path)
    if init is not None:
        text = (ROOT / "ao" / "__init__.py").read_text() if init == "ours" else init
        (tmp_path / "ao" / "__init__.py").write_text(text)
    if dist_info is not None:
        (tmp_path / dist_info).mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    python = [sys.executable, "-I", "-c"]
    result = subprocess.run([*python, f"{code}import {module}"], capture_output=True, text=True)
    assert error in result.stderr and ("pip uninstall -y ao ao-lowbit" in result.stderr) == bool(error), result.stderr
    result = subprocess.run([*python, f"{code}sys.argv[1:] = ['--help']; import ao_command; sys.exit(ao_command.main())"],
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == (0 if init == "ours" else 1), result.stderr
    assert ("pip uninstall -y ao ao-lowbit" in result.stderr) == (init != "ours") and "Traceback" not in result.stderr


def test_import_leaves_global_settings_alone():
    state = (
        "torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, "
        "torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(), torch.are_deterministic_algorithms_enabled(), "
        "torch._inductor.config.save_config(), torch._dynamo.config.save_config()"
    )
    out = run(
        f"import torch, torch._dynamo, torch._inductor.config; torch.manual_seed(1); a = ({state});"
        "import ao; m = torch.nn.Linear(64, 64); torch.manual_seed(1); ao.quantize_(m, ao.Int8WeightOnlyConfig());"
        f"print(a == ({state}))"
    )
    assert out == "True"
