"""Classes as payloads see them: the name one goes by, and how its instances are taken apart.

A class travels as ``module:qualname`` with its kind and a checksum of its field names. Nothing here
imports a module or calls what a class defines, so that all of it may be used on whatever a payload
names.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
import weakref
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from langchain_core.messages import BaseMessage
from langgraph.store.base import Item, SearchItem
from langgraph.types import Send
from pydantic import BaseModel

from langgraph_perf._codec_format import EncodeError, Tag
from langgraph_perf._locks import new_lock

# -- names ----------------------------------------------------------------------------------------

_unreachable: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
"""Classes this process has encoded that no module attribute leads to, for example local ones."""
_unreachable_lock = new_lock()


def ref_of(cls: type) -> str:
    """The name a class has in payloads."""
    generic = generic_of(cls)
    if generic is None:
        return f"{cls.__module__}:{cls.__qualname__}"
    args = (ref_of(arg) if isinstance(arg, type) else repr(arg) for arg in generic["args"])
    return f"{ref_of(generic['origin'])}[{','.join(args)}]"


def generic_of(cls: type) -> Any:
    """pydantic's description of a parametrized generic model, else ``None``."""
    metadata = vars(cls).get("__pydantic_generic_metadata__")
    return metadata if metadata and metadata.get("origin") is not None else None


def parametrization(origin: type, ref: str) -> type | None:
    """The class ``origin[...]`` called ``ref``, if it exists: making it would run user code."""
    subclasses: list[type] = type.__subclasses__(origin)
    for cls in subclasses:
        generic = generic_of(cls)
        if generic is not None and generic["origin"] is origin and ref_of(cls) == ref:
            return cls
    return None


def find(ref: str) -> type | None:
    """The class of that name in an already imported module, or else one encoded before."""
    found = _imported(ref)
    return _unreachable.get(ref) if found is None else found


def ensure_reachable(cls: type, ref: str) -> None:
    """Make sure that ``ref`` leads back to ``cls`` in this process.

    Raises:
        EncodeError: another class has that name.
    """
    found = _imported(ref)
    if found is None:
        with _unreachable_lock:
            found = _unreachable.setdefault(ref, cls)
    if found is not cls:
        raise EncodeError(
            f"two different classes are named {ref}, so that its values cannot be told apart; "
            "give them different names at module level"
        )


def _imported(ref: str) -> type | None:
    """The class of that name in an already imported module, found without any attribute hook."""
    name, _, args = ref.partition("[")
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if not issubclass(type(module), types.ModuleType):
        return None
    # not vars(): a lazily loaded module would load
    namespace = object.__getattribute__(module, "__dict__")
    found: Any = None
    for part in qualname.split("."):
        found = namespace.get(part)
        if not issubclass(type(found), type):
            return None
        namespace = type.__getattribute__(found, "__dict__")
    cls = cast("type", found)
    if cls.__module__ != module_name or cls.__qualname__ != qualname:
        return None
    return parametrization(cls, ref) if args else cls


# -- plans ----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How instances of one class are taken apart and put together.

    Attributes:
        tag: the kind; a payload must agree.
        shape: checksum of the field names; a payload of another shape is of another version.
        slots: slot descriptors by name, used directly so that no property interferes.
        message: whether it is a LangChain message.
    """

    cls: type
    tag: int
    ref: str
    shape: int
    slots: Mapping[str, Any]
    message: bool


_PLAIN_SLOTS = (Send, Item, SearchItem)
"""Classes that are no dataclasses but hold their state in slots in just the same way."""

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
_MODEL_SLOTS = frozenset(
    ["__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__", "__fields_set__"]
)
_plans: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()
"""Plans already made, without the class and its slots: a value must not keep its key alive."""


def plan_of(cls: type) -> Plan | None:
    """The plan of a class, or ``None`` for one of no storable kind."""
    try:
        known = _plans[cls]
    except KeyError:
        # racing threads make equal plans
        plan = _make_plan(cls)
        if plan is None:
            _plans[cls] = None
        else:
            owners = {name: cls.__mro__.index(s.__objclass__) for name, s in plan.slots.items()}
            _plans[cls] = plan._replace(cls=object, slots=owners)
        return plan
    if known is None:
        return None
    mro = cls.__mro__
    slots = {name: vars(mro[owner])[name] for name, owner in known.slots.items()}
    return cast("Plan", known._replace(cls=cls, slots=slots))


def _make_plan(cls: type) -> Plan | None:
    mro = type.__getattribute__(cls, "__mro__")
    fields: Iterable[str]
    if enum.Enum in mro:
        tag, fields = (Tag.FLAG if enum.Flag in mro else Tag.ENUM), ()
    elif tuple in mro:
        names = getattr(cls, "_fields", None)
        if type(names) is not tuple or not all(type(name) is str for name in names):
            return None
        tag, fields = Tag.NAMED, names
    elif BaseModel in mro:
        tag, fields = Tag.MODEL, getattr(cls, "__pydantic_fields__", ())
    elif _v1_model() in mro:
        tag, fields = Tag.MODEL_V1, cls.__fields__  # type: ignore[attr-defined]
    elif dataclasses.is_dataclass(cls):
        tag, fields = Tag.RECORD, [field.name for field in dataclasses.fields(cls)]
    elif cls in _PLAIN_SLOTS:
        tag, fields = Tag.RECORD, cls.__slots__
    else:
        return None
    slots: dict[str, Any] = {}
    if tag in (Tag.MODEL, Tag.MODEL_V1, Tag.RECORD):
        base: Any = cls
        while base is not object:
            # the layout of a built-in base (dict, Exception) is not in __dict__ and slots
            if not base.__flags__ & _HEAP_TYPE:
                return None
            base = base.__base__
        for base in mro:
            for name, member in vars(base).items():
                if type(member) is types.MemberDescriptorType:
                    slots.setdefault(name, member)
        if tag != Tag.RECORD:
            slots = {name: slot for name, slot in slots.items() if name not in _MODEL_SLOTS}
            if slots.keys() - getattr(cls, "__private_attributes__", {}).keys():
                return None
    shape = zlib.crc32("\0".join(fields).encode("utf-8", "surrogatepass"))
    return Plan(cls, tag, ref_of(cls), shape, slots, BaseMessage in mro)


def _v1_model() -> Any:
    """pydantic's v1 ``BaseModel`` if anybody imported it."""
    main = sys.modules.get("pydantic.v1.main")
    return getattr(main, "BaseModel", None)
