# SPDX-License-Identifier: Apache-2.0
"""A whole machine's state: taken from one that stands, kept in a directory, put into a new one.

========================  ===============================================================================
:mod:`.vcpu`              a processor's registers, through the KVM API
:mod:`.chips`             the interrupt chips and the guest's clock
:mod:`.state`             all of a machine but its memory, as plain data; what that is, its board knows
:mod:`.encoding`          plain data as bytes, and back
========================  ===============================================================================

Memory is apart, for it is large: a file that is mapped copy-on-write, or pages on a connection.
"""
