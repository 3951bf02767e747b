#!/bin/sh
# native.sh DISK COMMAND...: run a command in the lab machine's file system on this machine's own kernel, as root.
#
# DISK is an ext4 file system in a file, which the command may change. Standard input is a tar file for its /lab.
# Namespaces are new (mount, pid, ipc, uts, net, cgroup), so that whatever the command leaves ends with it. Its cgroup
# is of version 2, with the controllers that this machine has to give there: on a hybrid machine none.
set -eu
case ${STAGE:-outside} in
outside)
	top=/sys/fs/cgroup/unified
	[ -d $top ] || top=/sys/fs/cgroup
	top=$top$(sed -n 's/^0:://p' /proc/self/cgroup)
	rmdir "$top"/labs-native.*/tests "$top"/labs-native.* 2>/dev/null || true # of runs that were killed
	GROUP=$top/labs-native.$$
	mkdir "$GROUP"
	trap 'find "$GROUP" -depth -type d -exec rmdir {} +' EXIT
	export GROUP
	STAGE=group unshare --mount --pid --ipc --uts --net --fork --kill-child "$0" "$@"
	;;
group) # a cgroup namespace begins where its first process is
	echo 0 >"$GROUP/cgroup.procs"
	STAGE=root exec unshare --cgroup "$0" "$@"
	;;
root)
	mount --make-rprivate /
	mount -o loop,noatime "$1" /mnt
	shift
	mount -t proc proc /mnt/proc
	mount -t sysfs sysfs /mnt/sys
	mount -t cgroup2 cgroup2 /mnt/sys/fs/cgroup
	mount --rbind /dev /mnt/dev
	mount -t tmpfs -o mode=755 tmpfs /mnt/run
	mount -t tmpfs tmpfs /mnt/tmp
	hostname lab
	ip link set lo up
	cd /mnt
	pivot_root . .
	umount -l .
	mount --make-rshared / # as systemd leaves it
	mkdir /sys/fs/cgroup/tests # a group with processes could give its children no controllers
	echo 0 >/sys/fs/cgroup/tests/cgroup.procs
	cd /lab
	find . -mindepth 1 -delete
	tar -xf -
	# process 1 takes in orphans, as the labs expect of it; a job in the background of a shell ignores SIGINT
	exec env -i --default-signal=INT,QUIT PATH=/opt/labs/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
		LANG=C.UTF-8 catatonit -- "$@" </dev/null
	;;
esac
