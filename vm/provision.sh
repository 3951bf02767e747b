#!/bin/sh
# The one provisioner of the lab machine: Debian 13, run as root from the repository's copy at /lab.
#
#   provision.sh install   packages, Python, users, configuration and images; needs no running daemon, so it runs in a chroot
#   provision.sh start     what needs the booted machine: swap, images into Docker, Podman and the registry
#   provision.sh           both
#
# Safe to run again: a step whose result stands is passed over. Environment: LABS_BACKEND (qemu or vagrant) is
# written into the marker file, LABS_JUPYTER_TOKEN sets the token of JupyterLab (else one is made and kept).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
repo=$(dirname "$here")
opt=/opt/labs
venv=$opt/venv
layout=$opt/images
registry=127.0.0.1:5000
images="busybox debian webapp redis nginx"

# a host behind its own certificate authority: labvm.py leaves the host's bundle here while it installs
if [ -s /etc/labs-host-ca.pem ]; then
	export SSL_CERT_FILE=/etc/labs-host-ca.pem REQUESTS_CA_BUNDLE=/etc/labs-host-ca.pem
fi

say() { printf '%s provision: %s\n' "$(date +%T)" "$*"; }

packages() {
	arch=$(dpkg --print-architecture)
	sed -e 's/#.*//' -e "s/ *\[$arch\]//" -e '/\[/d' -e '/^ *$/d' "$here/packages.txt"
}

install_packages() {
	# shellcheck disable=SC2046 # a list
	if dpkg-query -W -f='${db:Status-Abbrev}\n' $(packages) 2>/dev/null | grep -qv '^ii' || ! dpkg-query -W $(packages) >/dev/null 2>&1; then
		say "Debian packages"
		apt-get -q update
		DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends $(packages)
	fi
}

install_python() {
	inputs=$(cat "$repo/requirements.txt" "$here/requirements.txt" "$repo/constraints.txt" | sha256sum)
	[ "$(cat $venv/.inputs 2>/dev/null)" = "$inputs" ] && return
	say "Python environment"
	rm -rf $venv
	python3 -m venv $venv
	$venv/bin/pip --quiet install -r "$repo/requirements.txt" -r "$here/requirements.txt"
	$venv/bin/python - "$repo" <<'PY'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "labs-repository.pth").write_text(sys.argv[1] + "\n")
PY
	# pytest rewrites its plugins, and hypothesis is a large one: done here once, an emulated machine finds the bytecode
	printf 'import hypothesis\n' >$venv/test_warm.py
	$venv/bin/python -m pytest --quiet --collect-only --rootdir=$venv -c /dev/null $venv/test_warm.py >/dev/null || [ $? = 5 ]
	rm $venv/test_warm.py
	mkdir -p $venv/share/jupyter/lab/settings
	cat >$venv/share/jupyter/lab/settings/overrides.json <<'JSON'
{
  "@jupyterlab/translation-extension:plugin": {"locale": "ja_JP"},
  "@jupyterlab/apputils-extension:notification": {"checkForUpdates": false, "fetchNews": "false"}
}
JSON
	printf '%s' "$inputs" >$venv/.inputs
}

install_images() {
	inputs=$(find "$here/images" -type f | LC_ALL=C sort | xargs cat | sha256sum) # the order of a directory is its file system's
	[ "$(cat $layout/.inputs 2>/dev/null)" = "$inputs" ] && return
	say "container images from Debian packages"
	"$here/images/build.sh" $layout $opt/rootfs
	printf '%s' "$inputs" >$layout/.inputs
}

