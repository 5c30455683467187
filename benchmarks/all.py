# SPDX-License-Identifier: Apache-2.0
"""Every measurement, one after the other (``make bench``)."""

from __future__ import annotations

import sys

from benchmarks import boot, client, common, exits, memory, mips, net, share, snapshot, vsock


def measure() -> None:
    """Run all; the last message says which failed."""
    failed = []
    for module in (boot, mips, exits, client, memory, net, share, snapshot, vsock):
        try:
            module.measure()
        except common.BenchmarkError as error:
            print(f"{module.__name__}: {error}", file=sys.stderr)
            failed.append(module.__name__)
    if failed:
        raise common.BenchmarkError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    common.main(measure)
