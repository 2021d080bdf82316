"""`recommended_inductor_config_setter`: compiler settings that other libraries set for every quantized model."""

from __future__ import annotations

from typing import Any

SETTINGS = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "fx_graph_cache": True,
    "triton.unique_kernel_names": True,
}
"""What is set, in `torch._inductor.config`."""


class recommended_inductor_config_setter:
    """Set Inductor's configuration for this process to the values recommended for quantized models (`SETTINGS`).

    A plain call sets them for good:

        ao.recommended_inductor_config_setter()

    In a `with` statement they hold inside of it, and what was there before comes back:

        with ao.recommended_inductor_config_setter():
            torch.compile(model)(x)  # compilation happens at the first call

    `ao` needs none of it and never calls it. Coordinate descent makes kernels somewhat faster and compilation much slower;
    `torch.compile(model, mode="max-autotune")` turns it on for one model.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] | None = None
        self._apply()

    def _apply(self) -> None:
        import torch._inductor.config as config

        self._before = {name: getattr(config, name) for name in SETTINGS}
        for name, value in SETTINGS.items():
            setattr(config, name, value)

    def __enter__(self) -> recommended_inductor_config_setter:
        if self._before is None:
            self._apply()
        return self

    def __exit__(self, *exception: object) -> None:
        import torch._inductor.config as config

        for name, value in (self._before or {}).items():
            setattr(config, name, value)
        self._before = None
