//! The boundaries between effects. In tests the server can be made to "crash" after any of them.

use clawpot_types::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Named,
    Mounted,
    Taps,
    Veth,
    Configured,
    Rules,
    MarkedReady,
    MarkedGiven,
    Admitted,
    MarkedUsed,
    Silenced,
    Forgotten,
    Unnamed,
}

#[derive(Debug, Default)]
pub(crate) struct Steps {
    #[cfg(test)]
    crash_after: std::sync::Mutex<Option<Step>>,
}

impl Steps {
    pub(crate) fn reached(&self, step: Step) -> Result<()> {
        tracing::trace!(?step, "network slot");
        self.crash(step)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a crash exists in tests only")]
    fn crash(&self, _step: Step) -> Result<()> {
        Ok(())
    }

    #[cfg(test)]
    fn crash(&self, step: Step) -> Result<()> {
        use clawpot_types::{Error, Kind};
        if *self.crash_after.lock().unwrap() == Some(step) {
            return Err(Error::new(Kind::Cancelled, format!("crash after {step:?}")));
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn crash_after(&self, step: Step) {
        *self.crash_after.lock().unwrap() = Some(step);
    }
}
