//! Create: admission, then one transaction that writes record, slot, name and request id. Nothing exists before it.

use std::collections::BTreeMap;

use clawpot_core::admission::{Budget, Claim, Resource, Short};
use clawpot_core::ports::{ImageConfig, TxnOutcome};
use clawpot_core::record::RECORD_VERSION;
use clawpot_core::{Desired, DiskSource, ExtraDisk, ImagePin, Phase, Restart, RestartPolicy, VmRecord, VmSpec};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::guest::MAX_EXTRA_DISKS;
use clawpot_types::{
    Error, Generation, ImageRef, Incarnation, Kind, Label, MiB, Millis, Result, Revision, Slot, Timestamp, VmId, VmName,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::admit::Promise;
use super::intent::check_ttl;
use super::volume::LeaseChange;
use super::{Service, event, known, to_its_end};
use crate::records::{name_key, slot_key};

/// What a client may ask for, checked in form by the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateVm {
    pub name: Option<VmName>,
    pub labels: BTreeMap<Label, Label>,
    pub spec: VmSpec,
    pub remove_when_done: bool,
    /// `None`: for ever.
    pub ttl: Option<Millis>,
    pub restart: RestartPolicy,
}

/// `requests/<id>`: what was asked and which VM it made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub version: u32,
    pub body: CreateVm,
    pub vm: VmId,
    pub at: Timestamp,
}

/// Version of [`Request`]'s JSON. The first had no number.
pub const REQUEST_VERSION: u32 = 4;

impl Request {
    /// `Unsupported`: a newer server wrote it.
    pub fn check_version(bytes: &[u8]) -> Result<()> {
        #[derive(Deserialize)]
        struct Head {
            version: Option<u32>,
        }
        // What has no version at all is damage, and told as such where it is needed.
        match serde_json::from_slice::<Head>(bytes) {
            Ok(Head { version: Some(version) }) if version > REQUEST_VERSION => {
                let what = format!("request: version {version} is newer than this server's {REQUEST_VERSION}");
                Err(Error::new(Kind::Unsupported, what).hint("run the newer clawpot-server that wrote it"))
            }
            _ => Ok(()),
        }
    }

    /// Reads a row of this version or an older one.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let corrupt =
            |error| Error::new(Kind::Corrupt, "request_id: what was asked before cannot be read").because(error);
        Self::check_version(bytes)?;
        let mut row: serde_json::Value = serde_json::from_slice(bytes).map_err(corrupt)?;
        if row.get("version").is_none()
            && let Some(body) = row.get_mut("body").and_then(serde_json::Value::as_object_mut)
        {
            body.insert("ttl".to_owned(), serde_json::Value::Null);
            body.insert("restart".to_owned(), "never".into());
            row["version"] = 2.into();
        }
        if row["version"] == 2 {
            if let Some(spec) = row.pointer_mut("/body/spec").and_then(serde_json::Value::as_object_mut) {
                spec.insert("extra_disks".to_owned(), serde_json::json!([]));
            }
            row["version"] = 3.into();
        }
        if row["version"] == 3 {
            if let Some(spec) = row.pointer_mut("/body/spec").and_then(serde_json::Value::as_object_mut) {
                spec.insert("reach".to_owned(), "default".into());
            }
            row["version"] = REQUEST_VERSION.into();
        }
        serde_json::from_value(row).map_err(corrupt)
    }
}

/// Longest request id, bytes.
pub const MAX_REQUEST_ID: usize = 128;

/// How often a clash of slots or of chosen names is tried again.
const ATTEMPTS: usize = 16;

impl Service {
    /// Accepts a VM; its runner brings it up. The same `request_id` with the same body is the same VM, for 24 hours.
    pub async fn create(&self, request_id: &str, body: CreateVm, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        let (this, request_id, actor) = (self.clone(), request_id.to_owned(), actor.to_owned());
        to_its_end(async move { this.accept(&request_id, body, &actor).await }).await
    }

