//! One build: disks → nix → result → disks again, under a deadline, given up when the host hangs up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clawpot_common::builder::{CACHE, DEFAULT_TIMEOUT_SECS, INPUT, LOG_FILE, Request, Response};
use clawpot_common::v1::exec_exited::End;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{EnvVar, ExecExited, ExecStart};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::collect::{self, Collect};
use super::disks::Disks;
use super::log::Log;
use super::{Builder, Context, Failure};
use crate::console::say;
use crate::exec::attachment::attach;

/// Longest list of results that nix may print, bytes.
const MAX_RESULT: usize = 64 << 10;
/// Longest message of an `Err`, bytes: it fits a line with room to spare.
const MAX_MESSAGE: usize = 8 << 10;
/// How long processes that were killed may take to end.
const KILL: Duration = Duration::from_secs(5);

/// What was asked for, by whom, and whether they still want it.
#[derive(Debug)]
pub struct Order {
    flake_ref: String,
    attr: String,
    substitute: bool,
    timeout: Duration,
    deadline: Instant,
    answers: mpsc::Sender<Response>,
    /// Over: the host has hung up.
    cancel: oneshot::Receiver<()>,
    cancelled: Arc<AtomicBool>,
}

/// How the part with nix went.
struct Ran {
    exited: ExecExited,
    stdout: Vec<u8>,
}

/// What `nix build --json` prints of each installable.
#[derive(Debug, Deserialize)]
struct Built {
    outputs: BTreeMap<String, Option<String>>,
}

impl Order {
    /// Of a [`Request::Build`] that was checked.
    pub fn new(request: Request, answers: mpsc::Sender<Response>, cancel: oneshot::Receiver<()>) -> Self {
        let (flake_ref, attr, timeout_secs, substitute) = match request {
            Request::Build { flake_ref, attr, timeout_secs, substitute } => (flake_ref, attr, timeout_secs, substitute),
            Request::Ping => (String::new(), String::new(), None, false),
        };
        let timeout = Duration::from_secs(timeout_secs.unwrap_or(DEFAULT_TIMEOUT_SECS));
        let deadline = Instant::now() + timeout;
        Self { flake_ref, attr, substitute, timeout, deadline, answers, cancel, cancelled: Arc::default() }
    }

    /// A line for the host, which is waited for until the deadline. `false`: it has hung up.
    async fn tell(&mut self, line: String) -> bool {
        if self.cancelled.load(Ordering::Relaxed) {
            return false;
        }
        tokio::select! {
            biased;
            _ = &mut self.cancel => {
                self.cancelled.store(true, Ordering::Relaxed);
                false
            }
            // Beyond the deadline nobody waits for a host that does not read.
            _ = timeout_at(self.deadline, self.answers.send(Response::Log { line })) => true,
        }
    }

    fn too_long(&self) -> Failure {
        Failure(format!("the build took longer than {} s and was killed", self.timeout.as_secs()))
    }
}

/// Builds, and says how that went. `permit` is given back before that is said: whoever hears it can ask for the next.
pub async fn run(builder: &Arc<Builder>, mut order: Order, permit: OwnedSemaphorePermit) {
    let response = match build(builder, &mut order).await {
        Ok(out_path) => Response::Ok { out_path },
        Err(failure) => Response::Err { message: cut(failure.to_string()) },
    };
    drop(permit);
    if order.cancelled.load(Ordering::Relaxed) {
        return say("builder: the host hung up; its build was given up");
    }
    // A host that has gone in this very moment hears nothing.
    order.answers.send(response).await.unwrap_or_default();
}

async fn build(builder: &Arc<Builder>, order: &mut Order) -> Result<String, Failure> {
    let config = builder.config.clone();
    let with_input = order.flake_ref == INPUT;
    let (disks, log) = blocking(move || {
        let disks = Disks::mount(&config, with_input)?;
        collect::clear(&config.output.path)?;
        let path = config.output.path.join(LOG_FILE);
        let log = Log::create(&path).context(format_args!("making {}", path.display()))?;
        Ok((disks, log))
    })
    .await?;
    let mut log = log;
    let built = with_disks(builder, order, &mut log).await;
    let (lines, log) = blocking(move || Ok((log.finish(), log))).await?;
    for line in lines {
        order.tell(line).await;
    }
    if let Some(error) = log.broken() {
        order.tell(format!("[{LOG_FILE} is not whole: {error}]")).await;
    }
    // However it went: the host may take the disks away now.
    let released = blocking(move || disks.release()).await;
    let out_path = built?;
    released?;
    Ok(out_path)
}

