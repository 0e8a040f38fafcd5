//! The house stands as `ARCHITECTURE.md` draws it: who may depend on whom, what the study does not know, that named paths exist.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn metadata() -> Value {
    #[expect(
        clippy::disallowed_methods,
        reason = "a test asks cargo; it is no server that must account for its children"
    )]
    let mut cargo = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let output = cargo
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

/// Every crate of ours and which others of ours it needs to be built and run (not: to be tested).
fn house(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let members: BTreeSet<&str> =
        metadata["workspace_members"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
    let ours = metadata["packages"].as_array().unwrap().iter().filter(|package| members.contains(text(package, "id")));
    let short = |name: &str| name.trim_start_matches("clawpot-").to_owned();
    let names: BTreeSet<&str> = ours.clone().map(|package| text(package, "name")).collect();
    ours.map(|package| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let needed = dependencies.filter(|needs| text(needs, "kind") != "dev").map(|needs| text(needs, "name"));
        (short(text(package, "name")), needed.filter(|name| names.contains(name)).map(short).collect())
    })
    .collect()
}

/// The drawing of ARCHITECTURE.md. A driver may use common where it speaks a protocol.
const ALLOWED: [(&str, &[&str]); 18] = [
    ("types", &[]),
    ("failpoint", &[]),
    ("common", &["types"]),
    ("core", &["types"]),
    ("host", &["failpoint", "types"]),
    ("control", &["core", "failpoint", "types"]),
    ("store", &["core", "failpoint", "host", "types"]),
    ("vmm", &["core", "failpoint", "host", "types"]),
    ("net", &["core", "failpoint", "host", "types"]),
    ("image", &["core", "failpoint", "host", "types"]),
    ("agent-client", &["common", "core", "host", "types"]),
    ("edge", &["core", "host", "types"]),
    ("testkit", &["control", "core", "types"]),
    ("simulator", &["control", "core", "testkit", "types"]),
    ("agent", &["common", "types"]),
    ("cli", &["common", "types"]),
    ("bench", &["common", "types"]),
    (
        "server",
        &[
            "agent-client",
            "common",
            "control",
            "core",
            "edge",
            "failpoint",
            "host",
            "image",
            "net",
            "store",
            "types",
            "vmm",
        ],
    ),
];

