"""Other libraries' import paths over the names of `ao`: change one word of an import, and code that was written for them runs.

    from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

Nothing else in `ao` imports this package, and each part of it is imported when it is asked for.
"""
