# SPDX-License-Identifier: Apache-2.0
"""Bounded and repeatable: the same examples each time."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "softkvm",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("softkvm")