async fn with_disks(builder: &Arc<Builder>, order: &mut Order, log: &mut Log) -> Result<String, Failure> {
    let ran = nix(builder, order, log).await?;
    if order.cancelled.load(Ordering::Relaxed) {
        return Err(Failure("the host has hung up".to_owned()));
    }
    if ran.exited.timed_out {
        return Err(order.too_long());
    }
    match ran.exited.end {
        Some(End::Code(0)) => {}
        Some(End::Code(code)) => {
            return Err(Failure(format!("nix build failed (exit code {code}): {}", log.last_words())));
        }
        Some(End::Signal(signal)) => {
            let words = log.last_words();
            return Err(Failure(format!("nix build was killed (signal {signal}; for want of memory?): {words}")));
        }
        None => return Err(Failure("nix build ended nobody knows how".to_owned())),
    }
    let out_path = result(&ran.stdout, &builder.config.store)?;
    let (config, deadline, cancelled) = (builder.config.clone(), order.deadline.into_std(), order.cancelled.clone());
    let path = PathBuf::from(&out_path);
    let collecting = blocking(move || {
        let (store, output, cancelled) = (&config.store, &config.output.path, &*cancelled);
        Collect { result: &path, store, output, deadline, cancelled }.run()
    });
    let mut collecting = std::pin::pin!(collecting);
    tokio::select! {
        collected = &mut collecting => collected?,
        _ = &mut order.cancel => {
            order.cancelled.store(true, Ordering::Relaxed);
            collecting.await?;
        }
    }
    Ok(out_path)
}

/// Runs nix to its end, its timeout's or the host's.
async fn nix(builder: &Arc<Builder>, order: &mut Order, log: &mut Log) -> Result<Ran, Failure> {
    let left = order.deadline.saturating_duration_since(Instant::now());
    let start = command(&builder.config.nix, order, left);
    let refused = |failed: clawpot_common::v1::ExecFailed| Failure(format!("starting nix: {}", failed.message));
    let exec = builder.execs.start(start).map_err(refused)?;
    let mut output = attach(&exec, [0, 0], stream::empty()).map_err(refused)?;
    let (mut stdout, mut exited) = (Vec::new(), None);
    while exited.is_none() {
        let frame = tokio::select! {
            biased;
            _ = &mut order.cancel, if !order.cancelled.load(Ordering::Relaxed) => {
                order.cancelled.store(true, Ordering::Relaxed);
                exec.kill();
                continue;
            }
            frame = output.next() => frame,
        };
        match frame.and_then(Result::ok).and_then(|output| output.frame) {
            Some(Out::Stderr(data)) => {
                for line in log.push(&data.data) {
                    if !order.cancelled.load(Ordering::Relaxed) && !order.tell(line).await {
                        exec.kill();
                    }
                }
            }
            Some(Out::Stdout(data)) if stdout.len() + data.data.len() <= MAX_RESULT => stdout.extend(data.data),
            Some(Out::Stdout(_)) => exec.kill(),
            Some(Out::Exited(end)) => exited = Some(end),
            Some(_) => {}
            None => {
                exec.kill();
                return Err(Failure("nix: its output was lost".to_owned()));
            }
        }
    }
    // What it left running would write on.
    clear_away(&exec.cgroup).await;
    let Some(exited) = exited else { return Err(Failure("nix: its end was lost".to_owned())) };
    Ok(Ran { exited, stdout })
}

async fn clear_away(cgroup: &crate::exec::cgroup::Cgroup) {
    let deadline = Instant::now() + KILL;
    // A cgroup that is gone had nobody in it.
    while matches!(cgroup.is_empty(), Ok(false)) && Instant::now() < deadline {
        cgroup.kill().unwrap_or_default();
        sleep(Duration::from_millis(10)).await;
    }
}

