//! What a caller asks to run, checked and made ready for the child.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use bytes::Bytes;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::{ExecFailed, ExecStart};
use rustix::termios::Winsize;

use super::pty;
use crate::user::{User, UserError, Users};

/// The kernel's limit of one argument or variable, with its NUL, bytes: MAX_ARG_STRLEN = 32 pages.
const MAX_STRING: usize = 128 << 10;

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// All that is decided before the fork.
#[derive(Debug)]
pub struct Plan {
    /// Files to try in turn: one, or the program in each directory of PATH.
    pub candidates: Vec<CString>,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    pub cwd: CString,
    /// The directory was not asked for: "/" does where it does not exist.
    pub cwd_is_default: bool,
    pub user: User,
    pub timeout: Option<Duration>,
    pub stdin: bool,
    pub tty: Option<Winsize>,
    /// Bytes of arguments and environment, NULs included.
    pub string_bytes: usize,
}

/// `ExecFailed` with words.
pub fn failed(reason: Reason, message: impl Into<String>) -> ExecFailed {
    ExecFailed { reason: reason.into(), message: message.into() }
}

pub fn plan(start: ExecStart, users: &Users) -> Result<Plan, ExecFailed> {
    let user = users.resolve(&start.user).map_err(|error| bad_user(&error))?;
    if start.argv.first().is_none_or(Bytes::is_empty) {
        return Err(failed(Reason::BadRequest, "argv: needs a program"));
    }
    let cwd_is_default = start.cwd.is_empty();
    let cwd = if cwd_is_default {
        user.home.as_ref().map_or(b"/".to_vec(), |home| home.as_os_str().as_bytes().to_vec())
    } else if start.cwd.starts_with('/') {
        start.cwd.into_bytes()
    } else {
        return Err(failed(
            Reason::BadCwd,
            format!("working directory {:?}: must begin with /", shown(start.cwd.as_bytes())),
        ));
    };
    let variables = environment(&start.env, &user, start.tty)?;
    let candidates = candidates(&start.argv[0], variables.get(&b"PATH"[..]).map_or(DEFAULT_PATH, Vec::as_slice))?;
    let argv = start
        .argv
        .iter()
        .enumerate()
        .map(|(i, arg)| string(arg, || format!("argv[{i}]")))
        .collect::<Result<Vec<_>, _>>()?;
    let env = variables
        .into_iter()
        .map(|(name, value)| {
            let text = [&name[..], b"=", &value].concat();
            string(&text, || format!("environment variable {}", shown(&name)))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let string_bytes = argv.iter().chain(&env).map(|text| text.as_bytes_with_nul().len()).sum();
    Ok(Plan {
        candidates,
        argv,
        env,
        cwd: string(&cwd, || "working directory".into())?,
        cwd_is_default,
        user,
        timeout: (start.timeout_ms > 0).then(|| Duration::from_millis(start.timeout_ms)),
        stdin: start.stdin,
        tty: start.tty.then(|| start.size.map_or(pty::size(0, 0), |size| pty::size(size.rows, size.columns))),
        string_bytes,
    })
}

/// At most 80 characters of it, for a message.
pub fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(320)]);
    let mut shown: String = text.chars().take(80).collect();
    if shown.len() < bytes.len() {
        shown.push('…');
    }
    shown
}

fn environment(
    asked: &[clawpot_common::v1::EnvVar],
    user: &User,
    tty: bool,
) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ExecFailed> {
    let home = user.home.as_ref().map_or(&b"/"[..], |home| home.as_os_str().as_bytes());
    let mut variables = BTreeMap::from([
        (b"HOME".to_vec(), home.to_vec()),
        (b"USER".to_vec(), user.name.clone()),
        (b"LOGNAME".to_vec(), user.name.clone()),
        (b"PATH".to_vec(), DEFAULT_PATH.to_vec()),
    ]);
    if tty {
        variables.insert(b"TERM".to_vec(), b"xterm-256color".to_vec());
    }
    for variable in asked {
        if variable.name.is_empty() || variable.name.contains(&b'=') {
            let name = shown(&variable.name);
            return Err(failed(
                Reason::BadRequest,
                format!("environment variable {name:?}: a name is not empty and has no ="),
            ));
        }
        variables.insert(variable.name.to_vec(), variable.value.to_vec());
    }
    Ok(variables)
}

