#!/bin/sh
# The first program of Entresol's own guest: devices, modules, then a script or a shell; power off after it.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run

while read -r module; do
    insmod "/lib/modules/$module" || echo "init: cannot load $module"
done < /etc/entresol/modules

# /dev/console cannot be a shell's controlling terminal: cttyhack finds out which device it is.
control=cttyhack
if [ -e /etc/entresol/console ]; then
    console=/dev/$(cat /etc/entresol/console)
    exec < "$console" > "$console" 2>&1
    control=-c
fi

hostname guest
export HOME=/root TERM=linux PS1='guest:\w\$ '
if [ -e /etc/entresol/script ]; then
    sh /etc/entresol/script
    echo "entresol-script: exit $?"
else
    echo
    echo "Linux $(uname -r) on $(nproc) CPUs. Leaving the shell powers the machine off."
    echo "entresol-guest: console ready"
    cd /root
    setsid $control sh
fi
sync
poweroff -f