/// The program and its arguments, none of which a shell ever sees. Behind `--` nothing is an option.
fn command(nix: &str, order: &Order, timeout: Duration) -> ExecStart {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // As it is, whether or not it is a git work tree.
    let flake = if order.flake_ref == INPUT { format!("path:{INPUT}") } else { order.flake_ref.clone() };
    let installable = format!("{flake}#{}", order.attr);
    let mut argv = vec![
        nix,
        "--extra-experimental-features",
        "nix-command flakes",
        "build",
        "--no-link",
        "--json",
        "--print-build-logs",
        // The flake's directory is read-only; and what it wants to be configured is not its to say.
        "--no-write-lock-file",
        "--option",
        "accept-flake-config",
        "false",
    ];
    if order.substitute {
        // Beside what the image's own configuration names.
        argv.extend(["--option", "extra-substituters", CACHE]);
    }
    argv.extend(["--", &installable]);
    let env = [("LANG", "C.UTF-8"), ("NIX_SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")];
    ExecStart {
        exec_id: format!("build{:011}", NEXT.fetch_add(1, Ordering::Relaxed)),
        argv: argv.iter().map(|arg| Bytes::copy_from_slice(arg.as_bytes())).collect(),
        env: env.map(|(name, value)| EnvVar { name: name.into(), value: value.into() }).to_vec(),
        cwd: "/".to_owned(),
        timeout_ms: crate::micros(timeout) / 1000 + 1,
        ..ExecStart::default()
    }
}

/// The path of the result: of its output `out`, or the first that there is.
fn result(stdout: &[u8], store: &Path) -> Result<String, Failure> {
    let mut built: Vec<Built> = serde_json::from_slice(stdout).context("reading what nix says that it built")?;
    let mut outputs = built.pop().map(|built| built.outputs).unwrap_or_default();
    let path = outputs.remove("out").flatten().or_else(|| outputs.into_values().flatten().next());
    let path = path.ok_or_else(|| Failure("nix built nothing".to_owned()))?;
    // One name in the store, as all results have.
    if Path::new(&path).parent() != Some(store) || path.ends_with("/..") {
        return Err(Failure(format!("nix built {path}, which is not in {}", store.display())));
    }
    Ok(path)
}

fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        message.push('…');
    }
    message
}

/// What reads and writes disks is done beside the one thread that serves.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.context("working on the disks")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_asked_for_becomes_an_option_or_a_command() {
        let order = |flake_ref: &str, attr: &str, substitute| {
            let (flake_ref, attr) = (flake_ref.to_owned(), attr.to_owned());
            let request = Request::Build { flake_ref, attr, timeout_secs: None, substitute };
            Order::new(request, mpsc::channel(1).0, oneshot::channel().1)
        };
        let argv = |order: &Order| -> Vec<String> {
            let start = command("nix", order, Duration::from_secs(1));
            start.argv.iter().map(|arg| String::from_utf8(arg.to_vec()).unwrap()).collect()
        };
        for (flake_ref, attr, want) in [
            ("/build-in", "a.b", "path:/build-in#a.b"),
            ("; rm -rf /", "$(reboot)", "; rm -rf /#$(reboot)"),
            ("--option", "", "--option#"),
        ] {
            let argv = argv(&order(flake_ref, attr, false));
            assert_eq!(argv[argv.len() - 2..], ["--", want]);
            assert_eq!(argv.len(), 13);
        }
        // A cache is asked where the builder reaches it, and nowhere else.
        let argv = argv(&order("/build-in", "a", true));
        assert_eq!(argv[argv.len() - 5..], ["--option", "extra-substituters", CACHE, "--", "path:/build-in#a"]);
        assert_eq!(command("nix", &order("a", "b", false), Duration::from_millis(1500)).timeout_ms, 1501);
    }

    #[test]
    fn the_result_is_a_name_in_the_store() {
        let said = |text: &str| result(text.as_bytes(), "/nix/store".as_ref()).map_err(|failure| failure.to_string());
        let ok = r#"[{"drvPath":"/nix/store/x.drv","outputs":{"dev":"/nix/store/d","out":"/nix/store/abc-machine"}}]"#;
        assert_eq!(said(ok).unwrap(), "/nix/store/abc-machine");
        assert_eq!(said(r#"[{"outputs":{"bin":"/nix/store/b"}}]"#).unwrap(), "/nix/store/b");
        for bad in ["", "[]", r#"[{"outputs":{}}]"#, r#"[{"outputs":{"out":null}}]"#] {
            said(bad).unwrap_err();
        }
        for path in ["/etc", "/nix/store", "/nix/store/..", "/nix/store/../../etc", "/nix/store/a/b", "nix/store/a"] {
            assert!(said(&format!(r#"[{{"outputs":{{"out":"{path}"}}}}]"#)).unwrap_err().contains("not in /nix/store"));
        }
    }

    #[test]
    fn a_message_has_an_end() {
        let message = cut("ä".repeat(MAX_MESSAGE));
        assert!(message.len() <= MAX_MESSAGE + 3 && message.ends_with('…'));
    }
}
