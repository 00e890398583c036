"""Classes with a mixin in front: of models, their configs and caches, whose objects others hold already."""

from __future__ import annotations

from typing import Any

_Base: Any = object  # known only when the class is made; this tells type checkers what it has


class Subclass(_Base):
    """Mixin of the classes that `subclass` makes, which pickle cannot find by name."""

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
    """The class of `mixin` in front of `base`, one for each base and `more`, with the base's name: transformers and
    accelerate look up classes by name.

    Args:
        make_class: the function that makes this class of `base` and `more`, which pickle calls.
    """
    key = (mixin, base, *more)
    if key in _made:
        return _made[key]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    made = {"wrapped_class": base, "make_class": staticmethod(make_class), "made_of": (base, *more)}
    return _made.setdefault(key, type(base.__name__, (mixin, Subclass, base), names | made | attributes))
