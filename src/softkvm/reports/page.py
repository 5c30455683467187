# SPDX-License-Identifier: Apache-2.0
"""The results as one self-contained HTML page: no file beside it, nothing fetched, readable without scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

import softkvm
from softkvm.reports.result import Result, Status, Subtest
from softkvm.reports.suite import Suite

MIB = 1 << 20

LOG_LIMIT = 200_000
"""Characters of a log on the page; the end is what matters."""

SUBTEST_LIMIT = 2000

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --fg: #1d2127; --dim: #626b77; --line: #dfe2e6; --card: #fff;
  --pass: #1f7a44; --fail: #b3261e; --skip: #8a6100; --passbg: #e4f3ea; --failbg: #fbe6e4; --skipbg: #f8efd9;
  --code: #f3f4f6; --bar: #8fa8c8; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e3e6ea; --dim: #98a1ad; --line: #2e343c;
  --card: #1b1f25; --pass: #6fd195; --fail: #ff8f85; --skip: #e3bd62; --passbg: #17301f; --failbg: #3b1b19;
  --skipbg: #352a12; --code: #11141a; --bar: #4d6a90; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; }
.sub { color: var(--dim); margin: 0 0 14px; }
.totals { font-size: 18px; margin: 0 0 10px; } .totals b { color: var(--c); }
.failed { margin: 0 0 14px; } .failed a { color: var(--fail); margin-right: 10px; overflow-wrap: anywhere; }
.none { color: var(--dim); padding: 14px 4px; }
.share { display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--line); margin: 0 0 14px; }
.share span { display: block; }
.PASS { --c: var(--pass); --b: var(--passbg); } .SKIP { --c: var(--skip); --b: var(--skipbg); }
.FAIL, .XPASS { --c: var(--fail); --b: var(--failbg); } .XFAIL, .KFAIL { --c: var(--dim); --b: var(--code); }
.share .PASS, .share .FAIL, .share .SKIP { background: var(--c); }
nav { position: sticky; top: 0; background: var(--bg); padding: 10px 0; display: flex; gap: 8px; flex-wrap: wrap;
  border-bottom: 1px solid var(--line); margin-bottom: 6px; z-index: 1; }
nav button, nav input { font: inherit; border: 1px solid var(--line); background: var(--card); color: var(--fg);
  border-radius: 7px; padding: 5px 12px; }
nav button { cursor: pointer; } nav button[aria-pressed=true] { border-color: var(--fg); font-weight: 600; }
nav input { flex: 1; min-width: 160px; }
details.test { border-bottom: 1px solid var(--line); scroll-margin-top: 60px; }
details.test > summary { display: grid; grid-template-columns: 62px minmax(150px, 250px) 1fr 108px 92px; gap: 12px;
  align-items: baseline; padding: 8px 4px; cursor: pointer; list-style: none; }
details.test > summary::-webkit-details-marker { display: none; }
details.test > summary:hover { background: var(--card); }
details.test[open] > summary { background: var(--card); }
.head { display: grid; grid-template-columns: 62px minmax(150px, 250px) 1fr 108px 92px; gap: 12px; padding: 8px 4px;
  color: var(--dim); font-size: 13px; border-bottom: 1px solid var(--line); }
.badge { color: var(--c); background: var(--b); font-size: 12px; font-weight: 700; border-radius: 5px; padding: 2px 0;
  text-align: center; letter-spacing: .03em; }
.name { font-weight: 600; overflow-wrap: anywhere; }
.why { color: var(--dim); overflow-wrap: anywhere; }
.num { text-align: right; color: var(--dim); font-variant-numeric: tabular-nums; white-space: nowrap; }
.body { padding: 6px 4px 20px 78px; }
.body h2 { font-size: 14px; margin: 18px 0 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 6px 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.45 ui-monospace, monospace; }
pre { background: var(--code); border-radius: 7px; padding: 10px 12px; overflow: auto; max-height: 480px; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 14px; } td { padding: 2px 12px 2px 0; vertical-align: baseline; }
td.num { padding-right: 12px; }
.bar { display: inline-block; height: 8px; background: var(--bar); border-radius: 3px; vertical-align: middle; }
.checks td:first-child { width: 62px; } .checks .badge { display: block; font-size: 11px; padding: 0; }
.places { grid-template-columns: minmax(120px, max-content) 1fr; }
.body details > summary { cursor: pointer; color: var(--dim); }
.exits { display: flex; flex-wrap: wrap; gap: 8px 48px; }
@media (max-width: 720px) { details.test > summary, .head { grid-template-columns: 56px 1fr max-content; }
  .head :nth-child(3), .checkcount, .head :nth-child(4) { display: none; }
  details.test > summary { row-gap: 2px; } .why { grid-column: 2 / -1; grid-row: 2; font-size: 14px; }
  .why:empty { display: none; }
  .body { padding-left: 4px; } .places { grid-template-columns: 1fr; } .places dd { margin-bottom: 6px; }
  details.test { scroll-margin-top: 105px; } }
"""

