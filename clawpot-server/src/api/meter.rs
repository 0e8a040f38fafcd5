//! A request's messages, counted while they come in. tonic has one limit for a whole service and calls what is over it
//! `OUT_OF_RANGE`; here each call has its own, and what comes in at the same time is bounded too.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use clawpot_types::{Error, Kind};
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;

use super::guard::call;
use super::status::status;
use crate::limits::{self, Message};
use crate::shares::{Held, Shares};

/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// A request's body.
pub struct Metered {
    body: Body,
    call: String,
    uid: u32,
    most: Message,
    large: Shares,
    /// Of the message that came last, if it is a large one.
    held: Option<Held>,
    at: At,
    /// Whether one has come whole.
    first_came: bool,
    until: Pin<Box<Sleep>>,
}

#[derive(Clone, Copy)]
enum At {
    Prefix {
        bytes: [u8; PREFIX],
        have: usize,
    },
    Message {
        left: usize,
    },
    /// Nothing is read after an error.
    End,
}

impl At {
    const START: Self = Self::Prefix { bytes: [0; PREFIX], have: 0 };
}

impl Metered {
    pub fn body(body: Body, path: &str, uid: u32, large: Shares) -> Body {
        Body::new(Self {
            body,
            call: call(path).to_owned(),
            uid,
            most: Message::at(path),
            large,
            held: None,
            at: At::START,
            first_came: false,
            until: Box::pin(tokio::time::sleep(limits::FIRST_MESSAGE)),
        })
    }

    fn count(&mut self, mut data: &[u8]) -> Result<(), Error> {
        while !data.is_empty() {
            self.at = match self.at {
                At::Prefix { mut bytes, have } => {
                    let taken = data.len().min(PREFIX - have);
                    let (now, rest) = data.split_at(taken);
                    bytes[have..have + taken].copy_from_slice(now);
                    data = rest;
                    match bytes {
                        [_, length @ ..] if have + taken == PREFIX => self.begin(u32::from_be_bytes(length))?,
                        _ => At::Prefix { bytes, have: have + taken },
                    }
                }
                At::Message { left } if left > data.len() => {
                    let left = left - data.len();
                    data = &[];
                    At::Message { left }
                }
                At::Message { left } => {
                    data = &data[left..];
                    self.whole()
                }
                At::End => return Ok(()),
            };
        }
        Ok(())
    }

    fn begin(&mut self, length: u32) -> Result<At, Error> {
        let most = if self.first_came { self.most.later } else { self.most.first };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > most {
            let what = format!("{}: a message of {length} bytes: at most {most}", self.call);
            return Err(Error::new(Kind::Exhausted, what).hint("send less at once"));
        }
        self.held = None;
        if length > limits::SMALL {
            let bytes = u64::try_from(length).unwrap_or(u64::MAX);
            self.held = Some(self.large.take(self.uid, bytes).map_err(|error| error.context(self.call.as_str()))?);
        }
        Ok(if length == 0 { self.whole() } else { At::Message { left: length } })
    }

    fn whole(&mut self) -> At {
        self.first_came = true;
        At::START
    }

    fn fail(&mut self, status: Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.at = At::End;
        self.held = None;
        Poll::Ready(Some(Err(status)))
    }
}

