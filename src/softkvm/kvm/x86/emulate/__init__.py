# SPDX-License-Identifier: Apache-2.0
"""The instruction emulator: what touches MMIO, and what an intercept asks for."""
