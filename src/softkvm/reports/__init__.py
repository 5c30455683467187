# SPDX-License-Identifier: Apache-2.0
"""Results of a suite of tests, and reports of them: what ``softkvm unittests`` and ``softkvm selftests`` share.

======================================  ==========================================
:mod:`~softkvm.reports.result`          what came out of an entry
:mod:`~softkvm.reports.suite`           which suite it is
:mod:`~softkvm.reports.formats`         TAP, JUnit XML, JSON, Markdown
:mod:`~softkvm.reports.page`            one self-contained HTML page
======================================  ==========================================
"""
