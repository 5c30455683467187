# SPDX-License-Identifier: Apache-2.0
"""The vsock test suite: two halves, one on the host and one in a guest, that do the same cases at the same time.

The cases, their names and what the halves say to each other are those of the kernel's ``tools/testing/vsock``, so that
the kernel's own program can be the guest's half; some of ours are behind them. ``control`` is the connection on which
the halves wait for each other, ``half`` what the host's half can do, ``stream``, ``seqpacket``, ``zerocopy`` and
``more`` are the cases, ``cases`` the list of all; ``session`` does them with one program in the guest, ``guest`` boots.
"""
