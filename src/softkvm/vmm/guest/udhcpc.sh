#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What busybox's DHCP client calls with what it has found out: $1 says what has happened, variables say the rest.
case $1 in
deconfig)
    ip addr flush dev "$interface"
    ;;
bound | renew)
    [ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
    ip addr flush dev "$interface" scope global
    ip addr add "$ip/${mask:-24}" broadcast "${broadcast:-+}" dev "$interface"
    for gateway in $router; do
        ip route replace default via "$gateway" dev "$interface"
    done
    [ -z "$hostname" ] || hostname "$hostname"
    {
        [ -z "$domain" ] || echo "search $domain"
        for server in $dns; do
            echo "nameserver $server"
        done
    } > /etc/resolv.conf
    ;;
esac