    async fn accept(&self, request_id: &str, body: CreateVm, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        check(&body)?;
        let request_key = request_key(request_id)?;
        if let Some(key) = &request_key
            && let Some(earlier) = self.records.store().get(key).await?
        {
            return self.repeated(&earlier.value, &body).await;
        }
        self.check_stays("create")?;
        let image = self.deps.images.resolve(&body.spec.image).await?;
        let boots = self.deps.images.boots(&image, self.deps.vmms.default().capabilities().kind).await;
        boots.map_err(|error| error.context(format!("image {}", body.spec.image)))?;
        let config = self.deps.images.describe(&ImageRef::Digest(image.digest.clone())).await?.config;
        for _ in 0..ATTEMPTS {
            let record = self.draft(&body, image.clone(), &config, actor)?;
            let (promise, leases) = match self.may_have(&record).await {
                Ok(both) => both,
                Err(error) => return self.unless_repeated(request_key.as_deref(), &body, error).await,
            };
            let extra = match &request_key {
                Some(key) => Some((key.clone(), encode(&body, &record)?)),
                None => None,
            };
            let created = event(&self.deps, &record, "vm.create", told(&record), actor);
            let outcome = match self.records.insert(record.clone(), extra, leases, created).await {
                Ok(outcome) => outcome,
                Err(error) => {
                    self.find_out(record.id, Some(promise));
                    return Err(error);
                }
            };
            match outcome {
                TxnOutcome::Committed(revision) => {
                    failpoint::reached(Point::Accepted);
                    self.run(&record.id);
                    self.warm().await;
                    return Ok((revision, Arc::new(record)));
                }
                // The same request, a moment earlier: what it made is published within microseconds.
                TxnOutcome::Conflict { key, .. } if Some(&key) == request_key.as_ref() => {
                    return self.same_moment(&key, &body).await;
                }
                TxnOutcome::Conflict { key, .. } => self.clash(&key, &record, &body)?,
            }
        }
        Err(Error::new(Kind::Conflict, "create: slots and names were taken by others again and again"))
    }

    /// Room on the host, and its volumes.
    async fn may_have(&self, record: &VmRecord) -> Result<(Promise, Vec<LeaseChange>)> {
        let whole = Claim::whole(&record.spec, self.deps.vmms.footprint(record));
        let promise = self.admit(record, whole, "create").await?;
        Ok((promise, self.leases(record).await?))
    }

    /// What it cannot have may be held by what the same request made a moment earlier.
    async fn unless_repeated(
        &self,
        key: Option<&str>,
        body: &CreateVm,
        error: Error,
    ) -> Result<(Revision, Arc<VmRecord>)> {
        match key {
            Some(key) if self.records.store().get(key).await?.is_some() => self.same_moment(key, body).await,
            _ => Err(error),
        }
    }

    fn draft(&self, body: &CreateVm, image: ImagePin, config: &ImageConfig, actor: &str) -> Result<VmRecord> {
        let now = self.deps.clock.now();
        let mut record = VmRecord {
            version: RECORD_VERSION,
            id: self.deps.ids.vm_id(),
            name: body.name.clone().unwrap_or_else(|| self.deps.ids.vm_name()),
            labels: body.labels.clone(),
            spec: with_image(&body.spec, config),
            image,
            desired: Desired::Running,
            generation: Generation(1),
            incarnation: Incarnation(0),
            phase: Phase::Accepted,
            phase_since: now,
            deadline: None,
            slot: self.free_slot()?,
            vmm: None,
            boot_id: String::new(),
            address: None,
            created_at: now,
            disk_made: false,
            timings: Vec::new(),
            failure: None,
            quarantine: None,
            remove_when_done: body.remove_when_done,
            stop_grace: self.deps.settings.stop_grace,
            intent_by: actor.to_owned(),
            exit: None,
            restart: Restart::new(body.restart),
            ttl: None,
            expires_at: None,
        };
        record.keep(body.ttl, now);
        Ok(record)
    }

    fn free_slot(&self) -> Result<Slot> {
        self.next_slot().ok_or_else(|| {
            let limit = self.deps.net.slots().into();
            Short { resource: Resource::Slots, asked: 1, vmm_memory: 0, of: Budget { limit, used: limit } }
                .error("create")
        })
    }

    /// `Ok`: try again with another draft.
    fn clash(&self, key: &str, record: &VmRecord, body: &CreateVm) -> Result<()> {
        if key == name_key(&record.name) && body.name.is_some() {
            let owner = self
                .records
                .find(record.name.as_str())
                .map_or_else(|_| "another VM".to_owned(), |id| format!("VM {id}"));
            return Err(Error::new(Kind::AlreadyExists, format!("name {:?}: taken by {owner}", record.name.as_str()))
                .hint("choose another name, or delete that VM first"));
        }
        tracing::debug!(key, slot = slot_key(record.slot), "create: taken, trying another");
        Ok(())
    }

