"""What a code object does, apart from where it stands and how it is laid out.

Two code objects have the same ``body`` when they run the same instructions on the same names and
constants. Line numbers, file names, docstrings, comments and the order of the constant table do not
count. Constants are written as keys are, so equality does not depend on the process.
"""

from __future__ import annotations

import dis
import sys
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, TypeAlias

from langgraph_perf._canonical import IdentityMap, text
from langgraph_perf._messages_key import KeyEncoder

Origin: TypeAlias = tuple[str, ...]
"""Where a value comes from: ``("global", "config", "items")`` is ``config.items``.

The first word is ``global``, ``free`` (a closure's variable), ``local``, or ``inner`` (a variable
of a nested function).
"""

MUTATORS = frozenset(
    (
        "add",
        "append",
        "appendleft",
        "clear",
        "difference_update",
        "discard",
        "extend",
        "extendleft",
        "insert",
        "intersection_update",
        "move_to_end",
        "pop",
        "popitem",
        "popleft",
        "remove",
        "reverse",
        "rotate",
        "setdefault",
        "sort",
        "subtract",
        "symmetric_difference_update",
        "update",
    )
)
"""Methods that change the built-in containers."""

_LOADS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_FROM_DICT_OR_GLOBALS": "global",
    "LOAD_DEREF": "free",
    "LOAD_CLASSDEREF": "free",
    "LOAD_FROM_DICT_OR_DEREF": "free",
    "LOAD_FAST": "local",
    "LOAD_FAST_CHECK": "local",
    "LOAD_FAST_BORROW": "local",
}
_STORES = {
    "STORE_GLOBAL": "global",
    "DELETE_GLOBAL": "global",
    "STORE_DEREF": "free",
    "DELETE_DEREF": "free",
}
_OF_ATTRIBUTES = frozenset(("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"))
# how many values go into a call or a container; 0: as many as the argument says
_PASSING = {
    # in Python 3.11 the two stand one after the other
    ("PRECALL" if "PRECALL" in dis.opmap else "CALL"): 0,
    "CALL_FUNCTION": 0,
    "CALL_FUNCTION_KW": 0,
    "CALL_KW": 0,
    "CALL_METHOD": 0,
    "BUILD_CONST_KEY_MAP": 0,
    "BUILD_LIST": 0,
    "BUILD_MAP": 0,
    "BUILD_SET": 0,
    "BUILD_TUPLE": 0,
    "LIST_APPEND": 1,
    "MAP_ADD": 1,
    "SET_ADD": 1,
}
_NAMING = frozenset(("CALL_FUNCTION_KW", "CALL_KW", "BUILD_CONST_KEY_MAP"))
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_CONSTANTS = frozenset(dis.hasconst)
_NAMED = frozenset((*dis.hasname, *dis.haslocal, *dis.hasfree))
# they say where a class body stands, or repeat what else is in it
_NOTES = frozenset(("__doc__", "__firstlineno__", "__static_attributes__"))
_HAS_DOCSTRING = 0x4000000  # a flag of Python 3.13
_SLOT_ABOVE = sys.version_info >= (3, 13)


@dataclass(frozen=True)
class Code:
    """What is known about a code object and those nested in it.

    Attributes:
        body: equal for code that does the same.
        loads: where the values come from that it reads, with all their attributes.
        stores: the names and attributes that it binds anew.
        pokes: the names and attributes whose value it changes, if that is a built-in container.
        passed: those whose value it passes to a call or puts into a container.
        whole: those that it reads as a value, not just for an attribute of theirs.
        imports: ``(level, module, names)`` of import statements.
    """

    body: bytes
    loads: frozenset[Origin]
    stores: frozenset[Origin]
    pokes: frozenset[Origin]
    passed: frozenset[Origin]
    whole: frozenset[Origin]
    imports: frozenset[tuple[int, str, tuple[str, ...]]]


_known = IdentityMap(8192)


def code_of(code: CodeType) -> Code:
    """What is known about ``code``."""
    found = _known.entries.get(id(code))
    if found is None:
        _known.put(code, _Reader(code).read())
        found = _known.entries[id(code)]
    known: Code = found[0]
    return known


