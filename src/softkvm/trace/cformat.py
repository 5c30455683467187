# SPDX-License-Identifier: Apache-2.0
"""The print format of a trace event, as the kernel describes it in an event's ``format`` file: C, compiled to Python.

``"vcpu %u, rip 0x%lx", REC->vcpu_id, REC->rip`` is a format in the manner of printf() and expressions over the event's
fields: arithmetic, comparisons, ``?:``, casts, and the helpers ``__print_symbolic``, ``__print_flags``, ``__print_hex``
(Documentation/trace/events.rst, include/trace/stages/stage3_trace_output.h). A file's formats may come from anywhere:
what is compiled are the tokens that are known here, nothing else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

#: Values of an event's fields, in their order, to text.
Printer = Callable[[Sequence[Any]], str]

_TOKEN: Final = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>0[xX][0-9a-fA-F]+|\d+)[uUlL]*|REC->(?P<field>\w+)|(?P<name>\w+)'
    r"|(?P<op><<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^~!<>?:(),{}]))"
)
_CONVERSION: Final = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\d*)(?:\.(?P<precision>\d+))?(?P<long>hh|h|ll|l|z)?(?P<type>[diuxXcsp%])"
)

#: Operators of two operands, by how strongly they bind; C's and Python's mean the same for what formats have.
_BINARY: Final = (
    ("||",),
    ("&&",),
    ("|",),
    ("^",),
    ("&",),
    ("==", "!="),
    ("<", ">", "<=", ">="),
    ("<<", ">>"),
    ("+", "-"),
    ("*", "/", "%"),
)
_IN_PYTHON: Final = {"||": "or", "&&": "and", "/": "//"}

#: Types that a cast may name: how many bits are left, and whether the highest is a sign.
_CASTS: Final = {
    **{f"{prefix}u{bits}": (bits, False) for bits in (8, 16, 32, 64) for prefix in ("", "__")},
    **{f"{prefix}s{bits}": (bits, True) for bits in (8, 16, 32, 64) for prefix in ("", "__")},
    "unsigned": (32, False),
    "int": (32, True),
    "char": (8, True),
    "short": (16, True),
    "long": (64, True),
}


class FormatError(ValueError):
    """A print format that this doesn't understand."""


