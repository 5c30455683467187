# SPDX-License-Identifier: Apache-2.0
"""The performance monitoring unit that guests see (``arch/x86/kvm/pmu.c``)."""
