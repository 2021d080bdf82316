"""`Kind`: the type of a class whose instances are told by what they hold."""

from __future__ import annotations

from typing import Any


class Kind(type):
    """The type of a class of another library that is a property of our objects here.

    There it is a class of its own; here it is, say, an `IntxTensor` of 8 bits. `isinstance(x, cls)` asks `cls.holds(x)`.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        holds = getattr(cls, "holds", None)
        return super().__instancecheck__(instance) or (holds is not None and bool(holds(instance)))
