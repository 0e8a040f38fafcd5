//! What tenants that do not trust one another could learn from each other through the host's memory and CPUs. Firecracker's
//! guide for production hosts leaves all of this to the operator; nothing of it keeps a VM from running.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use super::check::Check;

const CPUS: &str = "/sys/devices/system/cpu";
const MICROCODE: &str = "install the distribution's current kernel and `intel-microcode` or `amd64-microcode`, take \
                         `mitigations=` off the kernel's command line, and reboot; in a VM this is its provider's to do";

pub fn examine() -> Vec<Check> {
    let text = |path: &str| fs::read_to_string(path);
    vec![
        swap(text("/proc/swaps"), encrypted),
        ksm(text("/sys/kernel/mm/ksm/run").ok().as_deref()),
        smt(text(&format!("{CPUS}/smt/active")).ok().as_deref()),
        flaws(&verdicts(), &text("/proc/cmdline").unwrap_or_default()),
        ecc(Path::new("/sys/devices/system/edac/mc/mc0").exists()),
    ]
}

/// Judges `/proc/swaps`.
fn swap(swaps: io::Result<String>, encrypted: impl Fn(&str) -> bool) -> Check {
    const NAME: &str = "swap";
    let fix = "`sudo swapoff -a` and take it out of /etc/fstab, or encrypt it with a key that is never written down";
    let Ok(swaps) = swaps else { return Check::ok(NAME, "this kernel has none") };
    let all: Vec<&str> = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let bare: Vec<&str> = all.iter().copied().filter(|at| !at.starts_with("/dev/zram") && !encrypted(at)).collect();
    match (all.as_slice(), bare.as_slice()) {
        ([], _) => Check::ok(NAME, "none"),
        (all, []) => Check::ok(NAME, format!("{}: compressed memory or encrypted", all.join(", "))),
        (_, bare) => {
            Check::warn(NAME, format!("{}: what is in memory may come to lie readable on a disk", bare.join(", ")), fix)
        }
    }
}

/// Whether dm-crypt stands behind the device.
fn encrypted(device: &str) -> bool {
    let name = fs::canonicalize(device).ok();
    let name = name.as_deref().and_then(Path::file_name);
    let uuid = name.map(|name| Path::new("/sys/block").join(name).join("dm/uuid"));
    uuid.and_then(|uuid| fs::read_to_string(uuid).ok()).is_some_and(|uuid| uuid.starts_with("CRYPT-"))
}

/// Judges `/sys/kernel/mm/ksm/run`.
fn ksm(run: Option<&str>) -> Check {
    const NAME: &str = "ksm";
    match run.map(str::trim) {
        Some("1") => Check::warn(
            NAME,
            "same pages of different VMs are merged: how long a write takes tells one what the other has in memory",
            "`echo 2 | sudo tee /sys/kernel/mm/ksm/run`, and disable ksmtuned or what else turns it on",
        ),
        Some(_) => Check::ok(NAME, "off"),
        None => Check::ok(NAME, "this kernel has none"),
    }
}

/// Judges `/sys/devices/system/cpu/smt/active`.
fn smt(active: Option<&str>) -> Check {
    const NAME: &str = "smt";
    let fix = "`echo off | sudo tee /sys/devices/system/cpu/smt/control`, and for every boot `nosmt` on the kernel's \
               command line; not needed where all VMs are one owner's";
    match active.map(str::trim) {
        Some("0") => Check::ok(NAME, "off: no two VMs share a core at the same moment"),
        Some(_) => Check::warn(NAME, "on: two VMs may share a core, and watch each other through its caches", fix),
        None => Check::unknown(NAME, "this kernel does not tell", fix),
    }
}

/// What the kernel says of each known flaw of its CPUs.
fn verdicts() -> BTreeMap<String, String> {
    let entries = fs::read_dir(format!("{CPUS}/vulnerabilities")).into_iter().flatten().filter_map(Result::ok);
    let verdict = |entry: fs::DirEntry| {
        Some((entry.file_name().into_string().ok()?, fs::read_to_string(entry.path()).ok()?.trim().to_owned()))
    };
    entries.filter_map(verdict).collect()
}

fn flaws(verdicts: &BTreeMap<String, String>, cmdline: &str) -> Check {
    const NAME: &str = "cpu flaws";
    if verdicts.is_empty() {
        return Check::unknown(NAME, "this kernel does not tell", MICROCODE);
    }
    let open = verdicts.iter().filter(|(_, verdict)| verdict.to_ascii_lowercase().contains("vulnerable"));
    let mut open: Vec<&str> = open.map(|(flaw, _)| flaw.as_str()).collect();
    let weak = |word: &&str| word.starts_with("mitigations=") && (word.contains("off") || word.contains("no_guest"));
    open.extend(cmdline.split_whitespace().filter(weak));
    match open.as_slice() {
        [] => Check::ok(NAME, format!("{} known to this kernel, none open", verdicts.len())),
        open => Check::warn(NAME, format!("open: {}", open.join(", ")), MICROCODE),
    }
}

/// Whether a driver watches memory that corrects its errors.
fn ecc(watched: bool) -> Check {
    const NAME: &str = "memory";
    match watched {
        true => Check::ok(NAME, "corrects its errors (ECC)"),
        false => Check::unknown(
            NAME,
            "whether it corrects its errors (ECC) cannot be seen: one guest may flip another's bits (Rowhammer)",
            "see that it is DDR4 or later with ECC and target row refresh: `sudo dmidecode -t memory`; in a VM ask its \
             provider",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn swap_counts_where_it_is_readable() {
        let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        let level = |lines: &str| swap(Ok(format!("{head}{lines}")), |device| device == "/dev/dm-1").level;
        assert_eq!(level(""), Level::Ok);
        assert_eq!(level("/dev/zram0 partition 8 0 100\n/dev/dm-1 partition 8 0 -2\n"), Level::Ok);
        assert_eq!(level("/dev/zram0 partition 8 0 100\n/swapfile file 8 0 -2\n"), Level::Warn);
        assert_eq!(level("/dev/sda2 partition 8 0 -2\n"), Level::Warn);
        assert_eq!(swap(Err(io::ErrorKind::NotFound.into()), |_| false).level, Level::Ok);
    }

    #[test]
    fn merged_pages_and_shared_cores() {
        assert_eq!(["0\n", "1\n", "2\n"].map(|run| ksm(Some(run)).level), [Level::Ok, Level::Warn, Level::Ok]);
        assert_eq!(ksm(None).level, Level::Ok);
        assert_eq!(["0\n", "1\n"].map(|active| smt(Some(active)).level), [Level::Ok, Level::Warn]);
        assert_eq!(smt(None).level, Level::Unknown);
        assert_eq!([true, false].map(|watched| ecc(watched).level), [Level::Ok, Level::Unknown]);
    }

    #[test]
    fn the_kernels_verdicts_are_read() {
        let verdicts = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        let fine = verdicts(&[("mds", "Not affected"), ("retbleed", "Mitigation: untrained return thunk")]);
        assert_eq!(flaws(&fine, "quiet mitigations=auto").level, Level::Ok);
        let word = "mitigations=auto,no_guest_host";
        assert_eq!(flaws(&fine, word).found, format!("open: {word}"));
        let open = verdicts(&[
            ("mds", "Mitigation: Clear CPU buffers; SMT vulnerable"),
            ("old_microcode", "Vulnerable"),
            ("l1tf", "Not affected"),
        ]);
        assert_eq!(flaws(&open, "").found, "open: mds, old_microcode");
        assert_eq!(flaws(&BTreeMap::new(), "").level, Level::Unknown);
    }
}
