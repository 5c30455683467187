# SPDX-License-Identifier: Apache-2.0
"""The KVM API as Python classes: the one seam between the machine monitor and a KVM.

One method per ioctl, named after it in lower case without ``KVM_``. Structures are those of
:mod:`softkvm.abi`; a getter returns a fresh one, a setter takes one and keeps no reference to it. Every
method raises :class:`OSError` with the errno that the KVM API document (``Documentation/virt/kvm/api.rst``,
section 4: one heading per ioctl) gives.

:mod:`softkvm.kvm` (KVM in Python) and :mod:`softkvm.devkvm` (the real device) implement these protocols:
:mod:`.common` has what every architecture has, :mod:`.x86` the rest of what is exported here.
"""

from softkvm.api.common import Closeable as Closeable
from softkvm.api.x86 import Kvm as Kvm
from softkvm.api.x86 import Vcpu as Vcpu
from softkvm.api.x86 import Vm as Vm
