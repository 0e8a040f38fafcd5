//! Which instance a state directory is: a random id in a file of its own, made once.

use std::path::Path;

use clawpot_types::{Error, InstanceId, Kind, Result};

/// Holds the id and a newline.
const FILE: &str = "instance";

/// The id that `state_dir` bears; `None`: no such directory, or it bears none. `Corrupt`: not an id.
pub fn read(state_dir: &Path) -> Result<Option<InstanceId>> {
    let path = state_dir.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map(Some).map_err(|error: Error| {
            Error::new(Kind::Corrupt, format!("reading the instance id in {}", path.display())).because(error)
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("reading the instance id in {}", path.display()), error)),
    }
}

/// [`read`], or a new random id, written before it is returned. One server at a time holds a state directory.
pub fn read_or_create(state_dir: &Path) -> Result<InstanceId> {
    if let Some(instance) = read(state_dir)? {
        return Ok(instance);
    }
    let mut bytes = [0; InstanceId::LEN];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::io("drawing an instance id", errno.into()))?;
    let instance = InstanceId::from_random(bytes);
    clawpot_host::fs::replace(&state_dir.join(FILE), format!("{instance}\n").as_bytes(), 0o644)?;
    Ok(instance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
        assert_eq!(read(&dir.path().join("gone")).unwrap(), None);
        let instance = read_or_create(dir.path()).unwrap();
        assert_eq!(read_or_create(dir.path()).unwrap(), instance);
        clawpot_host::fs::replace(&dir.path().join(FILE), b"NOT AN ID", 0o644).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind(), Kind::Corrupt);
    }
}
