"""Which format each weight gets: the timings, the margin, the least SQNR, and the check of the whole model."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dtypes import Spec
from ..calibration.statistics import check_finite_inputs
from ..compiled import Compiler
from ..config import Config
from ..quantize import quantize_
from ..report import compute_error, progress
from . import end_to_end, timing
from .cache import TimingCache, product_key
from .candidates import candidates_on
from .recording import Call, Weight
from .report import AutoquantReport, Choice, Timing
from .timing import Product

Timings = dict[Product, dict[str, float | str]]
"""Product -> label of a format -> seconds, or why there are none."""

MARGIN = 0.03
"""A format must save this part of the unquantized time to be chosen; formats that differ by less count as equally fast."""


class Notes(list[str]):
    """What the user should know, each sentence once."""

    def add(self, note: str) -> None:
        """Append a sentence that is not there yet."""
        if note not in self:
            self.append(note)


def measure(
    weights: list[Weight], asked: Sequence[str | Config | Spec], compiler: Compiler, cache: TimingCache, notes: Notes
) -> Timings:
    """Time all candidates on all products. Raises RuntimeError where not even the plain weight can be timed."""
    owner = {product: w for w in weights for product in w.products()}
    held = Counter[torch.device]()
    for w in weights:
        held[w.parameter.device] += w.parameter.nbytes
    timings: dict[Product, dict[str, float | str]] = {}
    for product, w in progress(list(owner.items()), "autoquant: time the layers"):
        dense = w.parameter
        variants: dict[str, Callable[[], Tensor]] = {_dtype_name(w): lambda dense=dense: dense}  # type: ignore[misc]
        for name, config in candidates_on(asked, product.device).items():
            variants[name] = functools.partial(_quantized, dense, config)
        total = held[product.device]
        key = product_key(product, total)
        known = cache.get(key, variants)
        if known is None:
            assert w.sample is not None
            known = timing.time_products(product, w.sample, variants, compiler, total)
            plain = known[_dtype_name(w)]
            if isinstance(plain, str):
                raise RuntimeError(f"autoquant: {w.names[0]} cannot be timed, not even as it is: {plain}")
            try:
                cache.put(key, known)
            except OSError as error:
                notes.add(f"timings are not kept: {error}")
        timings[product] = known
    failed: dict[tuple[str, str, str], set[int]] = {}
    for product, known in timings.items():
        for name, time in known.items():
            if isinstance(time, str):
                shape = f"{product.out_features} x {product.in_features}"
                failed.setdefault((name, shape, time), set()).add(product.tokens)
    for (name, shape, why), tokens in failed.items():
        notes.add(f"{name} cannot be used on {shape}, M = {', '.join(map(str, sorted(tokens)))}: {why}")
    return timings


def choose(
    weights: list[Weight],
    asked: Sequence[str | Config | Spec],
    timings: Timings,
    min_sqnr: float | None,
    notes: Notes,
) -> list[tuple[Weight, Choice, nn.Parameter | None]]:
    """The choice for each weight, and the parameter to put there, or None.

    Raises ValueError for recorded activations that are not finite where `min_sqnr` asks for what they become.
    """
    for w in weights if min_sqnr is not None else ():
        if w.sample is not None:
            check_finite_inputs(w.sample, w.names[0], "min_sqnr: a call that autoquant recorded")
    found: list[tuple[Weight, Choice, nn.Parameter | None]] = []
    low: Counter[str] = Counter()
    for w in progress(weights, "autoquant: quantize"):
        candidates = candidates_on(asked, w.parameter.device)
        counts = w.products()
        usable = [n for n in candidates if all(isinstance(timings[p][n], float) for p in counts)]
        dense = _dtype_name(w)
        times = {n: sum(c * timings[p][n] for p, c in counts.items()) for n in [dense, *usable]}  # type: ignore[misc]
        winner, config, sqnr, parameter = dense, None, None, None
        for name in preference(times, dense):
            try:
                made = _quantized(w.parameter, candidates[name])
                _look_up(w, made)
            except (ValueError, NotImplementedError) as error:
                notes.add(f"{name} cannot be used for {w.names[0]}: {timing.reason(error)}")
                continue
            quality = _sqnr(w, made)
            if min_sqnr is None or quality >= min_sqnr:
                winner, config, sqnr, parameter = name, candidates[name], quality, made
                break
            low[name] += 1
        measured = tuple(
            Timing(p.tokens, c, {n: t for n, t in timings[p].items() if isinstance(t, float)})
            for p, c in sorted(counts.items(), key=lambda item: item[0].tokens)
        )
        shape = (w.parameter.shape[0], w.parameter.shape[1])
        found.append((w, Choice(w.names, shape, config, winner, dense, measured, sqnr), parameter))
    for name, count in low.items():
        notes.add(f"{name} was faster but below min_sqnr = {min_sqnr} dB for {count} layers")
    return found


def install_checked(
    model: nn.Module, calls: list[Call], found: list[tuple[Weight, Choice, nn.Parameter | None]], notes: Notes
) -> AutoquantReport:
    """Put the choices into the model, and take back what does not make it faster as a whole."""
    made = {w: parameter for w, _, parameter in found if parameter is not None}
    choices = {w: choice for w, choice, _ in found}
    devices = {w.parameter.device for w in choices}
    report = AutoquantReport()

    def install(kept: Iterable[Weight]) -> None:
        for w in choices:
            w.install(made[w] if w in kept else w.parameter)

    kept = set(made)
    try:
        while kept and calls:
            before, after = functools.partial(install, ()), functools.partial(install, kept)
            compared = end_to_end.compare(model, calls, devices, before, after)
            report.before_ms, report.after_ms = compared.before, compared.after
            if not compared.slower:
                break
            weaker = _weaker_half({w: choices[w] for w in kept})
            kept = kept - weaker
            notes.add(
                f"end to end this was slower ({compared.after:,.3f} ms, before {compared.before:,.3f} ms): "
                f"{len(weaker)} layers went back to what they were, {len(kept)} stay quantized"
            )
            if not kept:
                report.after_ms = compared.before
        install(kept)
    except BaseException:
        install(())
        raise
    for w, choice in choices.items():
        taken_back = w in made and w not in kept
        report.choices.append(replace(choice, config=None, label=choice.dtype, sqnr=None) if taken_back else choice)
    return report


def preference(times: Mapping[str, float], dense: str) -> Iterator[str]:
    """The formats that are faster than the plain weight, best first; of two about as fast, the one that was given first.

    times: label -> seconds. dense: the label of the plain weight.
    """
    left = [name for name, time in times.items() if time < (1 - MARGIN) * times[dense]]
    while left:
        fastest = min(times[name] for name in left)
        best = next(name for name in left if times[name] <= (1 + MARGIN) * fastest)
        left.remove(best)
        yield best


def _dtype_name(w: Weight) -> str:
    return str(w.parameter.dtype).removeprefix("torch.")


def _quantized(weight: Tensor, config: Config | Spec) -> nn.Parameter:
    """A weight as a linear layer of its own would have it. Raises ValueError for a shape that the format does not take."""
    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight.detach(), requires_grad=False)
    report = quantize_(holder, config)
    if not len(report):
        raise ValueError(report.skipped["weight"])
    return holder.weight


def _look_up(w: Weight, made: Tensor) -> None:
    """Raise NotImplementedError where the weight is also an embedding's table and its format has no rows to look up."""
    if any(isinstance(owner, nn.Embedding) for owner, _ in w.slots):
        F.embedding(torch.zeros(1, dtype=torch.int64, device=made.device), made)


def _sqnr(w: Weight, made: Tensor) -> float:
    """Signal to noise of the layer's output on the recorded activations, in dB."""
    assert w.sample is not None
    exact = F.linear(w.sample.float(), w.parameter.detach().float())
    noisy = F.linear(w.sample, made)
    return math.inf if torch.equal(exact, noisy.float()) else float(compute_error(exact, noisy))


def _weaker_half(choices: Mapping[Weight, Choice]) -> set[Weight]:
    """Half of the kinds of layers, or the only one: those whose format gained least, by its own timing."""
    kinds: dict[tuple[object, ...], list[Weight]] = {}
    for w, choice in choices.items():
        kinds.setdefault((choice.shape, choice.label, round(choice.speedup, 2)), []).append(w)
    ranked = sorted(kinds.values(), key=lambda ws: choices[ws[0]].speedup)
    return {w for ws in ranked[: math.ceil(len(ranked) / 2)] for w in ws}
