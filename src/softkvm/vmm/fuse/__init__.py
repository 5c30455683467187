# SPDX-License-Identifier: Apache-2.0
"""A server of FUSE's protocol, which is how virtio-fs has another system's files."""
