# SPDX-License-Identifier: Apache-2.0
"""What x86 adds to the places of :mod:`softkvm.abi.run_page`: its MSR, debug and TPR exits, and registers."""

from __future__ import annotations

from typing import Final

from softkvm.abi.run import (
    kvm_hyperv_exit,
    kvm_hyperv_exit_hcall,
    kvm_hyperv_exit_syndbg,
    kvm_run_msr,
    kvm_run_system_event,
    kvm_run_tpr_access,
    kvm_xen_exit,
    kvm_xen_exit_hcall,
)
from softkvm.abi.run_page import EXIT, index
from softkvm.abi.x86.processor import kvm_debug_exit_arch
from softkvm.abi.x86.run import kvm_run

#: kvm_run.msr: the error and seven bytes of padding in one element.
MSR_ERROR_Q: Final = index(kvm_run_msr, "error", 8, EXIT)
MSR_ERROR_B: Final = index(kvm_run_msr, "error", 1, EXIT)
MSR_REASON_D: Final = index(kvm_run_msr, "reason", 4, EXIT)
MSR_INDEX_D: Final = index(kvm_run_msr, "index", 4, EXIT)
MSR_DATA_Q: Final = index(kvm_run_msr, "data", 8, EXIT)

DEBUG_EXCEPTION_D: Final = index(kvm_debug_exit_arch, "exception", 4, EXIT)
DEBUG_PC_Q: Final = index(kvm_debug_exit_arch, "pc", 8, EXIT)
DEBUG_DR6_Q: Final = index(kvm_debug_exit_arch, "dr6", 8, EXIT)
DEBUG_DR7_Q: Final = index(kvm_debug_exit_arch, "dr7", 8, EXIT)

#: kvm_run.hyperv: its type, and what each says.
HYPERV_TYPE_D: Final = index(kvm_hyperv_exit, "type", 4, EXIT)
_HYPERV_U: Final = index(kvm_hyperv_exit, "u", 1, EXIT)
HYPERV_HCALL_INPUT_Q: Final = index(kvm_hyperv_exit_hcall, "input", 8, _HYPERV_U)
HYPERV_HCALL_RESULT_Q: Final = index(kvm_hyperv_exit_hcall, "result", 8, _HYPERV_U)
HYPERV_HCALL_PARAMS_Q: Final = index(kvm_hyperv_exit_hcall, "params", 8, _HYPERV_U)
HYPERV_SYNDBG_MSR_D: Final = index(kvm_hyperv_exit_syndbg, "msr", 4, _HYPERV_U)
HYPERV_SYNDBG_STATUS_Q: Final = index(kvm_hyperv_exit_syndbg, "status", 8, _HYPERV_U)

#: kvm_run.xen: its type, and a hypercall.
XEN_TYPE_D: Final = index(kvm_xen_exit, "type", 4, EXIT)
_XEN_U: Final = index(kvm_xen_exit, "u", 1, EXIT)
XEN_HCALL_LONGMODE_D: Final = index(kvm_xen_exit_hcall, "longmode", 4, _XEN_U)
XEN_HCALL_CPL_D: Final = index(kvm_xen_exit_hcall, "cpl", 4, _XEN_U)
XEN_HCALL_INPUT_Q: Final = index(kvm_xen_exit_hcall, "input", 8, _XEN_U)
XEN_HCALL_RESULT_Q: Final = index(kvm_xen_exit_hcall, "result", 8, _XEN_U)
XEN_HCALL_PARAMS_Q: Final = index(kvm_xen_exit_hcall, "params", 8, _XEN_U)

SYSTEM_EVENT_TYPE_D: Final = index(kvm_run_system_event, "type", 4, EXIT)
SYSTEM_EVENT_NDATA_D: Final = index(kvm_run_system_event, "ndata", 4, EXIT)

TPR_RIP_Q: Final = index(kvm_run_tpr_access, "rip", 8, EXIT)
TPR_IS_WRITE_D: Final = index(kvm_run_tpr_access, "is_write", 4, EXIT)

#: Which registers are to be stored in the page, and which are to be taken from it.
KVM_VALID_REGS_Q: Final = index(kvm_run, "kvm_valid_regs", 8)
KVM_DIRTY_REGS_Q: Final = index(kvm_run, "kvm_dirty_regs", 8)
