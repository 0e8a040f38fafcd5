//! Who had what done to the images, and who has a command in hand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use clawpot_control::Library;
use clawpot_core::event::{About, Event};
use clawpot_core::exec::{ExecAttach, ExecInput};
use clawpot_core::ports::{
    BoxStream, Collect, Collected, Garbage, ImageDetail, ImageInfo, ImageLibrary, ImageProgress, ImageStep,
    Images as _, Import, Pull, UnreadableImage,
};
use clawpot_testkit::FakeImages;
use clawpot_types::{Digest, Error, ExecId, ImageRef, Kind, Result, VmId};
use futures_util::StreamExt as _;
use support::House;

/// One image, which can be had in every way.
struct Shelf {
    image: ImageDetail,
    /// A pull that was begun waits for this.
    go: Arc<tokio::sync::Notify>,
    dropped: Arc<AtomicBool>,
}

struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[async_trait]
impl ImageLibrary for Shelf {
    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)> {
        Ok((vec![self.image.info.clone()], Vec::new()))
    }

    async fn describe(&self, _: &ImageRef) -> Result<ImageDetail> {
        Ok(self.image.clone())
    }

    fn pull(&self, _: Pull) -> BoxStream<Result<ImageProgress>> {
        let (go, done) = (Arc::clone(&self.go), Ok(ImageProgress::Done(Box::new(self.image.clone()))));
        let held = Dropped(Arc::clone(&self.dropped));
        let step = ImageStep { id: "a".into(), doing: "b".into(), bytes: 1, total_bytes: 2, bytes_per_second: 1 };
        Box::pin(futures_util::stream::iter([Ok(ImageProgress::Step(step))]).chain(futures_util::stream::once(
            async move {
                let _held = held;
                go.notified().await;
                done
            },
        )))
    }

    fn import(&self, _: Import, _: BoxStream<Result<bytes::Bytes>>) -> BoxStream<Result<ImageProgress>> {
        let refused = Err(Error::new(Kind::Corrupt, "import: no archive"));
        Box::pin(futures_util::stream::iter([refused]))
    }

    async fn export(&self, _: &ImageRef) -> Result<BoxStream<Result<bytes::Bytes>>> {
        Err(Error::new(Kind::Unsupported, "not here"))
    }

    async fn tag(&self, _: &ImageRef, name: &ImageRef, _: bool) -> Result<Digest> {
        match name.to_string() == "taken" {
            true => Err(Error::new(Kind::AlreadyExists, "taken")),
            false => Ok(self.image.info.digest.clone()),
        }
    }

    async fn untag(&self, _: &ImageRef) -> Result<Digest> {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(self.image.info.digest.clone())
    }

    async fn gc(&self, gc: Collect) -> Result<Collected> {
        let one = |kind: &str| Garbage { kind: kind.to_owned(), name: "x".to_owned(), bytes: 10 };
        let removed = if gc.all { vec![one("layer"), one("rootfs"), one("layer")] } else { Vec::new() };
        Ok(Collected { removed, kept_bytes: 0 })
    }

    async fn hold(&self, _: Option<BTreeSet<Digest>>) -> Result<()> {
        Ok(())
    }
}

async fn shelf(house: &House) -> (Library, Arc<Shelf>) {
    let image = FakeImages::new(&house.host).describe(&"debian".parse().unwrap()).await.unwrap();
    let shelf = Arc::new(Shelf { image, go: Arc::default(), dropped: Arc::default() });
    (Library::new(house.service().clone(), shelf.clone()), shelf)
}

fn pull() -> Pull {
    Pull {
        reference: "docker.io/library/debian\u{1b}:12".to_owned(),
        name: None,
        replace: false,
        plain_http: false,
        credentials: None,
    }
}

/// Events of images and of commands.
fn told(house: &House) -> Vec<Event> {
    let mine = |event: &Event| event.kind.starts_with("image.") || event.kind == "vm.attach";
    house.store.all_events().into_iter().filter(mine).collect()
}

