"""torchao.utils: measuring, and a base for tensors of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from ao import benchmark_model, get_model_size_in_bytes

__all__ = [
    "DummyModule",
    "TorchAOBaseTensor",
    "benchmark_model",
    "benchmark_torch_function_in_microseconds",
    "ceil_div",
    "check_cpu_version",
    "check_xpu_version",
    "compute_max_diff",
    "find_multiple",
    "get_available_devices",
    "get_compute_capability",
    "get_current_accelerator_device",
    "get_model_size_in_bytes",
    "is_MI300",
    "is_ROCM",
    "is_fbcode",
    "is_sm_at_least_89",
    "is_sm_at_least_90",
    "is_sm_at_least_100",
    "is_sm_version",
    "parse_version",
    "profiler_runner",
    "round_up",
    "should_reduce_range",
    "skip_if_rocm",
    "torch_version_at_least",
    "unwrap_tensor_subclass",
]


def parse_version(version_string: str) -> list[int]:
    """The numbers of a version: "2.13.0+cpu" -> [2, 13, 0]. One that was not released counts below: "2.13.0a0" -> [2, 13, -1]."""
    import re

    found = re.match(r"(\d+)\.(\d+)\.(\d+)(a|\.dev|rc)?", version_string)
    if found is None:
        raise ValueError(f"parse_version: {version_string!r} is no version such as 2.13.0")
    major, minor, patch, before = found.groups()
    return [int(major), int(minor), -1 if before else int(patch)]


def torch_version_at_least(min_version: str) -> bool:
    """Whether this torch is of `min_version` or later."""
    return parse_version(torch.__version__) >= parse_version(min_version)


TORCH_VERSION_AT_LEAST_2_9 = TORCH_VERSION_AT_LEAST_2_8 = TORCH_VERSION_AT_LEAST_2_7 = True
TORCH_VERSION_AT_LEAST_2_6 = TORCH_VERSION_AT_LEAST_2_5 = TORCH_VERSION_AT_LEAST_2_4 = True
TORCH_VERSION_AT_LEAST_2_3 = TORCH_VERSION_AT_LEAST_2_2 = True
TORCH_VERSION_AFTER_2_5 = TORCH_VERSION_AFTER_2_4 = TORCH_VERSION_AFTER_2_3 = TORCH_VERSION_AFTER_2_2 = True


def benchmark_torch_function_in_microseconds(f: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """The median time of a call."""
    return 1e3 * benchmark_model(lambda *a, **k: f(*a, **k), 20, args, kwargs)


def profiler_runner(path: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and write a trace of it for chrome://tracing."""
    with torch.profiler.profile(record_shapes=True) as profile:
        result = fn(*args, **kwargs)
    profile.export_chrome_trace(path)
    return result


def get_available_devices() -> list[str]:
    """ "cpu", and the accelerators that are there."""
    found = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        found.append(accelerator.type)
    return found


def get_current_accelerator_device() -> torch.device | None:
    """The accelerator, or None."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def get_compute_capability() -> float:
    """Of the CUDA device, as 8.9; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0.0
    major, minor = torch.cuda.get_device_capability()
    return float(f"{major}.{minor}")


def is_fbcode() -> bool:
    """False."""
    return False


def is_ROCM() -> bool:
    """Whether the accelerator is AMD's."""
    return torch.cuda.is_available() and torch.version.hip is not None


def is_MI300() -> bool:
    """Whether it is an MI300."""
    return is_ROCM() and "gfx94" in torch.cuda.get_device_properties(0).gcnArchName


def is_sm_version(major: int, minor: int) -> bool:
    """Whether the CUDA device has this compute capability."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (major, minor)


def _at_least(major: int, minor: int) -> bool:
    there = torch.cuda.is_available() and torch.version.cuda is not None
    return there and torch.cuda.get_device_capability() >= (major, minor)


def is_sm_at_least_89() -> bool:
    """Whether the CUDA device has float8."""
    return _at_least(8, 9)


def is_sm_at_least_90() -> bool:
    """Whether it is a Hopper or later."""
    return _at_least(9, 0)


def is_sm_at_least_100() -> bool:
    """Whether it is a Blackwell or later."""
    return _at_least(10, 0)


def should_reduce_range(device: Any) -> bool:
    """False: no sum of int8 products overflows here."""
    return False


def check_cpu_version(device: Any, version: str = "2.6.0") -> bool:
    """Whether a device is the CPU."""
    return torch.device(device).type == "cpu"


def check_xpu_version(device: Any, version: str = "2.8.0") -> bool:
    """Whether a device is an Intel GPU."""
    return torch.device(device).type == "xpu"


def _is_fbgemm_gpu_genai_available() -> bool:
    return False


_is_mslk_available = _is_fbgemm_gpu_genai_available


def skip_if_rocm(message: str | None = None) -> Callable[[Any], Any]:
    """For a test: skip it where the accelerator is AMD's."""
    import unittest

    return unittest.skipIf(is_ROCM(), message or "not for ROCm")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """`a`, rounded up to a multiple of `b`."""
    return ceil_div(a, b) * b


