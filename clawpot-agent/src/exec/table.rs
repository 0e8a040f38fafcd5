//! All execs of this machine by id, and what they share.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clawpot_common::EXEC_CHUNK;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::{ExecFailed, ExecStart};
use clawpot_types::ExecId;
use tokio::io::Interest;
use tokio::time::Instant;

use super::cgroup::Cgroups;
use super::driver::{Pipes, drive};
use super::io::{Io, input_pipe, output_pipe};
use super::pty;
use super::request::{Plan, failed, plan};
use super::resource::{Exec, Parts, State, bad};
use super::ring::Budget;
use super::spawn::{FileLimit, Stdio, spawn};
use crate::lock;
use crate::reaper::Reaper;
use crate::user::Users;

/// Execs that run at once; more are refused.
const MAX_RUNNING: usize = 1024;
/// Ended ones that are kept for a caller who was lost; beyond that those go of which everything was fetched, then the oldest.
const MAX_FINISHED: usize = 64;
/// How long an ended one is kept.
const KEEP: Duration = Duration::from_secs(600);

/// What execs need of their surroundings.
#[derive(Debug)]
pub struct Shared {
    pub reaper: Arc<Reaper>,
    pub cgroups: Cgroups,
    pub users: Users,
    pub files: Option<FileLimit>,
    pub budget: Arc<Budget>,
    /// How long a process whose caller was lost is held by a full ring before its oldest output is dropped.
    pub patience: Duration,
    /// One buffer to read into for all: it is never held over a wait.
    pub scratch: Mutex<Box<[u8]>>,
    null: File,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    execs: BTreeMap<ExecId, Arc<Exec>>,
    /// Ended, the oldest first.
    finished: VecDeque<(ExecId, Instant)>,
    closing: bool,
}

/// How [`Shared`] is made.
#[derive(Debug)]
pub struct Surroundings {
    pub reaper: Arc<Reaper>,
    pub cgroups: Cgroups,
    /// Where etc/passwd and etc/group are.
    pub root: PathBuf,
    pub files: Option<FileLimit>,
    /// Bytes of output and input that all execs together may hold.
    pub memory: usize,
    /// See [`Shared::patience`].
    pub patience: Duration,
}

impl Shared {
    pub fn new(surroundings: Surroundings) -> io::Result<Arc<Self>> {
        let Surroundings { reaper, cgroups, root, files, memory, patience } = surroundings;
        let scratch = Mutex::new(vec![0; EXEC_CHUNK].into_boxed_slice());
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let budget = Budget::new(memory);
        let users = Users::new(&root);
        Ok(Arc::new(Self { reaper, cgroups, users, files, budget, patience, scratch, null, table: Mutex::default() }))
    }

    /// Starts an exec, or finds the one that was started with this id.
    pub fn start(self: &Arc<Self>, start: ExecStart) -> Result<Arc<Exec>, ExecFailed> {
        let id = exec_id(&start.exec_id)?;
        self.sweep();
        {
            let table = lock(&self.table);
            if let Some(exec) = table.execs.get(&id) {
                return Ok(exec.clone());
            }
            if table.closing {
                return Err(failed(Reason::Resources, "the machine is shutting down"));
            }
            let running = table.execs.len().saturating_sub(table.finished.len());
            if running >= MAX_RUNNING {
                return Err(failed(
                    Reason::Resources,
                    format!("{running} execs are running, no more than {MAX_RUNNING} can"),
                ));
            }
        }
        let plan = plan(start, &self.users)?;
        let (exec, run) = self.spawn(id, &plan)?;
        lock(&self.table).execs.insert(exec.id.clone(), exec.clone());
        tokio::spawn(run);
        Ok(exec)
    }

    pub fn get(&self, id: &str) -> Result<Arc<Exec>, ExecFailed> {
        let id = exec_id(id)?;
        lock(&self.table).execs.get(&id).cloned().ok_or_else(|| {
            failed(Reason::UnknownExec, format!("exec {id}: not known here; it ended long ago, or never began"))
        })
    }

    /// Refuses new execs from now on.
    pub fn close(&self) {
        lock(&self.table).closing = true;
    }

