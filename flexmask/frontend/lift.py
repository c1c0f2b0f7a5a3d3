"""Lifting: the user's function rebuilt over symbols in place of the numbers it captures, through closures, globals and objects.

A captured number becomes a run-time scalar without the user doing anything. Everything read on the way is guarded.
"""

from __future__ import annotations

import dis
import functools
import sys
from abc import ABCMeta
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from .guards import GuardList
from .recorder import Recorder

_FOREIGN = (sys.stdlib_module_names | {"torch", "numpy", "triton"}) - {"__main__"}
_MODS = "flexmask.mods"
_CONSTRUCTION = {
    "__init__", "__new__", "__del__", "__init_subclass__", "__class_getitem__", "__post_init__", "__set_name__", "__subclasshook__",
    "__setattr__", "__delattr__", "__getattribute__", "__repr__", "__str__", "__eq__", "__hash__", "__reduce__", "__reduce_ex__",
    "__getstate__", "__setstate__", "__replace__",
}  # fmt: skip


class Lifter:
    """One trace's lifted objects, each original once, so that shared cells and cycles stay shared."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.guards = GuardList()
        self._done: dict[int, Any] = {}
        self._kept: list[Any] = []  # originals made on the fly, kept so that their ids stay theirs
        self._classes: dict[int, type] = {}
        self._cells: dict[int, CellType] = {}
        self._spaces: dict[int, ModuleType] = {}
        self._named: set[tuple[int, str]] = set()

    def lift(self, value: Any, name: str) -> Any:
        """`value` over symbols; `name` is what the user calls it."""
        number = value.item() if isinstance(value, (np.integer, np.floating)) else value
        if type(number) in (int, float):
            return self.recorder.scalar(number, name)
        if isinstance(value, torch.Tensor):
            self.recorder.names.setdefault(id(value), name)
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, (bool, str, bytes, type(None), complex)):
            return value
        return self._structure(value, name)

    def _structure(self, value: Any, name: str) -> Any:
        if isinstance(value, FunctionType):
            return value if _is_foreign(value.__module__) else self._function(value)
        if isinstance(value, MethodType):
            return self._method(value)
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, functools._lru_cache_wrapper):
            # a cache would keep symbols of this trace for the next one
            return self.lift(value.__wrapped__, name)
        if isinstance(value, (list, tuple, dict)):
            return self._container(value, name)
        if isinstance(value, type):
            return self._class(value)
        return self._instance(value) if _can_be_cloned(type(value)) else self._opaque(value)

    # functions

    def _function(self, function: FunctionType) -> FunctionType:
        code, originals = function.__code__, function.__closure__ or ()
        cells = tuple(self._cells.get(id(c)) or CellType() for c in originals)
        space = self._space(function.__globals__)
        lifted = FunctionType(code, vars(space), function.__name__, None, cells or None)
        self._done[id(function)] = lifted
        self.guards.attributes += [(function, "__code__", code), (function, "__defaults__", function.__defaults__)]
        lifted.__defaults__ = self._defaults(function)
        if function.__kwdefaults__:
            lifted.__kwdefaults__ = self._items(function.__kwdefaults__)
        for name, original, cell in zip(code.co_freevars, originals, cells, strict=True):
            self._fill(original, cell, name)
        self._globals(function.__globals__, code)
        if function.__dict__:
            lifted.__dict__.update(self._items(function.__dict__))
        return lifted

    def _defaults(self, function: FunctionType) -> tuple[Any, ...] | None:
        defaults, code = function.__defaults__, function.__code__
        if not defaults:
            return defaults
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        return tuple(self.lift(value, name) for name, value in zip(names, defaults, strict=True))

    def _fill(self, original: CellType, cell: CellType, name: str) -> None:
        if id(original) in self._cells:
            return
        self._cells[id(original)] = cell
        try:
            value = original.cell_contents
        except ValueError:  # assigned later; calling the function before is the user's error
            return
        self.guards.cells.append((original, value))
        cell.cell_contents = self.lift(value, name)

    def _method(self, method: MethodType) -> Any:
        owner = method.__self__
        function = self.lift(method.__func__, method.__func__.__name__)
        lifted = MethodType(function, self.lift(owner, type(owner).__name__))
        self._done[id(method)] = lifted
        self._kept.append(method)
        return lifted

    def _partial(self, partial: functools.partial[Any]) -> Any:
        self.guards.attributes.append((partial, "args", partial.args))
        function = self.lift(partial.func, getattr(partial.func, "__name__", "function"))
        arguments = tuple(self.lift(a, f"argument_{i}") for i, a in enumerate(partial.args))
        lifted = functools.partial(function, *arguments, **self._items(partial.keywords))
        self._done[id(partial)] = lifted
        return lifted

    # globals

    def _space(self, original: dict[str, Any]) -> ModuleType:
        """A copy of a module's variables that the lifted functions read."""
        if id(original) not in self._spaces:
            space = ModuleType(original.get("__name__") or "")
            vars(space).update(original)
            self._spaces[id(original)] = space
        return self._spaces[id(original)]

    def _globals(self, original: dict[str, Any], code: CodeType) -> None:
        names, attributes = _names(code)
        self._variables(original, names, attributes)

    def _variables(self, original: dict[str, Any], names: frozenset[str], attributes: frozenset[str]) -> None:
        space = vars(self._space(original))
        for name in names:
            if name not in original:
                continue
            value = original[name]
            if isinstance(value, ModuleType):
                self._module(space, original, name, value, attributes)
            elif (id(original), name) not in self._named:
                self._named.add((id(original), name))
                self.guards.items.append((original, name, value))
                space[name] = self.lift(value, name)

    def _module(self, space: dict[str, Any], original: dict[str, Any], name: str, module: ModuleType, attributes: frozenset[str]) -> None:
        """`config.WINDOW`: the module's variables are read like globals, as far as the code names them."""
        if type(module) is not ModuleType or _is_foreign(module.__name__):
            return
        if (id(original), name) not in self._named:
            self._named.add((id(original), name))
            self.guards.items.append((original, name, module))
            space[name] = self._space(vars(module))
            self._variables(vars(module), attributes, attributes)

    # objects

    def _items(self, original: dict[str, Any], of_mod: bool = False) -> dict[str, Any]:
        """A dict of variables, guarded and lifted; private numbers stay constants. A Mask's private attributes are not the user's."""
        self.guards.sizes.append((original, len(original)))
        lifted = {}
        for name, value in original.items():
            if of_mod and name.startswith("_"):
                lifted[name] = value
                continue
            self.guards.items.append((original, name, value))
            private = str(name).startswith("_") and isinstance(value, (int, float, np.generic))
            lifted[name] = value if private else self.lift(value, name)
        return lifted

    def _container(self, original: Any, name: str) -> Any:
        """Numbers in a list, tuple or dict are constants; functions and objects in it are lifted."""
        self._done[id(original)] = original
        if isinstance(original, dict):
            keys, values = list(original), list(original.values())
            self.guards.sizes.append((original, len(original)))
            self.guards.items += [(original, key, value) for key, value in original.items()]
        else:
            keys, values = list(range(len(original))), list(original)
            if isinstance(original, list):
                self.guards.sequences.append((original, tuple(original)))
        lifted = [
            v if isinstance(v, (int, float, np.generic)) else self.lift(v, _element(name, k)) for k, v in zip(keys, values, strict=True)
        ]
        if type(original) in (list, tuple, dict) and any(new is not old for new, old in zip(lifted, values, strict=True)):
            twin: Any = dict(zip(keys, lifted, strict=True)) if isinstance(original, dict) else type(original)(lifted)
            self._done[id(original)] = twin
        return self._done[id(original)]

    def _instance(self, original: Any) -> Any:
        cls = type(original)
        twin = object.__new__(self._derived(cls))
        self._done[id(original)] = twin
        if hasattr(original, "__dict__"):
            vars(twin).update(self._items(vars(original), _is_mod(cls)))
        for name, slot in _slots(cls):
            if hasattr(original, name):
                value = slot.__get__(original)
                self.guards.attributes.append((original, name, value))
                slot.__set__(twin, self.lift(value, name))
        return twin

    def _opaque(self, original: Any) -> Any:
        """An object that cannot be copied: used as it is, its numbers constants, guarded as far as they can be seen."""
        self._done[id(original)] = original
        state = getattr(original, "__dict__", None)
        if isinstance(state, dict) and not isinstance(original, ModuleType):
            self.guards.sizes.append((state, len(state)))
            self.guards.items += [(state, key, value) for key, value in state.items()]
        return original

    def _class(self, cls: type) -> type:
        """A class used as a namespace, `Config.WINDOW`: its plain attributes are constants, guarded."""
        self._done[id(cls)] = cls
        for base in cls.__mro__:
            if not _is_foreign(base.__module__):
                plain = [(k, v) for k, v in vars(base).items() if not k.startswith("__") and not callable(v)]
                self.guards.items += [(vars(base), k, v) for k, v in plain]
        return cls

    def _derived(self, cls: type) -> type:
        """A subclass whose methods and class attributes are lifted; the class itself where subclassing could have effects."""
        if id(cls) not in self._classes:
            self._classes[id(cls)] = cls
            members: dict[str, Any] = {}
            for base in reversed(cls.__mro__[:-1]):
                if not _is_foreign(base.__module__) and base.__module__ != _MODS:
                    members.update(self._members(base))
            if members and type(cls) in (type, ABCMeta) and not hasattr(cls.__init_subclass__, "__func__"):
                names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
                self._classes[id(cls)] = type(cls)(cls.__name__, (cls,), {**members, **names})
        return self._classes[id(cls)]

    def _members(self, cls: type) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in vars(cls).items():
            if name in _CONSTRUCTION or isinstance(value, type):
                continue
            if isinstance(value, FunctionType):
                self.guards.items.append((vars(cls), name, value))
                members[name] = self.lift(value, name)
            elif isinstance(value, (staticmethod, classmethod)):
                members[name] = type(value)(self.lift(value.__func__, name))
            elif isinstance(value, property) and value.fget is not None:
                members[name] = property(self.lift(value.fget, name))
            elif not name.startswith("_") and (type(value) in (int, float) or isinstance(value, torch.Tensor)):
                self.guards.items.append((vars(cls), name, value))
                members[name] = self.lift(value, name)
        return members


def _is_mod(cls: type) -> bool:
    return any(base.__module__ == _MODS for base in cls.__mro__)


def _element(name: str, key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() else f"{name}_{key}"


def _slots(cls: type) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for base in cls.__mro__
        for name, value in vars(base).items()
        if type(value).__name__ == "member_descriptor" and not name.startswith("__")
    ]


@functools.lru_cache(maxsize=4096)
def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


def _can_be_cloned(cls: type) -> bool:
    """Plain classes of the user's, and modules of torch.nn: no C state, no destructor that a copy would run."""
    plain: Callable[..., Any] = object.__new__
    if cls.__new__ is not plain or hasattr(cls, "__del__"):
        return False
    return not _is_foreign(cls.__module__) or issubclass(cls, torch.nn.Module)


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the attributes that a code object and those nested in it name."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_attributes = _names(constant)
            names |= inner_names
            attributes |= inner_attributes
    return frozenset(names), frozenset(attributes)
