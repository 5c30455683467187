# SPDX-License-Identifier: Apache-2.0
"""Looking inside of a machine: registers, memory by virtual address, breakpoints, steps; all through the KVM API."""
