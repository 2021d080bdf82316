"""torchao.quantization.quantize_.workflows.int4.int4_choose_qparams_algorithm."""

from .. import Int4ChooseQParamsAlgorithm

__all__ = ["Int4ChooseQParamsAlgorithm"]
