//! On a terminal: raw while attached, itself again afterwards.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::fake::Fake;
use crate::{ended, eventually, kill};

struct Terminal {
    ours: OwnedFd,
    theirs: File,
    /// Everything that was written to it.
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn open() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
        let theirs = std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, sink) = (File::from(ours.try_clone().unwrap()), seen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = reader.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
        });
        let terminal = Self { ours, theirs, seen };
        terminal.resize(30, 100);
        terminal
    }

    fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.theirs, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(self.theirs.as_fd()).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    fn spawn(&self, fake: &Fake, args: &[&str]) -> Child {
        let end = || Stdio::from(self.theirs.try_clone().unwrap());
        fake.clawpot(args).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap()
    }

    fn type_in(&self, keys: &[u8]) {
        File::from(self.ours.try_clone().unwrap()).write_all(keys).unwrap();
    }

    fn shows(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).contains(text)
    }
}

#[test]
fn keys_pass_and_the_terminal_is_itself_again() {
    let fake = Fake::with_vm();
    let terminal = Terminal::open();
    // Without a command: a login shell, which this guest takes for cat.
    let child = terminal.spawn(&fake, &["exec", "web"]);
    eventually("it is raw", || terminal.is_raw());
    eventually("it runs", || fake.state.guest.only().is_some());
    let exec = fake.state.guest.only().unwrap();
    {
        let inner = exec.inner.lock().unwrap();
        assert!(inner.start.tty && inner.start.stdin);
        assert_eq!(inner.start.argv.len(), 2);
        assert_eq!(inner.start.size.map(|size| (size.rows, size.columns)), Some((30, 100)));
        assert_eq!(inner.start.env[0].value.as_ref(), b"xterm");
    }
    // Ctrl-C is a key like any other.
    terminal.type_in(b"ls\x03\r");
    eventually("it is echoed by the guest", || terminal.shows("ls\x03\r"));
    terminal.resize(40, 120);
    kill(&child, Signal::WINCH);
    eventually("the size is told", || {
        exec.inner.lock().unwrap().sizes.iter().any(|size| (size.rows, size.columns) == (40, 120))
    });
    exec.with(|inner| inner.ended = Some(clawpot_common::v1::exec_exited::End::Code(4)));
    assert_eq!(ended(child).code, Some(4));
    assert!(!terminal.is_raw());
}

#[test]
fn the_terminal_is_restored_when_it_fails_too() {
    let mut fake = Fake::with_vm();
    let terminal = Terminal::open();
    let child = terminal.spawn(&fake, &["exec", "-t", "web", "--", "stubborn"]);
    eventually("it is raw", || terminal.is_raw());
    eventually("it runs", || fake.state.guest.only().is_some());
    fake.state.guest.only().unwrap().with(|inner| inner.stdout.kept.extend(b"attached"));
    eventually("it is attached", || terminal.shows("attached"));
    fake.kill();
    eventually("the loss is told", || terminal.shows("the server is gone"));
    // Nothing could forward it: the key is for the program itself.
    terminal.type_in(b"\x03");
    assert_eq!(ended(child).code, Some(130));
    assert!(!terminal.is_raw());
}

#[test]
fn a_terminal_is_not_read_without_being_asked() {
    let fake = Fake::with_vm();
    let terminal = Terminal::open();
    let child = terminal.spawn(&fake, &["exec", "web", "--", "show"]);
    assert_eq!(ended(child).code, Some(0));
    eventually("it is shown", || terminal.shows("stdin false\r\ntty false"));
    let child = terminal.spawn(&fake, &["exec", "-i", "web", "--", "show"]);
    assert_eq!(ended(child).code, Some(0));
    eventually("it is shown", || terminal.shows("stdin true\r\ntty false"));
}

#[test]
fn a_console_cannot_drive_the_terminal() {
    let fake = Fake::with_vm();
    fake.state.console.lock().unwrap().extend(b"boot\r\n\x1b[2Jgone\r\n");
    let terminal = Terminal::open();
    assert_eq!(ended(terminal.spawn(&fake, &["logs", "web"])).code, Some(0));
    eventually("it is shown", || terminal.shows("boot\r\n^[[2Jgone\r\n"));
}