impl http_body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if matches!(self.at, At::End) {
            return Poll::Ready(None);
        }
        // The one before has been taken, or it would not be asked for more: a call may go on for days after it.
        if matches!(self.at, At::Prefix { have: 0, .. }) {
            self.held = None;
        }
        let frame = match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Pending if self.first_came => return Poll::Pending,
            Poll::Pending => {
                ready!(self.until.as_mut().poll(cx));
                let what = format!("{}: no whole message came within {:?}", self.call, limits::FIRST_MESSAGE);
                return self.fail(status(Error::new(Kind::Timeout, what)));
            }
            Poll::Ready(frame) => frame,
        };
        match frame {
            None => Poll::Ready(None),
            // Not as `CANCELLED`, which tonic takes for an orderly end.
            Some(Err(broken)) => {
                let mut gone = Status::unavailable(format!("{}: the client went away", self.call));
                gone.set_source(std::sync::Arc::new(broken));
                self.fail(gone)
            }
            Some(Ok(frame)) => match frame.data_ref().map_or(Ok(()), |data| self.count(data)) {
                Ok(()) => Poll::Ready(Some(Ok(frame))),
                Err(error) => self.fail(status(error)),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body: its call is under way until it ends.
pub struct Counted {
    body: Body,
    _held: Held,
}

impl Counted {
    pub fn body(body: Body, held: Held) -> Body {
        Body::new(Self { body, _held: held })
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;
    use crate::limits::Share;

    const EXEC: &str = "/clawpot.v1.VmService/Exec";
    const GET: &str = "/clawpot.v1.VmService/GetVm";

    fn shares() -> Shares {
        Shares::new(limits::LARGE, 0)
    }

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        bytes.resize(PREFIX + length, b'x');
        bytes
    }

    fn metered(path: &str, pieces: Vec<Vec<u8>>, large: &Shares) -> Body {
        let frames = pieces.into_iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::from(piece))));
        let body = Body::new(StreamBody::new(futures_util::stream::iter(frames)));
        Metered::body(body, path, 1000, large.clone())
    }

    /// What came through, or why not.
    async fn read(body: Body) -> Result<usize, String> {
        match body.collect().await {
            Ok(all) => Ok(all.to_bytes().len()),
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::ResourceExhausted);
                Err(status.message().to_owned())
            }
        }
    }

    #[tokio::test]
    async fn each_call_has_its_largest_message_however_it_comes() {
        let most = Message::at(GET).first;
        for pieces in [1, 7, 4096] {
            let cut = |bytes: Vec<u8>| bytes.chunks(pieces).map(<[u8]>::to_vec).collect();
            assert_eq!(read(metered(GET, cut(message(most)), &shares())).await, Ok(most + PREFIX), "{pieces}");
            let refused = read(metered(GET, cut(message(most + 1)), &shares())).await.unwrap_err();
            assert_eq!(refused, "GetVm: a message of 65537 bytes: at most 65536", "{pieces}");
        }
    }

    #[tokio::test]
    async fn later_messages_are_smaller_than_the_first() {
        let Message { first, later } = Message::at(EXEC);
        let all = [message(first), message(0), message(later)].concat();
        assert_eq!(read(metered(EXEC, vec![all.clone()], &shares())).await, Ok(all.len()));
        let refused = read(metered(EXEC, vec![[message(0), message(later + 1)].concat()], &shares())).await;
        assert_eq!(refused.unwrap_err(), format!("Exec: a message of {} bytes: at most {later}", later + 1));
    }

    #[tokio::test]
    async fn large_ones_share_what_there_is_and_give_it_back() {
        let share = Share { what: "bytes of large messages", all: 60_000, user: 50_000, root: 1 };
        let large = Shares::new(share, 0);
        let half_come = |length: usize| {
            let bytes = message(length)[..100].to_vec();
            let frames = futures_util::stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(bytes)))]);
            let body = Body::new(StreamBody::new(frames.chain(futures_util::stream::pending())));
            Metered::body(body, GET, 1000, large.clone())
        };
        let mut first = half_come(40_000);
        assert!(first.frame().await.unwrap().is_ok());
        let refused = read(metered(GET, vec![message(20_000)], &large)).await.unwrap_err();
        assert!(refused.contains("bytes of large messages: uid=1000 has 40000, 20000 more asked"), "{refused}");
        assert!(read(metered(GET, vec![message(limits::SMALL)], &large)).await.is_ok(), "small ones go on");
        drop(first);
        assert!(read(metered(GET, vec![message(20_000)], &large)).await.is_ok());
        large.take(1000, 50_000).expect("all of it is back");
    }

    /// A command that was given much, and runs on.
    #[tokio::test]
    async fn what_has_been_taken_counts_no_longer() {
        let large = Shares::new(Share { what: "bytes of large messages", all: 60_000, user: 50_000, root: 1 }, 0);
        let frames = futures_util::stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(message(40_000))))]);
        let body = Body::new(StreamBody::new(frames.chain(futures_util::stream::pending())));
        let mut body = Metered::body(body, EXEC, 1000, large.clone());
        assert!(body.frame().await.unwrap().is_ok());
        assert!(large.take(1000, 20_000).is_err(), "it has only come");
        let more = tokio::time::timeout(std::time::Duration::from_millis(10), body.frame()).await;
        assert!(more.is_err(), "there is no more yet");
        large.take(1000, 50_000).expect("all of it is back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_does_not_come_is_not_waited_for() {
        let silent = StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, Status>>());
        let status = Metered::body(Body::new(silent), GET, 0, shares()).collect().await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (tonic::Code::DeadlineExceeded, "GetVm: no whole message came within 30s")
        );
        // After the first it is: a shell that nobody types into.
        let came = futures_util::stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(message(3))))]);
        let body = Body::new(StreamBody::new(came.chain(futures_util::stream::pending())));
        let read = Metered::body(body, EXEC, 0, shares()).collect();
        tokio::time::timeout(limits::FIRST_MESSAGE * 9, read).await.expect_err("it goes on");
    }

    #[tokio::test]
    async fn a_client_that_goes_away_has_not_ended_in_order() {
        let gone = StreamBody::new(futures_util::stream::iter([Err::<Frame<Bytes>, _>(Status::cancelled("reset"))]));
        let status = Metered::body(Body::new(gone), EXEC, 0, shares()).collect().await.unwrap_err();
        assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, "Exec: the client went away"));
    }
}
