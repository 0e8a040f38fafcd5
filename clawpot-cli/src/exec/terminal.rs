//! This program's terminal: raw while a terminal in a guest is attached, and itself again afterwards, come what may.

use std::sync::Mutex;

use clawpot_common::v1::TerminalSize;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal as it was, while it is raw. Global because a panic anywhere must be able to restore it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is raw while this lives.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// `None` when it is not wanted, or standard input is no terminal.
    pub fn enter_if(wanted: bool) -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin).ok().filter(|_| wanted)?;
        let mut raw = before.clone();
        raw.make_raw();
        *locked() = Some(before);
        let guard = Self(());
        tcsetattr(stdin, OptionalActions::Now, &raw).ok()?;
        Some(guard)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether a line needs a carriage return.
pub fn is_raw() -> bool {
    locked().is_some()
}

/// A panic's message is written to a terminal that is itself again.
pub fn restore_on_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        usual(info);
    }));
}

fn restore() {
    if let Some(before) = locked().take()
        && tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before).is_err()
    {
        // The terminal is gone: there is nothing to restore.
    }
}

fn locked() -> std::sync::MutexGuard<'static, Option<Termios>> {
    BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Of whichever of our streams is a terminal, else 24 × 80.
pub fn size() -> TerminalSize {
    let streams = [rustix::stdio::stdout(), rustix::stdio::stdin(), rustix::stdio::stderr()];
    let known = streams.into_iter().filter(|fd| isatty(fd)).find_map(|fd| tcgetwinsize(fd).ok());
    match known {
        Some(size) if size.ws_row > 0 && size.ws_col > 0 => {
            TerminalSize { rows: size.ws_row.into(), columns: size.ws_col.into() }
        }
        _ => TerminalSize { rows: 24, columns: 80 },
    }
}
