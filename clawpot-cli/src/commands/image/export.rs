//! `clawpot image export`.

use std::fs::File;
use std::io::{IsTerminal as _, Write};
use std::path::{Path, PathBuf};

use clap::builder::ValueHint;
use clawpot_common::v1::{ExportImageRequest, ImageChunk};
use clawpot_types::ImageRef;
use tonic::Streaming;

use crate::args::vm::image;
use crate::cli::Global;
use crate::commands::{INTERRUPTED, Outcome};
use crate::failure::Failure;
use crate::output;

/// Write an image to a file, to be imported on another host under the same digest
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or digest
    #[arg(value_parser = image)]
    image: ImageRef,
    /// Where to; `-` for standard output
    #[arg(value_hint = ValueHint::FilePath)]
    to: PathBuf,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    if args.to == Path::new("-") && std::io::stdout().is_terminal() {
        return Err(Failure::new("image export: it would go to your terminal").hint("name a file, or pipe it").code(2));
    }
    let doing = format!("image {}: exporting it", args.image);
    let request = ExportImageRequest { image: args.image.to_string() };
    let chunks =
        global.api().await?.images().export_image(request).await.map_err(|status| Failure::status(&doing, &status))?;
    let copied = async {
        if args.to == Path::new("-") {
            copy(chunks.into_inner(), &doing, output::raw).await
        } else {
            to_file(chunks.into_inner(), &doing, &args.to).await
        }
    };
    tokio::select! {
        copied = copied => copied.map(|()| 0),
        _ = tokio::signal::ctrl_c() => {
            remove(&half(&args.to));
            Ok(INTERRUPTED)
        }
    }
}

/// Whole or not there.
async fn to_file(chunks: Streaming<ImageChunk>, doing: &str, to: &Path) -> Result<(), Failure> {
    let half = half(to);
    let failed =
        |error: std::io::Error| Failure::new(format!("{}: writing it", to.display())).because(error.to_string());
    let mut file = File::create(&half).map_err(failed)?;
    let written = copy(chunks, doing, |bytes| file.write_all(bytes).map_err(failed)).await;
    let done = written.and_then(|()| file.sync_all().and_then(|()| std::fs::rename(&half, to)).map_err(failed));
    if done.is_err() {
        remove(&half);
    }
    done
}

async fn copy(
    mut chunks: Streaming<ImageChunk>,
    doing: &str,
    mut write: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    while let Some(chunk) = chunks.message().await.map_err(|status| Failure::status(doing, &status))? {
        write(&chunk.data)?;
    }
    Ok(())
}

fn half(to: &Path) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

fn remove(half: &Path) {
    // There may be none; nothing better can be done here in either case.
    std::fs::remove_file(half).unwrap_or_default();
}
