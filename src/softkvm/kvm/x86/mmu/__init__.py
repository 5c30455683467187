# SPDX-License-Identifier: Apache-2.0
"""The MMU: nested page tables and walks of the guest's own."""
