//! Named points behind (or inside) the server's effects on its host, at which a test lets the whole server die as by
//! `kill -9`: no destructor runs, no buffer is flushed.
//!
//! Without the feature `on`, as the server is shipped, [`reached`] is empty and no name of a point is in the binary; a test
//! of the server's looks. With it, the environment variable `CLAWPOT_FAILPOINTS` names a directory:
//!
//! - `armed`, written by the test at any time, names a point and which hit of it from then on is fatal: `net.taps_made 2`.
//!   The server removes it as it dies, so that the next one comes up unharmed;
//! - `hits` gets one line for each point that is passed, so that a test knows what there is to hit.
//!
//! - [`Point`] every point there is · `armed` what happens at one
//!
//! Called by the drivers, the store and control behind their effects; calls nobody.

mod point;

#[cfg(feature = "on")]
mod armed;

pub use point::Point;

/// Dies here if a test asked for it.
#[cfg(feature = "on")]
pub fn reached(point: Point) {
    if armed::is_fatal(point) {
        armed::die();
    }
}

/// Nothing.
#[cfg(not(feature = "on"))]
#[inline(always)]
pub const fn reached(_: Point) {}

/// For a child between fork and exec, which can look nothing up itself: whether its parent is to die now.
#[cfg(feature = "on")]
#[must_use]
pub fn is_fatal(point: Point) -> bool {
    armed::is_fatal(point)
}

/// No.
#[cfg(not(feature = "on"))]
#[inline(always)]
#[must_use]
pub const fn is_fatal(_: Point) -> bool {
    false
}