def _cast(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> bits - 1 else value


def print_symbolic(value: int, *pairs: tuple[int, str]) -> str:
    """``__print_symbolic``: the name of a value, the value in hexadecimal if it has none."""
    return next((name for number, name in pairs if number == value), f"0x{value & (1 << 64) - 1:x}")


def print_flags(value: int, delimiter: str, *pairs: tuple[int, str]) -> str:
    """``__print_flags``: the names of the bits that are set, what is left of them in hexadecimal."""
    names = []
    for mask, name in pairs:
        if mask & value == mask:
            names.append(name)
            value &= ~mask
    return delimiter.join([*names, *([f"0x{value:x}"] if value else [])])


def print_hex(data: bytes, length: int) -> str:
    """``__print_hex``: bytes, with spaces between."""
    return bytes(data[:length]).hex(" ")


_HELPERS: Final[dict[str, Callable[..., str]]] = {
    "__print_symbolic": print_symbolic,
    "__print_flags": print_flags,
    "__print_hex": print_hex,
}


class Parser:
    """Expressions in C to expressions in Python, in which the value of field *n* is ``r[n]``."""

    def __init__(self, text: str, fields: Mapping[str, int], *, bare: bool = False) -> None:
        self._fields = fields
        self._bare = bare  # a name without REC-> is a field
        self._tokens: list[tuple[str, str]] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise FormatError(f"unexpected {text[at:].strip()[:20]!r}")
            kind = match.lastgroup or ""
            self._tokens.append((kind, match[kind]))
            at = match.end()
        self._tokens.append(("end", ""))
        self._at = 0

    @property
    def token(self) -> tuple[str, str]:
        """The next token: its kind and its text."""
        return self._tokens[self._at]

    def accept(self, *operators: str) -> str:
        """Take the next token if it is one of *operators*; "" if not."""
        kind, text = self.token
        if kind == "op" and text in operators:
            self._at += 1
            return text
        return ""

    def expect(self, operator: str) -> None:
        """Take *operator*; FormatError if something else comes."""
        if not self.accept(operator):
            raise FormatError(f"expected {operator!r}, got {self.token[1] or 'the end'!r}")

    def end(self) -> None:
        """FormatError unless all has been taken."""
        if self.token[0] != "end":
            raise FormatError(f"unexpected {self.token[1]!r}")

    def string(self) -> str:
        """Take string literals, which C puts together."""
        parts = []
        while self.token[0] == "string":
            parts.append(ast.literal_eval(self.token[1]))
            self._at += 1
        if not parts:
            raise FormatError(f"expected a string, got {self.token[1] or 'the end'!r}")
        return "".join(parts)

    def expression(self, level: int = -1) -> str:
        """Take an expression; with a *level*, one whose operators bind at least as strongly."""
        if level < 0:
            condition = self.expression(0)
            if not self.accept("?"):
                return condition
            then = self.expression()
            self.expect(":")
            return f"({then} if {condition} else {self.expression()})"
        if level == len(_BINARY):
            return self._unary()
        left = self.expression(level + 1)
        while operator := self.accept(*_BINARY[level]):
            left = f"({left} {_IN_PYTHON.get(operator, operator)} {self.expression(level + 1)})"
        return left

    def _unary(self) -> str:
        if operator := self.accept("-", "~", "!"):
            return f"({'not ' if operator == '!' else operator}{self._unary()})"
        if self.accept("("):
            cast = self._cast_type()
            if cast is not None:
                return f"_cast({self._unary()}, {cast[0]}, {cast[1]})"
            inner = self.expression()
            self.expect(")")
            return inner
        kind, text = self.token
        if kind == "string":
            return repr(self.string())
        self._at += 1
        if kind == "number":
            return str(int(text, 0))
        if kind == "field" or (kind == "name" and self._bare):
            if text not in self._fields:
                raise FormatError(f"there is no field {text!r}")
            return f"r[{self._fields[text]}]"
        if kind == "name" and text in _HELPERS:
            return f"{text}({', '.join(self._arguments())})"
        raise FormatError(f"unexpected {text or 'end'!r}")

    def _cast_type(self) -> tuple[int, bool] | None:
        """Take a type and the parenthesis behind it, if that is what comes."""
        names = []
        at = self._at
        while self._tokens[at][0] == "name" and self._tokens[at][1] in _CASTS:
            names.append(self._tokens[at][1])
            at += 1
        if not names or self._tokens[at] != ("op", ")"):
            return None
        self._at = at + 1
        bits = max(_CASTS[name][0] for name in names) if "long" in names else min(_CASTS[name][0] for name in names)
        return bits, all(_CASTS[name][1] for name in names)

    def _arguments(self) -> list[str]:
        """Take the arguments of a helper; ``{1, "one"}`` is a pair."""
        self.expect("(")
        arguments = []
        while not self.accept(")"):
            if self.accept("{"):
                if not self.accept("}"):
                    number = self.expression()
                    self.expect(",")
                    arguments.append(f"({number}, {self.string()!r})")
                    self.expect("}")
            else:
                arguments.append(self.expression())
            if self.token != ("op", ")"):
                self.expect(",")
        return arguments


def evaluate(source: str) -> Callable[[Sequence[Any]], Any]:
    """Return what a :class:`Parser` has made as a function of an event's values."""
    names: dict[str, Any] = {"__builtins__": {}, "_cast": _cast, **_HELPERS}
    # What is evaluated has been put together of the tokens above.
    function: Callable[[Sequence[Any]], Any] = eval(f"lambda r: {source}", names)
    return function


def _conversion(match: re.Match[str]) -> Callable[[Any], str]:
    """Return what one conversion of a format makes of its argument."""
    kind, long = match["type"], match["long"] or ""
    flags = match["flags"]
    spec = ("<" if "-" in flags else ">" if kind in "sc" else "") + ("+" if "+" in flags else "")
    zero = "0" if "0" in flags and "-" not in flags else ""
    width = match["width"]
    if kind == "s":
        text = f"{{:{spec}{width}}}" if width else "{}"
        return lambda value: text.format(value if isinstance(value, str) else str(value))
    if kind == "c":
        return lambda value: chr(value & 0xFF)
    bits = {"": 32, "hh": 8, "h": 16}.get(long, 64)
    if kind == "p":
        return lambda value: f"0x{value:x}"
    signed = kind in "di"
    base = {"x": "x", "X": "X"}.get(kind, "d")
    alternate = "#" if "#" in flags and base != "d" else ""
    text = f"{{:{spec}{zero}{width}{base}}}"
    prefixed = f"{{:{spec}{alternate}{zero}{width}{base}}}" if alternate else text

    def converted(value: Any) -> str:
        number = _cast(int(value), bits, signed)
        return (prefixed if number else text).format(number)  # 0 has no prefix (C17, 7.21.6.1)

    return converted


def compile_format(text: str, fields: Sequence[str]) -> Printer:
    """Return the function that prints an event of which ``text`` is the print format; FormatError if it is none."""
    parser = Parser(text, {name: n for n, name in enumerate(fields)})
    literal = parser.string()
    arguments = []
    while parser.accept(","):
        arguments.append(evaluate(parser.expression()))
    parser.end()
    pieces: list[str | Callable[[Sequence[Any]], str]] = []
    at = used = 0
    for match in _CONVERSION.finditer(literal):
        pieces.append(literal[at : match.start()])
        at = match.end()
        if match["type"] == "%":
            pieces.append("%")
            continue
        if used == len(arguments):
            raise FormatError("more conversions than arguments")
        pieces.append(_printed(arguments[used], _conversion(match)))
        used += 1
    pieces.append(literal[at:])
    if used != len(arguments):
        raise FormatError("more arguments than conversions")
    return lambda values: "".join(piece if isinstance(piece, str) else piece(values) for piece in pieces)


def _printed(value: Callable[[Sequence[Any]], Any], convert: Callable[[Any], str]) -> Callable[[Sequence[Any]], str]:
    return lambda values: convert(value(values))


def compile_filter(text: str, fields: Sequence[str]) -> Callable[[Sequence[Any]], bool]:
    """Return whether an event's values meet a condition, ``exit_reason == 0x72 && vcpu_id < 2``.

    FormatError if it is none.
    """
    parser = Parser(text, {name: n for n, name in enumerate(fields)}, bare=True)
    source = parser.expression()
    parser.end()
    return evaluate(source)
