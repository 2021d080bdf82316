"""The number formats by name: one list for `quantize_`, the configs of other libraries, the command line and the scripts.

Nothing is imported here, so that the command line can list the names without torch; read_format.py makes configs of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """expression: over the public names of `ao`, and `torch`. bits: per element of a 4096 x 4096 weight."""

    expression: str
    bits: float
    use: str


FORMATS = {
    "int8": Format("Int8WeightOnlyConfig()", 8.01, "half of bfloat16, next to no loss"),
    "int4-g128": Format("Int4WeightOnlyConfig(group_size=128)", 4.31, "the usual choice for decoding"),
    "int4-g32": Format("Int4WeightOnlyConfig(group_size=32)", 5.25, "4 bits, with less loss"),
    "float8": Format("Float8WeightOnlyConfig()", 8.01, "weights with a wide range"),
    "int8-dynamic": Format("Int8DynamicActivationInt8WeightConfig()", 8.01, "faster prefill and large batches"),
    "float8-dynamic": Format("Float8DynamicActivationFloat8WeightConfig()", 8.0, "the same, on chips with float8"),
    "int8-int4": Format("Int8DynamicActivationInt4WeightConfig()", 5.0, "8-bit inputs, 4-bit weights (8da4w)"),
    "nf4": Format("NF4", 4.14, "frozen, under adapters (QLoRA)"),
    "nvfp4": Format("NVFP4", 4.5, "4-bit floats, blocks of 16 (NVIDIA)"),
    "mxfp4": Format("MXFP4", 4.25, "4-bit floats, blocks of 32 (OCP)"),
    "fp6": Format("FP6", 6.01, "6-bit floats with a scale per row"),
    "mxfp6": Format("MXFP6", 6.25, "6-bit floats, blocks of 32 (OCP)"),
    "mxfp8": Format("MXFP8", 8.25, "8-bit floats, blocks of 32 (OCP)"),
    "mxint8": Format("MXINT8", 8.25, "8-bit integers, blocks of 32 (OCP)"),
    "ternary": Format("TernaryWeightOnlyConfig()", 1.63, "trained weights of -1, 0 and 1"),
    "bitnet": Format("Int8DynamicActivationTernaryWeightConfig()", 1.63, "what bitnet_training trained"),
    "int6": Format("IntxWeightOnlyConfig(torch.int6, PerGroup(128))", 6.25, ""),
    "uint5": Format("UIntXWeightOnlyConfig(torch.uint5, 128)", 5.31, ""),
    "int3": Format("Intx(bits=3, block=(1, 128))", 3.31, "needs a recipe such as gptq"),
    "int2": Format("Intx(bits=2, block=(1, 128))", 2.31, "needs a recipe and training"),
}

ALIASES = {
    "int4": "int4-g128",
    "8da4w": "int8-int4",
    "int8wo": "int8",
    "int4wo": "int4-g128",
    "float8wo": "float8",
    "float8wo_e4m3": "float8",
    "float8wo_e5m2": "Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)",
    "int8dq": "int8-dynamic",
    "int4dq": "int8-int4",
    "float8dq": "float8-dynamic",
    "float8dq_e4m3": "float8-dynamic",
    "float8dq_e4m3_tensor": "float8-dynamic",
    "float8dq_e4m3_row": "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())",
    "fpx_e3m2": "FPXWeightOnlyConfig(3, 2)",
    "fpx_e2m3": "FPXWeightOnlyConfig(2, 3)",
    **{f"uint{bits}wo": f"UIntXWeightOnlyConfig(torch.uint{bits})" for bits in range(1, 8)},
    **{f"q{name}": name for name in ("int2", "int8", "float8")},
    "qint4": "int4-g128",
    **{f"int{b}-g{g}": f"UIntXWeightOnlyConfig(torch.uint{b}, group_size={g})" for b in (2, 3) for g in (32, 64)},
    "int4-g64": "Int4WeightOnlyConfig(group_size=64)",
}
"""What others call them, and the pages of the documentation -> one of FORMATS, or an expression."""

RECIPES = (
    *("rtn", "clip", "hqq", "gptq", "awq", "smoothquant", "bias_correction"),
    *("magnitude", "wanda", "sparsegpt"),
)
"""Names of recipes, which may be joined by "+", and follow the name of a format: "int4-g128+gptq"."""

WITHOUT_DATA = ("rtn", "clip", "hqq", "magnitude")
"""The recipes that need none to calibrate on."""

PLAIN = ("bf16", "float32")
"""Names of what is not quantized."""


def split_recipe(name: str) -> tuple[str, str]:
    """The format and the recipe of "int4-g128+awq+gptq": ("int4-g128", "awq+gptq"); ("int4-g128", "") where there is none."""
    *parts, last = name.split("+")
    recipes: list[str] = []
    while parts and last.strip().lower() in RECIPES:
        recipes.insert(0, last.strip().lower())
        last = parts.pop()
    return "+".join([*parts, last]).strip(), "+".join(recipes)
