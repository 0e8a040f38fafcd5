//! From a registry.

use std::net::IpAddr;
use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::Bytes;
use clawpot_core::ports::{ImageDetail, Pull};
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};
use futures_util::StreamExt as _;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::Library;
use super::fetch::Landing;
use super::finish::Called;
use super::progress::Teller;
use super::room::Promise;
use crate::manifest::Blob;
use crate::oci::{self, DOCUMENT_LIMIT, Document, Image};
use crate::refs::Hold;
use crate::store::digest_of;

const CONNECT: Duration = Duration::from_secs(10);
/// Without a single byte.
const SILENCE: Duration = Duration::from_secs(30);
/// Layers on their way at once; docker's default.
const AT_ONCE: usize = 3;

/// A registry, and who we are there.
#[derive(Clone)]
struct Registry {
    client: Client,
    auth: RegistryAuth,
}

pub async fn pull(library: Library, pull: Pull, teller: Teller) -> Result<ImageDetail> {
    library.blocking(|this| this.store.prepare()).await?;
    let reference = parse(&pull.reference)?;
    let called = called(&pull, &reference)?;
    let meter = teller.meter("image", 0);
    meter.at("asking the registry", 0);
    let (registry, first) = connect(&pull, &reference).await?;
    let (digest, document) = registry.manifest(&reference, first).await?;
    if let Some(known) = library.known(&digest, &called).await? {
        meter.at("present", 0);
        return Ok(known);
    }
    let blobs = blobs(&document);
    let hold = library
        .blocking(move |this| {
            let mut hold = Hold::new(&this.store)?;
            hold.add(blobs.into_iter().map(|blob| blob.digest)).map(|()| hold)
        })
        .await?;
    let made = layers(&library, &registry, &reference, (digest, document, called), &teller).await;
    library.settle(hold, made).await
}

/// Layers and configuration.
fn blobs(document: &Document) -> Vec<Blob> {
    let config = document.config.as_ref().map(oci::Descriptor::blob);
    document.layers.iter().flatten().map(oci::Descriptor::blob).chain(config).collect()
}

async fn layers(
    library: &Library,
    registry: &Registry,
    reference: &Reference,
    (digest, document, called): (Digest, Document, Called),
    teller: &Teller,
) -> Result<ImageDetail> {
    let landing = Landing::default();
    let blobs = blobs(&document);
    let what = (digest, document, called);
    let made = assembled(library, registry, reference, what.clone(), (teller, &landing)).await;
    // Also when it failed: what nobody needs is removed after this, and must be all that there will be.
    landing.landed().await;
    let error = match made {
        // What it says of the layers may be the disk's fault.
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::InvalidArgument) => error,
        made => return made,
    };
    if library.blocking(move |this| this.remove_rotten(&blobs)).await? == 0 {
        return Err(error);
    }
    let made = assembled(library, registry, reference, what, (teller, &landing)).await;
    landing.landed().await;
    made
}

async fn assembled(
    library: &Library,
    registry: &Registry,
    reference: &Reference,
    (digest, document, called): (Digest, Document, Called),
    (teller, landing): (&Teller, &Landing),
) -> Result<ImageDetail> {
    let image = image(library, registry, reference, (digest, &document), (teller, landing)).await?;
    let missing: Vec<Blob> =
        image.layers.iter().filter(|layer| !matches!(library.fetched(layer), Ok(Some(_)))).cloned().collect();
    // What the layers will take is not the tree's as well, nor another pull's.
    let promised = library.blocking(move |this| this.promised.promise(this.room, &this.store, missing)).await?;
    let (left, promise) = (promised.0, Arc::new(promised.1));
    let files = downloads(library, registry, (reference, &image), &promise, (teller, landing));
    library.assemble(image, called, left, teller, files).await
}

fn parse(text: &str) -> Result<Reference> {
    text.parse().map_err(|error: oci_client::ParseError| {
        Error::new(Kind::InvalidArgument, format!("image reference {text:?}: {error}"))
            .hint("like docker.io/library/debian:12, localhost:5000/team/app:1.0 or registry.example.org/app@sha256:…")
    })
}

/// A reference's tag moves by itself, so its name here does too; a name that was chosen does not.
fn called(pull: &Pull, reference: &Reference) -> Result<Called> {
    let (name, replace) = match &pull.name {
        Some(name) => (name.clone(), pull.replace),
        None if reference.digest().is_some() => {
            let what = format!("image {}: a digest needs a name to be kept under", pull.reference);
            return Err(Error::new(Kind::InvalidArgument, what).hint("give one with --name"));
        }
        None => {
            let name = pull.reference.parse::<ImageRef>();
            (name.map_err(|error| error.hint("give it a name with --name"))?, true)
        }
    };
    crate::write::plain_name(&name)?;
    Ok(Called { name, replace, kind: "registry", reference: reference.whole() })
}

