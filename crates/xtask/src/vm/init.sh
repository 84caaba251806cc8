#!/bin/busybox sh
# The guest's first process: show the host's root under a RAM overlay, run the job, leave its status, power off.
# The 9p share "job" is this run's folder: config (shell variables), setup, command; status comes back in it.
/bin/busybox --install -s /bin
export PATH=/bin

fail() {
    echo "init: $*" >/dev/console
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do
    insmod "$module" || fail "cannot insert $module"
done

options=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $options,cache=none job /job || fail "no share for the job"
. /job/config
# Should the host forget us: its own limit comes first.
(sleep "$LIMIT"; poweroff -f) &
mount -t 9p -o $options,ro,cache=loose hostroot /host || fail "no share for the host's root"
# The overlay is ordinary memory: keep it off the nodes that are to be looked at.
mount -t tmpfs -o mpol=prefer:0 overlay /overlay || fail "no memory for the overlay"
mkdir /overlay/upper /overlay/work
mount -t overlay -o lowerdir=/host,upperdir=/overlay/upper,workdir=/overlay/work root /root || fail "no overlay"

mkdir -p /root/proc /root/sys /root/dev /root/run
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mount -t tmpfs run /root/run
mkdir -p /root/dev/shm /root/dev/pts /root/run/job
mount -t tmpfs shm /root/dev/shm
mount -t devpts pts /root/dev/pts
mount -t cgroup2 cgroup /root/sys/fs/cgroup
mount -t debugfs debug /root/sys/kernel/debug
mount -o bind /job /root/run/job
mkdir -p "/root/lib/modules/$RELEASE"
mount -o bind "/host$KERNEL/lib/modules/$RELEASE" "/root/lib/modules/$RELEASE" || fail "no modules"
ip link set lo up
hostname vm

# What the kernel itself asks for goes through the tools' modprobe as well.
cat >/modprobe <<X
#!/bin/busybox sh
exec /bin/busybox chroot /root "$TOOLS/modprobe" "\$@"
X
chmod +x /modprobe
echo /modprobe >/proc/sys/kernel/modprobe

export PATH="$TOOLS:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" HOME=/root
chroot /root /bin/sh /run/job/setup </dev/null >/job/setup.log 2>&1
status=$?
if [ $status = 0 ]; then
    stty -F /dev/ttyS1 raw -echo
    chroot /root /bin/sh /run/job/command </dev/null >/dev/ttyS1 2>&1
    echo $? >/job/status
else
    echo $status >/job/setup.status
fi
sync
umount /root/mnt 2>/dev/null
poweroff -f
