# SPDX-License-Identifier: Apache-2.0
"""Measurements, as a library: :mod:`softkvm.bench.vmexit`, :mod:`softkvm.bench.dirty_log`."""
