//! `clawpot-mvm-client DIR [FLAKE_REF ATTR [TIMEOUT_SECS]]`: pings the builder behind `DIR/runtime/v.sock`, which is where
//! `mvm-guest` looks for it, and lets it build. Prints what it answers, a line each as `mvm-guest` writes it.
//! Exit code 0: the answer was Pong, or Ok.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use mvm_guest::builder_agent::{BUILDER_AGENT_PORT, BuilderRequest, BuilderResponse};
use mvm_guest::vsock::{DEFAULT_TIMEOUT_SECS, vsock_uds_path};

type Failure = Box<dyn std::error::Error>;

/// The crate has this for its other agent's port only.
fn connect(dir: &str) -> Result<BufReader<UnixStream>, Failure> {
    let mut stream = UnixStream::connect(vsock_uds_path(dir))?;
    stream.set_read_timeout(Some(Duration::from_secs(DEFAULT_TIMEOUT_SECS)))?;
    // In one piece: Firecracker hangs up where the first it reads is a part of the line.
    stream.write_all(format!("CONNECT {BUILDER_AGENT_PORT}\n").as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if !line.starts_with("OK ") {
        return Err(format!("expected OK, got {line:?}").into());
    }
    Ok(reader)
}

fn ask(connection: &mut BufReader<UnixStream>, request: &BuilderRequest) -> Result<(), Failure> {
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    connection.get_mut().write_all(line.as_bytes())?;
    Ok(())
}

fn hear(connection: &mut BufReader<UnixStream>) -> Result<BuilderResponse, Failure> {
    let mut line = String::new();
    connection.read_line(&mut line)?;
    let response: BuilderResponse = serde_json::from_str(&line).map_err(|error| format!("{line:?}: {error}"))?;
    writeln!(io::stdout(), "{}", serde_json::to_string(&response)?)?;
    Ok(response)
}

fn run() -> Result<bool, Failure> {
    let mut words = std::env::args().skip(1);
    let dir = words.next().ok_or("usage: clawpot-mvm-client DIR [FLAKE_REF ATTR [TIMEOUT_SECS]]")?;
    let mut connection = connect(&dir)?;
    ask(&mut connection, &BuilderRequest::Ping)?;
    let alive = hear(&mut connection)? == BuilderResponse::Pong;
    let Some(flake_ref) = words.next() else { return Ok(alive) };
    let attr = words.next().unwrap_or_default();
    let timeout_secs = words.next().map(|text| text.parse()).transpose()?;
    connection.get_ref().set_read_timeout(None)?;
    ask(&mut connection, &BuilderRequest::Build { flake_ref, attr, timeout_secs })?;
    loop {
        match hear(&mut connection)? {
            BuilderResponse::Ok { .. } => return Ok(alive),
            BuilderResponse::Err { .. } => return Ok(false),
            BuilderResponse::Log { .. } | BuilderResponse::Pong => {}
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(2)
        }
    }
}