configure() {
	say "users and configuration"
	id learner >/dev/null 2>&1 || useradd --create-home --shell /bin/bash --uid 1000 learner
	grep -q '^learner:' /etc/subuid || echo learner:100000:65536 >>/etc/subuid
	grep -q '^learner:' /etc/subgid || echo learner:100000:65536 >>/etc/subgid
	mkdir -p "$repo/book" /var/lib/systemd/linger /etc/containers/registries.conf.d /etc/docker /etc/docker/registry /etc/sysctl.d
	: >/var/lib/systemd/linger/learner

	sed -i 's/^# *\(ja_JP.UTF-8\|en_US.UTF-8\)/\1/' /etc/locale.gen
	locale -a 2>/dev/null | grep -qi ja_JP.utf8 || locale-gen >/dev/null

	cat >/etc/containers/registries.conf.d/labs.conf <<CONF
unqualified-search-registries = ["localhost", "$registry"]
short-name-mode = "disabled"
[[registry]]
location = "$registry"
insecure = true
CONF
	cat >/etc/docker/daemon.json <<JSON
{"log-level": "warn", "runtimes": {"labs": {"path": "$repo/bin/labs-runtime"}}}
JSON
	mkdir -p /etc/containers/containers.conf.d
	cat >/etc/containers/containers.conf.d/labs.conf <<CONF
[engine.runtimes]
labs = ["$repo/bin/labs-runtime"]
CONF
	cat >/etc/docker/registry/config.yml <<CONF
version: 0.1
storage:
  filesystem: {rootdirectory: /var/lib/docker-registry}
  delete: {enabled: true}
http:
  addr: $registry
CONF
	cat >/etc/systemd/system/labs-jupyter.service <<CONF
[Unit]
Description=JupyterLab of the container labs
After=network.target docker.service
[Service]
ExecStartPre=/bin/mkdir -p $repo/book
ExecStart=$venv/bin/jupyter lab --allow-root --no-browser --ip=0.0.0.0 --port=8888 --notebook-dir=$repo/book
EnvironmentFile=/etc/labs-jupyter.env
Environment=PATH=$venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYDEVD_DISABLE_FILE_VALIDATION=1
WorkingDirectory=$repo
Restart=on-failure
[Install]
WantedBy=multi-user.target
CONF
	if [ -n "${LABS_JUPYTER_TOKEN:-}" ] || [ ! -s /etc/labs-jupyter.env ]; then
		(umask 077 && echo "JUPYTER_TOKEN=${LABS_JUPYTER_TOKEN:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}" >/etc/labs-jupyter.env)
	fi
	# the labs look at what changes on the machine: nothing periodic may change it behind them
	systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
		fstrim.timer man-db.timer xfs_scrub_all.timer podman-auto-update.timer systemd-tmpfiles-clean.timer
	systemctl --quiet enable labs-jupyter.service podman.socket docker.service containerd.service docker-registry.service
	printf '{"provisioned": "%s", "backend": "%s"}\n' "$(date -u +%F)" "${LABS_BACKEND:-vagrant}" >/etc/labs-machine
}

start_swap() {
	swapon --show=NAME --noheadings | grep -q . && return
	say "512 MiB of swap"
	[ -s /swapfile ] || { (umask 077 && fallocate -l 512M /swapfile) && mkswap --quiet /swapfile; }
	grep -q '^/swapfile' /etc/fstab || echo '/swapfile none swap sw 0 0' >>/etc/fstab
	swapon /swapfile
}

start_images() {
	for image in $images; do
		if ! skopeo inspect --tls-verify=false "docker://$registry/$image:lab" >/dev/null 2>&1; then
			say "$image into the registry"
			skopeo copy --quiet --dest-tls-verify=false "oci:$layout:$image" "docker://$registry/$image:lab"
		fi
		if ! podman image exists "localhost/$image:lab"; then
			say "$image into Podman"
			skopeo copy --quiet "oci:$layout:$image" "containers-storage:localhost/$image:lab"
		fi
		if ! docker image inspect "$image:lab" >/dev/null 2>&1; then
			say "$image into Docker"
			skopeo copy --quiet "oci:$layout:$image" "docker-daemon:$image:lab"
		fi
	done
}

# the engines' first run makes what stays: bridges, tables, slices; the labs compare the machine before and after
start_engines() {
	say "the engines' first run"
	docker run --rm busybox:lab true
	podman run --rm localhost/busybox:lab true
}

case ${1:-all} in
install)
	install_packages
	install_python
	install_images
	configure
	;;
start)
	start_swap
	start_images
	start_engines
	;;
all)
	"$0" install
	systemctl daemon-reload
	systemctl restart docker-registry docker labs-jupyter
	"$0" start
	;;
*)
	echo "provision.sh: unknown step: $1 (install or start)" >&2
	exit 2
	;;
esac
