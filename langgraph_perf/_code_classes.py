"""How classes and annotations count in the identity of code."""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from langgraph_perf._canonical import Plan, instance_state, mro_of, namespace_of, text, type_name
from langgraph_perf._code_walk import Walk, as_first_seen, by_type, found_by_name, state

# what Python, dataclasses, enums and pydantic add to a class; it follows from the rest
_ADDED = frozenset(
    """
    __module__ __qualname__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__
    __annotations__ __annotate__ __annotate_func__ __annotations_cache__ __abstractmethods__
    _abc_impl __parameters__ __orig_bases__ __dataclass_fields__ __dataclass_params__
    __match_args__ __signature__ __class_vars__ __private_attributes__ model_fields
    model_computed_fields __hash__ __protocol_attrs__ __non_callable_proto_members__
    __callable_proto_members_only__ __type_params__ __classcell__
    """.split()  # noqa: SIM905
)
_DATACLASS = ("init", "repr", "eq", "order", "unsafe_hash", "frozen")
_DECORATORS = (
    "field_validators",
    "model_validators",
    "field_serializers",
    "model_serializers",
    "computed_fields",
)
# not all, and not those that are set: which there are depends on pydantic's version
_FIELD = """
    default default_factory alias alias_priority validation_alias serialization_alias title
    field_title_generator description examples exclude exclude_if discriminator deprecated
    json_schema_extra frozen validate_default repr init init_var kw_only metadata
""".split()  # noqa: SIM905
_OF_A_MEMBER = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_"))
_NAMED_TUPLE = frozenset(("__new__", "__repr__", "__getnewargs__", "_make", "_replace", "_asdict"))


def class_or_annotation_plan(kind: type) -> Plan | None:
    """The plan of classes, and of what annotations are made of."""
    if type in mro_of(kind):
        return _class
    if kind is TypeAdapter:
        return _type_adapter
    if FieldInfo in mro_of(kind):
        return _field
    if any(type_name(base).endswith(".PydanticMetadata") for base in mro_of(kind)):
        return _constraints
    return annotation if _is_annotation(kind) else None


def _class(walk: Walk, kind: type) -> bytes:
    """A class: by name if it is a library's, else by what is in it."""
    if walk.library(kind.__module__) and (found_by_name(kind) or walk.near is not None):
        return b"N" + text(type_name(kind))
    return walk.later(kind, _class_body)


def _type_adapter(walk: Walk, adapter: Any) -> bytes:
    own = instance_state(TypeAdapter)(adapter)
    return b"A" + annotation(walk, own.get("_type")) + walk.or_type(own.get("_config"))


def _field(walk: Walk, info: Any) -> bytes:
    told = [walk.or_type(getattr(info, name, None)) for name in _FIELD]
    # models made by create_model have no annotations of their own
    return b"?" + annotation(walk, info.annotation) + b"".join(told)


def _constraints(walk: Walk, constraints: Any) -> bytes:
    return by_type(constraints) + walk.encode(vars(constraints))


def _class_body(walk: Walk, kind: type) -> bytes:
    out = [_class(walk, type(kind))]
    out += [_class(walk, base) for base in kind.__bases__]
    members = dict(_members(kind))
    for name in sorted(members):
        member = members[name]
        if walk.facts.changes(kind, name, member):
            out.append(text(name) + as_first_seen(kind, name, member))
        else:
            out.append(text(name) + _member(walk, member))
    return b"%d:%b" % (len(members), b"".join(out))


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """What the class statement put into a class, and its fields."""
    namespace = namespace_of(kind)
    is_enum = enum.Enum in mro_of(kind)
    for name, member in namespace.items():
        if name in _ADDED or name.startswith("__pydantic_"):
            continue
        if "_fields" in namespace and name in _NAMED_TUPLE:
            continue
        if "__dataclass_fields__" in namespace and _generated(member):
            continue
        if is_enum and (name in namespace["_member_map_"] or _of_enums(name, member)):
            continue
        yield name, member
    doc = namespace.get("__doc__")
    if isinstance(doc, str) and (BaseModel in mro_of(kind) or "__total__" in namespace):
        yield "schema", doc  # part of its JSON schema, and so of what a model is told
    if is_enum:
        for name, member in namespace["_member_map_"].items():
            yield f"= {name}", member._value_
            if not vars(member).keys() <= _OF_A_MEMBER:
                yield f"= {name}.", _Attributes(member)
    for name, note in namespace.get("__annotations__", {}).items():
        yield f": {name}", _Note(note)
    for name, field in namespace.get("__dataclass_fields__", {}).items():
        yield f"field {name}", (field.default, field.default_factory, field.init, field.kw_only)
        yield f"field {name} more", (field.repr, field.compare, field.hash, field.metadata)
    params = namespace.get("__dataclass_params__")
    if params is not None:
        yield "dataclass", tuple(getattr(params, name) for name in _DATACLASS)
    fields = namespace.get("__pydantic_fields__")
    if (fields is not None or BaseModel in mro_of(kind)) and kind is not BaseModel:
        for name, info in (fields or {}).items():
            yield f"field {name}", info
        for name, private in getattr(kind, "__private_attributes__", {}).items():
            yield f"private {name}", (private.default, private.default_factory)
        decorators = getattr(kind, "__pydantic_decorators__", None)
        for group in _DECORATORS:
            for name, decorator in getattr(decorators, group, {}).items():
                info = decorator.info
                told = (*(getattr(info, f, None) for f in type(info).__dataclass_fields__),)
                yield f"decorator {name}", told


