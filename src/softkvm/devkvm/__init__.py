# SPDX-License-Identifier: Apache-2.0
"""The KVM API on a real device: every method is the ioctl it is named after, and nothing else."""

from softkvm.devkvm.system import Kvm as Kvm
from softkvm.devkvm.vcpu import Vcpu as Vcpu
from softkvm.devkvm.vm import Vm as Vm
