# SPDX-License-Identifier: Apache-2.0
"""Guest memory: slots, host memory behind them, dirty logging."""
