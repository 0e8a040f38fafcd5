//! The files of a flake's directory as a tar: the same files give the same bytes.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    /// Relative to it, sorted.
    names: Vec<PathBuf>,
}

impl Files {
    /// As nix takes them: of a git repository what git knows, as it is in the work tree; else, and with `all`, everything
    /// but `.git` and links to earlier results.
    pub fn of(dir: &Path, all: bool) -> io::Result<Self> {
        let mut names = match all {
            false if in_git(dir)? => known_to_git(dir)?,
            _ => everything(dir)?,
        };
        names.sort();
        names.dedup();
        Ok(Self { dir: dir.to_owned(), names })
    }

    /// Blocks until all of it is sent.
    pub fn send(self, to: impl Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(to);
        for name in &self.names {
            let path = self.dir.join(name);
            add(&mut tar, name, &path)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        }
        tar.into_inner()?.flush()
    }
}

fn add(tar: &mut tar::Builder<impl Write>, name: &Path, path: &Path) -> io::Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        // Removed in the work tree, and git does not know yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let kind = meta.file_type();
    let mut header = tar::Header::new_gnu();
    // What nix keeps of a file: whether it can be executed.
    header.set_mode(if is_executable(&meta) || kind.is_dir() { 0o755 } else { 0o644 });
    header.set_mtime(1);
    if kind.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        return tar.append_link(&mut header, name, std::fs::read_link(path)?);
    }
    if kind.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        return tar.append_data(&mut header, name, io::empty());
    }
    if !kind.is_file() {
        return Err(io::Error::other(
            "neither a file, a directory nor a symbolic link, which nix does not take either",
        ));
    }
    header.set_size(meta.len());
    let file = std::fs::File::open(path)?;
    // One that grows meanwhile is as long as it was; one that shrinks is an error of the archive.
    tar.append_data(&mut header, name, file.take(meta.len()))
}

fn is_executable(meta: &Metadata) -> bool {
    meta.is_file() && meta.permissions().mode() & 0o111 != 0
}

fn in_git(dir: &Path) -> io::Result<bool> {
    Ok(dir.canonicalize()?.ancestors().any(|above| above.join(".git").exists()))
}

fn known_to_git(dir: &Path) -> io::Result<Vec<PathBuf>> {
    #[expect(clippy::disallowed_methods, reason = "crates/host is the server's; this only asks what files there are")]
    let mut git = std::process::Command::new("git");
    git.arg("-C").arg(dir).args(["ls-files", "-z", "--cached"]).stdin(Stdio::null());
    let hint = "; to take all files of the directory, name it path:DIR";
    let said = git.output().map_err(|error| io::Error::new(error.kind(), format!("asking git: {error}{hint}")))?;
    if !said.status.success() {
        let why = String::from_utf8_lossy(&said.stderr);
        return Err(io::Error::other(format!(
            "git: {}{hint}",
            why.lines().next().unwrap_or("it failed without a word")
        )));
    }
    let names = said.stdout.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| PathBuf::from(OsStr::from_bytes(name))).collect())
}

fn everything(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut names, mut todo) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(below) = todo.pop() {
        for entry in std::fs::read_dir(dir.join(&below))? {
            let entry = entry?;
            let name = below.join(entry.file_name());
            let kind = entry.file_type()?;
            let top = below.as_os_str().is_empty();
            if top && (entry.file_name() == ".git" || (kind.is_symlink() && is_result(&entry.file_name()))) {
                continue;
            }
            if kind.is_dir() {
                todo.push(name.clone());
            }
            names.push(name);
        }
    }
    Ok(names)
}

/// What `nix build` leaves behind.
fn is_result(name: &OsStr) -> bool {
    name == "result" || name.as_bytes().starts_with(b"result-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::File::create(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    fn sent(dir: &Path, all: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        Files::of(dir, all).unwrap().send(&mut bytes).unwrap();
        bytes
    }

    fn names(bytes: &[u8]) -> Vec<String> {
        let mut archive = tar::Archive::new(bytes);
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn the_same_files_give_the_same_bytes_whatever_their_times() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for dir in &dirs {
            let dir = dir.path();
            write(&dir.join("flake.nix"), "{ }");
            std::fs::create_dir_all(dir.join("a/b")).unwrap();
            write(&dir.join("a/b/script"), "#!/bin/sh");
            std::fs::set_permissions(dir.join("a/b/script"), std::fs::Permissions::from_mode(0o700)).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", dir.join("link")).unwrap();
            std::os::unix::fs::symlink("/nix/store/x", dir.join("result")).unwrap();
            write(&dir.join(format!("a/{}", "long".repeat(60))), "x");
        }
        std::fs::File::open(dirs[1].path().join("flake.nix")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        let [first, second] = [0, 1].map(|n| sent(dirs[n].path(), true));
        assert_eq!(first, second);
        let long = format!("a/{}", "long".repeat(60));
        assert_eq!(names(&first), ["a", "a/b", "a/b/script", &long, "flake.nix", "link"]);
        let mut archive = tar::Archive::new(first.as_slice());
        let link =
            archive.entries().unwrap().map(Result::unwrap).find(|entry| entry.path().unwrap() == Path::new("link"));
        assert_eq!(link.unwrap().link_name().unwrap().unwrap(), Path::new("/etc/passwd"), "not followed");
    }

    #[test]
    fn of_a_repository_what_git_knows_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            #[expect(clippy::disallowed_methods, reason = "the real git")]
            let mut git = std::process::Command::new("git");
            git.arg("-C").arg(dir.path()).args(args).output().is_ok_and(|said| said.status.success())
        };
        if !git(&["init", "-q"]) {
            panic!("this test needs git");
        }
        for name in ["flake.nix", "secret", "gone"] {
            write(&dir.path().join(name), name);
        }
        assert!(git(&["add", "flake.nix", "gone"]));
        std::fs::remove_file(dir.path().join("gone")).unwrap();
        assert_eq!(names(&sent(dir.path(), false)), ["flake.nix"]);
        assert_eq!(names(&sent(dir.path(), true)), ["flake.nix", "secret"]);
    }
}
