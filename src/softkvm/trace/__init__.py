# SPDX-License-Identifier: Apache-2.0
"""Tracing, whatever is traced: events, tracepoints that cost nothing while off, the recorder, files and reports.

It is below KVM, which has the tables of its tracepoints (:mod:`softkvm.kvm.trace`), and names no architecture. What is
recorded is in the format of ``trace-cmd`` (trace-cmd.dat.v6(5)), so that its tools read it as well as ours.
"""
