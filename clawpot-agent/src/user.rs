//! Users and groups of the image, read from its passwd and group files by hand: a static binary has no name services.
//!
//! The files belong to the guest: they may be absent, huge, or not files at all.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};

use crate::lock;

/// More of passwd or group is not read, bytes.
const MAX_FILE: u64 = 4 << 20;

/// The kernel's limit of supplementary groups.
const MAX_GROUPS: usize = 65_536;

/// Whom a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, `gid` among them.
    pub groups: Vec<u32>,
    /// Login name, or the number where there is none.
    pub name: Vec<u8>,
    pub home: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("user {name:?} is not in {}", file.display())]
    NoUser { name: String, file: PathBuf },
    #[error("group {name:?} is not in {}", file.display())]
    NoGroup { name: String, file: PathBuf },
    #[error("cannot read {}", file.display())]
    Unreadable {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// passwd and group of one root, read again only when they have changed: every exec asks.
#[derive(Debug)]
pub struct Users {
    passwd: Kept,
    group: Kept,
}

impl Users {
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { passwd: Kept::new(root.join("etc/passwd")), group: Kept::new(root.join("etc/group")) }
    }

    /// The user that `spec` names: "name", "uid", either with ":group" or ":gid"; empty is root.
    ///
    /// A number always works. As with container runtimes, a number without an entry has group 0, and a named group replaces
    /// the supplementary ones.
    pub fn resolve(&self, spec: &str) -> Result<User, UserError> {
        let (name, group) = match spec.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (spec, None),
        };
        let name = if name.is_empty() { "0" } else { name };
        let passwd = self.passwd.read()?;
        let number = name.parse::<u32>().ok();
        let entry = lines(&passwd).find_map(|line| Entry::parse(line).filter(|entry| entry.is(name, number)));
        let mut user = match (entry, number) {
            (Some(entry), _) => User {
                uid: entry.uid,
                gid: entry.gid,
                groups: Vec::new(),
                name: entry.name.to_vec(),
                home: Some(PathBuf::from(std::ffi::OsString::from_vec(entry.home.to_vec()))),
            },
            (None, Some(uid)) => {
                let home = (uid == 0).then(|| PathBuf::from("/root"));
                let name = if uid == 0 { b"root".to_vec() } else { name.into() };
                User { uid, gid: 0, groups: Vec::new(), name, home }
            }
            (None, None) => return Err(UserError::NoUser { name: name.into(), file: self.passwd.path.clone() }),
        };
        match group {
            Some(group) => user.gid = self.gid_of(group)?,
            // A guest without a group file has no supplementary groups; that is no reason not to run.
            None => user.groups = supplementary(&self.group.read()?, &user.name),
        }
        if !user.groups.contains(&user.gid) {
            user.groups.insert(0, user.gid);
        }
        Ok(user)
    }

    fn gid_of(&self, group: &str) -> Result<u32, UserError> {
        if let Ok(gid) = group.parse() {
            return Ok(gid);
        }
        lines(&self.group.read()?)
            .find_map(|line| {
                let mut fields = line.split(|byte| *byte == b':');
                let name = fields.next()?;
                (name == group.as_bytes()).then(|| fields.nth(1).and_then(decimal))?
            })
            .ok_or_else(|| UserError::NoGroup { name: group.into(), file: self.group.path.clone() })
    }
}

struct Entry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

impl<'a> Entry<'a> {
    /// `name:password:uid:gid:comment:home:shell`; `None` where a line is not that.
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = decimal(fields.nth(1)?)?;
        let gid = decimal(fields.next()?)?;
        let home = fields.nth(1)?;
        Some(Self { name, uid, gid, home })
    }

    fn is(&self, name: &str, number: Option<u32>) -> bool {
        self.name == name.as_bytes() || number == Some(self.uid)
    }
}

/// Gids of the groups whose member list has `name`.
fn supplementary(group: &[u8], name: &[u8]) -> Vec<u32> {
    lines(group)
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b':').skip(2);
            let gid = decimal(fields.next()?)?;
            fields.next()?.split(|byte| *byte == b',').any(|member| member == name).then_some(gid)
        })
        .take(MAX_GROUPS - 1)
        .collect()
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

