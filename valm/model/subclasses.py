"""Puts a mixin in front of the class of an existing object: a model, a config or a cache."""

from __future__ import annotations

from typing import Any

_Base: Any = object  # for type checkers: known only when the class is made


class Subclass(_Base):
    """Mixin of the classes that `subclass` makes. Pickle rebuilds them, since it cannot find them by name."""

    wrapped_class: type
    make_class: Any  # the function that makes this class
    made_of: tuple[Any, ...]  # its arguments, the wrapped class first

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).make_class, *type(self).made_of), self.__dict__


def _new(make_class: Any, *made_of: Any) -> Any:
    made = make_class(*made_of)
    return made.__new__(made)


_made: dict[Any, Any] = {}


def subclass(mixin: type, base: Any, make_class: Any, *more: Any, **attributes: Any) -> Any:
    """The class of `mixin` in front of `base`, made once for each `base` and `more`. It keeps the base's name, because
    transformers and accelerate look up classes by name.

    Args:
        make_class: the function that makes this class from `base` and `more`; pickle calls it.
    """
    key = (mixin, base, *more)
    if key in _made:
        return _made[key]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    made = {"wrapped_class": base, "make_class": staticmethod(make_class), "made_of": (base, *more)}
    return _made.setdefault(key, type(base.__name__, (mixin, Subclass, base), names | made | attributes))
