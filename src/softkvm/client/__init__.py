# SPDX-License-Identifier: Apache-2.0
"""Unmodified KVM clients on KVM in Python, in their own process (``softkvm exec``).

=================================  ====================================================================================
:mod:`~softkvm.client.launch`      starts a client with the preloaded library, in the launcher's process
:mod:`~softkvm.client.program`     what a file is that is to be executed, and what keeps KVM out of it
``client/preload`` (Rust)          stands before the C library's functions in the client
:mod:`~softkvm.client.settings`    what the command line asked for, on its way to the client
:mod:`~softkvm.client.world`       what the interpreter in the client's process begins with
``client/loader`` (Rust)           the same for programs that no dynamic linker loads
``client/src`` (Rust)              loads the interpreter; the functions that both sides call
``cpu/python/src/client`` (Rust)   descriptors, threads and memory of the client
:mod:`~softkvm.client.files`       the files behind the descriptors, with the kernel's lifetimes
:mod:`~softkvm.client.dispatch`    a request by its number: the table of requests says the rest
:mod:`~softkvm.client.trace`       what the client has asked, and got
=================================  ====================================================================================
"""