_SCRIPT = """
const tests = [...document.querySelectorAll('details.test')], buttons = [...document.querySelectorAll('nav button')];
const search = document.querySelector('nav input'), none = document.querySelector('.none');
let wanted = '';
function show() {
  const text = search.value.toLowerCase();
  for (const test of tests)
    test.hidden = (wanted && test.dataset.status !== wanted) || !test.dataset.text.includes(text);
  none.hidden = tests.some(test => !test.hidden);
}
for (const button of buttons) button.onclick = () => {
  wanted = button.value;
  for (const other of buttons) other.setAttribute('aria-pressed', other === button);
  show();
};
search.oninput = show;
for (const test of tests) test.querySelector('summary').onclick = () => {
  if (!test.open) history.replaceState(null, '', '#' + encodeURIComponent(test.id));
};
function reveal() {
  const test = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (test) { test.hidden = false; test.open = true; test.scrollIntoView(); }
}
addEventListener('hashchange', reveal); reveal();
"""


def html_page(results: Sequence[Result], suite: Suite) -> str:
    """Return the page."""
    counts = Counter(result.status for result in results)
    total_s = sum(result.time_s for result in results)
    share = "".join(
        f'<span class="{status}" style="width:{100 * counts[status] / len(results):.3f}%"></span>'
        for status in Status
        if counts[status]
    )
    buttons = f'<button value="" aria-pressed="true">All {len(results)}</button>' + "".join(
        f'<button value="{status}" aria-pressed="false">{status.capitalize()} {counts[status]}</button>'
        for status in Status
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(suite.name)}: {counts[Status.PASS]} pass, {counts[Status.FAIL]} fail</title>"
        f"<style>{_STYLE}</style></head><body><main>\n"
        f"<h1>{escape(suite.title)}</h1>\n"
        f'<p class="sub">softkvm {escape(softkvm.__version__)}, {escape(suite.engine)}; '
        f"{len(results)} entries, {_duration(total_s)} of test time</p>\n"
        f'<p class="totals">{_totals(counts)}</p>\n'
        f'<div class="share" role="img" aria-label="{escape(_counts(counts))}">{share}</div>\n'
        f"{_failed(results)}"
        f'<nav>{buttons}<input type="search" placeholder="Name or reason" aria-label="Name or reason"></nav>\n'
        '<div class="head"><span>Status</span><span>Entry</span><span>Remarks</span>'
        '<span class="num">Checks</span><span class="num">Time</span></div>\n'
        + "\n".join(_test(result) for result in results)
        + '\n<p class="none" hidden>No entry matches.</p>'
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _counts(counts: Mapping[Status, int]) -> str:
    return ", ".join(f"{counts[status]} {status.lower()}" for status in Status)


def _totals(counts: Mapping[Status, int]) -> str:
    words = {Status.PASS: "pass", Status.FAIL: "fail", Status.SKIP: "skipped"}
    return " · ".join(f'<b class="{status}">{counts[status]}</b> {word}' for status, word in words.items())


