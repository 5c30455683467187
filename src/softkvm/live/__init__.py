# SPDX-License-Identifier: Apache-2.0
"""Looking at machines that run, from another process of the same user: counters, and tracing that is turned on later.

Each process that has a virtual machine listens at a Unix socket named after it, which is its user's alone. Requests and
answers are JSON, a line each; see :mod:`.server` for what may be asked.
"""
