#!/usr/bin/env bash
# Builds a base image from Debian packages and puts it into the image store. Does nothing when it is there already.
#
#   scripts/setup-rootfs.sh [NAME] [--packages a,b | --only-packages a,b] [--files DIR] [--upgrade]
#     NAME           the image's name; default debian
#     --packages a,b Debian packages besides the usual ones
#     --only-packages a,b  these instead of the usual ones
#     --files DIR    a tree that is laid over that of the packages, owned by root
#     --upgrade      build it anew, with today's packages
# Mirrors, proxies and keys are those of this machine's own apt configuration; only its Debian suites are used.
# CLAWPOT_IMAGE_DIR names another store than assets/.
here=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=scripts/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=scripts/lib/packages.sh
source "$here/lib/packages.sh"
# shellcheck source=scripts/lib/debian.sh
source "$here/lib/debian.sh"

usual_packages=bash,coreutils,curl,ca-certificates,git,python3
# Nobody reads these in a microVM; they are a third of the packages' files.
left_out=('/usr/share/man/*' '/usr/share/doc/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/i18n/*'
  '/usr/share/lintian/*' '/usr/share/bash-completion/*' '/usr/share/gitweb/*')
# The same for every image: read-only file systems in separate VMs never meet.
filesystem_uuid=c1a4b07e-0000-4000-8000-000000000001

store() { as_root /usr/bin/python3 "$repo/scripts/lib/imagestore.py" "$assets" "$@"; }

# The tree to be laid over that of the packages.
files=""

# Names and contents of the files in it, and nothing else: of a work tree neither owners nor times mean anything.
files_digest() { (cd -- "$files" && find . -type f -print0 | sort -z | xargs -0 sha256sum) | sha256sum | cut -c1-16; }

# When the packages were published: the newest Date of the Release files. Files get no newer time than that.
publication_time() {
  find /var/lib/apt/lists -maxdepth 1 -type f -name '*Release' -exec sed -n 's/^Date: //p' {} + |
    while IFS= read -r date; do date -d "$date" +%s; done | sort -n | tail -n 1
}

# build_tree SCRATCH RELEASE PACKAGES: SCRATCH/root, everything as it will be in the image.
build_tree() {
  local scratch=$1 release=$2 packages=$3 pattern
  local -a options=(--mode=root --format=directory --variant=essential --include="$packages"
    --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io)
  for pattern in "${left_out[@]}"; do options+=(--dpkgopt="path-exclude=$pattern"); done
  # Licences stay with what they license.
  options+=(--dpkgopt='path-include=/usr/share/doc/*/copyright')
  while IFS= read -r pattern; do options+=(--aptopt="$pattern"); done < <(transport_options)
  if [[ -n $(ls -A /etc/apt/auth.conf.d 2>/dev/null) ]]; then options+=(--aptopt='Dir::Etc::netrcparts "/etc/apt/auth.conf.d"'); fi
  if [[ -s /etc/apt/auth.conf ]]; then options+=(--aptopt='Dir::Etc::netrc "/etc/apt/auth.conf"'); fi
  # Its own mount namespace: whatever mmdebstrap mounts is gone with it, also when it is killed. No SOURCE_DATE_EPOCH: with
  # it Python writes byte code that is checked against a hash of its source, which doubles the time of every import.
  as_root env -u SOURCE_DATE_EPOCH PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR="$scratch" unshare --mount --propagation private \
    mmdebstrap "${options[@]}" "$release" "$scratch/root" "$scratch/sources.list"
  if [[ -n $files ]]; then as_root cp -R --no-preserve=all -- "$files/." "$scratch/root/"; fi
  as_root "$repo/scripts/lib/rootfs-finish.sh" "$scratch/root" "$(publication_time)"
}

