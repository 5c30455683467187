# SPDX-License-Identifier: Apache-2.0
"""A server of 9P2000.L, the protocol by which Linux has another system's files."""
