# SPDX-License-Identifier: Apache-2.0
"""gdb's remote serial protocol: a stub for Debian's, or any, gdb (gdb's manual, appendix E)."""
