//! What listens, and how it ends: SIGTERM and SIGINT leave the VMs running, or stop them first where the settings say so.

use std::sync::Arc;

use clawpot_common::v1::build_service_server::BuildServiceServer;
use clawpot_common::v1::event_service_server::EventServiceServer;
use clawpot_common::v1::host_service_server::HostServiceServer;
use clawpot_common::v1::image_service_server::ImageServiceServer;
use clawpot_common::v1::vm_service_server::VmServiceServer;
use clawpot_common::v1::volume_service_server::VolumeServiceServer;
use clawpot_common::{CONNECTION_WINDOW, DESCRIPTORS, MAX_MESSAGE_BYTES, STREAM_WINDOW};
use clawpot_types::{Error, Kind, Result};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tracing::{info, warn};

use crate::api::access::Doors;
use crate::api::build::BuildApi;
use crate::api::event::EventApi;
use crate::api::guard::Guard;
use crate::api::host::HostApi;
use crate::api::image::ImageApi;
use crate::api::vm::VmApi;
use crate::api::volume::VolumeApi;
use crate::config::{Config, OnStop};
use crate::entrance::Entrance;
use crate::metrics::Metrics;
use crate::{app, limits, metrics, socket};

pub async fn serve(config: Config) -> Result<()> {
    let group = socket::group(config.group.as_deref())?;
    let app = app::App::start(&config).await?;
    let api = socket::bind(&config.socket, "--socket", group)?;
    let doors = Doors { own: rustix::process::geteuid().as_raw(), group };
    let scrape = socket::bind(&config.metrics_socket, "--metrics-socket", group)?;
    let (mut term, mut int) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);

    let metrics = Metrics::new(app.service.clone());
    let follow = tokio::spawn(metrics.clone().follow());
    let scraped = tokio::spawn(metrics::serve(Entrance::metrics(scrape, doors.own), metrics));
    info!(socket = %config.socket.display(), "ready");
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!(%error, "telling systemd that the server is ready");
    }

    let ended = tokio::select! {
        served = answer(Entrance::api(api, doors.own), doors, &app) => served,
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
    };
    follow.abort();
    scraped.abort();
    info!(on_stop = ?config.on_stop, "going");
    let drained = match config.on_stop {
        OnStop::Drain => app.service.drain("server").await,
        OnStop::Leave => Ok(()),
    };
    // Streams end with the listener; clients attach again to the next server.
    app.service.leave().await;
    let closed = app.close().await;
    ended.and(drained).and(closed)
}

async fn answer(entrance: Entrance, doors: Doors, app: &app::App) -> Result<()> {
    let (service, about) = (app.service.clone(), app.about.clone());
    let library = clawpot_control::Library::new(service.clone(), Arc::new(app.library.clone()));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<VmServiceServer<VmApi>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::new(Kind::Internal, "API: preparing reflection").because(error))?;
    // Each call's own limit is the guard's; this is only not to be in its way.
    let vm = VmServiceServer::new(VmApi { service: service.clone() }).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let events = EventServiceServer::new(EventApi { service: service.clone() });
    let host = HostServiceServer::new(HostApi { service: service.clone(), about });
    let builds = BuildServiceServer::new(BuildApi { builds: app.builds.clone() });
    let volumes = VolumeServiceServer::new(VolumeApi { service: service.clone() });
    let images = ImageServiceServer::new(ImageApi { library });
    Server::builder()
        .layer(Guard::new(doors))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(limits::HEADER_BYTES_READ)
        .add_service(health_service)
        .add_service(reflection)
        .add_service(vm)
        .add_service(events)
        .add_service(host)
        .add_service(builds)
        .add_service(volumes)
        .add_service(images)
        .serve_with_incoming(Box::pin(entrance.connections()))
        .await
        .map_err(|error| Error::new(Kind::Internal, "API: no longer served").because(error))
}

fn on(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(|error| Error::io("listening for signals", error))
}
