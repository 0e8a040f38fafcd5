//! One build in a builder VM: a request, then lines until its last word.
//!
//! What is not read stays with the guest: one piece of the connection and the lines cut of it are all that is held here.

use std::time::Duration;

use async_trait::async_trait;
use clawpot_common::builder::{self, INPUT, Line, Lines, Request, Response};
use clawpot_core::ports::{BoxStream, BuildOrder, BuilderGuest, BuilderSays, FlakeSource, GuestEndpoint};
use clawpot_types::{Error, Kind, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

use crate::client::clean;
use crate::dial::{self, Stream};

/// Read of the connection at once, bytes.
const PIECE: usize = 16 << 10;
/// Lines that are cut and not yet taken.
const AHEAD: usize = 16;
/// Lines in a row that are no response: after these it is no builder that speaks.
const NONSENSE: u32 = 100;
/// For the request, some hundred bytes, to leave.
const SEND: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, Default)]
pub struct BuilderClient;

#[async_trait]
impl BuilderGuest for BuilderClient {
    async fn build(&self, endpoint: &GuestEndpoint, order: BuildOrder) -> Result<BoxStream<Result<BuilderSays>>> {
        let request = request(order)?;
        let port = u16::try_from(builder::PORT)
            .map_err(|error| Error::new(Kind::Internal, "builder: its port").because(error))?;
        let mut stream = dial::stream(endpoint, Some(port)).await?;
        let line = builder::encode(&request)
            .map_err(|error| Error::new(Kind::Internal, "builder: encoding the request").because(error))?;
        match tokio::time::timeout(SEND, stream.write_all(&line)).await {
            Ok(sent) => sent.map_err(|error| lost("sending the request", error))?,
            Err(_) => return Err(Error::new(Kind::Timeout, "builder: it does not take the request")),
        }
        let (say, mut said) = mpsc::channel(AHEAD);
        // It ends with the receiver, which is how nobody listening is told.
        tokio::spawn(listen(stream, say));
        Ok(Box::pin(futures_util::stream::poll_fn(move |cx| said.poll_recv(cx))))
    }
}

fn request(order: BuildOrder) -> Result<Request> {
    let flake_ref = match order.flake {
        FlakeSource::Local => INPUT.to_owned(),
        FlakeSource::Remote(flake) => flake,
    };
    let (timeout_secs, substitute) = (Some(order.timeout_secs), order.substitute);
    let request = Request::Build { flake_ref, attr: order.attr, timeout_secs, substitute };
    request.check().map_err(|refused| Error::new(Kind::InvalidArgument, "build").because(refused))?;
    Ok(request)
}

/// Until the build's last word, or until nobody takes what is said: then the connection closes, and the guest ends the build.
async fn listen(mut stream: Box<dyn Stream>, say: mpsc::Sender<Result<BuilderSays>>) {
    let last = tokio::select! {
        last = relay(&mut stream, &say) => last,
        () = say.closed() => return,
    };
    // Nobody who would hear it: nobody who needs it.
    say.send(last).await.unwrap_or_default();
}

/// Gives the last word.
async fn relay(stream: &mut Box<dyn Stream>, say: &mpsc::Sender<Result<BuilderSays>>) -> Result<BuilderSays> {
    let (mut lines, mut nonsense, mut buffer) = (Lines::default(), 0, vec![0; PIECE]);
    loop {
        let read = stream.read(&mut buffer).await.map_err(|error| lost("reading what it says", error))?;
        if read == 0 {
            return Err(Error::new(Kind::Unavailable, "builder: it hung up before the build was done")
                .hint("it may have run out of memory: give it more with --memory"));
        }
        let mut piece = buffer.get(..read).unwrap_or_default();
        while let Some(line) = lines.next(&mut piece) {
            let response = match &line {
                Line::Whole(line) => builder::decode::<Response>(line).ok(),
                Line::TooLong => None,
            };
            match response {
                Some(Response::Ok { out_path }) => return Ok(BuilderSays::Built { out_path: clean(&out_path) }),
                Some(Response::Err { message }) => return Err(failed(&message)),
                Some(Response::Log { line }) => {
                    // Gone: `listen` sees it too.
                    say.send(Ok(BuilderSays::Log(shown(&line)))).await.unwrap_or_default();
                }
                Some(Response::Pong) => {}
                None if nonsense == NONSENSE => {
                    return Err(Error::new(Kind::Corrupt, "builder: what it says makes no sense"));
                }
                None => {
                    nonsense += 1;
                    continue;
                }
            }
            nonsense = 0;
        }
    }
}

fn failed(message: &str) -> Error {
    // Its own words, in full: they are all there is to go by.
    Error::new(Kind::FailedPrecondition, "the build failed").because(shown(message))
}

/// Text of a guest in one line of bounded length; colours of build tools are theirs to lose.
fn shown(text: &str) -> String {
    let clean = |c: char| match c {
        '\n' => ' ',
        '\t' => c,
        c if c.is_control() => '?',
        c => c,
    };
    without_colour(text).chars().take(builder::MAX_LOG_LINE).map(clean).collect()
}

/// Without `ESC [ … letter`, which is what nix and compilers colour with.
fn without_colour(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\x1b[") {
        plain.push_str(&rest[..at]);
        let sequence = &rest[at + 2..];
        match sequence.find(|c: char| !matches!(c, '0'..='9' | ';' | '?')) {
            Some(end) => rest = sequence[end..].get(1..).unwrap_or_default(),
            None => return plain,
        }
    }
    plain.push_str(rest);
    plain
}

