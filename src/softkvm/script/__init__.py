# SPDX-License-Identifier: Apache-2.0
"""What :class:`softkvm.Machine` is made of besides the monitor: a shell in the guest, drgn's view of its kernel."""
