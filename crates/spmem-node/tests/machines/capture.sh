#!/bin/sh
# Prints what spmem_node::machine reads of this machine, as the *.machine files beside this one have it:
#   = PATH     a file; its lines follow, each behind a blank
#   > PATH TO  a symbolic link
#   / PATH     a directory
# For a guest: cargo xtask vm --topology cxl --mode devdax -- sh crates/spmem-node/tests/machines/capture.sh
cd / || exit

file() {
    for path in "$@"; do
        [ -f "$path" ] && [ -r "$path" ] && text=$(cat "$path" 2>/dev/null) || continue
        printf '= %s\n' "$path"
        printf '%s\n' "$text" | sed 's/^/ /'
    done
}

link() {
    for path in "$@"; do
        [ -L "$path" ] && printf '> %s %s\n' "$path" "$(readlink "$path")"
    done
}

# The devices of a bus, each with these files of its own.
bus() {
    folder=sys/bus/$1/devices
    shift
    for device in "$folder"/*; do
        [ -e "$device" ] || continue
        link "$device"
        real=$(readlink -f "$device")
        real=${real#/}
        for name in "$@"; do
            # Patterns are meant: access0/read_latency and the like.
            # shellcheck disable=SC2086
            file $real/$name
        done
        link "$real/driver" "$real/uport"
        for disk in "$real"/block/*; do
            [ -d "$disk" ] && printf '/ %s\n' "$disk"
        done
    done
}

nodes=sys/devices/system/node
file $nodes/online $nodes/possible $nodes/has_cpu $nodes/has_memory $nodes/has_generic_initiator
for node in $nodes/node[0-9]*; do
    file "$node/cpulist" "$node/distance"
    printf '= %s\n' "$node/meminfo"
    grep -E 'MemTotal|MemFree|Active\(file\)|Inactive\(file\)|SReclaimable' "$node/meminfo" | sed 's/^/ /'
    file "$node"/access*/initiators/*_* "$node"/memory_side_cache/index*/*
    link "$node"/access*/initiators/node*
done
file sys/devices/virtual/memory_tiering/*/nodelist
bus dax size target_node numa_node align resource
bus cxl devtype mode size start resource interleave_ways interleave_granularity 'target[0-9]*' serial numa_node ram/size pmem/size \
    ram/qos_class 'access*/*'
bus nd devtype type mode size resource numa_node target_node nstype holder namespace uuid
printf '= proc/iomem\n'
grep -E 'RAM|Soft|Persistent|CXL|dax|hmem|namespace' proc/iomem | sed 's/^/ /'