/// The client, and the answer to its first question. On loopback a registry without TLS is talked to as it is.
async fn connect(pull: &Pull, reference: &Reference) -> Result<(Registry, Bytes)> {
    let auth = match &pull.credentials {
        Some(given) => RegistryAuth::Basic(given.user.clone(), given.password.clone()),
        None => RegistryAuth::Anonymous,
    };
    let protocols = match (pull.plain_http, is_loopback(reference.registry())) {
        (true, _) => vec![ClientProtocol::Http],
        (false, true) => vec![ClientProtocol::Https, ClientProtocol::Http],
        (false, false) => vec![ClientProtocol::Https],
    };
    let mut last = None;
    for protocol in protocols {
        let registry = Registry { client: client(protocol)?, auth: auth.clone() };
        match registry.client.pull_manifest_raw(reference, &registry.auth, &oci::MANIFESTS).await {
            Ok((bytes, _)) => return Ok((registry, bytes)),
            // A bad certificate is an answer.
            Err(OciDistributionError::RequestError(error)) if speaks_of_certificates(&error) => {
                return Err(registry_error(reference, OciDistributionError::RequestError(error)));
            }
            // No answer that is HTTP: perhaps it speaks without TLS.
            Err(error @ OciDistributionError::RequestError(_)) => last = Some(error),
            Err(error) => return Err(registry_error(reference, error)),
        }
    }
    Err(last.map_or_else(|| Error::new(Kind::Internal, "no protocol"), |error| registry_error(reference, error)))
}

/// Of the registry's part of a reference: a name or address with an optional port.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(six) => six.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn client(protocol: ClientProtocol) -> Result<Client> {
    static PROVIDER: Once = Once::new();
    // One provider for the whole program; another part may have been faster.
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let config = ClientConfig {
        protocol,
        connect_timeout: Some(CONNECT),
        read_timeout: Some(SILENCE),
        user_agent: concat!("clawpot/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    Client::try_from(config).map_err(|error| Error::new(Kind::Internal, "preparing a connection").because(error))
}

impl Registry {
    /// The image's manifest for this host; through an index, if `first` is one.
    async fn manifest(&self, reference: &Reference, first: Bytes) -> Result<(Digest, Document)> {
        let what = reference.whole();
        let (digest, document) = read(&what, &first, reference.digest())?;
        let Some(manifests) = &document.manifests else { return Ok((digest, document)) };
        let chosen = oci::select(&what, manifests)?;
        let by_digest = reference.clone_with_digest(chosen.digest.to_string());
        let asked = self.client.pull_manifest_raw(&by_digest, &self.auth, &oci::MANIFESTS).await;
        let (bytes, _) = asked.map_err(|error| registry_error(&by_digest, error))?;
        let (digest, document) = read(&what, &bytes, Some(chosen.digest.as_str()))?;
        if document.manifests.is_some() {
            return Err(Error::new(Kind::InvalidArgument, format!("{what}: an index in an index")));
        }
        Ok((digest, document))
    }
}

fn read(what: &str, bytes: &[u8], expected: Option<&str>) -> Result<(Digest, Document)> {
    if bytes.len() as u64 > DOCUMENT_LIMIT {
        return Err(Error::new(Kind::InvalidArgument, format!("{what}: its manifest has {} bytes", bytes.len())));
    }
    let digest = digest_of(bytes);
    if expected.is_some_and(|expected| expected != digest.as_str()) {
        let what = format!("{what}: what came has the digest {digest}");
        return Err(Error::new(Kind::Corrupt, what)
            .hint("the registry has it wrong, or somebody between it and here changed it"));
    }
    Ok((digest, oci::parse(&format!("{what}: its manifest"), bytes)?))
}

/// With its configuration, which is fetched as a layer is.
async fn image(
    library: &Library,
    registry: &Registry,
    reference: &Reference,
    (digest, document): (Digest, &Document),
    (teller, landing): (&Teller, &Landing),
) -> Result<Image> {
    let what = reference.whole();
    let (Some(config), Some(layers)) = (&document.config, &document.layers) else {
        return Err(Error::new(Kind::InvalidArgument, format!("{what}: neither an image nor an index of images")));
    };
    if config.size > DOCUMENT_LIMIT {
        return Err(Error::new(Kind::InvalidArgument, format!("{what}: its configuration has {} bytes", config.size)));
    }
    let blob = config.blob();
    let meter = teller.meter("configuration", blob.size);
    let file = library.fetch((&registry.client, reference), &blob, meter, landing).await?;
    let layers = layers.iter().map(oci::Descriptor::blob).collect();
    library
        .blocking(move |_| {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut &file, &mut bytes)
                .map_err(|error| Error::io("reading the image's configuration", error))?;
            // What was there is believed by its size, and nothing that is unpacked tells otherwise of this.
            if digest_of(&bytes) != blob.digest {
                return Err(Error::new(Kind::Corrupt, format!("{what}: its configuration is not {}", blob.digest)));
            }
            oci::image(&what, digest, blob, layers, &bytes)
        })
        .await
}

