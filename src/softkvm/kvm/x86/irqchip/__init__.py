# SPDX-License-Identifier: Apache-2.0
"""The in-kernel interrupt chips: local APIC, IOAPIC, PIC, PIT."""