fn kinds(house: &House) -> Vec<(String, String)> {
    told(house).into_iter().map(|event| (event.kind, event.actor)).collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_done_to_images_is_told_with_who_had_it_done() {
    let house = House::new().await;
    let (library, shelf) = shelf(&house).await;
    shelf.go.notify_one();
    let steps: Vec<_> = library.pull(pull(), "uid=1").collect().await;
    assert!(matches!(steps[..], [Ok(ImageProgress::Step(_)), Ok(ImageProgress::Done(_))]), "{steps:?}");
    let (debian, web): (ImageRef, ImageRef) = ("debian".parse().unwrap(), "web".parse().unwrap());
    library.tag(debian.clone(), web.clone(), false, "uid=2").await.unwrap();
    library.untag(web, "uid=3").await.unwrap();
    let all = Collect { all: true, ..Collect::default() };
    library.gc(all.clone(), "uid=4").await.unwrap();

    let events = told(&house);
    let image = shelf.image.info.digest.clone();
    let named = |name: &str| About::Image { image: image.clone(), image_name: name.to_owned() };
    let expected = [
        ("image.pull", "uid=1", named(&shelf.image.info.name), "of docker.io/library/debian:12".to_owned()),
        ("image.tag", "uid=2", named("web"), "of debian".to_owned()),
        ("image.rm", "uid=3", named("web"), format!("the name is gone from {image}")),
        (
            "image.gc",
            "uid=4",
            About::Images { images_removed: 3 },
            "3 files removed (2 layer, 1 rootfs), 30 bytes".into(),
        ),
    ];
    let seen: Vec<_> =
        events.iter().map(|e| (e.kind.as_str(), e.actor.as_str(), e.about.clone(), e.message.clone())).collect();
    assert_eq!(seen, expected);

    // What changed nothing is no event.
    library.gc(Collect { dry_run: true, ..all }, "uid=5").await.unwrap();
    library.gc(Collect::default(), "uid=5").await.unwrap();
    assert!(library.tag(debian, "taken".parse().unwrap(), false, "uid=5").await.is_err());
    let import = Import { name: None, replace: false, select: String::new() };
    let steps: Vec<_> = library.import(import, Box::pin(futures_util::stream::empty()), "uid=5").collect().await;
    assert!(matches!(steps[..], [Err(_)]), "{steps:?}");
    assert_eq!(told(&house).len(), expected.len());
}

#[tokio::test(start_paused = true)]
async fn who_goes_before_the_answer_is_told_of_if_it_was_done() {
    let house = House::new().await;
    let (library, shelf) = shelf(&house).await;
    let asked = library.untag("debian".parse().unwrap(), "uid=1");
    assert!(tokio::time::timeout(Duration::from_millis(1), asked).await.is_err(), "its client went");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(kinds(&house), [("image.rm".to_owned(), "uid=1".to_owned())]);

    // A pull ends with its client, and nothing came of it.
    let mut steps = library.pull(pull(), "uid=2");
    assert!(matches!(steps.next().await, Some(Ok(ImageProgress::Step(_)))));
    drop(steps);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(shelf.dropped.load(Ordering::SeqCst), "it goes on for nobody");
    assert_eq!(told(&house).len(), 1);

    // This one was done when its client went, who read nothing of it.
    shelf.go.notify_one();
    let steps = library.pull(pull(), "uid=3");
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(steps);
    assert_eq!(kinds(&house)[1..], [("image.pull".to_owned(), "uid=3".to_owned())]);
}

async fn attach(house: &House, vm: &VmId, exec: &ExecId, actor: &str) {
    let first = ExecInput::Attach(ExecAttach { id: exec.clone(), stdout: 0, stderr: 0 });
    let rest = Box::pin(futures_util::stream::pending());
    // What the command says is another test's.
    drop(house.service().exec(vm.as_str(), first, rest, actor).await.unwrap());
}

/// Whoever attaches may type and signal. The one who comes back after a broken connection is known already.
#[tokio::test(start_paused = true)]
async fn who_joins_a_command_is_told_once() {
    let mut house = House::new().await;
    let vm = house.running("web").await;
    house.exec(&vm, &["echo", "hello"]).await.unwrap();
    let started = house.store.all_events().into_iter().find(|event| event.kind == "vm.exec").unwrap();
    let exec: ExecId = started.message.split(':').next().unwrap().parse().unwrap();
    for _ in 0..3 {
        attach(&house, &vm, &exec, "uid=0").await;
    }
    assert_eq!(kinds(&house), [], "its own client comes back");
    for _ in 0..3 {
        attach(&house, &vm, &exec, "uid=1000").await;
    }
    assert_eq!(kinds(&house), [("vm.attach".to_owned(), "uid=1000".to_owned())]);
    let event = told(&house).remove(0);
    assert!(event.about.is_vm(&vm) && event.message == exec.to_string(), "{event:?}");
    // Another server does not know of the first.
    house.restart().await;
    attach(&house, &vm, &exec, "uid=0").await;
    assert_eq!(kinds(&house).len(), 2);
}
