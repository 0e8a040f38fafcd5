//! `FLAKE[#ATTR]` as it was typed.

use std::path::{Path, PathBuf};

use clawpot_types::ImageRef;

use crate::failure::Failure;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flake {
    Local {
        dir: PathBuf,
        /// Also what git does not know.
        all: bool,
        attr: String,
    },
    Remote {
        reference: String,
        attr: String,
    },
}

impl Flake {
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let (reference, attr) = text.split_once('#').unwrap_or((text, ""));
        let attr = attr.to_owned();
        let (path, all) = match reference.strip_prefix("path:") {
            Some(path) => (path, true),
            None => (reference, false),
        };
        let reference_there =
            !all && (reference.contains("://") || reference.split('/').next().unwrap_or("").contains(':'));
        if reference_there {
            return Ok(Self::Remote { reference: reference.to_owned(), attr });
        }
        let dir = PathBuf::from(if path.is_empty() { "." } else { path });
        if !dir.join("flake.nix").exists() {
            let what = format!("flake {text}: there is no {}", dir.join("flake.nix").display());
            return Err(Failure::new(what)
                .hint("name the directory of a flake, or one that nix fetches, as github:OWNER/REPO")
                .code(2));
        }
        Ok(Self::Local { dir, all, attr })
    }

    /// For nix; empty where the directory is sent.
    pub fn reference(&self) -> &str {
        match self {
            Self::Local { .. } => "",
            Self::Remote { reference, .. } => reference,
        }
    }

    pub fn attr(&self) -> &str {
        match self {
            Self::Local { attr, .. } | Self::Remote { attr, .. } => attr,
        }
    }

    /// What an image of it is called where nobody says: `None` where that is no name.
    pub fn name(&self) -> Option<String> {
        let last = match self {
            Self::Local { dir, .. } => dir.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned(),
            Self::Remote { reference, .. } => {
                let path = reference.split(['?', '@']).next()?.trim_end_matches('/');
                // github:OWNER/REPO/REF: the repository.
                let part = match path.split_once(':') {
                    Some((kind, rest)) if !rest.starts_with("//") && kind != "git+file" => rest.split('/').nth(1)?,
                    _ => Path::new(path).file_name()?.to_str()?,
                };
                part.trim_end_matches(".git").trim_end_matches(".tar.gz").to_owned()
            }
        };
        let name = last.to_lowercase();
        matches!(name.parse::<ImageRef>(), Ok(ImageRef::Name(_))).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_and_references_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let app = dir.path().join("App");
        std::fs::create_dir(&app).unwrap();
        std::fs::File::create(app.join("flake.nix")).unwrap();
        let path = app.display().to_string();
        let local = |all, attr: &str| Flake::Local { dir: app.clone(), all, attr: attr.to_owned() };
        assert_eq!(Flake::parse(&path).unwrap(), local(false, ""));
        assert_eq!(
            Flake::parse(&format!("{path}#packages.x86_64-linux.web")).unwrap(),
            local(false, "packages.x86_64-linux.web")
        );
        assert_eq!(Flake::parse(&format!("path:{path}#a#b")).unwrap(), local(true, "a#b"));
        assert_eq!(local(false, "").name().as_deref(), Some("app"));
        for (text, name) in [
            ("github:owner/Repo#x", Some("repo")),
            ("github:owner/repo/v1.2", Some("repo")),
            ("https://example.org/x/app.tar.gz", Some("app")),
            ("git+https://example.org/app.git?ref=main", Some("app")),
        ] {
            let flake = Flake::parse(text).unwrap();
            assert!(matches!(flake, Flake::Remote { .. }), "{text}");
            assert_eq!(flake.name().as_deref(), name, "{text}");
        }
        let missing = Flake::parse("/nowhere#x").unwrap_err();
        assert_eq!(missing.exit_code(), 2);
    }
}
