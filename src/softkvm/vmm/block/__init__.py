# SPDX-License-Identifier: Apache-2.0
"""Disk images: raw files and devices, qcow2, and a layer that keeps what is written out of an image."""
