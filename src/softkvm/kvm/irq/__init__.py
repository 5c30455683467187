# SPDX-License-Identifier: Apache-2.0
"""Eventfds, and the buses of in-kernel devices."""
