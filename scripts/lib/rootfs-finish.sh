#!/usr/bin/env bash
# rootfs-finish.sh ROOT TIME: run when all packages are in and nothing is mounted in ROOT. Removes what belongs to this machine or to nobody,
# and every trace of the moment at which it was built: no file is newer than TIME (seconds since the epoch).
set -euo pipefail
root=${1:?the root directory of the image}
time=${2:-0}

# The VM's own: the agent writes hostname, hosts and resolv.conf of each boot.
: >"$root/etc/machine-id"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n' >"$root/etc/hosts"
rm -f -- "$root/etc/hostname" "$root/etc/resolv.conf"
: >"$root/etc/resolv.conf"
: >"$root/etc/fstab"

# How *this* machine reaches its mirrors is no business of the guest's.
rm -f -- "$root"/etc/apt/apt.conf.d/99mmdebstrap
# Packages that the guest installs itself come without manuals too, but with what they recommend left out.
printf 'APT::Install-Recommends "false";\n' >"$root/etc/apt/apt.conf.d/90clawpot"

rm -rf -- "$root"/var/lib/apt/lists/* "$root"/var/cache/* "$root"/var/log/* "$root"/var/lib/dpkg/*-old \
  "$root"/etc/*- "$root"/var/tmp/* "$root"/tmp/* "$root"/run/*
mkdir -p -- "$root"/var/cache/apt/archives/partial "$root"/var/lib/apt/lists/partial "$root"/var/log/apt
# devtmpfs covers it; without the nodes nothing is lost.
find "$root/dev" -mindepth 1 -delete

if [[ -e $root/etc/shadow ]]; then
  awk -F: -v OFS=: -v day="$((time / 86400))" '{ $3 = day; print }' "$root/etc/shadow" >"$root/etc/shadow.new"
  cat "$root/etc/shadow.new" >"$root/etc/shadow"
  rm -- "$root/etc/shadow.new"
fi
find "$root" -xdev -newermt "@$time" -exec touch --no-dereference --date="@$time" {} +