def find_multiple(n: int, *args: int) -> int:
    """`n`, rounded up to a multiple of all of `args`."""
    import math

    return round_up(n, math.lcm(*args))


def compute_max_diff(output: Tensor, output_ref: Tensor) -> Tensor:
    """mean|a - b| / mean|b|."""
    return (output - output_ref).abs().mean() / output_ref.abs().mean()


def unwrap_tensor_subclass(model: nn.Module, filter_fn: Any = None) -> nn.Module:
    """The model: a quantized layer is exported and compiled as it is here."""
    return model


class DummyModule(nn.Module):
    """A module that holds a weight, for a handler that takes modules."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


def _as_list(functions: Any) -> list[Any]:
    return list(functions) if isinstance(functions, (list, tuple)) else [functions]


class TorchAOBaseTensor(torch.Tensor):
    """A base for a tensor subclass of your own. (A format of `ao` is a Spec and a QTensor: docs/extending.md.)

    A subclass lists the names of its tensors and of its other attributes, in the order of its `__init__`, and says what
    functions mean for it:

        class MyTensor(TorchAOBaseTensor):
            tensor_data_names = ["codes", "scale"]
            tensor_attribute_names = ["bits"]

        @MyTensor.implements(torch.ops.aten.t.default)
        def _(func, types, args, kwargs): ...

    Flattening, copies, moves between devices and repr follow from the names. `implements` takes operators of ATen, and functions
    of torch too; `implements_torch_function` functions.
    """

    tensor_data_names: ClassVar[list[str]] = []
    tensor_attribute_names: ClassVar[list[str]] = []
    optional_tensor_data_names: ClassVar[list[str]] = []
    optional_tensor_attribute_names: ClassVar[list[str]] = []
    _tables: ClassVar[tuple[dict[Any, Any], dict[Any, Any]]] = ({}, {})
    _layouts: ClassVar[dict[type, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What the bases know by now, the last base first; what a base learns later is its own.
        known = [base._tables for base in cls.__bases__ if issubclass(base, TorchAOBaseTensor)]
        cls._tables = ({k: v for t, _ in known for k, v in t.items()}, {k: v for _, t in known for k, v in t.items()})
        cls._layouts = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a subclass that has fields keeps them."""

    @classmethod
    def implements(cls, aten_ops: Any) -> Callable[[Any], Any]:
        """Say what operators mean: the decorated `f(func, types, args, kwargs)`."""

        def register(handler: Any) -> Any:
            @functools.wraps(handler)
            def with_class(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
                return handler(func, types, args, kwargs)

            for op in _as_list(aten_ops):
                cls._tables[0 if isinstance(op, torch._ops.OpOverload) else 1][op] = with_class
            return with_class

        return register

    @classmethod
    def implements_torch_function(cls, torch_fns: Any) -> Callable[[Any], Any]:
        """Say what functions of torch mean: the decorated `f(func, types, args, kwargs)`."""
        return cls.implements(torch_fns)

    @classmethod
    def register_layout(cls, layout_class: type) -> Callable[[Any], Any]:
        """Say which class stores a layout; `get_tensor_impl_constructor(layout_class)` gives its `from_plain`."""

        def register(impl: Any) -> Any:
            cls._layouts[layout_class] = impl.from_plain
            return impl

        return register

    @classmethod
    def get_tensor_impl_constructor(cls, layout_class: type) -> Any:
        """What `register_layout` was told. Raises ValueError for a layout that is not known."""
        if layout_class not in cls._layouts:
            raise ValueError(f"{cls.__name__} has no layout {layout_class.__name__}; register_layout tells it")
        return cls._layouts[layout_class]

    @classmethod
    def _names(cls) -> list[str]:
        return [*cls.tensor_data_names, *cls.optional_tensor_data_names]

    @classmethod
    def _others(cls) -> list[str]:
        return [*cls.tensor_attribute_names, *cls.optional_tensor_attribute_names]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [name for name in self._names() if getattr(self, name, None) is not None]
        return names, [getattr(self, name) for name in self._others()]

    @classmethod
    def __tensor_unflatten__(cls, tensors: Any, attributes: Any, outer_size: Any, outer_stride: Any) -> Any:
        return cls._made(lambda name: tensors.get(name), dict(zip(cls._others(), attributes)))

    @classmethod
    def _made(cls, tensor: Callable[[str], Any], others: dict[str, Any]) -> Any:
        first = [tensor(name) for name in cls.tensor_data_names]
        rest = [others[name] for name in cls.tensor_attribute_names]
        optional = {name: tensor(name) for name in cls.optional_tensor_data_names}
        optional |= {name: others[name] for name in cls.optional_tensor_attribute_names}
        return cls(*first, *rest, **optional)

    def _apply_fn_to_data(self, fn: Callable[[Tensor], Tensor]) -> Any:
        def applied(name: str) -> Any:
            t = getattr(self, name, None)
            return None if t is None else fn(t)

        return self._made(applied, {name: getattr(self, name) for name in self._others()})

    def _get_to_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        args = tuple(a for a in args if not isinstance(a, torch.layout))
        kwargs.pop("layout", None)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        return {
            "device": self.device if device is None else device,
            "dtype": self.dtype if dtype is None else dtype,
            "non_blocking": non_blocking,
            "memory_format": torch.preserve_format if memory_format is None else memory_format,
        }

    def get_layout(self) -> Any:
        """The `_layout` of a tensor that has one."""
        return getattr(self, "_layout", None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in (*self._names(), *self._others()))
        return f"{type(self).__name__}({shown})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = cls._tables[1].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = cls._tables[0].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs)
        if cls._names() and func in _COMMON:
            return _COMMON[func](func, args, kwargs)
        known = ", ".join(sorted(map(str, cls._tables[0])))
        arg_types = ", ".join(type(a).__name__ for a in args)
        raise NotImplementedError(
            f"{cls.__name__} does not say what {func} means (arg_types: {arg_types}); use @{cls.__name__}.implements({func}), or "
            f"name its tensors in tensor_data_names. It knows: {known}"
        )


aten = torch.ops.aten


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    made = args[0]._apply_fn_to_data(lambda t: func(t, *args[1:], **kwargs))
    return return_and_correct_aliasing(func, args, kwargs, made)


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    t = args[0]
    device = t.device if kwargs.get("device") is None else torch.device(kwargs["device"])
    dtype = kwargs.get("dtype")

    def move(inner: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and inner.is_floating_point() else inner.dtype
        return inner.to(device, wanted, kwargs.get("non_blocking", False), copy=True)

    others = {name: getattr(t, name) for name in t._others()}
    changed = {"device": device, "dtype": dtype or t.dtype}
    others |= {name: value for name, value in changed.items() if name in others}
    made = t._made(lambda name: None if getattr(t, name, None) is None else move(getattr(t, name)), others)
    return return_and_correct_aliasing(func, args, kwargs, made)


def _copied(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    if type(target) is not type(source) or target.shape != source.shape:
        raise ValueError(
            f"copy_ takes a {type(target).__name__} of shape {tuple(target.shape)}, got {type(source).__name__} of shape "
            f"{tuple(source.shape)}"
        )
    for name in target._names():
        if getattr(target, name, None) is not None:
            getattr(target, name).copy_(getattr(source, name))
    return target


_COMMON: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.contiguous.default: _same,
    aten._to_copy.default: _moved,
    aten.copy_.default: _copied,
}


def fill_defaults(args: Any, n: int, defaults_tail: Iterable[Any]) -> list[Any]:
    """`args`, filled up to `n` from the end of the defaults."""
    tail = list(defaults_tail)
    missing = n - len(args)
    if missing > len(tail):
        raise RuntimeError(f"fill_defaults: {len(args)} arguments and {len(tail)} defaults are not {n}")
    return [*args, *(tail[-missing:] if missing > 0 else [])]
