//! A server with a fake guest: enough of both to see every answer that the program must understand.
//!
//! - [`vms`] VMs that boot, fail and go · [`guest`] programs and their streams · [`exec`] attachments to them
//! - [`rest`] host, images, events

pub mod exec;
pub mod guest;
mod rest;
pub use rest::event as rest_event;
pub mod vms;

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;

use clawpot_common::v1::event_service_server::EventServiceServer;
use clawpot_common::v1::host_service_server::HostServiceServer;
use clawpot_common::v1::image_service_server::ImageServiceServer;
use clawpot_common::v1::vm_service_server::VmServiceServer;
use clawpot_common::{CONNECTION_WINDOW, STREAM_WINDOW};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

pub use vms::State;

pub struct Fake {
    dir: tempfile::TempDir,
    pub state: Arc<State>,
    /// Its own, so that killing it drops every connection as `kill -9` would.
    runtime: Option<Runtime>,
}

#[derive(Clone)]
pub struct Service(pub Arc<State>);

impl Fake {
    pub fn start() -> Self {
        let mut fake = Self { dir: tempfile::tempdir().unwrap(), state: Arc::default(), runtime: None };
        fake.revive();
        fake
    }

    /// With a VM "web" that runs.
    pub fn with_vm() -> Self {
        let fake = Self::start();
        fake.state.add_running("web");
        fake
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    pub fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_timeout(std::time::Duration::from_secs(5));
    }

    /// What was known before the kill is still known: it is the guest's, or was on disk.
    pub fn revive(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let socket = self.socket();
        if socket.exists() {
            std::fs::remove_file(&socket).unwrap();
        }
        let listener = runtime.block_on(async { UnixListener::bind(&socket) }).unwrap();
        let service = Service(self.state.clone());
        runtime.spawn(
            Server::builder()
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .add_service(VmServiceServer::new(service.clone()))
                .add_service(EventServiceServer::new(service.clone()))
                .add_service(HostServiceServer::new(service.clone()))
                .add_service(ImageServiceServer::new(service))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        self.runtime = Some(runtime);
    }

    /// The program, told of this server.
    pub fn clawpot(&self, args: &[&str]) -> Command {
        let mut command = crate::clawpot(args);
        command.env("CLAWPOT_SOCKET", self.socket());
        command
    }

    /// Until the program under test is attached to the only exec, by a byte of its output.
    pub fn until_attached(&self, child: &mut Child) {
        crate::eventually("it runs", || self.state.guest.only().is_some());
        self.state.guest.only().unwrap().with(|inner| inner.stdout.kept.extend(b"."));
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    }

    /// Runs the program to its end, without standard input.
    pub fn run(&self, args: &[&str]) -> crate::Ran {
        self.clawpot(args).output().unwrap().into()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
