# SPDX-License-Identifier: Apache-2.0
"""Measurements, one module per figure: ``python -m benchmarks.boot``. All of them: ``make bench``.

Each prints a table and writes ``benchmarks/results/NAME.json``. A figure is the median of several runs. Where
qemu-system-x86_64 is installed it runs the same image in the same session, with its portable accelerator (TCG).
"""
