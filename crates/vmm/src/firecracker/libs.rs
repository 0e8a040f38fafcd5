//! Firecracker's programs, made fit for the jail.
//!
//! The jailer names a jail after its program's file, so the program is kept under one constant name, whatever the release's
//! archive calls it: `<dir>/firecracker`. Official releases are static. A build that is not (gnu target, unofficial) needs
//! its loader and libraries inside the chroot; they are collected once beside the program and linked into each jail.

use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use clawpot_host::fs::{clone_file, ensure_dir, hard_link, remove_file_if_exists, temp_name};
use clawpot_host::process::Tool;
use clawpot_types::{Error, Kind, Result};

use super::elf;
use super::version::Version;

/// File name of the program, and so of the directory of its jails.
pub const PROGRAM: &str = "firecracker";

/// The programs that machines are started with.
#[derive(Clone, Debug)]
pub struct Toolbox {
    /// Our copy of the program.
    pub program: PathBuf,
    pub jailer: PathBuf,
    pub version: Version,
    /// Loader first; empty for a static program.
    libraries: Vec<Library>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Library {
    /// Our copy.
    kept: PathBuf,
    /// Where the loader looks for it, below the jail's root.
    place: PathBuf,
}

impl Toolbox {
    /// Copies the program, and what it loads, into `dir`. Machines that run have their own copies and do not notice.
    /// `Unsupported`: too old a release; `FailedPrecondition`: program and jailer are of different releases, a library is
    /// missing.
    pub async fn install(firecracker: &Path, jailer: &Path, dir: &Path) -> Result<Self> {
        let version = version_of(firecracker).await?;
        let of_jailer = version_of(jailer).await?;
        if version != of_jailer {
            let what =
                format!("Firecracker: {} is {version}, but {} is {of_jailer}", firecracker.display(), jailer.display());
            return Err(Error::new(Kind::FailedPrecondition, what).hint("take both from one release"));
        }
        version.check()?;
        let loaded = match elf::interpreter(firecracker)? {
            Some(loader) => loaded_files(firecracker, loader).await?,
            None => Vec::new(),
        };
        ensure_dir(dir, 0o700)?;
        let program = dir.join(PROGRAM);
        keep(firecracker, &program)?;
        let mut libraries = Vec::new();
        for (number, (file, place)) in loaded.iter().enumerate() {
            let kept = dir.join(format!("library-{number}"));
            keep(file, &kept)?;
            libraries.push(Library { kept, place: below_root(place)? });
        }
        Ok(Self { program, jailer: jailer.to_owned(), version, libraries })
    }

    #[cfg(test)]
    pub fn for_tests(program: &str, jailer: &str) -> Self {
        Self {
            program: program.into(),
            jailer: jailer.into(),
            version: "1.16.1".parse().expect("a version"),
            libraries: Vec::new(),
        }
    }

    /// Whether the program is an official kind of build, which carries its own seccomp filters.
    #[must_use]
    pub fn is_static(&self) -> bool {
        self.libraries.is_empty()
    }

    /// Puts into a jail's root what the program loads before its first line runs. Again is fine.
    pub fn furnish(&self, root: &Path) -> Result<()> {
        for library in &self.libraries {
            let mut dir = root.to_owned();
            for part in library.place.parent().into_iter().flat_map(Path::components) {
                dir.push(part);
                ensure_dir(&dir, 0o755)?;
            }
            hard_link(&library.kept, &root.join(&library.place))?;
        }
        Ok(())
    }
}

async fn version_of(program: &Path) -> Result<Version> {
    let said = Tool::new(program).args(["--version"]).run().await?;
    Version::from_banner(&String::from_utf8_lossy(&said))
        .map_err(|error| error.context(format!("asking {} for its version", program.display())))
}

/// What the loader would load, each with the place where it looks for it.
async fn loaded_files(program: &Path, loader: PathBuf) -> Result<Vec<(PathBuf, PathBuf)>> {
    let what = || format!("collecting the libraries of {}", program.display());
    let said = Tool::new(&loader)
        .args([std::ffi::OsStr::new("--list"), program.as_os_str()])
        .run()
        .await
        .map_err(|error| error.context(what()))?;
    let libraries = listed(&String::from_utf8_lossy(&said)).map_err(|missing| {
        Error::new(Kind::FailedPrecondition, format!("{}: there is no {missing}", what()))
            .hint("install it, or take an official (static) release of Firecracker")
    })?;
    let mut files = vec![(loader.clone(), loader.clone())];
    files.extend(libraries.into_iter().filter(|file| *file != loader).map(|file| (file.clone(), file)));
    Ok(files)
}

/// The files in a loader's list: lines `name => /path (0x…)` and `/path (0x…)`. The kernel's own object has no path.
/// `Err`: a library that is not there.
fn listed(text: &str) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    for line in text.lines().map(str::trim) {
        let (name, found) = line.split_once(" => ").unwrap_or(("", line));
        if found.starts_with("not found") {
            return Err(name.to_owned());
        }
        let file = found.rsplit_once(" (").map_or(found, |(file, _address)| file);
        if file.starts_with('/') {
            files.push(PathBuf::from(file));
        }
    }
    Ok(files)
}

