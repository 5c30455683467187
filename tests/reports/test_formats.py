# SPDX-License-Identifier: Apache-2.0
import html
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from softkvm.reports import formats
from softkvm.reports.result import Place, Result, Status
from softkvm.unittests.result import judge, read_log
from softkvm.unittests.runner import suite_of

SUITE = suite_of("soft")
LOG = "start\nPASS: one\nFAIL: two <&> \x01\nXFAIL: three\nSUMMARY: 3 tests, 1 unexpected failures\n"


def results() -> list[Result]:
    subtests, summary = read_log(LOG)
    return [
        Result("good", Status.PASS, summary="2 tests", ignored=["-cpu +vmx"], time_s=1.5, exits={"KVM_EXIT_IO": 7}),
        Result(
            "bad|one",
            Status.FAIL,
            summary=summary,
            subtests=subtests,
            log=LOG,
            places=[Place(0, 0x1000, "main+0x4", "halted", ("IO in 0x60/1",))],
            kvm_exits={"exit_npf": 3, "halts": 1},
        ),
        Result("other", Status.SKIP, reason="needs i386 build"),
        Result("itself", Status.SKIP, summary="0 tests", log="PKU not enabled\nSUMMARY: 0 tests\n"),
    ]


def test_log_gives_checks_and_the_summary() -> None:
    subtests, summary = read_log(LOG)
    assert [s.status for s in subtests] == ["PASS", "FAIL", "XFAIL"]
    assert summary == "3 tests, 1 unexpected failures"


def test_summary_is_looked_for_at_the_end_only() -> None:
    assert read_log("SUMMARY: 1 tests\n" + "more\n" * 9)[1] == ""


@pytest.mark.parametrize(
    ("status", "expected"),
    [(1, Status.PASS), (77, Status.SKIP), (127, Status.FAIL), (3, Status.FAIL), (33, Status.FAIL)],
)
def test_exit_statuses(status: int, expected: Status) -> None:
    assert judge(status)[0] is expected


def test_lines_are_the_suites() -> None:
    assert [result.line for result in results()] == [
        "PASS good (2 tests)",
        "FAIL bad|one (3 tests, 1 unexpected failures)",
        "SKIP other (needs i386 build)",
        "SKIP itself (0 tests)",
    ]


def test_why_an_entry_does_not_pass() -> None:
    assert [result.why() for result in results()] == ["", "two <&> \x01", "needs i386 build", "PKU not enabled"]


def test_place_reads_well() -> None:
    assert str(results()[1].places[0]) == "vCPU 0 at 0x1000 main+0x4 (halted)"


def test_last_exits_name_repeated_ones_once() -> None:
    assert Place(0, 0, "", "", ("IO", "MMIO", "MMIO", "IO")).exits_text() == "IO, MMIO (2 times), IO"
    assert Place(0, 0, "", "").exits_text() == "none"


def slow(time_s: float = 47.2, timeout_s: float = 90, status: Status = Status.PASS) -> Result:
    """An entry that the suite gives 30 s."""
    return Result("slow", status, time_s=time_s, timeout_s=timeout_s, suite_timeout_s=30, log="x\n")


def test_pass_beyond_the_suites_own_limit_is_named_everywhere() -> None:
    said = "took 47 s, the suite's limit is 30 s"
    assert slow().over_suite_limit == said
    assert not slow(time_s=29).over_suite_limit
    assert not slow(status=Status.FAIL).over_suite_limit
    assert not results()[0].over_suite_limit
    document = json.loads(formats.json_text([slow(), *results()], SUITE))
    assert document["over_suite_limit"] == ["slow"]
    assert (document["results"][0]["timeout_s"], document["results"][0]["suite_timeout_s"]) == (90, 30)
    assert said in formats.junit([slow()], SUITE)
    assert f"slow {said}" in formats.markdown([slow()], SUITE)
    page = formats.html_page([slow()], SUITE)
    assert html.escape(said) in page
    assert html.escape("47.2 s; limit: 90 s; the suite's is 30 s") in page


@pytest.mark.parametrize(
    ("limit_s", "text"), [(90, "90 s; the suite's is 30 s"), (30, "30 s"), (0, "none; the suite's is 30 s")]
)
def test_limit_text_names_the_suites_where_it_is_another(limit_s: float, text: str) -> None:
    assert slow(timeout_s=limit_s).limit_text == text


def test_json_holds_everything() -> None:
    document = json.loads(formats.json_text(results(), SUITE))
    assert document["counts"] == {"PASS": 1, "FAIL": 1, "SKIP": 2}
    assert [Result.from_dict(item) for item in document["results"]] == results()


def test_junit_is_well_formed_whatever_the_guest_printed() -> None:
    suite = ElementTree.fromstring(formats.junit(results(), SUITE))[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "2")
    bad = suite[1]
    assert bad[0].tag == "failure"
    assert bad[0].get("message") == "3 tests, 1 unexpected failures"
    assert "two <&> \ufffd" in (bad[0].text or "")
    assert suite[3][0].get("message") == "PKU not enabled"


def test_tap_has_a_line_for_each_and_says_why() -> None:
    lines = formats.tap([*results(), Result("a # b", Status.PASS)], SUITE).splitlines()
    assert lines[:2] == ["TAP version 13", "1..5"]
    assert [line for line in lines[2:] if not line.startswith("#")] == [
        "ok 1 good",
        "not ok 2 bad|one",
        "ok 3 other # SKIP needs i386 build",
        "ok 4 itself # SKIP PKU not enabled",
        "ok 5 a b",
    ]
    assert lines[4] == "# two <&> \x01"


def test_markdown_table_keeps_its_columns() -> None:
    rows = [line for line in formats.markdown(results(), SUITE).splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "| good | PASS | 2 tests | ignored: -cpu +vmx |" in rows


class _Page(HTMLParser):
    """Counts tests, and sees whether tags are closed and nothing is fetched."""

    VOID = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tests: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert "src" not in given
        assert (given.get("href") or "#").startswith("#")
        if given.get("class") == "test":
            self.tests.append(given["id"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_complete_and_self_contained() -> None:
    text = formats.html_page(results(), SUITE)
    page = _Page()
    page.feed(text)
    assert not page.open
    assert page.tests == ["good", "bad|one", "other", "itself"]
    assert "two &lt;&amp;&gt;" in text
    assert "IO in 0x60/1" in text
    assert '<a href="#bad%7Cone">bad|one</a>' in text
    assert '<b class="SKIP">2</b> skipped' in text
    assert "http" not in text


def test_page_of_nothing() -> None:
    assert "0 entries" in formats.html_page([], suite_of("kvm"))