/// The layers' files in order; some of them are always on their way ahead of who takes them.
fn downloads(
    library: &Library,
    registry: &Registry,
    (reference, image): (&Reference, &Image),
    promise: &Arc<Promise>,
    (teller, landing): (&Teller, &Landing),
) -> impl futures_util::Stream<Item = Result<std::fs::File>> + Send + use<> {
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = Vec::new();
    for layer in &image.layers {
        let (library, client, reference, layer) =
            (library.clone(), registry.client.clone(), reference.clone(), layer.clone());
        let meter = teller.meter(layer.digest.as_str(), layer.size);
        let (turns, landing, promise) = (Arc::clone(&turns), landing.clone(), Arc::clone(promise));
        let task = async move {
            let _turn = turns.acquire_owned().await;
            let file = library.fetch((&client, &reference), &layer, meter, &landing).await?;
            promise.kept(&layer.digest);
            Ok(file)
        };
        tasks.push(AbortOnDropHandle::new(tokio::spawn(task)));
    }
    futures_util::stream::iter(tasks).then(async |task| {
        task.await.map_err(|error| Error::new(Kind::Internal, "a download's task panicked").because(error))?
    })
}

/// In our words: whether it is there, whether we may, whether it answers.
pub(super) fn registry_error(reference: &Reference, error: OciDistributionError) -> Error {
    use OciDistributionError as E;
    let registry = reference.registry();
    let (kind, what, hint) = match &error {
        E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => (
            Kind::PermissionDenied,
            format!(
                "registry {registry}: it lets nobody have {} who is not signed in as someone who may",
                reference.whole()
            ),
            Some("give user and password with --credentials FILE, or - for stdin (one line, user:password)"),
        ),
        E::ImageManifestNotFoundError(_) => {
            (Kind::NotFound, format!("image {}: not in the registry", reference.whole()), None)
        }
        E::RegistryError { envelope, .. } if envelope.errors.iter().any(|error| is_missing(&error.code)) => {
            (Kind::NotFound, format!("image {}: not in the registry", reference.whole()), None)
        }
        E::DigestError(_) => (
            Kind::Corrupt,
            format!("image {}: what the registry sent has another digest", reference.whole()),
            Some("the registry has it wrong, or somebody between it and here changed it"),
        ),
        E::ServerError { code: 404, .. } => {
            (Kind::NotFound, format!("image {}: not in the registry", reference.whole()), None)
        }
        E::ServerError { code: 401 | 403, .. } => (
            Kind::PermissionDenied,
            format!("registry {registry}: it refuses {}", reference.whole()),
            Some("give user and password with --credentials FILE, or - for stdin (one line, user:password)"),
        ),
        E::RequestError(error) if speaks_of_certificates(error) => (
            Kind::Unavailable,
            format!("registry {registry}: its certificate is not to be trusted here"),
            Some(
                "if it is your own authority's, add that to this host's (update-ca-certificates), or start the server with SSL_CERT_FILE naming it",
            ),
        ),
        E::RequestError(_) | E::ServerError { .. } | E::IoError(_) => (
            Kind::Unavailable,
            format!("registry {registry}: it does not answer as it should"),
            Some("is the name right, and does it run? one without TLS that is not on this host needs --plain-http"),
        ),
        _ => (Kind::Unavailable, format!("registry {registry}: asking for {}", reference.whole()), None),
    };
    let told = Error::new(kind, what).because(error);
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

/// Whether TLS failed by the certificate. The error is of a crate that we do not have by name, so its words must do.
fn speaks_of_certificates(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    std::iter::from_fn(|| {
        let error = next?;
        next = error.source();
        Some(error)
    })
    .any(|error| error.to_string().contains("certificate"))
}

fn is_missing(code: &oci_client::errors::OciErrorCode) -> bool {
    use oci_client::errors::OciErrorCode as C;
    matches!(code, C::ManifestUnknown | C::NameUnknown | C::BlobUnknown | C::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_talked_to_without_tls_unasked() {
        for here in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"] {
            assert!(is_loopback(here), "{here}");
        }
        for there in ["docker.io", "localhost.example.org", "127.0.0.1.example.org:5000", "10.0.0.1:5000", ""] {
            assert!(!is_loopback(there), "{there}");
        }
    }
}
