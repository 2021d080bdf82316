"""What `autoquant` measured and chose, as a value that prints as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...dtypes import Spec
from ..config import Config
from ..format_names import FORMATS
from ..read_format import read_format
from ..rules import FqnToConfig
from .saved_plan import plain_name, save_plan


@dataclass(frozen=True)
class Timing:
    """One product of a layer.

    tokens: M. count: how often it ran.
    seconds: label of a format -> seconds per call; the unquantized weight under its dtype's name.
    """

    tokens: int
    count: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """What became of one weight.

    names: full names of the modules that hold it.
    shape: (out, in) features.
    config: the winner, or None where the weight stays as it is.
    label: how the winner is called in tables; dtype: how the unquantized weight is.
    timings: what was measured.
    sqnr: signal to quantization noise of the layer's output on recorded activations, in dB; None where it stays.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    config: Config | Spec | None
    label: str
    dtype: str
    timings: tuple[Timing, ...]
    sqnr: float | None = None

    def seconds(self, label: str) -> float:
        """The time of all recorded calls with a format."""
        return sum(t.count * t.seconds[label] for t in self.timings)

    @property
    def speedup(self) -> float:
        """How many times faster than unquantized."""
        return self.seconds(self.dtype) / self.seconds(self.label) if self.timings else 1.0


@dataclass
class AutoquantReport:
    """What `autoquant` chose.

    choices: one per weight.
    skipped: full name -> why, for linear layers that were not in question.
    notes: candidates that could not be used, and what else the user should know.
    before_ms, after_ms: the model end to end, per call, as it was given and as it is now; None where nothing was quantized,
        so that nothing was measured.
    mode: how layers and the model were timed, "compiled" or "eager": as the model runs.
    """

    choices: list[Choice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    before_ms: float | None = None
    after_ms: float | None = None
    mode: Literal["compiled", "eager"] = "compiled"

    @property
    def plan(self) -> FqnToConfig:
        """The choices as a config: `quantize_(model, report.plan)` does the same to another copy of the model."""
        chosen = {plain_name(name): choice.config for choice in self.choices for name in choice.names}
        return FqnToConfig({**{plain_name(name): None for name in self.skipped}, **chosen})

    def save_plan(self, path: str | Path) -> None:
        """Write the plan as JSON; `autoquant(model, plan=path)` applies it without measuring."""
        save_plan(self.plan, path)

    def __len__(self) -> int:
        """How many weights were quantized."""
        return sum(choice.config is not None for choice in self.choices)

    def __str__(self) -> str:
        groups: dict[tuple[str, object, str, object], list[Choice]] = {}
        for choice in self.choices:
            pattern = re.sub(r"\d+", "*", " = ".join(map(plain_name, choice.names)))
            tokens = tuple((t.tokens, t.count) for t in choice.timings)
            groups.setdefault((pattern, choice.shape, choice.label, tokens), []).append(choice)
        lines: list[tuple[str, ...]] = [("layer", "shape", "M", "calls", "format", "us", "was", "speed", "SQNR dB")]
        for (pattern, _, _, _), group in groups.items():
            lines += _lines(pattern, group)
        before = sum(c.seconds(c.dtype) for c in self.choices)
        after = sum(c.seconds(c.label) for c in self.choices)
        speed = f"{before / after:.2f}x" if after else ""
        lines.append(("all linear layers", "", "", "", "", f"{1e6 * after:,.1f}", f"{1e6 * before:,.1f}", speed, ""))
        text = _table(lines, left=(0, 1, 4))
        if self.before_ms is not None and self.after_ms is not None:
            ratio = self.before_ms / self.after_ms
            text.append(
                f"end to end: {self.before_ms:,.3f} ms before, {self.after_ms:,.3f} ms after, {ratio:.2f}x, {self.mode}"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text.append(f"skipped {len(names)}: {', '.join(names[:3])}{more}: {why}")
        return "\n".join([*text, *self.notes])


def _format(choice: Choice) -> str:
    """The name that `ao formats` has for what was chosen, which is short and can be given back, or else its label."""
    return next((name for name in FORMATS if read_format(name) == choice.config), choice.label)


def _lines(pattern: str, group: Sequence[Choice]) -> list[tuple[str, ...]]:
    first = group[0]
    name = f"{pattern or '(the model)'}" + (f" ({len(group)})" if len(group) > 1 else "")
    shape = f"{first.shape[0]} x {first.shape[1]}"
    noisiest = min((c.sqnr for c in group if c.sqnr is not None), default=None)
    sqnr = "" if noisiest is None else f"{noisiest:.1f}"
    if not first.timings:
        return [(name, shape, "", "0", _format(first), "", "", "", "")]
    return [
        (
            name if i == 0 else "",
            shape if i == 0 else "",
            str(t.tokens),
            str(len(group) * t.count),
            _format(first) if i == 0 else "",
            f"{1e6 * t.seconds[first.label]:,.1f}",
            f"{1e6 * t.seconds[first.dtype]:,.1f}",
            f"{t.seconds[first.dtype] / t.seconds[first.label]:.2f}x",
            sqnr if i == 0 else "",
        )
        for i, t in enumerate(first.timings)
    ]


def _table(lines: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return text