# pack_tree SCRATCH: SCRATCH/rootfs, ext4 that is never written to: no journal, no room for growth.
# ext4 rather than erofs: built into Debian's cloud kernel, made in half a second, and as fast to read under emulation
# (python3 with three imports 0.80 s from ext4, 0.85 s from erofs, 0.86 s from erofs with LZ4, all cold).
pack_tree() {
  local scratch=$1 mib inodes
  # Read by all of e2fsprogs in place of the clock.
  E2FSPROGS_FAKE_TIME=$(publication_time)
  export E2FSPROGS_FAKE_TIME=${E2FSPROGS_FAKE_TIME:-1}
  mib=$(($(as_root du -s --block-size=1M "$scratch/root" | cut -f1) * 5 / 4 + 64))
  inodes=$(($(as_root find "$scratch/root" -xdev | wc -l) + 1024))
  with_fake_time mke2fs -q -F -t ext4 -b 4096 -m 0 -N "$inodes" -L rootfs -U "$filesystem_uuid" \
    -E "hash_seed=$filesystem_uuid,lazy_itable_init=0" -O ^has_journal,^resize_inode -d "$scratch/root" "$scratch/rootfs" "${mib}M"
  with_fake_time resize2fs -M "$scratch/rootfs"
  inode_times "$scratch/rootfs" | as_root tee "$scratch/times" >/dev/null
  with_fake_time debugfs -w -f "$scratch/times" "$scratch/rootfs" >/dev/null
  with_fake_time e2fsck -fn "$scratch/rootfs"
}

with_fake_time() { as_root env E2FSPROGS_FAKE_TIME="$E2FSPROGS_FAKE_TIME" "$@"; }

# inode_times FILE: commands that set what mke2fs took over from the moment at which the tree was made. With that the same
# packages give the same bytes, so an image that was damaged can be built again under its old digest.
inode_times() {
  local total free
  read -r total free < <(as_root dumpe2fs -h "$1" 2>/dev/null | awk '/^Inode count/ { t = $3 } /^Free inodes/ { f = $3 } END { print t, f }')
  awk -v last="$((total - free))" -v time="$E2FSPROGS_FAKE_TIME" 'BEGIN {
    for (inode = 2; inode <= last; inode++) {
      split("atime ctime crtime", times); for (i in times) print "sif <" inode "> " times[i] " @" time
      split("atime_extra ctime_extra crtime_extra mtime_extra", extras); for (i in extras) print "sif <" inode "> " extras[i] " 0"
    }
  }'
}

# keep SCRATCH NAME INPUTS
keep() {
  store image "$2" --rootfs "$1/rootfs" --format ext4 --inputs "$3" --cwd /root --user root \
    --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env HOME=/root --env LANG=C.UTF-8
}

main() {
  local name=debian packages=$usual_packages upgrade="" release inputs scratch
  while (($# > 0)); do
    case $1 in
      --packages)
        packages+=,${2:?--packages needs a list}
        shift
        ;;
      --only-packages)
        packages=${2:?--only-packages needs a list}
        shift
        ;;
      --files)
        files=${2:?--files needs a directory}
        [[ -d $files ]] || die "--files $files: no such directory"
        shift
        ;;
      --upgrade) upgrade=yes ;;
      -h | --help)
        sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      -*) die "unknown argument: $1" "see --help" ;;
      *) name=$1 ;;
    esac
    shift
  done
  [[ $name =~ ^[a-z0-9][a-z0-9._-]{0,62}$ ]] || die "image name '$name': 1 to 63 of [a-z0-9._-], beginning with a letter or digit"
  [[ $packages =~ ^[a-z0-9.+:=~,-]+$ ]] || die "packages '$packages': names of Debian packages, separated by commas"

  need_packages "${image_needs[@]}"
  store init
  exec 9<"$assets/cache/lock"
  flock 9
  release=$(codename)
  inputs="$release $packages $(cat "$repo/scripts/setup-rootfs.sh" "$repo/scripts/lib/debian.sh" "$repo/scripts/lib/rootfs-finish.sh" | sha256sum | cut -c1-16)"
  if [[ -n $files ]]; then inputs+=" $(files_digest)"; fi
  if [[ -z $upgrade ]] && store has-image "$name" "$inputs"; then
    say "✓ image $name is there and whole"
    return
  fi

  if ! apt_has_lists || [[ -n $upgrade ]]; then step "apt-get update" apt_update; fi
  scratch=$(as_root mktemp -d "$assets/cache/.scratch.XXXXXX")
  as_root chmod 755 "$scratch"
  # shellcheck disable=SC2064 # this very directory, expanded now
  trap "abandon_step; as_root rm -rf --one-file-system -- '$scratch'" EXIT
  debian_sources "$release" | as_root tee "$scratch/sources.list" >/dev/null
  [[ -s $scratch/sources.list ]] ||
    die "apt knows no Debian suite $release with component main" "see 'apt-get indextargets'; add Debian's own suites to the apt sources"

  step "filling image $name ($release: $packages)" build_tree "$scratch" "$release" "$packages"
  step "packing image $name" pack_tree "$scratch"
  step "keeping image $name" keep "$scratch" "$name" "$inputs"
}

main "$@"
