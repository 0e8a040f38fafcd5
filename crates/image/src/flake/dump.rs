//! Files out of a file system that a guest made. The kernel never mounts it: `debugfs` reads it as the user of a namespace, in
//! the sandbox of [`crate::unpack::sandbox`], with nothing but that disk to read and one directory to write.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use clawpot_host::process::{Exit, find_program};
use clawpot_types::{Error, Kind, Result};

use crate::build::{Builder, TOO_LARGE, Work, blame, blocking, lines, report, take_back, unexpected, until_it_becomes};
use crate::unpack::limits::Limits;
use crate::unpack::sandbox::NO_LANDLOCK;
use crate::unpack::wire::{self, Order, Report};

/// Those of `files` (names in the disk's root) that there are, as files of these names in the directory that is given; each
/// is at most `most` bytes. The disk is the helper's meanwhile.
pub async fn dump(builder: &Builder, disk: &Path, files: &[&str], most: u64) -> Result<Work> {
    let what = || format!("reading the disk of results {}", disk.display());
    let file = File::open(disk).map_err(|error| Error::io(what(), error))?;
    let returned = file.try_clone().map_err(|error| Error::io(what(), error))?;
    let starter = builder.clone();
    let (helper, socket, stderr) = blocking(move || starter.start()).await?;
    let (pid, owners) = (helper.child()?.pid(), helper.owners.clone());
    let own = rustix::fs::Uid::from_raw(owners.from);
    rustix::fs::fchown(&file, Some(own), Some(rustix::fs::Gid::from_raw(owners.from)))
        .map_err(|errno| Error::io(what(), errno.into()))?;
    let files: Vec<String> = files.iter().map(|name| (*name).to_owned()).collect();
    let talk = blocking(move || {
        match report(&socket)? {
            Report::Unshared => owners.map(pid)?,
            other => return Err(unexpected(&other)),
        }
        dialog(&socket, &file, files, most)
    })
    .await;
    let exit = helper.child()?.wait().await?;
    // Also on failure nothing of it is left once that is told.
    let (work, owners) = helper.done()?;
    let work = blocking(move || {
        // Before the next helper can have the same owners: from here on they reach nothing of this one.
        let root = (Some(rustix::fs::Uid::ROOT), Some(rustix::fs::Gid::ROOT));
        rustix::fs::fchown(&returned, root.0, root.1)
            .map_err(|errno| Error::io("taking back the disk of results", errno.into()))?;
        take_back(&work.dir)?;
        drop(owners);
        Ok(work)
    })
    .await?;
    let failed = match (talk, exit) {
        (Ok(()), exit) if exit.is_success() => match complaint(&stderr) {
            None => return Ok(work),
            Some(error) => error.context(what()),
        },
        (Ok(()), Exit::Signal(TOO_LARGE)) => Error::new(
            Kind::Exhausted,
            format!("a file of the result is larger than {} MiB", most >> 20),
        )
        .hint(
            "that is the most for a kernel, the size of the disk of results (--disk), or what the image store has left",
        ),
        (Ok(()), exit) => blame(Error::new(Kind::Internal, what()), exit, &stderr),
        (Err(error), exit) => blame(error, exit, &stderr),
    };
    blocking(move || {
        drop(work);
        Err(failed)
    })
    .await
}

/// `debugfs` ends well whatever it met. A file that is not there is no matter of its; anything else it says means that what it read
/// is not what was written.
fn complaint(stderr: &File) -> Option<Error> {
    // Its name and version; a name that it does not find; what the helper said before it became debugfs.
    let usual = |line: &str| {
        line.starts_with("debugfs 1.") || line.contains("File not found by ext2_lookup") || line == NO_LANDLOCK
    };
    let said: Vec<_> = lines(stderr).into_iter().filter(|line| !usual(line)).take(5).collect();
    if said.is_empty() {
        return None;
    }
    let said = said.join("; ");
    if said.contains("No space left") {
        return Some(Error::new(Kind::Exhausted, said));
    }
    Some(Error::new(Kind::Corrupt, format!("debugfs cannot read it: {said}")).hint("build it again"))
}

fn dialog(socket: &OwnedFd, disk: &File, files: Vec<String>, most: u64) -> Result<()> {
    let limits = Limits { bytes: most, ..Limits::default() };
    wire::send(socket.as_fd(), &Order::Mapped { limits }, Some(disk.as_fd()))?;
    let debugfs = find_program("debugfs", std::env::var_os("PATH").as_deref())
        .map_err(|error| error.hint("install the package e2fsprogs"))?;
    wire::send(socket.as_fd(), &Order::Dump { files, debugfs: debugfs.to_string_lossy().into_owned() }, None)?;
    match report(socket)? {
        Report::Making { .. } => until_it_becomes(socket),
        other => Err(unexpected(&other)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn complaint_of(said: &str) -> Option<Error> {
        let mut stderr = tempfile::tempfile().unwrap();
        stderr.write_all(said.as_bytes()).unwrap();
        complaint(&stderr)
    }

    #[test]
    fn only_what_debugfs_says_of_the_disk_counts() {
        let usual =
            format!("{NO_LANDLOCK}\ndebugfs 1.47.0 (5-Feb-2023)\nfc-base.json: File not found by ext2_lookup \n");
        assert!(complaint_of(&usual).is_none(), "a kernel without landlock builds as well");
        let damaged = format!("{usual}dump: Ext2 file too big while reading the file\n");
        assert_eq!(complaint_of(&damaged).unwrap().kind(), Kind::Corrupt);
        assert_eq!(complaint_of("dump: No space left on device\n").unwrap().kind(), Kind::Exhausted);
    }
}
