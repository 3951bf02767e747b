"""The box's disk, read back by sfdisk and mtools: what a UEFI firmware will find on it."""

import json
import subprocess

from vm import box


def test_the_disk_has_a_loader_a_kernel_and_the_root_file_system(tmp_path):
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    root = tmp_path / "root.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", "lab", root, "8M"], check=True)

    box.boot_disk(tmp_path, tmp_path, tmp_path / "log")

    disk = tmp_path / "box.raw"
    table = json.loads(subprocess.run(["sfdisk", "--json", disk], capture_output=True, check=True).stdout)[
        "partitiontable"
    ]
    assert table["label"] == "gpt"
    esp, system = table["partitions"]
    assert esp["type"] == box.ESP_TYPE and system["size"] * 512 >= root.stat().st_size
    at = f"{disk}@@{esp['start'] * 512}"
    loader = subprocess.run(
        ["mtype", "-i", at, "::loader/entries/lab.conf"], capture_output=True, text=True, check=True
    )
    assert "root=LABEL=lab" in loader.stdout
    kernel = subprocess.run(["mtype", "-i", at, "::vmlinuz"], capture_output=True, check=True).stdout
    assert kernel == b"vmlinuz" * 1000
    assert (
        box.EFI["x86_64"][1]
        in subprocess.run(["mdir", "-b", "-i", at, "::EFI/BOOT"], capture_output=True, text=True).stdout
    )
    with disk.open("rb") as file:
        file.seek(system["start"] * 512)
        assert file.read(root.stat().st_size) == root.read_bytes()
