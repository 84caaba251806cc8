# What a topology's `setup` is written in; runs in the guest as root, before the command.

wait_for() {
    tries=0
    until [ -e "$1" ]; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || { echo "there is no $1 after 20 s"; return 1; }
        sleep 0.1
    done
}

# A dax device is bound to a driver by the kernel already, not always to the one that is wanted.
set_dax_mode() {
    wait_for "/sys/bus/dax/devices/$1/driver" || return
    case $2/$(basename "$(readlink "/sys/bus/dax/devices/$1/driver")") in
    devdax/device_dax | system-ram/kmem) ;;
    *) daxctl reconfigure-device --force --mode="$2" "$1" || return ;;
    esac
    # Memory that the kernel has put online by itself may be finished a moment later.
    [ "$2" = devdax ] || daxctl online-memory "$1" || true
}

# Bytes; daxctl sets it only for a device that it makes.
set_dax_align() {
    echo "$1" >/sys/bus/dax/drivers/device_dax/unbind &&
        echo "$2" >"/sys/bus/dax/devices/$1/align" &&
        echo "$1" >/sys/bus/dax/drivers/device_dax/bind
}

# Volatile regions through /sys: cxl(1) 76 cannot make them. One device, MiB.
make_cxl_ram_region() {
    devices=/sys/bus/cxl/devices
    region=$(cat $devices/decoder0.0/create_ram_region)
    echo "$region" >$devices/decoder0.0/create_ram_region &&
        echo 256 >"$devices/$region/interleave_granularity" &&
        echo 1 >"$devices/$region/interleave_ways" &&
        echo $(($1 << 20)) >"$devices/$region/size" &&
        echo ram >$devices/decoder2.0/mode &&
        echo $(($1 << 20)) >$devices/decoder2.0/dpa_size &&
        echo decoder2.0 >"$devices/$region/target0" &&
        echo 1 >"$devices/$region/commit" &&
        echo "$region" >/sys/bus/cxl/drivers/cxl_region/bind &&
        wait_for /sys/bus/dax/devices/dax0.0/driver
}

make_cxl_pmem_region() {
    wait_for /sys/bus/nd/devices/ndbus0 && sleep 0.5
    cxl create-region -t pmem -m -d decoder0.0 -w 1 mem0 && wait_for /sys/bus/nd/devices/region0
}

# Without labels the whole region is one raw namespace, and there is no room for another.
start_labels() {
    ndctl disable-region "$1" && ndctl init-labels --force "$2" && ndctl enable-region "$1"
}

make_namespace() {
    ndctl create-namespace --force "$@" || return
    case "$*" in
    *devdax*) wait_for /sys/bus/dax/devices/dax0.0/driver ;;
    *) wait_for /dev/pmem0 ;;
    esac
}

make_files() {
    mkfs.ext4 -q -b 4096 -E nodiscard "$1" && mount_files "$@"
}

mount_files() {
    wait_for "$1" && mkdir -p /mnt && mount -t ext4 -o "$2" "$1" /mnt
}
