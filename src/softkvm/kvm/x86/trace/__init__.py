# SPDX-License-Identifier: Apache-2.0
"""Tracepoints of x86 (``arch/x86/kvm/trace.h`` of Linux 6.12): the events, and the places where they happen."""

from __future__ import annotations

from typing import Final

from softkvm.kvm import trace
from softkvm.kvm.x86.trace.avic import of_avic
from softkvm.kvm.x86.trace.hyperv_probes import hyperv
from softkvm.kvm.x86.trace.probes import GENERAL, x86
from softkvm.trace.tracepoint import Tracepoints

TRACEPOINTS: Final = Tracepoints([*trace.general(GENERAL), *x86(), *of_avic(), *hyperv()])
