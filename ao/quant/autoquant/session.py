"""`autoquant`: measure which number format is fastest for each linear layer, on the shapes that the model runs."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...dtypes import cache_directory
from ..choice import Filter, check_filter
from ..compiled import compiled_caller, compiler_of, is_compiled, unwrapped
from ..rules import FqnToConfig
from . import timing
from .cache import TimingCache
from .candidates import Candidates, candidates_on, check_candidates
from .choosing import Notes, choose, install_checked, measure
from .recording import Call, Recorder, Weight, find_weights, signature_of
from .report import AutoquantReport
from .saved_plan import apply_plan, load_plan

CALLS = 4
"""Calls that are kept for the end-to-end check: one for each way in which the linear layers were used."""


def autoquant(
    model: nn.Module,
    example_input: Any = None,
    candidates: Candidates = "default",
    filter_fn: Filter | None = None,
    *,
    manual: bool = False,
    min_sqnr: float | None = None,
    error_on_unseen: bool = True,
    plan: str | Path | FqnToConfig | None = None,
    cache: bool | str | Path = True,
    qtensor_class_list: Candidates | None = None,
    set_inductor_config: bool = False,
) -> nn.Module:
    """Quantize each linear layer to the format that is fastest on the shapes it runs, or leave it. Returns the model.

        model = ao.autoquant(torch.compile(model, mode="max-autotune"))
        model(x)                       # records, measures, chooses; minutes for a large model
        print(model.autoquant_report)  # a table

    model: any module. Formats are measured as it runs: in the mode in which it is compiled, or eagerly where it is not, which
        leaves less to gain. So compile it before, or call it by what `torch.compile` made of it while it records, as the
        `generate` of transformers does with a static cache for the steps after the first.
    example_input: call the model with it now: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
    candidates: the formats in question: configs, Specs, or names of sets: "default" (int8, weight-only and dynamic), "int4"
        (those and int4 weight-only), "float8", "all". Of a named set, what the device has no arithmetic for is left out.
    filter_fn: `(module, full name) -> bool`, which layers; by default every `nn.Linear` of 16 outputs and inputs or more.
    manual: several calls record, until `finalize_autoquant(model)` or `model.finalize_autoquant()`. Else the first does.
    min_sqnr: the least signal to quantization noise, in dB, that the output of a layer must keep on the activations that
        were recorded; formats below it are out for that layer.
    error_on_unseen: raise for layers that never ran; False leaves them as they are.
    plan: choose nothing, and apply what was chosen before: a file of `report.save_plan(path)`, or a FqnToConfig.
    cache: keep timings in $AO_CACHE_DIR or ~/.cache/ao; a path keeps them there, False nowhere. They hold for one
        device, version of torch, Triton and ao, number of threads, and mode, eager or compiled.
    qtensor_class_list: another name of `candidates`. set_inductor_config: accepted and without effect.

    While it records, the model runs uncompiled and computes what it always did. Then every format is timed on every shape
    (tokens, in, out) that ran, with weights that are cold in the cache, side by side with the unquantized layer. On a GPU, where
    the model is compiled, layers that meet one activation are timed together, and a norm or an activation function that comes
    before a layer is timed with it, as a graph may quantize there. The sum over shapes, times how often each ran, decides,
    and a format must win by 3 %. At last the whole model is timed on the recorded calls, each compiled or not as it was made,
    against what was given. If it is slower, the least certain half of the choices is taken back, again and again, to the
    original model if need be. The report has all numbers. Tied weights are chosen for together and stay tied.

    Until then the original weights are kept beside the quantized ones, with up to 64 activations of each layer and the
    arguments of up to four calls.

    Raises TypeError or ValueError for what cannot be understood, ValueError for a model without layers to choose for and for a
    plan that does not fit; RuntimeError, when it decides, for layers that never ran. A model is changed as a whole or not at all.
    """
    if plan is not None:
        if filter_fn is not None:
            raise ValueError("autoquant: filter_fn must be None with plan, which names the layers")
        apply_plan(model, plan if isinstance(plan, FqnToConfig) else load_plan(plan))
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"autoquant: model must be a torch.nn.Module, got {type(model).__name__}")
    if "finalize_autoquant" in unwrapped(model).__dict__:
        raise ValueError("autoquant: this model is recording already; run it, or call finalize_autoquant(model)")
    if min_sqnr is not None and (isinstance(min_sqnr, bool) or not isinstance(min_sqnr, (int, float))):
        raise TypeError(f"autoquant: min_sqnr must be a number of decibels, such as 30.0, or None, got {min_sqnr!r}")
    chosen = candidates if qtensor_class_list is None else qtensor_class_list
    asked = check_candidates(chosen)
    if filter_fn is not None:
        check_filter("autoquant", filter_fn)
    weights, skipped = find_weights(unwrapped(model), filter_fn)
    if not weights:
        why = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"autoquant: the model has no linear layer to choose for{why}")
    for device in {w.parameter.device for w in weights}:
        candidates_on(asked, device)
    directory = cache_directory() if cache is True else Path(cache) if cache else None
    session = _Session(model, weights, skipped, asked, manual, min_sqnr, error_on_unseen, directory)
    session.start()
    if example_input is not None:
        try:
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*(example_input if isinstance(example_input, (tuple, list)) else (example_input,)))
        except BaseException:
            session.stop()
            raise
    return model


def finalize_autoquant(model: nn.Module) -> AutoquantReport:
    """Choose from what `autoquant(model, manual=True)` has recorded, change the model, and return the report.

    Raises RuntimeError for layers that never ran (unless autoquant was told `error_on_unseen=False`); the model is then
    as it was and goes on recording. For a model that is finished already, returns its report.
    """
    inner = unwrapped(model)
    if "finalize_autoquant" in inner.__dict__:
        return inner.__dict__["finalize_autoquant"]()
    if isinstance(inner.__dict__.get("autoquant_report"), AutoquantReport):
        return inner.__dict__["autoquant_report"]
    raise ValueError("finalize_autoquant: this model is not recording; call autoquant(model, manual=True) first")


class _Session:
    """One model from `autoquant` to its report."""

    def __init__(
        self,
        model: nn.Module,
        weights: list[Weight],
        skipped: dict[str, str],
        candidates: list[Any],
        manual: bool,
        min_sqnr: float | None,
        error_on_unseen: bool,
        directory: Path | None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.candidates = candidates
        self.manual = manual
        self.min_sqnr = min_sqnr
        self.error_on_unseen = error_on_unseen
        self.skipped = skipped
        self.notes = Notes()
        self.calls: dict[frozenset[Any], Call] = {}
        self.signatures: set[tuple[Any, ...]] = set()
        self.directory = directory
        self.is_compiled = is_compiled(model)
        self.caller: nn.Module | None = None
        self._forwards: list[tuple[nn.Module, Any]] = []

    # Recording: the model's `forward`, and that of the wrapper which compiled it, are replaced for a while.

    def start(self) -> None:
        inner = unwrapped(self.model)
        reason = "autoquant records first: call the model once, or finalize_autoquant(model), before it runs compiled"
        forward = inner.forward
        record = functools.wraps(forward, updated=())(lambda *args, **kwargs: self._record(forward, args, kwargs))
        self._replace(inner, torch.compiler.disable(record, reason=reason))
        if self.model is not inner:
            self._replace(
                self.model, functools.wraps(forward, updated=())(lambda *args, **kwargs: inner(*args, **kwargs))
            )
        inner.__dict__["finalize_autoquant"] = self.finalize

    def stop(self) -> None:
        while self._forwards:
            module, forward = self._forwards.pop()
            module.__dict__.pop("forward")
            if forward is not None:
                module.__dict__["forward"] = forward
        unwrapped(self.model).__dict__.pop("finalize_autoquant", None)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._forwards.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def _record(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self._recorded(forward, args, kwargs)
        if not self.manual:
            self.finalize()
        return out

    def _recorded(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = None
        caller = None if self.is_compiled else compiled_caller(unwrapped(self.model))
        self.caller = self.caller if caller is None else caller
        signature = signature_of((args, kwargs))
        if signature not in self.signatures and len(self.calls) < CALLS and len(self.signatures) < 4 * CALLS:
            try:
                call = Call(args, kwargs, caller)
            except Exception as error:
                why = timing.reason(error)
                self.notes.add(f"a call is not part of the end-to-end check, for its arguments cannot be copied: {why}")
        recorder = Recorder(self.weights)
        with torch.compiler.set_stance("force_eager"), recorder:
            out = forward(*args, **kwargs)
        self.signatures.add(signature)
        for (w, product), count in recorder.calls.items():
            w.calls[product] += count
        kind = frozenset(recorder.calls.items())
        if kind in self.calls:
            self.calls[kind].count += 1
        elif kind and call is not None:
            self.calls[kind] = call
        return out

    # Deciding.

    def finalize(self) -> AutoquantReport:
        """Choose from what was recorded, change the model, and return the report."""
        report = self._decide()
        # A cycle may hold frames of ours, as an error that was kept does, and with them the original weights: collect it.
        self.weights, self.calls = [], {}
        gc.collect()
        return report

    def _decide(self) -> AutoquantReport:
        unseen = [name for w in self.weights if not w.calls for name in w.names]
        if unseen and self.error_on_unseen:
            shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
            raise RuntimeError(
                f"autoquant: no call reached {shown}; call the model so that every layer runs (autoquant with manual=True "
                "records several calls), leave such layers out with filter_fn, or give error_on_unseen=False"
            )
        recorded = Notes(self.notes)
        self.stop()
        try:
            with contextlib.ExitStack() as modes:
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
                for kind in {w.parameter.device.type for w in self.weights}:
                    modes.enter_context(torch.autocast(kind, torch.bfloat16, enabled=False))
                seen = [w for w in self.weights if w.calls]
                compiler = compiler_of(self.model if self.caller is None else self.caller)
                for w in seen:
                    if compiler.is_eager or w.parameter.device.type != "cuda":
                        w.forget_neighbours()
                cache = TimingCache(self.directory, compiler)
                timings = measure(seen, self.candidates, compiler, cache, self.notes)
                found = choose(seen, self.candidates, timings, self.min_sqnr, self.notes)
                report = install_checked(self.model, list(self.calls.values()), found, self.notes)
        except BaseException:
            self.notes = recorded
            self.start()
            raise
        report.skipped = {**self.skipped, **dict.fromkeys(unseen, "no call reached it")}
        report.notes = self.notes
        report.mode = "eager" if compiler.is_eager else "compiled"
        unwrapped(self.model).__dict__["autoquant_report"] = report
        return report
