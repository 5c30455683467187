# SPDX-License-Identifier: Apache-2.0
"""AMD-V: the VMCB, entering the guest, the table of exit handlers."""
