# SPDX-License-Identifier: Apache-2.0
"""Xen's interfaces for HVM guests (KVM API, KVM_XEN_HVM_*; Xen's public headers), as KVM accelerates them.

Userspace is the hypervisor: it gets every hypercall that is not carried out here. Event channels are those with two
levels; there are no FIFO event channels, grant tables, or XenStore in a kernel, either.
"""
