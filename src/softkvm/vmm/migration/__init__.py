# SPDX-License-Identifier: Apache-2.0
"""A machine moves to another process while it runs.

========================  ================================================================================
:mod:`.stream`            what goes over the connection: frames with a kind, a length and a checksum
:mod:`.source`            the side that has the machine: rounds of changed memory, the last while it stands
:mod:`.target`            the side that gets it
:mod:`.throttle`          vCPUs that write faster than the connection takes are slowed down
========================  ================================================================================

There is one machine at any moment. The target has everything, and has put it into a machine of its own, before the
source lets go of its own (``READY``). The source says ``COMMIT`` then, and the target ``COMMITTED`` before it starts.
Whatever ends before that, be it by a process that is killed, leaves the source's machine running, and a connection
that ends without ``COMMITTED`` is one whose target has not started, for the word is in the socket, or was never sent.
"""
