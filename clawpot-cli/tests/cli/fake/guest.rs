//! Programs of the fake guest. They live as long as the test, whatever becomes of the server.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use clawpot_common::v1::exec_exited::End;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::{ExecExited, ExecFailed, ExecStart, TerminalSize};
use tokio::sync::watch;

/// What a ring keeps that was not acknowledged, bytes.
const RING: usize = 256 << 10;

#[derive(Default)]
pub struct Guest {
    pub execs: Mutex<HashMap<String, Arc<Exec>>>,
}

pub struct Exec {
    pub inner: Mutex<Inner>,
    pub changed: watch::Sender<u64>,
}

/// Output from the first byte that is still kept.
#[derive(Default)]
pub struct Ring {
    pub base: u64,
    pub kept: VecDeque<u8>,
}

#[derive(Default)]
pub struct Inner {
    pub start: ExecStart,
    pub stdout: Ring,
    pub stderr: Ring,
    /// Accepted, not yet taken by the program.
    pub stdin: VecDeque<u8>,
    pub stdin_taken: u64,
    pub stdin_ended: bool,
    pub signals: Vec<i32>,
    pub sizes: Vec<TerminalSize>,
    pub hung_up: bool,
    pub ended: Option<End>,
    pub timed_out: bool,
}

impl Guest {
    /// Starts it, or finds the one that has this id.
    pub fn start(&self, start: ExecStart) -> Result<Arc<Exec>, ExecFailed> {
        let mut execs = self.execs.lock().unwrap();
        if let Some(exec) = execs.get(&start.exec_id) {
            return Ok(exec.clone());
        }
        if let Some(failed) = refusal(&start) {
            return Err(failed);
        }
        let inner = Inner { start: start.clone(), stdin_ended: !start.stdin, ..Inner::default() };
        let exec = Arc::new(Exec { inner: Mutex::new(inner), changed: watch::channel(0).0 });
        exec.with(Inner::begin);
        execs.insert(start.exec_id, exec.clone());
        Ok(exec)
    }

    pub fn find(&self, id: &str) -> Option<Arc<Exec>> {
        self.execs.lock().unwrap().get(id).cloned()
    }

    /// The only exec there is, once there is one.
    pub fn only(&self) -> Option<Arc<Exec>> {
        self.execs.lock().unwrap().values().next().cloned()
    }
}

fn refusal(start: &ExecStart) -> Option<ExecFailed> {
    let (reason, message) = match start.argv[0].as_ref() {
        b"nosuch" => (Reason::NotFound, ""),
        b"/etc" => (Reason::NotExecutable, "/etc: is a directory"),
        b"huge" => (Reason::TooLong, "E2BIG"),
        b"badcwd" => (Reason::BadCwd, "/nowhere: no such directory"),
        b"baduser" => (Reason::BadUser, "no user \"bob\" in /etc/passwd"),
        b"full" => (Reason::Resources, "no memory"),
        _ => return None,
    };
    Some(ExecFailed { reason: reason.into(), message: message.into() })
}

impl Exec {
    /// Something happened: the program goes on as far as it can, and whoever is attached looks.
    pub fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        let result = {
            let mut inner = self.inner.lock().unwrap();
            let result = act(&mut inner);
            inner.go_on();
            result
        };
        self.changed.send_modify(|count| *count += 1);
        result
    }
}

impl Ring {
    pub fn end(&self) -> u64 {
        self.base + u64::try_from(self.kept.len()).unwrap()
    }

    pub fn forget_below(&mut self, offset: u64) {
        let known = usize::try_from(offset.saturating_sub(self.base)).unwrap().min(self.kept.len());
        self.kept.drain(..known);
        self.base += u64::try_from(known).unwrap();
    }

    fn room(&self) -> usize {
        RING.saturating_sub(self.kept.len())
    }

    pub fn from(&self, offset: u64, most: usize) -> Bytes {
        let skip = usize::try_from(offset - self.base).unwrap();
        let to = (skip + most).min(self.kept.len());
        let (front, back) = self.kept.as_slices();
        let mut data = Vec::with_capacity(to - skip);
        data.extend_from_slice(&front[skip.min(front.len())..to.min(front.len())]);
        data.extend_from_slice(&back[skip.saturating_sub(front.len())..to.saturating_sub(front.len())]);
        data.into()
    }
}

impl Inner {
    fn word(&self, n: usize) -> String {
        self.start.argv.get(n).map(|word| String::from_utf8_lossy(word).into_owned()).unwrap_or_default()
    }

    fn begin(&mut self) {
        match self.word(0).as_str() {
            "echo" => self.print_and_exit(&format!("{}\n", self.word(1))),
            "both" => {
                self.stderr.kept.extend(b"to stderr\n");
                self.print_and_exit("to stdout\n");
            }
            "exit" => self.ended = Some(End::Code(self.word(1).parse().unwrap())),
            "die" => self.ended = Some(End::Signal(self.word(1).parse().unwrap())),
            "late" => (self.ended, self.timed_out) = (Some(End::Signal(9)), true),
            "show" => {
                let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
                let env: Vec<_> = self.start.env.iter().map(|var| (text(&var.name), text(&var.value))).collect();
                let start = &self.start;
                let shown = format!(
                    "env {env:?}\ncwd {:?}\nuser {:?}\ntimeout {}\nstdin {}\ntty {}\nsize {:?}\n",
                    start.cwd, start.user, start.timeout_ms, start.stdin, start.tty, start.size
                );
                self.print_and_exit(&shown);
            }
            _ => {}
        }
    }

    fn print_and_exit(&mut self, text: &str) {
        self.stdout.kept.extend(text.as_bytes());
        self.ended = Some(End::Code(0));
    }

    fn go_on(&mut self) {
        if self.hung_up {
            self.ended.get_or_insert(End::Signal(9));
        }
        match self.word(0).as_str() {
            _ if self.ended.is_some() => {}
            "cat" | "/bin/sh" => {
                let n = self.stdin.len().min(self.stdout.room());
                self.stdin_taken += u64::try_from(n).unwrap();
                self.stdout.kept.extend(self.stdin.drain(..n));
                self.ended = (self.stdin_ended && self.stdin.is_empty()).then_some(End::Code(0));
            }
            "yes" => {
                let room = self.stdout.room();
                self.stdout.kept.extend(std::iter::repeat_n(b'y', room));
            }
            // Ends at the first signal, as that signal tells.
            "sleep" => self.ended = self.signals.first().map(|number| End::Signal(*number)),
            // Catches every signal.
            "stubborn" => {}
            _ => {}
        }
    }

    pub fn exited(&self) -> Option<ExecExited> {
        self.ended.map(|end| ExecExited {
            end: Some(end),
            timed_out: self.timed_out,
            spawn_to_exit_us: 1_000,
            stdout_bytes: self.stdout.end(),
            stderr_bytes: self.stderr.end(),
        })
    }
}
