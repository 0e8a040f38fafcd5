use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::process::{Signal, getpid, kill_process};

use crate::Point;

const VARIABLE: &str = "CLAWPOT_FAILPOINTS";

/// Hits of the armed point since it was armed.
#[derive(Debug, Default)]
struct Count {
    order: String,
    hits: u32,
}

/// Read where it is needed, not handed down from `main`: this is a test's way in, and every driver has points.
fn directory() -> Option<&'static PathBuf> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIRECTORY.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)).as_ref()
}

pub(crate) fn is_fatal(point: Point) -> bool {
    static COUNT: Mutex<Option<Count>> = Mutex::new(None);
    let Some(directory) = directory() else { return false };
    // Held throughout, so that lines and hits are in one order.
    let mut guard = COUNT.lock().unwrap_or_else(PoisonError::into_inner);
    let hits = OpenOptions::new().append(true).create(true).open(directory.join("hits"));
    if let Err(error) = hits.and_then(|mut file| file.write_all(format!("{}\n", point.name()).as_bytes())) {
        // A hit that is not told would make the test believe in one that was never there.
        eprintln!("failpoint {}: {error}", point.name());
        die();
    }
    let armed = directory.join("armed");
    let Ok(order) = std::fs::read_to_string(&armed) else { return false };
    let count = guard.get_or_insert_default();
    if count.order != order {
        *count = Count { order, hits: 0 };
    }
    let (name, nth) = count.order.trim().split_once(' ').unwrap_or((count.order.trim(), "1"));
    if name != point.name() {
        return false;
    }
    count.hits += 1;
    let fatal = nth == count.hits.to_string() && std::fs::remove_file(armed).is_ok();
    if fatal {
        // Never unlocked: no other thread passes a point any more, and the last hit that is told is the one it died of.
        std::mem::forget(guard);
    }
    fatal
}

pub(crate) fn die() -> ! {
    loop {
        // A process may always kill itself, and does not come back from it.
        kill_process(getpid(), Signal::KILL).unwrap_or_default();
    }
}
