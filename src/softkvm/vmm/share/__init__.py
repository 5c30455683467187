# SPDX-License-Identifier: Apache-2.0
"""Directories of the host's that a guest has: what the protocols over it (``vmm/p9``, ``vmm/fuse``) have in common."""
