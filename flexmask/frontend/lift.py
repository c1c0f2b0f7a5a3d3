"""Lifting: the user's function rebuilt over symbols in place of the numbers it captures, through closures, globals and objects.

A captured number becomes a run-time scalar without the user doing anything. Everything read on the way is guarded. Of modules and
objects only what the code names is followed, so a mask that reads `trainer.window` neither copies nor watches the rest.
"""

from __future__ import annotations

import dis
import functools
import sys
from abc import ABCMeta
from collections.abc import Callable, Collection, Mapping
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from .guards import ABSENT, GuardList
from .promise import Ascending
from .recorder import Recorder, fits

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
        self._seen: set[tuple[int, str]] = set()
        self._attributes = {"forward"}  # named by the code met so far; torch.nn.Module calls `forward`
        self._followers: list[Callable[[Collection[str]], None]] = []

    def lift(self, value: Any, name: str) -> Any:
        """`value` over symbols; `name` is what the user calls it."""
        number = value.item() if isinstance(value, (np.integer, np.floating)) else value
        if type(number) is float or (type(number) is int and fits(number)):
            return self.recorder.scalar(number, name)
        if isinstance(value, Ascending):
            self.recorder.promise(value.tensor)
            value = value.tensor
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
            return self._function(value) if _is_joint(value) or not _is_foreign(value.__module__) else value
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
        if isinstance(value, ModuleType):
            return self._module(value)
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
        self._read(function)
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

    # variables by name

    def _space(self, original: dict[str, Any]) -> ModuleType:
        """A copy of a module's variables that the lifted functions read."""
        if id(original) not in self._spaces:
            space = ModuleType(original.get("__name__") or "")
            vars(space).update(original)
            self._spaces[id(original)] = space
        return self._spaces[id(original)]

    def _read(self, function: FunctionType) -> None:
        """Lifts the globals that the code names, and the attributes it names of everything met so far."""
        names, attributes = _names(function.__code__)
        new = attributes - self._attributes
        self._attributes |= new
        self._named(function.__globals__, vars(self._space(function.__globals__)), names)
        for follow in list(self._followers if new else ()):
            follow(new)

    def _follow(self, follow: Callable[[Collection[str]], None]) -> None:
        """`follow` lifts the attributes of one object whose names it is given: those known now, and those met later."""
        self._followers.append(follow)
        follow(frozenset(self._attributes))

    def _named(self, original: Mapping[str, Any], twin: dict[str, Any], names: Collection[str]) -> None:
        """The named variables guarded, and lifted into `twin`; private numbers stay constants."""
        for name in sorted(names):  # in an order of its own, for the same names of captures every time
            if name not in original or (id(original), name) in self._seen:
                continue
            self._seen.add((id(original), name))
            value = original[name]
            if isinstance(value, ModuleType) and not _is_followed(value):
                continue
            self.guards.items.append((original, name, value))
            private = name.startswith("_") and isinstance(value, (int, float, np.generic))
            twin[name] = value if private else self.lift(value, name)

    def _module(self, module: ModuleType) -> ModuleType:
        """`config.WINDOW`: a module's variables are read like globals."""
        self._done[id(module)] = module
        if not _is_followed(module):
            return module
        space = self._done[id(module)] = self._space(vars(module))
        self._follow(functools.partial(self._named, vars(module), vars(space)))
        return space

    # objects

    def _items(self, original: dict[str, Any]) -> dict[str, Any]:
        """All of a dict of variables: keywords, defaults, a function's attributes."""
        self.guards.sizes.append((original, len(original)))
        lifted = dict(original)
        self._named(original, lifted, tuple(original))
        return lifted

    def _container(self, original: Any, name: str) -> Any:
        """Numbers in a list, tuple or dict are constants; functions and objects in it are lifted."""
        self._done[id(original)] = original
        if isinstance(original, dict):
            keys, values = list(original), list(original.values())
            self.guards.sizes.append((original, len(original)))
            self.guards.items += list(zip([original] * len(keys), keys, values, strict=True))
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
        twin: Any = object.__new__(self._derived(cls))
        self._done[id(original)] = twin
        if hasattr(original, "__dict__"):
            vars(twin).update(vars(original))
            self._follow(functools.partial(self._attributes_of, original, twin))
        if slots := _slots(cls):
            for name, slot in slots.items():
                if hasattr(original, name):
                    slot.__set__(twin, slot.__get__(original))
            self._follow(functools.partial(self._slots_of, original, twin, slots))
        if isinstance(original, torch.nn.Module):
            self._submodules(original, twin)
        return twin

    def _attributes_of(self, original: Any, twin: Any, names: Collection[str]) -> None:
        if _is_mod(type(original)):  # read by flexmask's own code; its private attributes change when it is used
            names = [name for name in vars(original) if not name.startswith("_")]
        self._named(vars(original), vars(twin), names)
        shadowed = (n for n in names if n not in vars(original) and hasattr(type(original), n))
        self.guards.items += [(vars(original), name, ABSENT) for name in shadowed]

    def _slots_of(self, original: Any, twin: Any, slots: dict[str, Any], names: Collection[str]) -> None:
        for name in names:
            if name in slots and hasattr(original, name):
                value = slots[name].__get__(original)
                self.guards.attributes.append((original, name, value))
                slots[name].__set__(twin, self.lift(value, name))

    def _submodules(self, original: torch.nn.Module, twin: Any) -> None:
        """torch.nn keeps parameters and children in dicts of their own; children without a name to write are all read."""
        children = vars(twin)["_modules"] = dict(original._modules)
        numbered = [name for name in children if not name.isidentifier()]
        self._named(original._modules, children, numbered)
        self.guards.sizes.append((original._modules, len(children)))
        self._follow(functools.partial(self._named, original._modules, children))
        for tensors in (original._parameters, original._buffers):
            self._follow(functools.partial(self._named, tensors, {}))

    def _opaque(self, original: Any) -> Any:
        """An object that cannot be copied: used as it is, its numbers constants, guarded as far as they can be seen."""
        self._done[id(original)] = original
        state = getattr(original, "__dict__", None)
        if isinstance(state, dict):
            self._follow(functools.partial(self._named, state, {}))
        return original

    def _class(self, cls: type) -> type:
        """A class used as a namespace, `Config.WINDOW`: its attributes are constants, guarded."""
        self._done[id(cls)] = cls
        for base in cls.__mro__:
            if not _is_foreign(base.__module__):
                self._follow(functools.partial(self._named, vars(base), {}))
        return cls

    def _derived(self, cls: type) -> type:
        """A subclass whose methods and class attributes are lifted; the class itself where subclassing could have effects."""
        if id(cls) not in self._classes:
            self._classes[id(cls)] = cls
            bases = [b for b in cls.__mro__ if not _is_foreign(b.__module__) and b.__module__ != _MODS]
            if bases and type(cls) in (type, ABCMeta) and not hasattr(cls.__init_subclass__, "__func__"):
                names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
                self._classes[id(cls)] = type(cls)(cls.__name__, (cls,), names)
            operators = {name for base in bases for name in vars(base) if name.startswith("__")} - _CONSTRUCTION
            self._members(bases, cls, operators)
            self._follow(functools.partial(self._members, bases, cls))
        return self._classes[id(cls)]

    def _members(self, bases: list[type], cls: type, names: Collection[str]) -> None:
        """Methods, properties and class attributes, lifted into the derived class where there is one."""
        for name in names:
            base = next((b for b in bases if name in vars(b)), None)
            if base is None or (id(cls), name) in self._seen:
                continue
            self._seen.add((id(cls), name))
            value = vars(base)[name]
            lifted = self._member(value, name)
            self.guards.items.append((vars(base), name, value))
            if lifted is not value and self._classes[id(cls)] is not cls:
                setattr(self._classes[id(cls)], name, lifted)

    def _member(self, value: Any, name: str) -> Any:
        if isinstance(value, (staticmethod, classmethod)):
            return type(value)(self.lift(value.__func__, name))
        if isinstance(value, property) and value.fget is not None:
            return property(self.lift(value.fget, name))
        if isinstance(value, (FunctionType, torch.Tensor)) or type(value) in (int, float):
            return self.lift(value, name)
        return value


