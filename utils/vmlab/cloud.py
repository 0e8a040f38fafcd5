"""A golden image's tree from a Debian cloud image, in place of mmdebstrap."""

import json
import os
import shutil
from pathlib import Path

from . import host
from .errors import LabError
from .recipe import Recipe

#: Types of a partition that holds a Linux root: x86-64's own and the general one in GPT, and MBR's.
ROOT_TYPES = ("4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", "0FC63DAF-8483-4772-8E79-3D69D8477DE4", "83")
#: Run in a mount namespace of its own, so that nothing stays mounted. Arguments: image, offset, root, packages…
UNPACK = """
set -eu
image=$1 offset=$2 root=$3; shift 3
mkdir -p "$root" "$root.mnt"
mount -o "ro,noload,loop,offset=$offset" "$image" "$root.mnt"
cp -a "$root.mnt/." "$root"
umount "$root.mnt"; rmdir "$root.mnt"
mount --bind /dev "$root/dev"; mount -t proc proc "$root/proc"; mount -t sysfs sys "$root/sys"
rm -f "$root/etc/resolv.conf"; cp /etc/resolv.conf "$root/etc/resolv.conf"
printf '#!/bin/sh\\nexit 101\\n' >"$root/usr/sbin/policy-rc.d"; chmod +x "$root/usr/sbin/policy-rc.d"
export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
chroot "$root" apt-get -q update
chroot "$root" apt-get -q install -y --no-install-recommends "$@"
chroot "$root" apt-get -q clean
rm -f "$root/usr/sbin/policy-rc.d"
"""


def unpack(recipe: Recipe, scratch: Path, root: Path) -> None:
    """The image's root partition, copied, with the recipe's packages added by its own apt."""
    from .tree import apt_answer

    assert recipe.cloud_image is not None, "only called for a cloud image"
    raw = scratch / "cloud.raw"
    host.run("qemu-img", "convert", "-O", "raw", recipe.cloud_image, raw, seconds=600)
    offset = root_offset(raw)
    script = scratch / "unpack.sh"
    script.write_text(UNPACK)
    private = ["unshare", "--mount", "--propagation", "private"]
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    # The way to the mirrors is this machine's own, as with mmdebstrap; the way is not kept in the image.
    options = [
        word for line in apt_answer("transport_options") for word in ("-o", line.rstrip(";").replace(' "', "=").rstrip('"'))
    ]
    packages = [*options, *recipe.profile.packages]
    host.run(*private, "sh", script, raw, str(offset), root, *packages, seconds=1800, env=environment)
    raw.unlink()
    for left in ("etc/cloud", "etc/network/interfaces.d", "var/lib/cloud", "boot"):
        shutil.rmtree(root / left, ignore_errors=True)
    for unit in ("cloud-init", "cloud-init-local", "cloud-config", "cloud-final"):
        link = root / f"etc/systemd/system/{unit}.service"
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")


def root_offset(raw: Path) -> int:
    """Where the largest Linux partition begins, in bytes."""
    table = json.loads(host.run("sfdisk", "-J", raw))["partitiontable"]
    linux = [part for part in table["partitions"] if part["type"].upper() in ROOT_TYPES]
    if not linux:
        raise LabError("the cloud image has no Linux partition", "name a Debian cloud image, or unset CLAWPOT_VM_CLOUD_IMAGE")
    return int(max(linux, key=lambda part: part["size"])["start"]) * int(table.get("sectorsize", 512))