def _failed(results: Sequence[Result]) -> str:
    """Return links to what failed."""
    links = "".join(
        f'<a href="#{quote(result.name)}">{escape(result.name)}</a>'
        for result in results
        if result.status is Status.FAIL
    )
    return f'<p class="failed">Failed: {links}</p>\n' if links else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _test(result: Result) -> str:
    """Return one entry: a line, and what opens below it."""
    why = result.why()
    ignored = f"ignored: {', '.join(result.ignored)}" if result.ignored else ""
    said = "; ".join(part for part in (why, result.over_suite_limit, ignored) if part)
    checks = result.counts()
    good = checks.get("PASS", 0)
    done = sum(checks.values()) - checks.get("SKIP", 0)
    text = escape(f"{result.name} {said}".lower(), quote=True)
    return (
        f'<details class="test" id="{escape(result.name)}" data-status="{result.status}" data-text="{text}">'
        f'<summary><span class="badge {result.status}">{result.status}</span>'
        f'<span class="name">{escape(result.name)}</span><span class="why">{escape(said)}</span>'
        f'<span class="num checkcount">{f"{good} of {done}" if done else ""}</span>'
        f'<span class="num">{_duration(result.time_s) if result.log or result.time_s > 1 else ""}</span></summary>'
        f'<div class="body">{_facts(result)}{_places(result)}{_subtests(result)}{_exits(result)}{_log(result)}</div>'
        "</details>"
    )


def _facts(result: Result) -> str:
    facts = [
        ("Reason", result.reason),
        ("Summary", result.summary),
        ("Program", f"{result.file} {result.arguments}".strip()),
        ("Machine", _machine(result)),
        ("Ignored", "; ".join(result.ignored)),
        ("Set for it", "; ".join(result.notes)),
        ("Time", f"{_duration(result.time_s)}; limit: {result.limit_text}" if result.limit_text else ""),
        ("Exit status", "" if result.exit_status is None else str(result.exit_status)),
        ("Instructions", "" if result.instructions is None else f"{result.instructions:,}"),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
    return f"<dl>{rows}</dl>"


def _machine(result: Result) -> str:
    vcpus = "1 vCPU" if result.vcpus == 1 else f"{result.vcpus} vCPUs"
    return f"{vcpus}, {result.memory_bytes // MIB} MiB" if result.memory_bytes else ""


def _places(result: Result) -> str:
    if not result.places:
        return ""
    rows = "".join(f"<dt>{escape(str(place))}</dt><dd>{escape(place.exits_text())}</dd>" for place in result.places)
    return f'<h2>Where it stood, and its last exits</h2><dl class="places">{rows}</dl>'


def _subtests(result: Result) -> str:
    """Return the checks: what went wrong at once, what passed when asked for."""
    if not result.subtests:
        return ""
    passed = [subtest for subtest in result.subtests if subtest.status == "PASS"]
    others = [subtest for subtest in result.subtests if subtest.status != "PASS"]
    parts = ["<h2>Checks</h2>"]
    if others:
        parts.append(_checks(others))
    if passed:
        parts.append(f"<details><summary>{len(passed)} passed</summary>{_checks(passed)}</details>")
    return "".join(parts)


def _checks(subtests: Sequence[Subtest]) -> str:
    rows = "".join(
        f'<tr><td><span class="badge {s.status}">{s.status}</span></td><td>{escape(s.name)}</td></tr>'
        for s in subtests[:SUBTEST_LIMIT]
    )
    more = len(subtests) - SUBTEST_LIMIT
    if more > 0:
        rows += f"<tr><td></td><td>and {more} more, in the log</td></tr>"
    return f'<table class="checks">{rows}</table>'


def _exits(result: Result) -> str:
    tables = _bars("Exits to the monitor", result.exits)
    kvm = {name.removeprefix("exit_"): count for name, count in result.kvm_exits.items() if name.startswith("exit_")}
    tables += _bars("Exits to KVM", kvm)
    return f'<div class="exits">{tables}</div>' if tables else ""


def _bars(title: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    most = ordered[0][1]
    rows = "".join(
        f'<tr><td><code>{escape(name.removeprefix("KVM_EXIT_"))}</code></td><td class="num">{count:,}</td>'
        f'<td><span class="bar" style="width:{max(2, round(120 * count / most))}px"></span></td></tr>'
        for name, count in ordered
    )
    return f"<div><h2>{title}: {sum(counts.values()):,}</h2><table>{rows}</table></div>"


def _log(result: Result) -> str:
    if not result.log:
        return ""
    log = result.log
    if len(log) > LOG_LIMIT:
        log = f"[{len(log) - LOG_LIMIT} characters left out]\n{log[-LOG_LIMIT:]}"
    return f"<h2>Log</h2><pre>{escape(log)}</pre>"
