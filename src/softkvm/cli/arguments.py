# SPDX-License-Identifier: Apache-2.0
"""Values of options. What is none raises CommandError, which names the option, the value and what it may be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable

from softkvm.cli import CommandError

SECONDS_MAX = 1e9
"""Thirty years: what every wait of the system takes."""

FACTOR_MAX = 1e6


def _number(text: str) -> float:
    """Return the number that *text* is; NaN, which is within no limits, if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def seconds(option: str, text: str, *, zero: bool = False) -> float:
    """Return the time that *text* names, above 0; 0 as well if *zero*, which is no limit then."""
    value = _number(text)
    if 0 < value <= SECONDS_MAX or (zero and value == 0):
        return value
    limits = "a number of seconds up to 1e9, 0 for no limit" if zero else "a number of seconds above 0, up to 1e9"
    raise CommandError(f"{option} {text}: expected {limits}")


def factor(option: str, text: str) -> float:
    """Return the number above 0 that *text* names."""
    value = _number(text)
    if 0 < value <= FACTOR_MAX:
        return value
    raise CommandError(f"{option} {text}: expected a number above 0, up to 1e6")


def percent(option: str, text: str) -> float:
    """Return the part of a whole that *text* names, from 1 to 100 percent."""
    value = _number(text.removesuffix("%"))
    if 1 <= value <= 100:
        return value
    raise CommandError(f"{option} {text}: expected a number of percent from 1 to 100")


def count(option: str, text: str, low: int, high: int) -> int:
    """Return the number from *low* to *high* that *text* names."""
    if text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
        return int(text)
    raise CommandError(f"{option} {text}: expected a number from {low} to {high}")


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(option: str, text: str, unit: int = 4096) -> int:
    """Return the bytes that ``256M``, ``1G``, ``65536K`` or ``256`` (MiB) name: a multiple of *unit*, not 0."""
    match = re.fullmatch(r"(\d{1,12})(?:([KMGT])(?:i?B)?)?", text, re.IGNORECASE)
    value = int(match[1]) * _UNITS[(match[2] or "M").upper()] if match else 0
    if match is None or value % unit:
        multiple = f"{unit >> 20}M" if unit >> 20 else f"{unit >> 10}K"
        raise CommandError(f"{option} {text}: expected a size such as 256M or 2G, a multiple of {multiple}")
    return value


def pairs(option: str, texts: Iterable[str]) -> dict[str, str]:
    """Return the values by name that *texts*, each ``NAME=VALUE``, have."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise CommandError(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


def add_param(parser: argparse.ArgumentParser) -> None:
    """Add ``--param``, and ``--params``, which is the same: module parameters of the software KVM."""
    for name, told in (
        ("--param", "module parameters of the software KVM, such as avic=0; may be repeated"),
        ("--params", argparse.SUPPRESS),
    ):
        parser.add_argument(name, dest="param", metavar="NAME=VALUE,…", action="append", default=[], help=told)


def param_values(texts: Iterable[str]) -> dict[str, str]:
    """Return the values by name that ``--param`` options have: ``NAME=VALUE``, or several with commas between them."""
    return pairs("--param", (pair for text in texts for pair in text.split(",")))


def file_name(text: str) -> str:
    """Type of arguments that name a file: an empty one, such as a shell variable that is not set, is none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file name, got an empty text")
    return text
