#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What acpid calls when the power button is pressed.
echo 'softkvm: power button' > /dev/console
sync
poweroff -f
