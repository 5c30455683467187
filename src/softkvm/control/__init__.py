# SPDX-License-Identifier: Apache-2.0
"""Machines under the control of other processes: by name over the socket of :mod:`softkvm.live`, and by QMP."""