/// As execvp: a name with a slash is a path, another is looked for in each directory of PATH, "" being ".".
fn candidates(program: &Bytes, path: &[u8]) -> Result<Vec<CString>, ExecFailed> {
    if program.contains(&b'/') {
        return Ok(vec![string(program, || "argv[0]".into())?]);
    }
    path.split(|byte| *byte == b':')
        .map(|dir| {
            let dir = if dir.is_empty() { &b"."[..] } else { dir };
            string(&[dir, b"/", program].concat(), || "PATH".into())
        })
        .collect()
}

fn string(bytes: &[u8], what: impl Fn() -> String) -> Result<CString, ExecFailed> {
    if bytes.len() >= MAX_STRING {
        let (what, got, most) = (what(), bytes.len(), MAX_STRING - 1);
        let advice = "pass it on standard input, in a file, or in several arguments";
        return Err(failed(
            Reason::TooLong,
            format!("{what} is {got} bytes long; Linux takes at most {most} (128 KiB) in one: {advice}"),
        ));
    }
    CString::new(bytes).map_err(|_| failed(Reason::BadRequest, format!("{}: contains a NUL byte", what())))
}

fn bad_user(error: &UserError) -> ExecFailed {
    let mut message = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        message = format!("{message}: {source}");
    }
    failed(Reason::BadUser, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(argv: &[&[u8]]) -> ExecStart {
        ExecStart { argv: argv.iter().map(|arg| Bytes::copy_from_slice(arg)).collect(), ..ExecStart::default() }
    }

    fn nobody() -> Users {
        Users::new("/nonexistent".as_ref())
    }

    fn reason(start: ExecStart) -> Option<Reason> {
        plan(start, &nobody()).err().map(|failed| failed.reason())
    }

    #[test]
    fn each_bad_request_has_its_reason() {
        assert_eq!(reason(start(&[])), Some(Reason::BadRequest));
        assert_eq!(reason(start(&[b""])), Some(Reason::BadRequest));
        assert_eq!(reason(start(&[b"a\0b"])), Some(Reason::BadRequest));
        assert_eq!(reason(start(&[b"a", &[b'x'; MAX_STRING]])), Some(Reason::TooLong));
        assert_eq!(reason(start(&[b"a", &[b'x'; MAX_STRING - 1]])), None);
        assert_eq!(reason(ExecStart { user: "nobody".into(), ..start(&[b"a"]) }), Some(Reason::BadUser));
        assert_eq!(reason(ExecStart { cwd: "tmp".into(), ..start(&[b"a"]) }), Some(Reason::BadCwd));
    }

    #[test]
    fn path_is_that_of_the_request() {
        let path =
            clawpot_common::v1::EnvVar { name: Bytes::from_static(b"PATH"), value: Bytes::from_static(b"/a::/b") };
        let plan = plan(ExecStart { env: vec![path], ..start(&[b"x"]) }, &nobody()).unwrap();
        assert_eq!(plan.candidates, [c"/a/x".into(), c"./x".into(), CString::from(c"/b/x")]);
        assert!(plan.env.contains(&c"PATH=/a::/b".into()));
        assert!(plan.env.contains(&c"HOME=/root".into()));
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        let plan = plan(start(&[b"./x"]), &nobody()).unwrap();
        assert_eq!(plan.candidates, [CString::from(c"./x")]);
        assert_eq!(plan.cwd, CString::from(c"/root"));
        assert!(plan.cwd_is_default);
    }
}
