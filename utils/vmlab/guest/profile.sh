# shellcheck shell=sh
# What the image brought beside Debian's packages.
if [ -d /opt/rust/bin ]; then PATH=/opt/rust/bin:$PATH; fi
PATH=$HOME/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
export PATH
