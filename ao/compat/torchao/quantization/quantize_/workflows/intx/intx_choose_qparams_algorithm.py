"""torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm."""

from .. import IntxChooseQParamsAlgorithm

__all__ = ["IntxChooseQParamsAlgorithm"]
