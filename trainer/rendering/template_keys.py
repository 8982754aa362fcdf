"""What a chat template reads, from its syntax tree: keys of messages, and variables.

Each expression has kinds, followed through variables, loops, macros and namespaces without regard
to the order of statements: a message, a list of such a kind, a constant text, or anything else.
Where a message goes out of sight (message[key], message.items(), message | tojson), it is read
with all its keys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from gold_trainer.rendering.template_variables import variables_read

MAX_DEPTH = 4  # of lists in lists
ELEMENTS = ("first", "last", "min", "max", "random")
LISTS = ("list", "reverse", "slice", "batch", "select", "reject", "sort", "unique")
BY_FIRST = ("selectattr", "rejectattr")  # filters whose first argument is a key


class Kind(NamedTuple):
    base: str  # "message", "text", or "other"
    depth: int = 0  # of lists around it
    text: str = ""  # of a constant


Kinds = frozenset[Kind]
OTHER: Kinds = frozenset({Kind("other")})
NOTHING: Kinds = frozenset()


@dataclass(frozen=True)
class ReadKeys:
    """What a template reads."""

    variables: frozenset[str]
    of_messages: frozenset[str]
    has_all: bool = False  # keys of messages
    is_unknown: bool = False  # the whole template

    def unread(self, message_keys: Iterable[str], variables: Iterable[str]) -> set[str]:
        if self.is_unknown:
            return set()
        keys = set() if self.has_all else set(message_keys) - self.of_messages
        return keys | set(variables) - self.variables

    def reads_any(self, message_keys: Iterable[str]) -> bool:
        return self.is_unknown or self.has_all or not self.of_messages.isdisjoint(message_keys)


def keys_read(template: Any, *, has_tools: bool = False) -> ReadKeys:
    """template: a processor's, of which a dict has several by name."""
    if isinstance(template, Mapping):
        is_for_tools = has_tools and "tool_use" in template
        template = template.get("tool_use" if is_for_tools else "default")
    return _keys_read(str(template))


@lru_cache
def _keys_read(source: str) -> ReadKeys:
    try:
        tree = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError:  # no template of jinja: a processor has its own ways to read it
        return ReadKeys(frozenset(), frozenset(), is_unknown=True)
    reader = _Reader(macro.name for macro in tree.find_all(nodes.Macro))
    while True:  # kinds of variables only grow
        before = reader.size()
        reader.statements(tree.body, (0,))
        if reader.size() == before:
            break
    return ReadKeys(variables_read(tree), frozenset(reader.keys), reader.has_all)


