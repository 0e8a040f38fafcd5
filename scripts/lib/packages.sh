# shellcheck shell=bash
# Debian packages, from the machine's own apt configuration. Sourced after common.sh.

# What is looked for, and the package that brings it: a command, or a file when it starts with "/".
build_needs=(cc=gcc /usr/include/x86_64-linux-gnu/sys/types.h=libc6-dev /usr/lib/x86_64-linux-gnu/libc.a=libc6-dev)
image_needs=(lz4=lz4 /usr/bin/python3=python3 mmdebstrap=mmdebstrap mke2fs=e2fsprogs unshare=util-linux
  /usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring)
run_needs=(qemu-system-x86_64=qemu-system-x86 nft=nftables ip=iproute2 mke2fs=e2fsprogs)
vm_needs=(qemu-system-x86_64=qemu-system-x86 qemu-img=qemu-utils ssh=openssh-client rsync=rsync mmdebstrap=mmdebstrap mke2fs=e2fsprogs
  lz4=lz4 zstd=zstd strip=binutils)
python_needs=("/usr/lib/python3.*/ensurepip/__main__.py=python3-venv" /etc/ssl/certs/ca-certificates.crt=ca-certificates)
registry_needs=(docker-registry=docker-registry skopeo=skopeo umoci=umoci openssl=openssl buildah=buildah)
volume_needs=(mkfs.xfs=xfsprogs debugfs=e2fsprogs)
lint_needs=(shellcheck=shellcheck)

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@"; }

apt_update() { apt_get -q update; }

# Whether apt has lists to choose from (a container image is delivered without). Read to the end: a reader that is done early would
# end ls by SIGPIPE, and what is there would be told as missing.
# shellcheck disable=SC2016 # apt's placeholder, not the shell's
apt_has_lists() { apt-get indextargets --format '$(FILENAME)' 'Created-By: Packages' 2>/dev/null | xargs -r ls -- 2>/dev/null | awk 'END { exit !NR }'; }

missing_packages() {
  local need thing
  for need in "$@"; do
    thing=${need%%=*}
    if [[ $thing == /* ]]; then
      # A pattern, as versions are part of some paths.
      compgen -G "$thing" >/dev/null || printf '%s\n' "${need#*=}"
    else
      command -v "$thing" >/dev/null || printf '%s\n' "${need#*=}"
    fi
  done | sort -u
}

install_packages() {
  if apt_has_lists && apt_get -q install -y --no-install-recommends "$@"; then return; fi
  # No lists, or lists so old that the files they name are gone.
  apt_update
  apt_get -q install -y --no-install-recommends "$@"
}

# need_packages NEED…: installs what is missing of them, and says so.
need_packages() {
  local -a missing
  mapfile -t missing < <(missing_packages "$@")
  if ((${#missing[@]} == 0)); then return; fi
  command -v apt-get >/dev/null || die "missing: ${missing[*]}, and this is not a Debian (no apt-get)" "install them by hand"
  if ((EUID != 0)); then as_root true; fi
  step "installing Debian packages: ${missing[*]}" install_packages "${missing[@]}"
  mapfile -t missing < <(missing_packages "$@")
  ((${#missing[@]} == 0)) || die "installed, yet still not found: ${missing[*]}" "see whether the packages bring what scripts/lib/packages.sh looks for"
}
