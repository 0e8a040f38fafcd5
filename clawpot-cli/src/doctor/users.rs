//! User ids: every slot has one that nobody else may have.

use std::ops::Range;

use super::check::Check;

/// The first slot's uid and gid, and how many there are: 32 blocks of 1,024 slots.
const FIRST: u64 = 1_900_000_000;
const SLOTS: u64 = 32 * 1_024;

/// A file, and where in its lines ids are.
const FILES: [(&str, Shape); 4] = [
    ("/etc/passwd", Shape::Id(2)),
    ("/etc/group", Shape::Id(2)),
    ("/etc/subuid", Shape::Range),
    ("/etc/subgid", Shape::Range),
];

#[derive(Clone, Copy)]
enum Shape {
    /// One id, in this field.
    Id(usize),
    /// `name:first:count`.
    Range,
}

pub fn examine() -> Check {
    // A file that is not there gives nobody anything.
    judge(FILES.map(|(file, shape)| (file, shape, std::fs::read_to_string(file).unwrap_or_default())))
}

fn judge<const N: usize>(files: [(&str, Shape, String); N]) -> Check {
    const NAME: &str = "user ids";
    let ours = FIRST..FIRST + SLOTS;
    let mut taken = Vec::new();
    for (file, shape, text) in files {
        for line in text.lines() {
            if ids(line, shape).is_some_and(|ids| ids.start < ours.end && ours.start < ids.end) {
                taken.push(format!("{} in {file}", line.split(':').next().unwrap_or_default()));
            }
        }
    }
    match taken.as_slice() {
        [] => Check::ok(NAME, format!("{FIRST} to {} are free", FIRST + SLOTS - 1)),
        taken => Check::fail(
            NAME,
            format!("{} to {} are the VMs', but belong to {} too", FIRST, FIRST + SLOTS - 1, taken.join(", ")),
            "give these other ids: a VM's process would have their rights",
        ),
    }
}

fn ids(line: &str, shape: Shape) -> Option<Range<u64>> {
    let field = |n: usize| line.split(':').nth(n)?.parse::<u64>().ok();
    match shape {
        Shape::Id(n) => field(n).map(|id| id..id.saturating_add(1)),
        Shape::Range => Some(field(1)?..field(1)?.saturating_add(field(2)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    fn look(passwd: &str, subuid: &str) -> Check {
        judge([("/etc/passwd", Shape::Id(2), passwd.to_owned()), ("/etc/subuid", Shape::Range, subuid.to_owned())])
    }

    #[test]
    fn ids_of_slots_belong_to_nobody_else() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/usr/sbin/nologin\n";
        assert_eq!(look(passwd, "me:100000:65536\n").level, Level::Ok);
        assert!(look("ldap:x:1900000005:5::/:/bin/sh\n", "").found.contains("ldap in /etc/passwd"));
        assert_eq!(look(passwd, "big:1000000000:1000000000\n").level, Level::Fail);
        assert_eq!(look(passwd, "after:1900032768:65536\n").level, Level::Ok);
        assert_eq!(look("garbage\n::\n", "x:y:z\nx:18446744073709551615:9\n").level, Level::Ok);
    }
}
