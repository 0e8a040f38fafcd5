//! Settings of the host's kernel that let guests cost more than their cgroups say, or make VMs slow to start.

use std::fs;

use super::check::Check;

/// KVM's default, microseconds: no timer of a guest fires more often.
const TIMER_PERIOD: u64 = 200;
/// Messages of this level and below go to the console when `quiet` is said.
const QUIET: u64 = 4;
/// From here on the kernel is slow to move processes between cgroups, as it does for each KVM guest.
const SLOW_MOVES: (u64, u64) = (6, 0);

pub fn examine(kvm: bool) -> Vec<Check> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let seen = Seen {
        kvm,
        timer_period: text("/sys/module/kvm/parameters/min_timer_period_us").trim().parse().ok(),
        huge_pages: text("/sys/module/kvm/parameters/nx_huge_pages").trim().to_owned(),
        multihit: text("/sys/devices/system/cpu/vulnerabilities/itlb_multihit").trim().to_owned(),
        release: text("/proc/sys/kernel/osrelease"),
        favours_moves: text("/proc/self/mountinfo").lines().any(|line| line.contains("favordynmods")),
    };
    vec![timer(&seen), starts(&seen), console(&text("/proc/cmdline"), &text("/proc/sys/kernel/printk"))]
}

#[derive(Debug, Default)]
struct Seen {
    kvm: bool,
    timer_period: Option<u64>,
    huge_pages: String,
    multihit: String,
    release: String,
    favours_moves: bool,
}

/// A guest's timer is a thread of the kernel's, outside the VM's cgroup.
fn timer(seen: &Seen) -> Check {
    const NAME: &str = "kvm timers";
    match seen.timer_period.filter(|_| seen.kvm) {
        None => Check::ok(NAME, "no KVM here"),
        Some(period) if period >= TIMER_PERIOD => Check::ok(NAME, format!("a guest's fires every {period} µs at most")),
        Some(period) => Check::warn(
            NAME,
            format!("a guest's may fire every {period} µs: that costs CPU which its cgroup does not count"),
            format!(
                "`echo options kvm min_timer_period_us={TIMER_PERIOD} | sudo tee /etc/modprobe.d/kvm.conf`, then reboot"
            ),
        ),
    }
}

fn starts(seen: &Seen) -> Check {
    const NAME: &str = "kvm start";
    let version = seen.release.split(['.', '-']).map(|part| part.trim().parse::<u64>());
    let mut version = version.map_while(Result::ok);
    let slow = (version.next().unwrap_or(0), version.next().unwrap_or(0)) >= SLOW_MOVES;
    if !seen.kvm || !slow || seen.huge_pages == "never" || seen.favours_moves {
        return Check::ok(NAME, "nothing delays it");
    }
    let moves = "`sudo mount -o remount,favordynmods /sys/fs/cgroup` (where it is version 2)";
    let fix = match seen.multihit.as_str() {
        // Without the flaw its mitigation is not needed.
        "Not affected" => {
            format!("`echo options kvm nx_huge_pages=never | sudo tee /etc/modprobe.d/kvm.conf` and reboot, or {moves}")
        }
        _ => moves.to_owned(),
    };
    Check::warn(NAME, "each VM's start waits some 10 ms for a thread of KVM's to change its cgroup", fix)
}

/// Judges `/proc/cmdline` and `/proc/sys/kernel/printk`.
fn console(cmdline: &str, printk: &str) -> Check {
    const NAME: &str = "host console";
    let serial =
        |word: &str| word.strip_prefix("console=").is_some_and(|at| at.starts_with("ttyS") || at.starts_with("ttyAMA"));
    let level = printk.split_whitespace().next().and_then(|level| level.parse::<u64>().ok());
    match level.filter(|level| *level > QUIET) {
        Some(level) if cmdline.split_whitespace().any(serial) => Check::warn(
            NAME,
            format!("the kernel's messages up to level {level} go to a serial line, and what causes one waits for it"),
            "`sudo sysctl -w kernel.printk=1`, and for every boot `quiet loglevel=1` on the kernel's command line",
        ),
        Some(level) => Check::ok(NAME, format!("messages up to level {level}, to no serial line")),
        None => Check::ok(NAME, "quiet"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    fn seen() -> Seen {
        Seen {
            kvm: true,
            timer_period: Some(200),
            huge_pages: "N".into(),
            multihit: "Not affected".into(),
            release: "6.1.0-56-amd64\n".into(),
            favours_moves: false,
        }
    }

    #[test]
    fn timers_may_not_fire_without_end() {
        assert_eq!(timer(&seen()).level, Level::Ok);
        assert_eq!(timer(&Seen { timer_period: Some(50), ..seen() }).level, Level::Warn);
        assert_eq!(timer(&Seen { timer_period: Some(50), kvm: false, ..seen() }).level, Level::Ok);
    }

    #[test]
    fn slow_starts_have_two_remedies() {
        assert!(starts(&seen()).fix.unwrap().contains("nx_huge_pages=never"));
        assert!(
            !starts(&Seen { multihit: "KVM: Mitigation: Split huge pages".into(), ..seen() })
                .fix
                .unwrap()
                .contains("never")
        );
        let fine = [
            Seen { huge_pages: "never".into(), ..seen() },
            Seen { favours_moves: true, ..seen() },
            Seen { release: "5.10.0-30-amd64".into(), ..seen() },
            Seen { kvm: false, ..seen() },
        ];
        assert!(fine.iter().all(|seen| starts(seen).level == Level::Ok));
    }

    #[test]
    fn a_serial_console_is_slow() {
        assert_eq!(console("root=/dev/sda console=ttyS0,115200", "7\t4\t1\t7\n").level, Level::Warn);
        assert_eq!(console("console=ttyS0 quiet", "4\t4\t1\t7\n").level, Level::Ok);
        assert_eq!(console("console=tty0", "7\t4\t1\t7\n").level, Level::Ok);
        assert_eq!(console("", "").level, Level::Ok);
    }
}
