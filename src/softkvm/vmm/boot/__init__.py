# SPDX-License-Identifier: Apache-2.0
"""Boot loaders: they put an image into guest memory and the first vCPU at its entry point.

``bzimage`` (Linux's 64-bit boot protocol), ``pvh`` (ELF with the PVH note), ``flat`` (raw real-mode code).
"""
