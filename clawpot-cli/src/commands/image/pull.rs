//! `clawpot image pull`.

use std::io::{BufRead as _, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clawpot_common::v1::{PullImageRequest, RegistryCredentials};
use clawpot_types::ImageRef;

use super::transfer::{Ended, follow};
use crate::args::vm::image;
use crate::cli::Global;
use crate::commands::{INTERRUPTED, Outcome};
use crate::failure::Failure;
use crate::output::note;

/// Longest line of credentials, bytes: registries' tokens have some kilobytes.
const CREDENTIALS: u64 = 16 << 10;

/// Get an image from a registry
///
/// Pulling again goes on where the last pull broke off, and gets nothing that is there. Without --name the image is called by its
/// reference, and pulling moves that name along with the registry's tag.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:…
    reference: String,
    /// Its name here [default: the reference]
    #[arg(long, value_name = "NAME", value_parser = image)]
    name: Option<ImageRef>,
    /// Let the name mean the new image where it means another
    #[arg(long)]
    replace: bool,
    /// Talk to the registry without TLS; on this host that is tried unasked
    #[arg(long)]
    plain_http: bool,
    /// File with one line, USER:PASSWORD; `-` for standard input
    #[arg(long, value_name = "FILE")]
    credentials: Option<PathBuf>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let credentials = args.credentials.as_deref().map(credentials).transpose()?;
    let request = PullImageRequest {
        reference: args.reference.clone(),
        name: args.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        replace: args.replace,
        plain_http: args.plain_http,
        credentials,
    };
    let mut images = global.api().await?.images();
    let doing = format!("image {}: pulling it", args.reference);
    match follow(images.pull_image(request), &doing).await? {
        Ended::Done(image) => super::show(global, &image).map(|()| 0),
        Ended::Interrupted => {
            note("cancelled; what has come is kept for the next pull");
            Ok(INTERRUPTED)
        }
    }
}

/// Never from the command line, which every user of this machine can read.
fn credentials(path: &Path) -> Result<RegistryCredentials, Failure> {
    let what = format!("credentials {}", path.display());
    let mut line = String::new();
    if path == Path::new("-") {
        std::io::stdin().lock().take(CREDENTIALS).read_line(&mut line)
    } else {
        std::fs::File::open(path).and_then(|file| {
            if file.metadata()?.mode() & 0o044 != 0 {
                note(&format!("{what}: others can read it; chmod 600 it"));
            }
            std::io::BufReader::new(file.take(CREDENTIALS)).read_line(&mut line)
        })
    }
    .map_err(|error| Failure::new(format!("{what}: reading it")).because(error.to_string()))?;
    match line.trim_end_matches(['\r', '\n']).split_once(':') {
        Some((user, password)) if !user.is_empty() => {
            Ok(RegistryCredentials { user: user.to_owned(), password: password.to_owned() })
        }
        _ => Err(Failure::new(format!("{what}: not one line of USER:PASSWORD")).code(2)),
    }
}
