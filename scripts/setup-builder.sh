#!/usr/bin/env bash
# Builds the image of the microVMs in which `clawpot build` runs nix, and puts it into the image store as "builder". Does
# nothing when it is there already. nix is this machine's Debian's own (nix-bin).
#
#   scripts/setup-builder.sh [--packages a,b] [--upgrade]
#     --packages a,b Debian packages besides, for derivations that use the image's own programs
#     --upgrade      build it anew, with today's packages
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
case ${1:-} in
  -h | --help)
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
# git: flakes in repositories. e2fsprogs: root file systems.
exec "$here/setup-rootfs.sh" builder --only-packages bash,ca-certificates,coreutils,e2fsprogs,git,nix-bin \
  --files "$here/lib/builder-image" "$@"
