# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's interfaces for guests: the Hypervisor Top-Level Functional Specification (TLFS), as KVM has it."""
