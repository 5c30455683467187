# SPDX-License-Identifier: Apache-2.0
"""What a guest that knows KVM uses: clock, EOI, IPIs, hypercalls."""
