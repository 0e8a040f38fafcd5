"""Virtual machines to work and to test in: what `utils/devvm` and `ci/` share.

`host` looks at this machine, `accel` finds out how guests can run on it, `recipe` says what a golden image holds and `golden`
builds it, `qemu` and `ssh` speak to one machine, `machine` keeps it from launch to destroy.
"""