def _of_enums(name: str, member: Any) -> bool:
    """Whether it was ``enum`` that put this into the class."""
    if isinstance(member, types.FunctionType | staticmethod | classmethod):
        return getattr(member, "__module__", None) == "enum"
    return name[0] == name[-1] == "_"


class _Attributes:
    """Marks that of an enum's member the attributes count."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of


def _generated(member: Any) -> bool:
    """Whether a method was written by ``dataclasses``."""
    if type(member) is not types.FunctionType:
        return False
    member = getattr(member, "__wrapped__", member)
    code = member.__code__
    where = getattr(code, "co_qualname", None)  # Python 3.10 has none
    return "__create_fn__" in where if where else code.co_filename == "<string>"


def _member(walk: Walk, member: Any) -> bytes:
    if walk.survey and type(member) is types.FunctionType:
        walk.facts.members.add(member.__code__)
    if isinstance(member, staticmethod | classmethod):
        return text(type(member).__name__) + _member(walk, member.__func__)
    if isinstance(member, property | types.DynamicClassAttribute):
        return b"p" + b"".join(map(walk.or_type, (member.fget, member.fset, member.fdel)))
    if isinstance(member, functools.cached_property):
        return b"c" + walk.or_type(member.func)
    if isinstance(member, functools.partialmethod):
        parts = (member.func, member.args, member.keywords)
        return b"m" + b"".join(map(walk.or_type, parts))
    if isinstance(member, tuple):  # each for itself: one part without a key must not hide the rest
        return b"u%d:%b" % (len(member), b"".join(_member(walk, part) for part in member))
    if isinstance(member, _Note):
        return annotation(walk, member.note)
    if isinstance(member, _Attributes):
        return walk.leniently(partial(state, walk, member.of, _OF_A_MEMBER))
    if isinstance(member, type(_Note.__dict__["note"]) | types.GetSetDescriptorType):
        return by_type(member)  # slots
    return walk.or_type(member)


# -- annotations -----------------------------------------------------------------------------------


class _Note:
    """Marks an annotation among the members of a class."""

    __slots__ = ("note",)

    def __init__(self, note: Any) -> None:
        self.note = note


def _is_annotation(kind: type) -> bool:
    return kind in (types.GenericAlias, types.UnionType) or (
        kind.__module__ in ("typing", "typing_extensions")
    )


def annotation(walk: Walk, note: Any) -> bytes:
    """An annotation by its structure; text stays text."""
    if note is None or isinstance(note, str | bytes | int | enum.Enum):
        return walk.or_type(note)
    if type in mro_of(type(note)):
        return _class(walk, note)
    if isinstance(note, typing.ForwardRef):
        return b"f" + text(note.__forward_arg__)
    if isinstance(note, list | tuple):
        return b"l%d:%b" % (len(note), b"".join(annotation(walk, part) for part in note))
    origin = typing.get_origin(note)
    if origin is None:
        if _is_annotation(type(note)):
            return b"a" + text(str(getattr(note, "__name__", None) or type_name(type(note))))
        return walk.or_type(note)
    parts = [origin, *typing.get_args(note)]
    return b"g%d:%b" % (len(parts), b"".join(annotation(walk, part) for part in parts))
