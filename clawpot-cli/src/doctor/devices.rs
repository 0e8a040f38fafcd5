//! TUN and the kernel's modules.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use super::check::Check;

/// What the slots' network is made of, and what shows that a kernel without modules has it built in.
const MODULES: [&str; 4] = ["tun", "veth", "nf_tables", "nf_nat"];

pub fn tun() -> Check {
    judge_tun(&OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(drop))
}

fn judge_tun(opened: &io::Result<()>) -> Check {
    let fix = "`sudo modprobe tun`, and for every boot `echo tun | sudo tee /etc/modules-load.d/tun.conf`";
    match opened {
        Ok(()) => Check::ok("tun", "/dev/net/tun opens"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Check::unknown("tun", "/dev/net/tun may not be opened by this user", "run `sudo clawpot doctor`")
        }
        Err(error) => Check::fail("tun", format!("/dev/net/tun: {error}"), fix),
    }
}

/// What the kernel says of its modules. `None` where it says nothing.
#[derive(Debug, Default)]
struct Kernel {
    /// Names in `/proc/modules` and `/sys/module`.
    present: BTreeSet<String>,
    /// Names in `modules.builtin` and `modules.dep`.
    installed: Option<BTreeSet<String>>,
}

pub fn modules() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let dir = Path::new("/lib/modules").join(release.trim());
    let lists = [dir.join("modules.builtin"), dir.join("modules.dep")].map(|file| fs::read_to_string(file).ok());
    let loaded = fs::read_to_string("/proc/modules").unwrap_or_default();
    let mut present: BTreeSet<String> =
        loaded.lines().filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect();
    present.extend(
        MODULES.iter().filter(|name| Path::new("/sys/module").join(name).exists()).map(|name| (*name).to_owned()),
    );
    let installed =
        lists.iter().any(Option::is_some).then(|| lists.iter().flatten().flat_map(|list| names(list)).collect());
    judge_modules(&Kernel { present, installed })
}

/// `kernel/drivers/net/tun.ko.xz: …` → `tun`; the kernel writes `_` where a file may have `-`.
fn names(list: &str) -> Vec<String> {
    let file = |line: &str| Some(line.split(':').next()?.rsplit('/').next()?.split(".ko").next()?.replace('-', "_"));
    list.lines().filter_map(file).collect()
}

fn judge_modules(kernel: &Kernel) -> Check {
    const NAME: &str = "modules";
    let absent: Vec<&str> = MODULES.into_iter().filter(|name| !kernel.present.contains(*name)).collect();
    let Some(installed) = &kernel.installed else {
        return match absent.as_slice() {
            [] => Check::ok(NAME, MODULES.join(", ")),
            _ => Check::unknown(
                NAME,
                format!("this kernel lists no modules; not seen: {}", absent.join(", ")),
                "nothing, if VMs start; else use a kernel with these built in",
            ),
        };
    };
    let missing: Vec<&str> = absent.into_iter().filter(|name| !installed.contains(*name)).collect();
    match missing.as_slice() {
        [] => Check::ok(NAME, format!("{}: loaded, built in or loadable", MODULES.join(", "))),
        _ => Check::fail(
            NAME,
            format!("this kernel has no {}", missing.join(", ")),
            "boot a kernel with them, such as Debian's `linux-image-amd64`; after a kernel upgrade reboot first",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn tun_must_open() {
        assert_eq!(judge_tun(&Ok(())).level, Level::Ok);
        assert_eq!(judge_tun(&Err(io::ErrorKind::NotFound.into())).level, Level::Fail);
        assert_eq!(judge_tun(&Err(io::ErrorKind::PermissionDenied.into())).level, Level::Unknown);
    }

    #[test]
    fn modules_may_be_loaded_built_in_or_loadable() {
        let dep = "kernel/drivers/net/tun.ko:\nkernel/drivers/net/veth.ko.xz:\n\
                   kernel/net/netfilter/nf_tables.ko: kernel/net/netfilter/nfnetlink.ko\nkernel/net/netfilter/nf-nat.ko:\n";
        let installed = || Some(names(dep).into_iter().collect());
        assert_eq!(judge_modules(&Kernel { present: set(&[]), installed: installed() }).level, Level::Ok);
        assert_eq!(judge_modules(&Kernel { present: set(&["tun"]), installed: None }).level, Level::Unknown);
        assert_eq!(judge_modules(&Kernel { present: set(&MODULES), installed: None }).level, Level::Ok);
        let without = judge_modules(&Kernel { present: set(&["tun", "nf_nat"]), installed: Some(set(&["nf_tables"])) });
        assert_eq!((without.level, without.found.as_str()), (Level::Fail, "this kernel has no veth"));
    }
}
