"""Translates JSON Schema to arguments that are not written as JSON, see :data:`Notation`.

A text in them has no escapes, and ends at a mark.
"""

from typing import Any, Final

from app.llm import notations
from app.llm.ebnf import automaton, keywords, strings, writer
from app.llm.ebnf.automaton import State
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.keywords import Schema
from app.llm.ebnf.regex import Node
from app.llm.ebnf.schema import Path, SchemaCompiler, rule_of
from app.llm.ebnf.writer import EMPTY, Ranges, alternatives, literal, one_of, optional, sequence
from app.llm.protocol import JsonSchemaGrammar, Notation, Tag

# Letters, digits, "_", "-" and ".".
_NAMES: Final = ((0x2D, 0x2E), (0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))


class MarkedCompiler(SchemaCompiler):
    """Writes texts without escapes, which end at a mark; subclasses write the rest."""

    def _raw(self, schema: Schema, mark: str) -> str:
        """A text that follows the schema of a string, and the mark behind it."""
        node, least, most = rule_of(schema)
        if node is not None:
            strings.check_lengths(node, least, most)
            return self._matching(node, mark)
        if not least and most is None:
            return self._until(mark)
        if most is not None and least > most:
            raise GrammarError("minLength is above maxLength")
        return self._counted(mark, least, most)

    def _matching(self, node: Node, mark: str) -> str:
        def spelled(ranges: Ranges) -> Ranges:
            others = [] if writer.is_small(ranges) else [(ord(mark[0]), ord(mark[0]))]
            return tuple(writer.without(ranges, others))

        states = automaton.of_expression(node, spelled)
        self._rules.pay(automaton.cost(states))
        return sequence([automaton.as_rules(states, self._rules), literal(mark)])

    def _counted(self, mark: str, least: int, most: int | None) -> str:
        if most is not None:
            return strings.counted(self._rules, least, most, literal(mark), mark[0])
        fixed = strings.counted(self._rules, least, least, EMPTY, mark[0])
        return sequence([fixed, self._until(mark)])

    def _unlisted(self, least: int, most: int | None) -> str:
        """A name of so many characters."""
        return writer.repeat(one_of(_NAMES), least, most)

    def _until(self, mark: str) -> str:
        return self._rules.once(mark, lambda: automaton.as_rules(_to_first(mark), self._rules))


class GemmaCompiler(MarkedCompiler):
    """Writes objects whose names have no quotes, and strings between marks."""

    _blank = EMPTY

    def compile(self) -> str:
        """The expression of the arguments, which are an object in any case."""
        if self._root is True or not self._root:
            self._root = {"type": "object"}
        return super().compile()

    def _string(self, schema: Schema) -> str:
        mark = notations.GEMMA_QUOTE
        return sequence([self._mark(mark), self._raw(schema, mark)])

    def _mark(self, text: str) -> str:
        return literal(text)

    def _any_name(self, rule: Schema) -> str:
        node, least, most = rule_of(rule)
        if node is not None:
            raise GrammarError("a rule for names is not supported in the model's notation")
        return self._unlisted(max(1, least), most)

    def _named(self, name: str) -> str:
        return _plain(name, ",:{}[]<")

    def _spelled(self, value: Any) -> str:
        return _plain(notations.gemma(value))


class XmlCompiler(MarkedCompiler):
    """Writes the members of an object one after the other; values but for texts are JSON."""

    def compile(self) -> str:
        """The expression of the arguments."""
        return self._or(
            self._root,
            lambda: self._parameters(self._root, Path()),
            lambda: self._parameters({}, Path()),
        )

    def _parameters(self, given: Any, path: Path) -> str:
        schema = keywords.target(self._root, given)
        keywords.check(schema)
        if parts := self._options(schema):
            return self._rules.name(
                alternatives(self._parameters(part, path.option()) for part in parts)
            )
        if beside := schema.keys() & keywords.OF_ANY_NAMES:
            raise GrammarError(f"{min(beside)} is not supported in the model's notation")
        members, required, others = self._all_members(schema)
        if not members:
            if others is False:
                return EMPTY
            return f"({self._parameter(self._unlisted(1, None), others, path)})*"
        written = [
            (self._parameter(literal(_plain(n, "<>")), p, path.inside(forced=n in required)), n)
            for n, p in members.items()
            if p is not False or n in required
        ]
        return sequence(one if n in required else optional(one) for one, n in written)

    def _parameter(self, name: str, schema: Any, path: Path) -> str:
        begin, end = literal(notations.BEFORE_NAME), literal(notations.BEHIND_NAME)
        return self._rules.name(sequence([begin, name, end, self._value_of(schema, path)]))

    def _value_of(self, schema: Any, path: Path) -> str:
        """A value, and the mark behind it."""
        return self._or(
            schema,
            lambda: self._bare(schema, path),
            lambda: self._until(notations.BEHIND_VALUE),
        )

    def _bare(self, given: Any, path: Path) -> str:
        schema = keywords.target(self._root, given)
        keywords.check(schema)
        if parts := self._options(schema):
            return alternatives(self._bare(part, path.option()) for part in parts)
        end = literal(notations.BEHIND_VALUE)
        listed = keywords.values(schema)
        if listed is not None:
            self._count(len(listed))
            texts = self._rules.texts(_plain(notations.xml(value)) for value in listed)
            return sequence([texts, end])
        ways = [
            self._raw(schema, notations.BEHIND_VALUE)
            if kind == "string"
            else sequence([self._as_json({**schema, "type": kind}, path), end])
            for kind in keywords.types(schema) or keywords.meant(schema)
        ]
        return alternatives(ways) if ways else self._until(notations.BEHIND_VALUE)

    def _as_json(self, schema: Schema, path: Path) -> str:
        return self._compiled(schema, path)


_COMPILERS: Final[dict[Notation, type[SchemaCompiler]]] = {
    "json": SchemaCompiler,
    "xml": XmlCompiler,
    "gemma": GemmaCompiler,
}


def compiler_of(part: JsonSchemaGrammar | Tag) -> type[SchemaCompiler]:
    """What compiles the schema of a part of an answer."""
    return _COMPILERS[part.notation] if isinstance(part, Tag) else SchemaCompiler


def _plain(text: str, forbidden: str = "") -> str:
    if not text.isprintable() or set(forbidden) & set(text):
        raise GrammarError("a name or a value of it cannot be written in the model's notation")
    return text


def _to_first(mark: str) -> list[State]:
    """An automaton of all texts in which the mark stands at the end and nowhere else."""
    others = tuple(writer.complement((ord(c), ord(c)) for c in set(mark)))
    states = []
    for read in range(len(mark)):
        ways: dict[int, list[tuple[int, int]]] = {0: list(others)}
        for character in sorted(set(mark)):
            text = mark[:read] + character
            to = next(n for n in range(len(text), -1, -1) if text.endswith(mark[:n]))
            ways.setdefault(to, []).append((ord(character), ord(character)))
        edges = tuple((tuple(writer.union(ranges)), to) for to, ranges in ways.items())
        states.append(State(accepts=False, edges=edges))
    return [*states, State(accepts=True, edges=())]