#[test]
fn crates_depend_only_in_the_directions_drawn() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into_iter().collect();
    let mut wrong = Vec::new();
    for (name, needs) in house(&metadata()) {
        match allowed.get(name.as_str()) {
            None => wrong.push(format!("{name}: a new room; draw it in ARCHITECTURE.md and add it here")),
            Some(may) => {
                let more = needs.iter().filter(|needed| !may.contains(&needed.as_str()));
                wrong.extend(more.map(|needed| format!("{name} ─► {needed}: not drawn in ARCHITECTURE.md")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Everything that `name` is built with, itself included.
fn built_with(metadata: &Value, name: &str) -> BTreeSet<String> {
    let packages = metadata["packages"].as_array().unwrap();
    let names: BTreeMap<&str, &str> =
        packages.iter().map(|package| (text(package, "id"), text(package, "name"))).collect();
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let nodes: BTreeMap<&str, &Value> = nodes.iter().map(|node| (text(node, "id"), node)).collect();
    let mut todo: Vec<&str> = names.iter().filter(|(_, known)| **known == name).map(|(id, _)| *id).collect();
    assert_eq!(todo.len(), 1, "{name}");
    let mut seen = BTreeSet::new();
    while let Some(id) = todo.pop() {
        if !seen.insert(id) {
            continue;
        }
        for needed in nodes[id]["deps"].as_array().unwrap() {
            let kinds = needed["dep_kinds"].as_array().unwrap();
            if kinds.iter().any(|kind| text(kind, "kind").is_empty()) {
                todo.push(text(needed, "pkg"));
            }
        }
    }
    seen.into_iter().map(|id| names[id].to_owned()).collect()
}

#[test]
fn the_study_touches_nothing() {
    let metadata = metadata();
    for (room, strangers) in [
        ("clawpot-types", ["tokio", "tonic", "prost", "rusqlite", "rustix", "rand", "getrandom", "libc", "tracing"]),
        ("clawpot-core", ["tokio", "tonic", "prost", "rusqlite", "rustix", "rand", "getrandom", "libc", "tracing"]),
    ] {
        let with = built_with(&metadata, room);
        let found: Vec<_> = strangers.into_iter().filter(|stranger| with.contains(*stranger)).collect();
        assert!(found.is_empty(), "{room} is built with {found:?}");
    }
    // tokio's own optional parts depend on who else is built, so that control is asked for what it names.
    let packages = metadata["packages"].as_array().unwrap();
    let control = packages.iter().find(|package| text(package, "name") == "clawpot-control").unwrap();
    let named = control["dependencies"].as_array().unwrap().iter().filter(|needs| text(needs, "kind") != "dev");
    let named: BTreeSet<&str> = named.map(|needs| text(needs, "name")).collect();
    for stranger in ["tonic", "prost", "hyper", "rusqlite", "rustix", "libc", "rand"] {
        assert!(!named.contains(stranger), "clawpot-control names {stranger}");
    }
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// What would make two runs differ (DESIGN §3), in the rooms that a simulator must be able to run.
#[test]
fn core_and_control_are_deterministic() {
    let mut wrong = Vec::new();
    for room in ["crates/core/src", "crates/control/src"] {
        for file in rust_files(&root().join(room)) {
            let source = std::fs::read_to_string(&file).unwrap();
            let lines: Vec<&str> = source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
            for (number, line) in lines.iter().enumerate() {
                let banned = ["HashMap", "HashSet", "Instant::now", "SystemTime::now", "spawn_blocking"];
                let mut found: Vec<&str> = banned.into_iter().filter(|word| line.contains(word)).collect();
                let biased = lines.get(number + 1).is_some_and(|next| next.trim() == "biased;");
                if line.contains("select! {") && !biased {
                    found.push("select! without biased");
                }
                let place = file.strip_prefix(root()).unwrap().display();
                wrong.extend(found.iter().map(|what| format!("{place}:{}: {what}", number + 1)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// `like/this` in backticks; not what begins with a slash, which is the host's.
fn named_paths(markdown: &str) -> BTreeSet<&str> {
    let spans = markdown.split('`').skip(1).step_by(2);
    let path_like = |span: &&str| {
        span.contains('/')
            && span.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.')
            && span.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
    };
    spans.filter(path_like).collect()
}

#[test]
fn every_path_that_the_architecture_names_exists() {
    let root = root();
    let Ok(text) = std::fs::read_to_string(root.join("ARCHITECTURE.md")) else {
        eprintln!("SKIPPED: there is no ARCHITECTURE.md");
        return;
    };
    let paths = named_paths(&text);
    assert!(paths.len() > 5, "{paths:?}");
    let missing: Vec<_> = paths.into_iter().filter(|path| !root.join(path).exists()).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:?}");
}

#[test]
fn paths_are_told_from_other_words() {
    let text = "see `crates/core/src/phase.rs` and `clawpot run`, not `/run/clawpot` nor `a │ b/c`, but `.ci/run`";
    assert_eq!(named_paths(text), BTreeSet::from(["crates/core/src/phase.rs", ".ci/run"]));
}

/// `path/of/a/file.rs::name_of_a_test` in backticks.
fn named_tests(markdown: &str) -> BTreeSet<(&str, &str)> {
    let spans = markdown.split('`').skip(1).step_by(2);
    spans.filter_map(|span| span.split_once("::")).filter(|(file, _)| file.contains('/')).collect()
}

/// The file and the test in it, not called by another's name that begins alike.
fn is_there(root: &Path, file: &str, test: &str) -> bool {
    let source = std::fs::read_to_string(root.join(file)).unwrap_or_default();
    source.lines().any(|line| {
        let line = line.trim_start().trim_start_matches("pub ").trim_start_matches("async ");
        let name = line.strip_prefix("fn ").or_else(|| line.strip_prefix("def "));
        name.is_some_and(|name| name.strip_prefix(test).is_some_and(|rest| rest.starts_with(['(', '<'])))
    })
}

#[test]
fn every_test_that_the_security_document_names_exists() {
    let root = root();
    let text = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let tests = named_tests(&text);
    assert!(tests.len() > 20, "{tests:?}");
    let missing: Vec<_> = tests.into_iter().filter(|(file, test)| !is_there(&root, file, test)).collect();
    assert!(missing.is_empty(), "SECURITY.md names tests that are not there: {missing:?}");
    // Each line of Firecracker's guide has one, or says that it has none.
    let guide =
        text.split("## Firecracker's guide for production hosts").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows: Vec<&str> = guide.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() > 20, "{rows:?}");
    let bare = rows.into_iter().filter(|row| named_tests(row).is_empty() && !row.contains("| none "));
    assert_eq!(bare.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn tests_are_told_from_other_words() {
    let text = "`a/b.rs::works` and `std::process`, `x/y.py::test_it`";
    assert_eq!(named_tests(text), BTreeSet::from([("a/b.rs", "works"), ("x/y.py", "test_it")]));
    assert!(is_there(&root(), file!().trim_start_matches('/'), "tests_are_told_from_other_words"));
    assert!(!is_there(&root(), file!(), "tests_are_told"));
}

/// Where the links of a document lead that are no addresses.
fn linked_paths(markdown: &str) -> Vec<&str> {
    let targets = markdown.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let paths = targets.map(|target| target.split('#').next().unwrap_or(target));
    paths.filter(|path| !path.is_empty() && !path.contains("://")).collect()
}

/// Pages for users: in `docs/`, with its tutorials. From the README every one of them is reached.
#[test]
fn every_page_is_linked_and_every_link_leads_somewhere() {
    let root = root();
    let (mut found, mut next, mut dead) = (BTreeSet::new(), vec![root.join("README.md")], Vec::new());
    while let Some(page) = next.pop() {
        if !found.insert(page.clone()) {
            continue;
        }
        for path in linked_paths(&std::fs::read_to_string(&page).unwrap()) {
            match page.parent().unwrap().join(path).canonicalize() {
                Ok(to) if to.extension().is_some_and(|extension| extension == "md") => next.push(to),
                Ok(_) => {}
                Err(_) => dead.push(format!("{}: {path}", page.display())),
            }
        }
    }
    let pages = ["docs", "docs/tutorials", "docs/decisions"]
        .into_iter()
        .flat_map(|dir| std::fs::read_dir(root.join(dir)).unwrap());
    let pages = pages
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let lost: Vec<_> = pages.filter(|page| !found.contains(page)).collect();
    assert!(
        dead.is_empty() && lost.is_empty(),
        "links that lead nowhere: {dead:?}; pages that nothing leads to: {lost:?}"
    );
}

/// It is read by looking a word up.
#[test]
fn the_glossary_is_in_order() {
    let text = std::fs::read_to_string(root().join("docs/glossary.md")).unwrap();
    let words: Vec<String> =
        text.lines().filter_map(|row| Some(row.strip_prefix("| **")?.split_once("**")?.0.to_lowercase())).collect();
    assert!(words.len() > 20 && words.is_sorted_by(|one, other| one < other), "{words:?}");
}
