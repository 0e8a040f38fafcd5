//! Which VMM this host can run.
