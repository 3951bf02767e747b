#!/bin/sh
# Builds the lab's own container images from Debian packages, as one OCI layout, without a daemon and without a mount.
#
#   build.sh LAYOUT ROOTFS_DIR
#
# LAYOUT gets the references busybox, debian, webapp, redis and nginx; ROOTFS_DIR gets the unpacked
# busybox and debian trees that `labs` uses as read-only lower directories.
# The three application images share the debian layer.
set -eu
layout=$1 rootfs=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sources=/etc/apt/sources.list
[ -s "$sources" ] || sources=/etc/apt/sources.list.d/debian.sources
[ -s "$sources" ] || sources=
# shellcheck source=/dev/null
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")

busybox_tree() {
	mkdir -p "$1/bin" "$1/dev" "$1/etc" "$1/proc" "$1/root" "$1/sys" "$1/tmp" "$1/usr" "$1/var/www"
	chmod 1777 "$1/tmp"
	ln -s ../bin "$1/usr/bin"
	ln -s bin "$1/sbin"
	install -m 755 /usr/bin/busybox "$1/bin/busybox"
	busybox --list | grep -vx busybox | while read -r applet; do ln -s busybox "$1/bin/$applet"; done
	printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$1/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$1/etc/group"
}

debian_tree() {
	mmdebstrap --quiet --mode=root --variant=apt \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/info/*' \
		"$suite" "$1" ${sources:+"$sources"}
	rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin
	: >"$1/etc/resolv.conf"
}

# image NAME TREE CONFIG...: a new one-layer image from a directory tree
image() {
	name=$1 tree=$2
	shift 2
	umoci new --image "$layout:$name"
	umoci unpack --image "$layout:$name" "$work/$name"
	cp -a "$tree/." "$work/$name/rootfs/"
	umoci repack --image "$layout:$name" "$work/$name"
	umoci config --image "$layout:$name" --created "$created" --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
	rm -rf "${work:?}/$name"
}

# derive NAME PACKAGES CONFIG...: the debian image plus one layer: the packages and the files of images/NAME/
derive() {
	name=$1 packages=$2
	shift 2
	umoci tag --image "$layout:debian" "$name"
	umoci unpack --image "$layout:$name" "$work/$name"
	root="$work/$name/rootfs"
	cp /etc/resolv.conf "$root/etc/resolv.conf"
	printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
	chmod 755 "$root/usr/sbin/policy-rc.d"
	apt_in() { chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o APT::Update::Error-Mode=any "$@"; }
	apt_in update
	# shellcheck disable=SC2086 # a list
	apt_in install -y --no-install-recommends $packages >/dev/null
	rm -rf "$root/usr/sbin/policy-rc.d" "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/log/*.log "$root"/var/log/apt
	: >"$root/etc/resolv.conf"
	[ -d "$here/$name" ] && cp -a "$here/$name/." "$root/"
	umoci repack --image "$layout:$name" "$work/$name"
	umoci config --image "$layout:$name" --created "$created" "$@"
	rm -rf "${work:?}/$name"
}

rm -rf "$layout" "$rootfs"
mkdir -p "$rootfs"
created=$(date -u +%Y-%m-%dT00:00:00Z)
umoci init --layout "$layout"

busybox_tree "$rootfs/busybox"
image busybox "$rootfs/busybox" --config.cmd sh
debian_tree "$rootfs/debian"
image debian "$rootfs/debian" --config.cmd bash
derive webapp "python3 python3-redis" --config.cmd python3 --config.cmd /srv/app.py --config.exposedports 8000/tcp --config.env REDIS_HOST=redis
derive redis "redis-server" --config.user redis --config.workingdir /var/lib/redis --config.cmd redis-server --config.cmd --bind --config.cmd 0.0.0.0 --config.cmd --protected-mode --config.cmd no --config.exposedports 6379/tcp --config.volume /var/lib/redis
derive nginx "nginx" --config.cmd nginx --config.cmd -g --config.cmd 'daemon off;' --config.exposedports 80/tcp --config.stopsignal SIGQUIT
umoci gc --layout "$layout"
