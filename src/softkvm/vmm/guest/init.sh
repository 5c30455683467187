#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The default guest's first process. Kernel command line:
#   softkvm.run="cmd; cmd"   run these commands in place of the interactive shell, then power off
#   softkvm.terminal=TERM:ROWSxCOLUMNS   what the console is
#   softkvm.share=TAG        mount this shared directory at /mnt/TAG (may be there several times; %20 is a blank)
#   softkvm.port=NAME        there is such a port: give it its name in /dev/virtio-ports
#   softkvm.console=hvc0     the shell, or the commands, are to be there
#   softkvm.agent            no shell: the agent runs what the host wants (softkvm run -- COMMAND)
#   softkvm.noreboot         do not power off at the end (the kernel panics: for tests of that)
echo 'softkvm: init reached'
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=vt100
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /dev/pts
/bin/busybox mount -t devpts devpts /dev/pts
/bin/busybox --install -s
stty crtscts 2>/dev/null # the far end of our serial line waits when nobody reads
hostname softkvm
ip link set lo up 2>/dev/null
cd /root

# Drivers of the devices that are there: of those on PCI and of ACPI first, then of what these are the buses of.
drivers() {
    for bus; do
        for device in /sys/bus/$bus/devices/*; do
            [ -e "$device/driver" ] || ! read -r alias 2>/dev/null < "$device/modalias" || set -- "$@" "$alias"
        done
        shift
    done
    [ $# = 0 ] || modprobe -qab "$@"
}
if [ -e /sys/bus/pci/devices/0000:00:01.0 ] || [ -e /sys/bus/acpi/devices/LNRO0005:00 ]; then
    drivers pci acpi
    drivers virtio
fi

# Networks: an address by DHCP, whose server has three seconds before it becomes the background's business.
for device in /sys/class/net/*/device; do
    [ -e "$device" ] || continue
    name=${device%/device}
    name=${name##*/}
    ip link set "$name" up
    udhcpc -q -b -t 3 -T 1 -s /etc/udhcpc/default.script -i "$name" >/dev/null 2>&1
done

read -r cmdline < /proc/cmdline

# Shared directories: as virtio-fs if the kernel has it, else as 9p.
share() {
    mkdir -p "/mnt/$1"
    mount -t virtiofs "$1" "/mnt/$1" 2>/dev/null ||
        mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap "$1" "/mnt/$1"
}
# Named ports: their driver learns the names from the device, some time after it has been loaded.
port() {
    mkdir -p /dev/virtio-ports
    for attempt in 1 2 3 4 5 6 7 8 9; do
        for device in /sys/class/virtio-ports/*; do
            if [ -r "$device/name" ] && [ "$(cat "$device/name")" = "$1" ]; then
                ln -sf "../${device##*/}" "/dev/virtio-ports/$1"
                return
            fi
        done
        usleep 200000
    done
}
decoded() {
    printf '%b' "$(echo "${1#*=}" | sed 's/%/\\x/g')"
}
for word in $cmdline; do
    case $word in
    softkvm.share=*) share "$(decoded "$word")" ;;
    softkvm.port=*) port "$(decoded "$word")" ;;
    esac
done

console=
case $cmdline in
*softkvm.console=*)
    console=${cmdline#*softkvm.console=}
    console=/dev/${console%% *}
    if [ -c "$console" ]; then
        exec < "$console" > "$console" 2>&1
    else
        console=
    fi
    ;;
esac

run=
case $cmdline in
*softkvm.run=\"*)
    run=${cmdline#*softkvm.run=\"}
    run=${run%%\"*}
    ;;
*softkvm.run=*)
    run=${cmdline#*softkvm.run=}
    run=${run%% *}
    ;;
esac
case $cmdline in
*softkvm.terminal=*:*x*)
    terminal=${cmdline#*softkvm.terminal=}
    terminal=${terminal%% *}
    TERM=${terminal%:*}
    size=${terminal##*:}
    [ -n "$console" ] || stty rows "${size%x*}" columns "${size#*x}" 2>/dev/null # the device knows it better
    ;;
esac

case " $cmdline " in
*' softkvm.agent '*)
    # The host's commands in place of a shell.
    (modprobe -qa button evdev && exec acpid -d > /dev/null 2>&1) &
    [ -e /dev/vsock ] || modprobe -q vmw_vsock_virtio_transport
    softkvm-agent || echo 'softkvm: the agent cannot listen: the kernel lacks vsock' > /dev/console
    poweroff -f
    ;;
esac
[ ! -e /dev/vsock ] || softkvm-agent &

if [ -n "$run" ]; then
    sh -c "$run"
    echo "softkvm: run ended with status $?"
else
    # The power button (softkvm stop). In the background: nobody waits for it.
    (modprobe -qa button evdev && exec acpid -d > /dev/null 2>&1) &
    # A session of its own with the console as its terminal: job control and Ctrl-C work.
    if [ -n "$console" ]; then setsid -c sh -l; else setsid cttyhack sh -l; fi
fi

case $cmdline in
*softkvm.noreboot*) exit ;;
esac
poweroff -f
