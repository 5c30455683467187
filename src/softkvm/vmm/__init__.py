# SPDX-License-Identifier: Apache-2.0
"""The virtual machine monitor: machines, boot loaders and devices on nothing but the KVM API."""