    /// The processes and the task of a new exec; the task is not yet running.
    fn spawn(
        self: &Arc<Self>,
        id: ExecId,
        plan: &Plan,
    ) -> Result<(Arc<Exec>, impl Future<Output = ()> + use<>), ExecFailed> {
        let resources = |error: io::Error| failed(Reason::Resources, format!("exec {id}: making its pipes: {error}"));
        let ends = Ends::new(plan, &self.null).map_err(resources)?;
        let cgroup = self
            .cgroups
            .create()
            .map_err(|error| failed(Reason::Resources, format!("exec {id}: making its cgroup: {error}")))?;
        let stdio = Stdio { fds: ends.theirs.each_ref().map(AsFd::as_fd), tty: plan.tty.is_some() };
        let started = std::time::Instant::now();
        let (pid, exit) = self.reaper.spawn(|| spawn(plan, &stdio, &cgroup, self.files)).inspect_err(|_| {
            self.cgroups.remove(&cgroup);
        })?;
        let Ends { theirs, pipes, terminal } = ends;
        drop(theirs);
        let parts = Parts { id, pid, started, cgroup, terminal };
        let exec = Arc::new(Exec::new(parts, State::new(&self.budget, plan.stdin, self.patience), self.clone()));
        let (task, timeout) = (exec.clone(), plan.timeout);
        let run = async move {
            drive(&task, pipes, exit, timeout).await;
            task.shared.finished(&task);
        };
        Ok((exec, run))
    }

    fn finished(&self, exec: &Arc<Exec>) {
        {
            let mut table = lock(&self.table);
            while table.finished.len() >= MAX_FINISHED || (self.budget.exhausted() && !table.finished.is_empty()) {
                table.drop_one();
            }
            table.finished.push_back((exec.id.clone(), Instant::now()));
        }
        self.cgroups.remove(&exec.cgroup);
        self.cgroups.prepare();
    }

    /// Drops what was kept long enough, and cgroups whose last process has gone.
    fn sweep(&self) {
        self.cgroups.sweep();
        let mut table = lock(&self.table);
        while table.finished.front().is_some_and(|(_, since)| since.elapsed() >= KEEP) {
            table.drop_at(0);
        }
    }
}

impl Table {
    /// The oldest of which everything was fetched, or else the oldest.
    fn drop_one(&mut self) {
        let settled =
            self.finished.iter().position(|(id, _)| self.execs.get(id).is_some_and(|exec| exec.state().is_settled()));
        self.drop_at(settled.unwrap_or(0));
    }

    fn drop_at(&mut self, index: usize) {
        if let Some((id, _)) = self.finished.remove(index) {
            self.execs.remove(&id);
        }
    }
}

fn exec_id(text: &str) -> Result<ExecId, ExecFailed> {
    text.parse().map_err(|error: clawpot_types::Error| bad(error.chain()))
}

/// Both ends of everything that a process reads and writes.
struct Ends {
    theirs: [OwnedFd; 3],
    pipes: Pipes,
    terminal: Option<Arc<Io>>,
}

impl Ends {
    fn new(plan: &Plan, null: &File) -> io::Result<Self> {
        if let Some(size) = plan.tty {
            let pty::Pty { master, slave } = pty::open(plan.user.uid, size)?;
            let master = Arc::new(Io::new(master, Interest::READABLE | Interest::WRITABLE)?);
            let theirs = [slave.try_clone()?, slave.try_clone()?, slave];
            let pipes = Pipes { stdin: plan.stdin.then(|| master.clone()), stdout: Some(master.clone()), stderr: None };
            return Ok(Self { theirs, pipes, terminal: Some(master) });
        }
        let (stdin, their_stdin) = if plan.stdin {
            let (ours, theirs) = input_pipe()?;
            (Some(Arc::new(ours)), theirs)
        } else {
            (None, null.try_clone()?.into())
        };
        let (stdout, their_stdout) = output_pipe()?;
        let (stderr, their_stderr) = output_pipe()?;
        let pipes = Pipes { stdin, stdout: Some(Arc::new(stdout)), stderr: Some(Arc::new(stderr)) };
        Ok(Self { theirs: [their_stdin, their_stdout, their_stderr], pipes, terminal: None })
    }
}
