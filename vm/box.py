"""Packs the lab machine as a Vagrant box for libvirt, with a catalogue: what replaces a public box registry.

A libvirt box is a tar of metadata.json, Vagrantfile and box.img (vagrant-libvirt's "Box Format"); a catalogue is the
JSON of Vagrant's "Box Versioning". The disk boots by UEFI on both architectures: a GPT with an EFI system partition
(systemd-boot, kernel, initrd) and the lab's own root file system. Nothing is mounted, so it works in a container too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from vm.image import image as finished_image
from vm.qemu import Machine, arch
from vm.steps import LabError, run, step

NAME = "read.container/lab"
ESP_MIB = 256
EFI = {"x86_64": ("systemd-bootx64.efi", "BOOTX64.EFI"), "aarch64": ("systemd-bootaa64.efi", "BOOTAA64.EFI")}
FIRMWARE = {"x86_64": "/usr/share/OVMF/OVMF_CODE.fd", "aarch64": "/usr/share/AAVMF/AAVMF_CODE.fd"}
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"

# what Vagrant expects of a box: the user vagrant with sudo and the box's key, and an address from DHCP
_GUEST = """set -eu
id vagrant >/dev/null 2>&1 || useradd --create-home --shell /bin/bash vagrant
install -d -m 700 -o vagrant -g vagrant /home/vagrant/.ssh
install -m 600 -o vagrant -g vagrant /root/.ssh/authorized_keys /home/vagrant/.ssh/authorized_keys
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/vagrant
printf '[Match]\\nName=eth* en*\\n[Network]\\nDHCP=yes\\n' >/etc/systemd/network/lab.network
echo '{"provisioned": "box", "backend": "vagrant"}' >/etc/labs-machine
swapoff -a; sync; echo o >/proc/sysrq-trigger"""

_VAGRANTFILE = """Vagrant.configure("2") do |config|
  config.ssh.private_key_path = File.expand_path("../key", __FILE__)
  config.vm.provider :libvirt do |libvirt|
    libvirt.loader = "%s"
  end
end
"""


def pack(target: Path) -> Path:
    """Write lab.box and catalogue.json into `target`; return the catalogue's path."""
    image = finished_image()
    target.mkdir(parents=True, exist_ok=True)
    log = target / "box.log"
    with tempfile.TemporaryDirectory(dir=target) as place:
        work = Path(place)
        with step("the guest's user and network for Vagrant"):
            _prepare(image, work, log)
        with step("a disk that boots by UEFI"):
            boot_disk(image, work, log)
        with step("the box"):
            return _tar(image, work, target, log)


def _prepare(image: Path, work: Path, log: Path) -> None:
    """Boot a copy of the machine and make it one that Vagrant can log in to; the result is work/root.raw."""
    disk = work / "guest.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image / "boot.qcow2", disk], log)
    vm = Machine(work, image, disk)
    vm.launch({}, incoming=f"exec:zstd -qdc '{image / 'ram.zst'}'")
    try:
        vm.resume()
        vm.wait_ssh(120)
        subprocess.run([*vm.ssh(), _GUEST], stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
        deadline = time.monotonic() + 120
        while vm.alive():
            if time.monotonic() > deadline:
                raise LabError("the guest did not power off")
            time.sleep(0.2)
    finally:
        vm.kill()
    run(["qemu-img", "convert", "-O", "raw", disk, work / "root.raw"], log)
    # the power was cut with a clean journal at best: the file system is checked once, here
    subprocess.run(["/sbin/e2fsck", "-fy", work / "root.raw"], capture_output=True)


def boot_disk(image: Path, work: Path, log: Path) -> None:
    """Make work/box.raw from work/root.raw: GPT, an EFI system partition, the root file system behind it."""
    loader, default = EFI[os.uname().machine]
    esp, disk, root = work / "esp.img", work / "box.raw", work / "root.raw"
    with esp.open("wb") as file:
        file.truncate(ESP_MIB << 20)
    entry = work / "lab.conf"
    options = f"root=LABEL=lab rw console={arch().console} quiet net.ifnames=0 psi=1"
    entry.write_text(f"title lab\nlinux /vmlinuz\ninitrd /initrd\noptions {options}\n")
    run(["mkfs.vfat", "-F", "32", esp], log)
    run(["mmd", "-i", esp, "::EFI", "::EFI/BOOT", "::loader", "::loader/entries"], log)
    for source, name in (
        (Path("/usr/lib/systemd/boot/efi") / loader, f"EFI/BOOT/{default}"),
        (image / "vmlinuz", "vmlinuz"),
        (image / "initrd", "initrd"),
        (entry, "loader/entries/lab.conf"),
    ):
        run(["mcopy", "-i", esp, source, f"::{name}"], log)
    with disk.open("wb") as file:
        file.truncate((ESP_MIB + 2 << 20) + root.stat().st_size)
    table = f"label: gpt\nstart=1MiB, size={ESP_MIB}MiB, type={ESP_TYPE}\nstart={ESP_MIB + 1}MiB, type=L\n"
    subprocess.run(["/sbin/sfdisk", "--quiet", disk], input=table, text=True, check=True)
    for part, at in ((esp, 1), (root, ESP_MIB + 1)):
        run(["dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={at}", "conv=notrunc,sparse", "status=none"], log)


def _tar(image: Path, work: Path, target: Path, log: Path) -> Path:
    run(["qemu-img", "convert", "-c", "-O", "qcow2", work / "box.raw", work / "box.img"], log)
    size = -(-(work / "box.raw").stat().st_size >> 30)
    (work / "metadata.json").write_text(json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": size}))
    (work / "Vagrantfile").write_text(_VAGRANTFILE % FIRMWARE[os.uname().machine])
    shutil.copy(image / "id_ed25519", work / "key")
    box = target / "lab.box"
    run(["tar", "-C", work, "-cf", box, "metadata.json", "Vagrantfile", "key", "box.img"], log)
    digest = hashlib.sha256()
    with box.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    provider = {"name": "libvirt", "url": f"file://{box}", "checksum_type": "sha256", "checksum": digest.hexdigest()}
    catalogue = target / "catalogue.json"
    version = time.strftime("%Y%m%d.0.0")
    catalogue.write_text(
        json.dumps({"name": NAME, "versions": [{"version": version, "providers": [provider]}]}, indent=1)
    )
    return catalogue