fn lost(doing: &str, error: std::io::Error) -> Error {
    Error::new(Kind::Unavailable, format!("builder: {doing}")).because(error)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clawpot_host::{connect, unix};
    use futures_util::StreamExt as _;
    use tokio::net::UnixStream;

    use super::*;

    fn order(flake: FlakeSource, attr: &str) -> BuildOrder {
        BuildOrder { flake, attr: attr.to_owned(), timeout_secs: 60, substitute: false }
    }

    /// A VM's socket that takes one connection: whoever asked may have given up before it was answered.
    fn guest<F>(path: &Path, serve: impl FnOnce(UnixStream) -> F + Send + 'static) -> tokio::task::JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = unix::listen(path).unwrap();
        tokio::spawn(async move {
            let stream = loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let Ok(port) = connect::accept(&mut stream).await else { continue };
                assert_eq!(port, builder::PORT);
                if connect::confirm(&mut stream, 1025).await.is_ok() {
                    break stream;
                }
            };
            serve(stream).await;
        })
    }

    async fn build(path: &Path, order: BuildOrder) -> Result<BoxStream<Result<BuilderSays>>> {
        let endpoint = GuestEndpoint::Vsock(path.to_owned());
        // As the server does: a connection that does not come about in 250 ms is tried again.
        for _ in 0..200 {
            match BuilderClient.build(&endpoint, order.clone()).await {
                Err(error) if error.kind() == Kind::Unavailable => {}
                done => return done,
            }
        }
        BuilderClient.build(&endpoint, order).await
    }

    async fn request_of(stream: &mut UnixStream) -> String {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(line).unwrap()
    }

    #[tokio::test]
    async fn logs_come_as_they_are_said_and_the_last_word_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let guest = guest(&socket, |mut stream| async move {
            assert_eq!(
                request_of(&mut stream).await,
                "{\"Build\":{\"flake_ref\":\"/build-in\",\"attr\":\"image\",\"timeout_secs\":60}}\n"
            );
            stream
                .write_all(b"{\"Log\":{\"line\":\"building \\u001b[1;32mit\\u001b[0m\\u0007\"}}\n\"Pong\"\nwhat?\n{\"O")
                .await
                .unwrap();
            stream.write_all(b"k\":{\"out_path\":\"/nix/store/x\"}}\n{\"Log\":{\"line\":\"late\"}}\n").await.unwrap();
        });
        let said: Vec<_> = build(&socket, order(FlakeSource::Local, "image")).await.unwrap().collect().await;
        let said: Vec<_> = said.into_iter().map(Result::unwrap).collect();
        let built = BuilderSays::Built { out_path: "/nix/store/x".to_owned() };
        assert_eq!(said, [BuilderSays::Log("building it?".to_owned()), built]);
        guest.await.unwrap();
    }

    #[tokio::test]
    async fn a_failed_build_is_told_in_its_own_words() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let guest = guest(&socket, |mut stream| async move {
            request_of(&mut stream).await;
            stream.write_all(b"{\"Err\":{\"message\":\"flake has no attribute 'x'\"}}\n").await.unwrap();
        });
        let said: Vec<_> = build(&socket, order(FlakeSource::Local, "x")).await.unwrap().collect().await;
        let [Err(error)] = &said[..] else { panic!("{said:?}") };
        assert_eq!(error.chain(), "the build failed: flake has no attribute 'x'");
        guest.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_hangs_up_or_talks_nonsense_is_an_error() {
        for (text, kind) in [
            (String::new(), Kind::Unavailable),
            ("{}\n".repeat(200), Kind::Corrupt),
            ("x".repeat(5 << 20), Kind::Unavailable),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("v.sock");
            let _guest = guest(&socket, |mut stream| async move {
                request_of(&mut stream).await;
                // The other side may have heard enough.
                stream.write_all(text.as_bytes()).await.unwrap_or_default();
            });
            let said: Vec<_> = build(&socket, order(FlakeSource::Local, "")).await.unwrap().collect().await;
            let [Err(error)] = &said[..] else { panic!("{said:?}") };
            assert_eq!(error.kind(), kind, "{}", error.chain());
        }
    }

    /// Nobody takes what is said: the guest is not read any further, and nothing grows here.
    #[tokio::test]
    async fn a_reader_that_waits_makes_the_guest_wait_and_one_that_goes_hangs_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let (tell, mut told) = tokio::sync::watch::channel(0_usize);
        let guest = guest(&socket, |mut stream| async move {
            request_of(&mut stream).await;
            let line = format!("{{\"Log\":{{\"line\":\"{}\"}}}}\n", "x".repeat(4000));
            // Until the host hangs up.
            while stream.write_all(line.as_bytes()).await.is_ok() {
                tell.send_modify(|sent| *sent += line.len());
            }
        });
        let mut said = build(&socket, order(FlakeSource::Local, "")).await.unwrap();
        assert!(matches!(said.next().await, Some(Ok(BuilderSays::Log(_)))));
        // Until it waits.
        while let Ok(sent) = tokio::time::timeout(Duration::from_millis(500), told.changed()).await {
            sent.unwrap();
            let sent = *told.borrow_and_update();
            assert!(sent < 2 << 20, "sockets' buffers and ours: {sent}");
        }
        drop(said);
        tokio::time::timeout(Duration::from_secs(60), guest).await.expect("it was hung up on").unwrap();
    }

    #[tokio::test]
    async fn what_is_no_flake_reference_is_refused_before_anybody_is_asked() {
        for (flake, attr) in [("--impure", "a"), ("a#b", "c"), ("github:a/b", "-x"), ("a\nb", "")] {
            let order = order(FlakeSource::Remote(flake.to_owned()), attr);
            let error = build(Path::new("/nowhere"), order).await.err().unwrap();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{flake} {attr}");
        }
    }
}
