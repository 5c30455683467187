# SPDX-License-Identifier: Apache-2.0
"""Why there is no default guest."""


class GuestUnavailable(Exception):
    """The default guest cannot be prepared here; the message is one line that says why."""