@dataclass
class _Reader:
    code: CodeType
    loads: set[Origin] = field(default_factory=set)
    stores: set[Origin] = field(default_factory=set)
    pokes: set[Origin] = field(default_factory=set)
    passed: set[Origin] = field(default_factory=set)
    whole: set[Origin] = field(default_factory=set)
    imports: set[tuple[int, str, tuple[str, ...]]] = field(default_factory=set)

    def read(self) -> Code:
        code = self.code
        kept, places = self._instructions()
        count = code.co_argcount + code.co_kwonlyargcount
        count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
        encoder = KeyEncoder()
        head = (
            code.co_argcount,
            code.co_posonlyargcount,
            code.co_kwonlyargcount,
            code.co_flags & ~_HAS_DOCSTRING,
            code.co_varnames[:count],
        )
        out = [encoder.encode(head)]
        for instruction in kept:
            out.append(text(instruction.opname))
            argument: Any = instruction.arg
            if instruction.opcode in _CONSTANTS and argument is not None:
                argument = code.co_consts[argument]  # dis does not look up all kinds of them
            elif instruction.opcode in _JUMPS:
                argument = places[instruction.argval]
            elif instruction.opcode in _NAMED:
                argument = instruction.argval
            if isinstance(argument, CodeType):
                out.append(b"C" + self._nested(argument))
            else:
                out.append(encoder.encode(argument))
        for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
            where = (places[entry.start], places[entry.end], places[entry.target])
            out.append(encoder.encode((*where, entry.depth, entry.lasti)))
        self._follow(kept)
        return Code(
            b"%d:%b" % (len(kept), b"".join(out)),
            frozenset(self.loads),
            frozenset(self.stores),
            frozenset(self.pokes),
            frozenset(self.passed),
            frozenset(self.whole),
            frozenset(self.imports),
        )

    def _nested(self, code: CodeType) -> bytes:
        inner = code_of(code)
        own = set(self.code.co_cellvars)
        for mine, theirs in (
            (self.loads, inner.loads),
            (self.stores, inner.stores),
            (self.pokes, inner.pokes),
            (self.passed, inner.passed),
            (self.whole, inner.whole),
        ):
            for origin in theirs:
                space = origin[0]
                if space == "local":
                    space = "inner"
                elif space == "free" and origin[1] in own:
                    space = "local"
                mine.add((space, *origin[1:]))
        self.imports |= inner.imports
        return inner.body

    def _instructions(self) -> tuple[list[dis.Instruction], dict[int, int]]:
        """The instructions that count, and for each offset the position of the next of them."""
        kept: list[dis.Instruction] = []
        places = {}
        for instruction in dis.get_instructions(self.code):
            places[instruction.offset] = len(kept)
            if instruction.opname in ("NOP", "EXTENDED_ARG", "CACHE"):
                continue
            if instruction.opname == "STORE_NAME" and instruction.argval in _NOTES:
                del kept[-1:]
                continue
            kept.append(instruction)
        places[len(self.code.co_code)] = len(kept)
        return kept, places

    def _follow(self, instructions: list[dis.Instruction]) -> None:
        """Walk the code as if it ran straight on, and note what happens to which name.

        The stack holds the origins of the values, as far as they are known. Branches are not told
        apart; that can only lose an origin in the middle of a conditional expression.
        """
        stack: list[Origin | None] = []
        for index, instruction in enumerate(instructions):
            name, value = instruction.opname, instruction.argval
            if name == "IMPORT_NAME":
                level, names = (i.argval for i in instructions[index - 2 : index])
                self.imports.add((level or 0, value, tuple(names or ())))
            if name in _STORES:
                self.stores.add((self._space(_STORES[name], value), value))
            elif name in ("STORE_ATTR", "DELETE_ATTR"):
                self._note(self.stores, stack[-1:], value)
            elif name in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                self._note(self.pokes, stack[-2:-1])
            elif name == "STORE_SLICE":
                self._note(self.pokes, stack[-3:-2])
            elif name in _PASSING and instruction.arg:
                # below the arguments of a call is what is called, above them the keywords' names
                count = _PASSING[name] or instruction.arg * (1 + (name == "BUILD_MAP"))
                self.passed.update(filter(None, stack[-count - (name in _NAMING) :]))
            # a value and the attribute that is read off it stand next to each other
            following = instructions[index + 1 : index + 2]
            whole = not following or following[0].opname not in _OF_ATTRIBUTES
            self._step(stack, instruction, whole)

    def _space(self, space: str, name: str) -> str:
        return "local" if space == "free" and name in self.code.co_cellvars else space

    def _note(self, where: set[Origin], found: list[Origin | None], *attribute: str) -> None:
        if found and found[0]:
            where.add((*found[0], *attribute))

    def _load(self, origin: Origin, whole: bool) -> None:
        self.loads.add(origin)
        if whole:
            self.whole.add(origin)

    def _step(self, stack: list[Origin | None], instruction: dis.Instruction, whole: bool) -> None:
        name, value, arg = instruction.opname, instruction.argval, instruction.arg
        if name == "KW_NAMES":
            return  # stands between the arguments and their call, and touches neither
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            base = stack[-1] if stack else None
            if base:
                self._load((*base, value), whole)
                if value in MUTATORS:
                    self.pokes.add(base)
            effect = dis.stack_effect(instruction.opcode, arg)
            del stack[-1:]
            stack += _placed((*base, value) if base else None, effect + 1)
            return
        if name == "COPY" and arg is not None:
            stack.append(stack[-arg] if len(stack) >= arg else None)
        elif name == "SWAP" and arg is not None and len(stack) >= arg:
            stack[-1], stack[-arg] = stack[-arg], stack[-1]
        elif name == "DUP_TOP_TWO":
            stack += stack[-2:]
        elif name == "DUP_TOP":
            stack += stack[-1:]
        elif name in ("ROT_TWO", "ROT_THREE", "ROT_FOUR"):
            depth = ("ROT_TWO", "ROT_THREE", "ROT_FOUR").index(name) + 2
            stack[-depth:] = [*stack[-1:], *stack[-depth:-1]]
        else:
            effect = dis.stack_effect(instruction.opcode, arg, jump=False)
            if name in _LOADS:
                origin = (self._space(_LOADS[name], value), value)
                self._load(origin, whole)
                stack += _placed(origin, effect)
            elif name.startswith("LOAD_FAST_LOAD_FAST"):
                stack += [("local", each) for each in value]
            elif name.startswith(("LOAD_", "PUSH_")) and effect >= 0:
                stack += [None] * effect
            elif effect < 0:
                del stack[effect:]
                if stack and not name.startswith(("POP_", "STORE_", "DELETE_")):
                    stack[-1] = None
            else:
                if stack:
                    stack[-1] = None
                stack += [None] * effect


def _placed(origin: Origin | None, count: int) -> list[Origin | None]:
    """A value and, where it is loaded to be called, the empty slot that goes with it.

    Not only a call can come next, but also an attribute, which is read off what is on top.
    """
    slot: list[Origin | None] = [None] * (count - 1)
    return [origin, *slot] if _SLOT_ABOVE else [*slot, origin]
