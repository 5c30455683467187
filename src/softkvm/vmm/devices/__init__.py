# SPDX-License-Identifier: Apache-2.0
"""The devices of a PC that KVM leaves to user space, one per module.

A device answers ``read(offset, size)`` and ``write(offset, size, value)`` relative to where the machine puts it on
a bus, drives its interrupt through a ``set_irq(level)`` callable, and has ``save()`` and ``restore()``.
"""
