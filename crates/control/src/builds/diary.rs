//! What a build said, kept behind it: whoever was not there, or whose terminal forgot, can read it.

use std::sync::atomic::{AtomicBool, Ordering};

use clawpot_core::ports::{ImageDetail, Workbench};
use clawpot_types::{Error, Result, VmId};
use tracing::warn;

use super::{Build, build_name};

/// One build's. A log that cannot be written ends no build.
pub struct Diary<'a> {
    bench: &'a dyn Workbench,
    pub build: &'a VmId,
    /// From when there is a VM on: what went wrong before is said in a line.
    begun: AtomicBool,
    broken: AtomicBool,
}

impl<'a> Diary<'a> {
    pub fn new(bench: &'a dyn Workbench, build: &'a VmId) -> Self {
        Self { bench, build, begun: AtomicBool::new(false), broken: AtomicBool::new(false) }
    }

    pub async fn begin(&self, build: &Build, actor: &str) {
        self.begun.store(true, Ordering::Relaxed);
        self.write(&[format!("== {} as {}, for {actor}", build.shown, build.name.name)]).await;
    }

    pub async fn write(&self, lines: &[String]) {
        if lines.is_empty() || !self.begun.load(Ordering::Relaxed) || self.broken.load(Ordering::Relaxed) {
            return;
        }
        let mut text = lines.join("\n");
        text.push('\n');
        if let Err(error) = self.bench.write_log(self.build, text).await {
            self.broken.store(true, Ordering::Relaxed);
            warn!(build = %self.build, error = error.chain(), "the log of a build is not whole");
        }
    }

    pub async fn end(&self, done: &Result<(ImageDetail, bool)>) {
        let line = match done {
            Ok((image, _)) => format!("== built: {}", image.info.digest),
            Err(error) => format!("== failed: {}", error.chain()),
        };
        self.write(&[line]).await;
    }

    /// `error` with where all of it can be read.
    pub fn pointed_at(&self, error: Error) -> Error {
        if !self.begun.load(Ordering::Relaxed) {
            return error;
        }
        let log = format!("all that it said: clawpot image log {}", build_name(self.build));
        let hint = error.next_step().map_or_else(|| log.clone(), |hint| format!("{hint}; {log}"));
        error.hint(hint)
    }
}
