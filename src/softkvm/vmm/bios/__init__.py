# SPDX-License-Identifier: Apache-2.0
"""A BIOS: the services that programs in real mode call by software interrupts, carried out by the machine monitor.

``services`` has the device and all services but those of ``screen`` (INT 10h) and ``keyboard`` (INT 16h); ``call`` is a
caller's registers. The code in guest memory that leads here is ``softkvm.vmm.boot.firmware``.
"""
