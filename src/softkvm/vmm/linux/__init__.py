# SPDX-License-Identifier: Apache-2.0
"""What a running Linux kernel tells of itself in its memory: vmcoreinfo, kallsyms, BTF, unwind tables.

Nothing here needs debug packages, or the guest's help: everything is read out of guest memory. What is read there is
the guest's and may be anything; each module checks what it follows.
"""
