# SPDX-License-Identifier: Apache-2.0
"""Results for machines and for people: TAP, JUnit XML, JSON, Markdown (HTML: :mod:`softkvm.reports.page`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import softkvm
from softkvm.reports.page import html_page
from softkvm.reports.result import Result, Status
from softkvm.reports.suite import Suite

__all__ = ["html_page", "json_text", "junit", "markdown", "tap"]

VERSION = 1
TAP_LOG_LINES = 40
"""Lines of a failed entry's log; the end is what matters."""
_TAP_SPECIAL = re.compile(r"[#\\\s]+")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def json_text(results: Sequence[Result], suite: Suite) -> str:
    """Return everything as JSON."""
    document: dict[str, Any] = {
        "version": VERSION,
        "softkvm": softkvm.__version__,
        "suite": suite.name,
        "accel": suite.accel,
        "counts": {status.value: sum(r.status is status for r in results) for status in Status},
        "over_suite_limit": [result.name for result in results if result.over_suite_limit],
        "results": [result.as_dict() for result in results],
    }
    return json.dumps(document, indent=2) + "\n"


def junit(results: Sequence[Result], suite: Suite) -> str:
    """Return JUnit XML: an entry is a test case, its log is the case's output."""
    counts = Counter(result.status for result in results)
    element = ElementTree.Element(
        "testsuite",
        name=f"{suite.name} on softkvm ({suite.accel})",
        tests=str(len(results)),
        failures=str(counts[Status.FAIL]),
        errors="0",
        skipped=str(counts[Status.SKIP]),
        time=f"{sum(result.time_s for result in results):.3f}",
    )
    for result in results:
        case = ElementTree.SubElement(
            element, "testcase", classname=suite.name, name=result.name, time=f"{result.time_s:.3f}"
        )
        detail = _xml(result.reason or result.summary)
        if result.status is Status.FAIL:
            failure = ElementTree.SubElement(case, "failure", message=detail or _xml(result.why()))
            failure.text = _xml("\n".join([*result.failed_checks(), *map(str, result.places)]))
        elif result.status is Status.SKIP:
            ElementTree.SubElement(case, "skipped", message=_xml(result.why()))
        if result.log:
            ElementTree.SubElement(case, "system-out").text = _xml(result.log)
        remarks = [f"ignored: {text}" for text in result.ignored]
        remarks += [result.over_suite_limit] if result.over_suite_limit else []
        if remarks:
            ElementTree.SubElement(case, "system-err").text = _xml("\n".join(remarks))
    root = ElementTree.Element("testsuites")
    root.append(element)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def tap(results: Sequence[Result], suite: Suite) -> str:
    """Return a stream of the Test Anything Protocol, version 13, which kselftest has, too."""
    lines = ["TAP version 13", f"1..{len(results)}"]
    for number, result in enumerate(results, 1):
        name = _TAP_SPECIAL.sub(" ", result.name)
        why = " ".join(result.why().split())
        line = f"{'not ok' if result.status is Status.FAIL else 'ok'} {number} {name}"
        if result.status is Status.SKIP:
            lines.append(f"{line} # SKIP {why}".rstrip())
            continue
        lines.append(line)
        if result.status is Status.FAIL:
            lines += [f"# {why}"] if why else []
            lines += [f"# {text}" for text in result.log.splitlines()[-TAP_LOG_LINES:]]
    return "\n".join(lines) + "\n"


def _xml(text: str) -> str:
    """Return *text* without the characters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _limits(results: Sequence[Result]) -> list[str]:
    """Return a paragraph on the entries that took longer than the suite allows; none, if none did."""
    over = [f"{_cell(result.name)} {result.over_suite_limit}" for result in results if result.over_suite_limit]
    if not over:
        return []
    return [f"Took longer than the suite allows, under [scaled limits](unittests.md): {'; '.join(over)}.", ""]


def markdown(results: Sequence[Result], suite: Suite) -> str:
    """Return the page of the documentation: every entry with its status, and why it does not pass."""
    counts = Counter(result.status for result in results)
    lines = [
        f"# {suite.title}",
        "",
        f"<!-- Generated: softkvm {suite.command}{suite.argument} --markdown docs/{suite.page} -->",
        "",
        f"{counts[Status.PASS]} pass, {counts[Status.FAIL]} fail, {counts[Status.SKIP]} skipped,"
        f" of {len(results)} entries ({suite.where}).",
        "",
        f"`softkvm {suite.command}{suite.argument}` runs the suite {suite.origin}.",
        "",
        *_limits(results),
        "| entry | status | checks | why not |",
        "|---|---|---|---|",
    ]
    for result in results:
        parts = [result.why(), *(f"ignored: {text}" for text in result.ignored)]
        why = _cell("; ".join(part for part in parts if part))
        lines.append(f"| {_cell(result.name)} | {result.status} | {_cell(result.summary)} | {why} |")
    return "\n".join(lines) + "\n"
