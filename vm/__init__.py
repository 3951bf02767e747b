"""The lab machine and the front door: provisioner, QEMU and Vagrant backends."""
