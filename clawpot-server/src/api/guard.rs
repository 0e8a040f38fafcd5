//! Stands before every service: who calls what ([`access`](super::access)), and how much ([`crate::limits`]), before
//! anything is read of it.

use std::pin::Pin;
use std::task::{Context, Poll};

use clawpot_types::{Error, Kind};
use tonic::body::Body;
use tonic::codegen::http;
use tower::{Layer, Service};

use super::access::{Caller, Doors};
use super::meter::{Counted, Metered};
use super::status::status;
use crate::entrance::Visit;
use crate::limits;
use crate::shares::{Held, Shares};

#[derive(Clone, Debug)]
pub struct Guard {
    doors: Doors,
    calls: Shares,
    large: Shares,
}

impl Guard {
    pub fn new(doors: Doors) -> Self {
        let [calls, large] = [limits::CALLS, limits::LARGE].map(|share| Shares::new(share, doors.own));
        Self { doors, calls, large }
    }

    /// A place among the calls under way.
    fn check(&self, caller: &Caller, request: &http::Request<Body>) -> Result<Held, Error> {
        let path = request.uri().path();
        self.doors.check(caller, path)?;
        let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 32);
        let headers: usize = fields.sum::<usize>() + path.len();
        if headers > limits::HEADER_BYTES {
            let what = format!("{}: headers of {headers} bytes: at most {}", call(path), limits::HEADER_BYTES);
            return Err(Error::new(Kind::Exhausted, what).hint("send less metadata"));
        }
        self.calls.take(caller.uid(), 1).map_err(|error| error.context(call(path)))
    }
}

/// "CreateVm".
pub fn call(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, guard: self.clone() }
    }
}

#[derive(Clone, Debug)]
pub struct Guarded<S> {
    inner: S,
    guard: Guard,
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let visit = request.extensions().get::<Visit>();
        if let Some(refused) = visit.and_then(Visit::refused) {
            let refused = refused.clone().into_http();
            return Box::pin(async { Ok(refused) });
        }
        let caller = visit.map_or(Caller::Unknown, |visit| {
            visit.hear();
            visit.caller().clone()
        });
        let held = match self.guard.check(&caller, &request) {
            Ok(held) => held,
            Err(refused) => return Box::pin(async { Ok(status(refused).into_http()) }),
        };
        let (path, uid) = (request.uri().path().to_owned(), caller.uid());
        request.extensions_mut().insert(caller);
        let answer = self.inner.call(request.map(|body| Metered::body(body, &path, uid, self.guard.large.clone())));
        Box::pin(async move { Ok(answer.await?.map(|body| Counted::body(body, held))) })
    }
}