    async fn same_moment(&self, key: &str, body: &CreateVm) -> Result<(Revision, Arc<VmRecord>)> {
        for _ in 0..ATTEMPTS {
            let earlier = self.records.store().get(key).await?;
            if let Some(earlier) = earlier {
                match self.repeated(&earlier.value, body).await {
                    Err(error) if error.kind() == Kind::NotFound => {}
                    done => return done,
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        Err(Error::new(Kind::Conflict, "create: the same request is being accepted right now")
            .hint("repeat it with the same request_id"))
    }

    async fn repeated(&self, earlier: &[u8], body: &CreateVm) -> Result<(Revision, Arc<VmRecord>)> {
        let earlier = Request::decode(earlier)?;
        if earlier.body != *body {
            let what = format!("request_id: used before for VM {} with another body", earlier.vm);
            return Err(Error::new(Kind::AlreadyExists, what).hint("use a new request_id for a new request"));
        }
        if self.records.get(&earlier.vm).is_none() {
            // The answer of its create may have been lost on the way from the store.
            self.records.refresh(&earlier.vm).await?;
            self.run(&earlier.vm);
        }
        let row = self.records.get(&earlier.vm);
        known(&earlier.vm, row).map_err(|error| error.context("request_id: used before"))
    }
}

/// What the owner says wins over what the image says. It is written down, so that nothing changes with the image's name.
fn with_image(spec: &VmSpec, config: &ImageConfig) -> VmSpec {
    let mut spec = spec.clone();
    let own = std::mem::take(&mut spec.env);
    spec.env = config.env.iter().filter(|(name, _)| !own.iter().any(|(given, _)| given == name)).cloned().collect();
    spec.env.extend(own);
    if spec.cwd.is_empty() {
        spec.cwd.clone_from(&config.cwd);
    }
    if spec.user.is_empty() {
        spec.user.clone_from(&config.user);
    }
    spec
}

/// Again, whatever the door checked: nothing out of range may reach the store.
fn check(body: &CreateVm) -> Result<()> {
    MiB::memory(body.spec.memory.0).map_err(|error| error.context("spec.memory_mib"))?;
    MiB::disk(body.spec.disk.0).map_err(|error| error.context("spec.disk_mib"))?;
    check_ttl(body.ttl)?;
    check_disks(&body.spec.extra_disks)?;
    if body.remove_when_done && body.restart != RestartPolicy::Never {
        let what = "restart: a VM that is removed when done is not started again";
        return Err(Error::new(Kind::InvalidArgument, what).hint("leave out either --rm or --restart"));
    }
    Ok(())
}

fn check_disks(disks: &[ExtraDisk]) -> Result<()> {
    let bad = |why: String| Err(Error::new(Kind::InvalidArgument, format!("spec.volumes: {why}")));
    if disks.len() > MAX_EXTRA_DISKS {
        return bad(format!("{} of them: a VM has at most {MAX_EXTRA_DISKS} disks beside its own", disks.len()));
    }
    for (index, disk) in disks.iter().enumerate() {
        let earlier = &disks[..index];
        if earlier.iter().any(|other| other.source == disk.source) {
            return bad(match &disk.source {
                DiskSource::Volume(name) => format!("volume {name} is there twice"),
                DiskSource::File(path) => format!("disk {} is there twice", path.display()),
            });
        }
        if let Some(path) =
            disk.mount.as_ref().filter(|path| earlier.iter().any(|other| other.mount.as_ref() == Some(path)))
        {
            return bad(format!("{path} is there twice"));
        }
    }
    Ok(())
}

/// "256 MiB, 1 vCPU, …": what was asked for, in one line.
fn told(record: &VmRecord) -> String {
    let spec = &record.spec;
    format!("{}, {} vCPU, {} of memory, {} of disk", spec.image, spec.vcpus.get(), spec.memory, spec.disk)
}

fn request_key(id: &str) -> Result<Option<String>> {
    if id.is_empty() {
        return Ok(None);
    }
    if id.len() > MAX_REQUEST_ID || !id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        let what = format!("request_id: must be at most {MAX_REQUEST_ID} of [A-Za-z0-9._-]");
        return Err(Error::new(Kind::InvalidArgument, what));
    }
    Ok(Some(format!("requests/{id}")))
}

fn encode(body: &CreateVm, record: &VmRecord) -> Result<Vec<u8>> {
    serde_json::to_vec(&Request {
        version: REQUEST_VERSION,
        body: body.clone(),
        vm: record.id.clone(),
        at: record.created_at,
    })
    .map_err(|error| Error::new(Kind::Internal, "request_id: writing it down").because(error))
}
