//! The boundaries between effects. In tests the server can be made to "crash" after any of them.

use clawpot_failpoint::{self as failpoint, Point};
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
    LinkGone,
}

impl Step {
    const fn point(self) -> Point {
        match self {
            Self::Named => Point::NetNamed,
            Self::Mounted => Point::NetMounted,
            Self::Taps => Point::NetTaps,
            Self::Veth => Point::NetVeth,
            Self::Configured => Point::NetConfigured,
            Self::Rules => Point::NetRules,
            Self::MarkedReady => Point::NetMarkedReady,
            Self::MarkedGiven => Point::NetMarkedGiven,
            Self::Admitted => Point::NetAdmitted,
            Self::MarkedUsed => Point::NetMarkedUsed,
            Self::Silenced => Point::NetSilenced,
            Self::Forgotten => Point::NetForgotten,
            Self::Unnamed => Point::NetUnnamed,
            Self::LinkGone => Point::NetLinkGone,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Steps {
    #[cfg(test)]
    crash_after: std::sync::Mutex<Option<Step>>,
}

impl Steps {
    pub(crate) fn reached(&self, step: Step) -> Result<()> {
        tracing::trace!(?step, "network slot");
        failpoint::reached(step.point());
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
