//! A guest that halted. Firecracker has no power to switch off, so a kernel that is told to stops its processors instead, and the
//! VMM waits for them for ever; `halt` does the same to QEMU.
//!
//! What tells is the kernel's last line on the console. A guest's root can print the same, so its agent is asked as well: what
//! still answers is let be.

use std::path::Path;
use std::time::Duration;

use clawpot_core::{LastWords, MachineId};
use clawpot_host::{connect, unix};
use clawpot_types::guest::AGENT_PORT;

use crate::console::Consoles;

/// Between two looks at a console that is being written to, and two tries to end what has halted.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// For the agent of a guest that lives to take a connection; an emulated one on a loaded host needs seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// What became of it, for whoever asks afterwards.
pub(super) const HALTED: &str = "its guest had halted, and the server ended its VMM";

/// Returns once the guest has halted; else never. `socket`: the machine's, see [`crate::relay`].
pub(super) async fn halted(consoles: &Consoles, id: &MachineId, socket: &Path) {
    let mut written = consoles.written(&id.vm);
    loop {
        written.mark_unchanged();
        match consoles.last_words(&id.vm).await {
            Ok(LastWords::Down) if !answers(socket).await => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(machine = %id, error = error.chain(), "looking for a guest's last words"),
        }
        if written.changed().await.is_err() {
            // Nobody writes there any more.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn answers(socket: &Path) -> bool {
    let asked = async {
        let mut stream = unix::connect(socket).await.ok()?;
        connect::connect(&mut stream, AGENT_PORT.into()).await.ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.is_ok_and(|answer| answer.is_some())
}