def _is_mod(cls: type) -> bool:
    return any(base.__module__ == _MODS for base in cls.__mro__)


def _element(name: str, key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() else f"{name}_{key}"


def _slots(cls: type) -> dict[str, Any]:
    return {
        name: value
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if isinstance(value, MemberDescriptorType) and not name.startswith("__")
    }


@functools.lru_cache(maxsize=4096)
def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


def _is_joint(function: FunctionType) -> bool:
    """torch's `and_masks` and `or_masks` close over the user's functions."""
    return function.__module__ == "torch.nn.attention.flex_attention" and function.__closure__ is not None


def _is_library(module: str) -> bool:
    """Whether a module was installed as somebody's package: its objects are not searched for numbers, unless they are callable."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _is_followed(module: ModuleType) -> bool:
    return type(module) is ModuleType and not _is_foreign(module.__name__) and not _is_library(module.__name__)


def _can_be_cloned(cls: type) -> bool:
    """Plain classes of the user's, and modules of torch.nn: no C state, no destructor that a copy would run."""
    plain: Callable[..., Any] = object.__new__
    if cls.__new__ is not plain or hasattr(cls, "__del__"):
        return False
    if issubclass(cls, torch.nn.Module):
        return True
    return not _is_foreign(cls.__module__) and (hasattr(cls, "__call__") or not _is_library(cls.__module__))  # noqa: B004


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the attributes that a code object and those nested in it name."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
        elif instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            attributes.add(instruction.argval)  # getattr(config, "window")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_attributes = _names(constant)
            names |= inner_names
            attributes |= inner_attributes
    return frozenset(names), frozenset(attributes)
