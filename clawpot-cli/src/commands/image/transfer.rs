//! Progress of long work on images: bars with bytes and rate on a terminal, nothing anywhere else.

use std::collections::HashMap;
use std::io::IsTerminal as _;

use clawpot_common::v1::image_progress::Event;
use clawpot_common::v1::{ImageDetail, ImageProgress, ImageStep};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tonic::{Response, Status, Streaming};

use crate::failure::Failure;
use crate::output::text::printable;

pub enum Ended {
    Done(Box<ImageDetail>),
    /// Ctrl-C: the stream is dropped, and with it the work.
    Interrupted,
}

/// Asks for the work and shows its steps until it is done.
pub async fn follow<F>(asked: F, doing: &str) -> Result<Ended, Failure>
where
    F: Future<Output = Result<Response<Streaming<ImageProgress>>, Status>>,
{
    // From the first moment on, so that no Ctrl-C is lost.
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|error| Failure::new("this program: listening for Ctrl-C").because(error.to_string()))?;
    let mut steps = tokio::select! {
        steps = asked => steps.map_err(|status| Failure::status(doing, &status))?.into_inner(),
        _ = interrupt.recv() => return Ok(Ended::Interrupted),
    };
    let mut bars = Bars::new();
    loop {
        let step = tokio::select! {
            step = steps.message() => step.map_err(|status| Failure::status(doing, &status))?,
            _ = interrupt.recv() => return Ok(Ended::Interrupted),
        };
        match step.map(|step| step.event) {
            Some(Some(Event::Done(image))) => return Ok(Ended::Done(Box::new(image))),
            Some(Some(Event::Step(step))) => bars.show(&step),
            Some(None) => {}
            None => return Err(Failure::new(format!("{doing}: the server ended it without a word"))),
        }
    }
}

struct Bars {
    /// None where stderr is no terminal.
    all: Option<MultiProgress>,
    by_id: HashMap<String, ProgressBar>,
}

impl Bars {
    fn new() -> Self {
        Self { all: std::io::stderr().is_terminal().then(MultiProgress::new), by_id: HashMap::new() }
    }

    fn show(&mut self, step: &ImageStep) {
        let Some(all) = &self.all else { return };
        let bar = self.by_id.entry(step.id.clone()).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(step.total_bytes));
            bar.set_prefix(short(&step.id));
            bar
        });
        let template = match step.total_bytes {
            0 => "{prefix:14} {bytes:>10} {msg}",
            _ => "{prefix:14} {bar:24} {bytes:>10}/{total_bytes:10} {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_length(step.total_bytes);
        bar.set_position(step.bytes);
        bar.set_message(message(step));
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if let Some(all) = &self.all
            && all.clear().is_err()
        {
            // The terminal is gone; so are the bars.
        }
    }
}

fn message(step: &ImageStep) -> String {
    let doing = printable(&step.doing);
    match step.bytes_per_second {
        0 => doing.into_owned(),
        rate => format!("{doing}, {}/s", indicatif::HumanBytes(rate)),
    }
}

/// Twelve digits of a digest, or the word that it is.
fn short(id: &str) -> String {
    printable(id.strip_prefix("sha256:").unwrap_or(id)).chars().take(12).collect()
}
