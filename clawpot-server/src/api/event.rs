//! `clawpot.v1.EventService`.

use clawpot_common::v1;
use clawpot_common::v1::event_service_server::EventService;
use clawpot_control::Service;
use clawpot_core::ports::BoxStream;
use clawpot_types::Revision;
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status};

use super::convert;
use super::status::status;

#[derive(Debug)]
pub struct EventApi {
    pub service: Service,
}

#[tonic::async_trait]
impl EventService for EventApi {
    type WatchEventsStream = BoxStream<Result<v1::Event, Status>>;

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let request = request.into_inner();
        let size = usize::try_from(request.page_size).unwrap_or(usize::MAX);
        let events = self.service.events(&request.vm, Revision(request.after_id), size).await.map_err(status)?;
        Ok(Response::new(v1::ListEventsResponse { events: events.into_iter().map(convert::event).collect() }))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let events = self.service.watch_events(&request.vm, Revision(request.after_id)).await.map_err(status)?;
        Ok(Response::new(Box::pin(events.map(|event| event.map(convert::event).map_err(status)))))
    }
}