class _Generation(Extension):
    """{% generation %}, with which templates mark what an assistant says."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


Scope = tuple[int, ...]  # the root's number, then that of each loop or macro inside


class _Reader:
    def __init__(self, macros: Iterable[str]) -> None:
        self.keys: set[str] = set()
        self.has_all = False
        # kinds of each name of a scope, of "name.attribute" for namespaces
        self.names: dict[tuple[Scope, str], Kinds] = {
            ((0,), "messages"): frozenset({Kind("message", 1)})
        }
        self.always: set[tuple[Scope, str]] = set()  # loop variables and parameters hide others
        # also those that statements further down define
        self.macros: dict[str, list[tuple[nodes.Macro | nodes.CallBlock, Scope]]] = {
            name: [] for name in ("caller", *macros)
        }
        self.numbers: dict[int, int] = {}  # of a node's scope

    def size(self) -> tuple[int, int, bool]:
        return sum(len(kinds) for kinds in self.names.values()), len(self.keys), self.has_all

    def inner(self, node: nodes.Node, scope: Scope) -> Scope:
        return (*scope, self.numbers.setdefault(id(node), len(self.numbers) + 1))

    # Statements

    def statements(self, body: Iterable[nodes.Node], scope: Scope) -> None:
        for node in body:
            self.statement(node, scope)

    def statement(self, node: nodes.Node, scope: Scope) -> None:
        if isinstance(node, nodes.For):
            inside = self.inner(node, scope)
            elements = _elements(self.kinds(node.iter, scope))
            self.bind(node.target, elements, inside, hides=True)
            self.bind(nodes.Name("loop", "store"), OTHER, inside, hides=True)
            for attribute in ("previtem", "nextitem"):
                self.grow(inside, f"loop.{attribute}", elements)
            self.expressions([node.test] if node.test else [], inside)
            self.statements(node.body, inside)
            self.statements(node.else_, scope)
        elif isinstance(node, nodes.Macro | nodes.CallBlock):
            self.macro(node, scope)
        elif isinstance(node, nodes.Assign):
            self.assign(node, scope)
        elif isinstance(node, nodes.With):
            inside = self.inner(node, scope)
            for target, value in zip(node.targets, node.values, strict=True):
                self.bind(target, self.kinds(value, scope), inside, hides=True)
            self.statements(node.body, inside)
        elif isinstance(node, nodes.Output):
            for part in node.nodes:
                self.show(self.kinds(part, scope))
        elif isinstance(node, nodes.AssignBlock):
            self.bind(node.target, OTHER, scope)
            self.statements(node.body, self.inner(node, scope))
        else:  # if, and blocks of other kinds
            for child in node.iter_child_nodes():
                if isinstance(child, nodes.Expr):
                    self.kinds(child, scope)
                else:
                    self.statement(child, scope)

    def macro(self, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> None:
        inside = self.inner(node, scope)
        if isinstance(node, nodes.CallBlock):
            self.kinds(node.call, scope)
            name = "caller"
        else:
            name = node.name
        if (node, inside) not in self.macros[name]:
            self.macros[name].append((node, inside))
        for argument in node.args:
            self.bind(argument, NOTHING, inside, hides=True)
        with_default = node.args[len(node.args) - len(node.defaults) :]
        for argument, default in zip(with_default, node.defaults, strict=True):
            self.bind(argument, self.kinds(default, scope), inside, hides=True)
        self.statements(node.body, inside)

    def assign(self, node: nodes.Assign, scope: Scope) -> None:
        value = node.node
        if isinstance(value, nodes.Call) and _name(value.node) == "namespace" and not value.args:
            for pair in value.kwargs:
                self.grow((0,), f"{_name(node.target)}.{pair.key}", self.kinds(pair.value, scope))
            kinds = OTHER
        else:
            kinds = self.kinds(value, scope)
        self.bind(node.target, kinds, scope)

    def bind(self, target: nodes.Node, kinds: Kinds, scope: Scope, *, hides: bool = False) -> None:
        if isinstance(target, nodes.NSRef):
            self.grow((0,), f"{target.name}.{target.attr}", kinds)
        elif isinstance(target, nodes.Tuple | nodes.List):
            for item in target.items:
                self.bind(item, _elements(kinds), scope, hides=hides)
        else:
            name = _name(target)
            self.grow(scope, name, kinds)
            if hides:
                self.always.add((scope, name))

    def grow(self, scope: Scope, name: str, kinds: Kinds) -> None:
        self.names[scope, name] = self.names.get((scope, name), NOTHING) | kinds

    # Expressions

    def expressions(self, values: Iterable[nodes.Node], scope: Scope) -> list[Kinds]:
        return [self.kinds(value, scope) for value in values]

    def kinds(self, node: nodes.Node, scope: Scope) -> Kinds:
        if isinstance(node, nodes.Const):
            is_text = isinstance(node.value, str)
            return frozenset({Kind("text", 0, node.value)}) if is_text else OTHER
        if isinstance(node, nodes.Name):
            return self.of_name(node.name, scope)
        if isinstance(node, nodes.Getattr):
            return self.attribute(node, scope)
        if isinstance(node, nodes.Getitem):
            return self.item(node, scope)
        if isinstance(node, nodes.Call):
            return self.call(node, scope)
        if isinstance(node, nodes.Filter):
            return self.filter(node, scope)
        if isinstance(node, nodes.Compare):
            return self.compare(node, scope)
        if isinstance(node, nodes.List | nodes.Tuple):
            return self.lists(NOTHING.union(*self.expressions(node.items, scope))) or OTHER
        inside = self.expressions(node.iter_child_nodes(), scope)
        if isinstance(node, nodes.CondExpr):
            return NOTHING.union(*inside[1:])
        if isinstance(node, nodes.And | nodes.Or | nodes.Add):
            found = NOTHING.union(*inside)
            return _without_texts(found) if isinstance(node, nodes.Add) else found
        if isinstance(node, nodes.Concat | nodes.Dict | nodes.Mod):
            for kinds in inside:
                self.show(kinds)
        if isinstance(node, nodes.Pair | nodes.Keyword):
            return inside[-1]
        return OTHER

    def of_name(self, name: str, scope: Scope) -> Kinds:
        found = NOTHING
        for end in range(len(scope), 0, -1):
            place = scope[:end], name
            found |= self.names.get(place, NOTHING)
            if place in self.always:
                return found
        return found or OTHER

    def attribute(self, node: nodes.Getattr, scope: Scope) -> Kinds:
        held = self.of_name(f"{_name(node.node)}.{node.attr}", scope)
        if held != OTHER:  # a namespace's, or loop.previtem
            return held
        return self.value(self.kinds(node.node, scope), frozenset({Kind("text", 0, node.attr)}))

    def item(self, node: nodes.Getitem, scope: Scope) -> Kinds:
        kinds, key = self.expressions([node.node, node.arg], scope)
        if isinstance(node.arg, nodes.Slice):
            return _without_texts(kinds)
        return self.value(kinds, key)

    def value(self, kinds: Kinds, key: Kinds) -> Kinds:
        """Kinds of a dict's or a list's value at the key."""
        if Kind("message") in kinds:
            self.read(key)
        return _elements(kinds) | OTHER

    def read(self, key: Kinds) -> None:
        self.keys |= {kind.text for kind in key if kind.base == "text" and not kind.depth}
        self.has_all |= any(kind.base != "text" for kind in key)

    def show(self, kinds: Kinds) -> None:
        """A message that is shown as a whole is read with all its keys."""
        self.has_all |= any(kind.base == "message" for kind in kinds)

    def lists(self, kinds: Kinds) -> Kinds:
        if any(kind.depth >= MAX_DEPTH for kind in kinds):
            self.show(kinds)
        return frozenset(
            kind._replace(depth=kind.depth + 1) for kind in kinds if kind.depth < MAX_DEPTH
        )

    def compare(self, node: nodes.Compare, scope: Scope) -> Kinds:
        left = self.kinds(node.expr, scope)
        for operand in node.ops:
            right = self.kinds(operand.expr, scope)
            if operand.op in ("in", "notin") and Kind("message") in right:
                self.read(left)
            left = right
        return OTHER

    def call(self, node: nodes.Call, scope: Scope) -> Kinds:
        given = self.expressions(node.args, scope)
        named = {pair.key: self.kinds(pair.value, scope) for pair in node.kwargs}
        extra = [part for part in (node.dyn_args, node.dyn_kwargs) if part]
        rest = self.expressions(extra, scope)
        if isinstance(node.node, nodes.Getattr):
            return self.method(node.node, [*given, *named.values(), *rest], scope)
        name = _name(node.node)
        if name in self.macros:
            for macro, inside in self.macros[name]:
                self.pass_on(macro, inside, given, named, rest)
            return OTHER
        if name == "dict" and len(given) == 1:  # a copy, with more keys
            for kinds in [*named.values(), *rest]:
                self.show(kinds)
            return given[0]
        for kinds in [*given, *named.values(), *rest]:
            self.show(kinds)
        self.kinds(node.node, scope)
        return OTHER

    def pass_on(
        self,
        macro: nodes.Macro | nodes.CallBlock,
        inside: Scope,
        given: list[Kinds],
        named: dict[str, Kinds],
        rest: list[Kinds],
    ) -> None:
        names = [argument.name for argument in macro.args]
        for name, kinds in [*zip(names, given, strict=False), *named.items()]:
            if name in names:
                self.grow(inside, name, kinds)
            else:
                self.show(kinds)
        for kinds in [*given[len(names) :], *rest]:
            self.show(kinds)

    def method(self, node: nodes.Getattr, given: list[Kinds], scope: Scope) -> Kinds:
        owner = self.kinds(node.node, scope)
        if Kind("message") in owner:
            if node.attr == "get" and given:
                self.read(given[0])
                return NOTHING.union(*given[1:]) | OTHER
            self.has_all = True
        for kinds in given:
            self.show(kinds)
        return OTHER

    def filter(self, node: nodes.Filter, scope: Scope) -> Kinds:
        if node.node is None:  # of a filter block
            return OTHER
        owner = self.kinds(node.node, scope)
        given = self.expressions(node.args, scope)
        named = {str(pair.key): self.kinds(pair.value, scope) for pair in node.kwargs}
        if node.name in ("default", "d"):
            return owner.union(*given, *named.values())
        for kinds in [*given, *named.values()]:
            self.show(kinds)
        if node.name in ("length", "count"):
            return OTHER
        if node.name in ELEMENTS:
            return _elements(owner)
        key = given[0] if node.name in BY_FIRST and given else named.get("attribute")
        is_by_key = key is not None and node.name in (*BY_FIRST, *LISTS, "map")
        if is_by_key and key is not None and Kind("message", 1) in owner:
            self.read(frozenset(kind._replace(text=kind.text.split(".")[0]) for kind in key))
        if node.name in LISTS or (is_by_key and node.name in BY_FIRST):
            return _without_texts(owner)
        if not (is_by_key and node.name == "map"):
            self.show(owner)
        return OTHER


def _name(node: nodes.Node) -> str:
    return node.name if isinstance(node, nodes.Name) else ""


def _elements(kinds: Kinds) -> Kinds:
    """Kinds of the elements of lists of these kinds; anything else has elements of another kind."""
    inside = frozenset(kind._replace(depth=kind.depth - 1) for kind in kinds if kind.depth)
    return inside | (OTHER if any(not kind.depth for kind in kinds) else NOTHING)


def _without_texts(kinds: Kinds) -> Kinds:
    """The kinds where a constant may have become another text."""
    return frozenset(
        Kind("other") if kind.base == "text" and not kind.depth else kind for kind in kinds
    )