/// `/lib64/ld.so` → `lib64/ld.so`; a path that would lead out of the jail is none.
fn below_root(path: &Path) -> Result<PathBuf> {
    let plain: Option<PathBuf> = path
        .components()
        .filter(|part| *part != Component::RootDir)
        .map(|part| if let Component::Normal(name) = part { Some(name) } else { None })
        .collect();
    plain.ok_or_else(|| Error::new(Kind::InvalidArgument, format!("the library {}: not a plain path", path.display())))
}

/// A copy, whole or not there. Not a link: a package manager that writes into the original changes nobody's program.
fn keep(file: &Path, kept: &Path) -> Result<()> {
    let what = || format!("keeping a copy of {} at {}", file.display(), kept.display());
    let temp = temp_name(kept)?;
    clone_file(file, &temp).map_err(|error| error.context(what()))?;
    let placed = std::fs::set_permissions(&temp, std::fs::Permissions::from_mode(0o755))
        .and_then(|()| std::fs::rename(&temp, kept))
        .map_err(|error| Error::io(what(), error));
    placed.map_err(|error| match remove_file_if_exists(&temp) {
        Ok(()) => error,
        Err(cleanup) => error.and_cleanup(cleanup),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_loaders_list_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibgcc_s.so.1 => /lib/libgcc_s.so.1 (0x00007f00)\n\
                    \tlibc.so.6 => /lib/libc.so.6 (0x00007f01)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n";
        let files = listed(text).unwrap();
        assert_eq!(files, ["/lib/libgcc_s.so.1", "/lib/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
        assert_eq!(listed("\tlibx.so.1 => not found\n"), Err("libx.so.1".to_owned()));
        assert_eq!(listed("\tstatically linked\n"), Ok(Vec::new()));
    }

    #[test]
    fn places_stay_in_the_jail() {
        assert_eq!(below_root(Path::new("/lib64/ld.so")).unwrap(), Path::new("lib64/ld.so"));
        assert!(below_root(Path::new("/lib/../../etc/passwd")).is_err());
    }

    #[tokio::test]
    async fn programs_of_two_releases_or_of_an_old_one_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, says: &str| {
            let path = dir.path().join(name);
            clawpot_host::fs::replace_unsynced(&path, format!("#!/bin/sh\necho {says}\n").as_bytes(), 0o755).unwrap();
            path
        };
        let (new, old) = (program("new", "Firecracker v1.16.1"), program("old", "Firecracker v1.15.0"));
        let (jailer, older) = (program("jailer", "Jailer v1.16.0"), program("older", "Jailer v1.15.0"));
        let kept = dir.path().join("kept");
        for (program, jailer, kind) in [(&new, &jailer, Kind::FailedPrecondition), (&old, &older, Kind::Unsupported)] {
            let error = Toolbox::install(program, jailer, &kept).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{}", error.chain());
            assert!(!kept.exists(), "nothing of it is kept");
        }
    }

    #[tokio::test]
    async fn the_libraries_of_a_program_are_collected_and_linked_in() {
        let dir = tempfile::tempdir().unwrap();
        // Any dynamic program of a distribution.
        let program = Path::new("/bin/sh");
        let loader = elf::interpreter(program).unwrap().unwrap();
        let mut libraries = Vec::new();
        for (file, place) in loaded_files(program, loader.clone()).await.unwrap() {
            let kept = dir.path().join(libraries.len().to_string());
            keep(&file, &kept).unwrap();
            libraries.push(Library { kept, place: below_root(&place).unwrap() });
        }
        assert!(libraries.len() >= 2, "a loader and a C library: {libraries:?}");
        let root = dir.path().join("root");
        ensure_dir(&root, 0o755).unwrap();
        let toolbox = Toolbox { libraries, ..Toolbox::for_tests("/bin/sh", "/bin/sh") };
        assert!(!toolbox.is_static());
        toolbox.furnish(&root).unwrap();
        toolbox.furnish(&root).unwrap();
        let linked = std::fs::metadata(root.join(below_root(&loader).unwrap())).unwrap();
        assert_eq!((linked.mode() & 0o777, linked.nlink()), (0o755, 2));
    }
}