fn decimal(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A file as it was last read.
#[derive(Debug)]
struct Kept {
    path: PathBuf,
    last: Mutex<Option<(Stamp, Arc<[u8]>)>>,
}

/// Device, inode, size, and the times of the last changes of content and of anything.
type Stamp = [(u64, i64); 3];

impl Kept {
    fn new(path: PathBuf) -> Self {
        Self { path, last: Mutex::default() }
    }

    /// What the file holds; nothing where it does not exist or is not a file.
    fn read(&self) -> Result<Arc<[u8]>, UserError> {
        let stamp = match std::fs::metadata(&self.path) {
            Ok(found) => stamp(&found),
            Err(error) if is_absent(&error) => return Ok(Arc::default()),
            Err(error) => return Err(self.unreadable(error)),
        };
        if let Some((at, text)) = &*lock(&self.last)
            && *at == stamp
        {
            return Ok(text.clone());
        }
        let (stamp, text) = self.read_now().map_err(|error| self.unreadable(error))?;
        *lock(&self.last) = Some((stamp, text.clone()));
        Ok(text)
    }

    fn read_now(&self) -> io::Result<(Stamp, Arc<[u8]>)> {
        // Not blocking: the guest may have put a FIFO there.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = File::from(rustix::fs::open(&self.path, flags, Mode::empty())?);
        let found = open.metadata()?;
        let mut text = Vec::new();
        if found.is_file() {
            open.take(MAX_FILE).read_to_end(&mut text)?;
        }
        Ok((stamp(&found), text.into()))
    }

    fn unreadable(&self, source: io::Error) -> UserError {
        UserError::Unreadable { file: self.path.clone(), source }
    }
}

fn stamp(found: &Metadata) -> Stamp {
    let size = i64::try_from(found.size()).unwrap_or(i64::MAX);
    let [changed, touched] = [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())]
        .map(|(seconds, nanos)| (seconds.unsigned_abs(), nanos));
    [(found.dev().rotate_left(32) ^ found.ino(), size), changed, touched]
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(clippy::disallowed_methods, reason = "a fixture has no crash to survive")]
    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/bash\n\
             # not an entry\n\
             broken:x:abc:1::/:\n\
             +nis::::::\n\
             dev:x:1000:1000:Dev,,,:/home/dev:/bin/sh\n\
             1234:x:77:77::/srv:\n",
        )
        .unwrap();
        std::fs::write(
            root.path().join("etc/group"),
            "root:x:0:\nsudo:x:27:alice,dev\ndocker:x:998:dev\nshort:x:5\ndev:x:1000:\nadev:x:6:adev,devx\n",
        )
        .unwrap();
        root
    }

    fn summary(spec: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        let root = root();
        let user = Users::new(root.path()).resolve(spec).map_err(|error| error.to_string())?;
        Ok((user.uid, user.gid, user.groups, String::from_utf8(user.name).unwrap()))
    }

    #[test]
    fn names_numbers_and_groups() {
        assert_eq!(summary(""), Ok((0, 0, vec![0], "root".into())));
        assert_eq!(summary("dev"), Ok((1000, 1000, vec![1000, 27, 998], "dev".into())));
        assert_eq!(summary("1000"), summary("dev"));
        assert_eq!(summary("dev:docker"), Ok((1000, 998, vec![998], "dev".into())));
        assert_eq!(summary("dev:5"), Ok((1000, 5, vec![5], "dev".into())));
        assert_eq!(summary("4242"), Ok((4242, 0, vec![0], "4242".into())));
        assert_eq!(summary("4242:4243"), Ok((4242, 4243, vec![4243], "4242".into())));
        assert_eq!(summary(":27"), Ok((0, 27, vec![27], "root".into())));
    }

    #[test]
    fn who_is_not_there_is_named_with_the_file() {
        assert!(summary("nobody").unwrap_err().contains("user \"nobody\" is not in"));
        assert!(summary("dev:wheel").unwrap_err().contains("group \"wheel\" is not in"));
        assert!(summary("broken").is_err());
        assert!(summary("4294967296").is_err());
    }

    #[test]
    fn without_files_numbers_still_work() {
        let root = tempfile::tempdir().unwrap();
        let user = Users::new(root.path()).resolve("").unwrap();
        assert_eq!((user.uid, user.home), (0, Some("/root".into())));
        assert_eq!(Users::new(root.path()).resolve("7").unwrap().uid, 7);
    }

    #[test]
    fn a_fifo_in_place_of_passwd_does_not_block() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.path().join("etc/passwd"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert_eq!(Users::new(root.path()).resolve("").unwrap().uid, 0);
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "a fixture has no crash to survive")]
    fn a_changed_file_is_read_again() {
        let root = root();
        let users = Users::new(root.path());
        assert_eq!(users.resolve("dev").unwrap().uid, 1000);
        std::fs::write(root.path().join("etc/passwd"), "dev:x:2000:2000::/:/bin/sh\n").unwrap();
        assert_eq!(users.resolve("dev").unwrap().uid, 2000);
        std::fs::remove_file(root.path().join("etc/passwd")).unwrap();
        assert!(users.resolve("dev").is_err());
    }
}
