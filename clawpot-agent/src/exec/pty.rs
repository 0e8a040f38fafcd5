//! A terminal for one exec.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Group of terminals on Debian and its like ("tty"); devpts is mounted with the same.
const TTY_GROUP: u32 = 5;

pub struct Pty {
    /// Ours; not blocking.
    pub master: OwnedFd,
    /// The process's.
    pub slave: OwnedFd,
}

/// A new terminal that belongs to `uid`, so that its programs can open it by name.
pub fn open(uid: u32, size: Winsize) -> io::Result<Pty> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    if uid != 0 {
        rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(TTY_GROUP)))?;
    }
    resize(&master, size)?;
    Ok(Pty { master, slave })
}

/// 24 × 80 where a side is 0.
#[must_use]
pub fn size(rows: u32, columns: u32) -> Winsize {
    let side = |value: u32, default| match u16::try_from(value).unwrap_or(u16::MAX) {
        0 => default,
        value => value,
    };
    Winsize { ws_row: side(rows, 24), ws_col: side(columns, 80), ws_xpixel: 0, ws_ypixel: 0 }
}

/// The foreground group gets SIGWINCH from the kernel.
pub fn resize(master: impl AsFd, size: Winsize) -> io::Result<()> {
    Ok(tcsetwinsize(master, size)?)
}
