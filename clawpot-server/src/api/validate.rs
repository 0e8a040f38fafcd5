//! Forms are checked before anything is touched; every error begins with the field's path.

use std::collections::{BTreeMap, HashMap};

use clawpot_common::v1;
use clawpot_control::Settings;
use clawpot_control::service::create::CreateVm;
use clawpot_core::{DiskSource, ExtraDisk, Reach, RestartPolicy, VmSpec};
use clawpot_types::guest::MAX_EXTRA_DISKS;
use clawpot_types::{Error, ImageRef, Kind, Label, MiB, Result, Vcpus};

use super::convert;
use crate::limits;

pub fn create(request: v1::CreateVmRequest, settings: &Settings) -> Result<CreateVm> {
    let name = match request.name.as_str() {
        "" => None,
        name => Some(at("name", name.parse())?),
    };
    let Some(spec) = request.spec else {
        return Err(Error::new(Kind::InvalidArgument, "spec: missing").hint("name an image in spec.image"));
    };
    Ok(CreateVm {
        name,
        labels: labels(request.labels)?,
        spec: vm_spec(spec, settings)?,
        remove_when_done: request.remove_when_done,
        ttl: convert::ttl(request.ttl_ms),
        restart: restart(request.restart)?,
    })
}

fn restart(wire: i32) -> Result<RestartPolicy> {
    match v1::RestartPolicy::try_from(wire) {
        Ok(v1::RestartPolicy::RestartUnspecified | v1::RestartPolicy::RestartNever) => Ok(RestartPolicy::Never),
        Ok(v1::RestartPolicy::RestartOnFailure) => Ok(RestartPolicy::OnFailure),
        Ok(v1::RestartPolicy::RestartAlways) => Ok(RestartPolicy::Always),
        Err(_) => Err(bad("restart", format!("{wire}: this server knows never, on-failure and always"))),
    }
}

fn vm_spec(spec: v1::VmSpec, settings: &Settings) -> Result<VmSpec> {
    let vcpus = match spec.vcpus {
        0 => settings.default_vcpus,
        count => at("spec.vcpus", Vcpus::try_from(count))?,
    };
    let memory = match spec.memory_mib {
        0 => settings.default_memory,
        mib => at("spec.memory_mib", MiB::memory(mib))?,
    };
    let disk = match spec.disk_mib {
        0 => settings.default_disk,
        mib => at("spec.disk_mib", MiB::disk(mib))?,
    };
    let image: ImageRef = at("spec.image", spec.image.parse())?;
    let env = env(spec.env)?;
    limit("spec.cwd", spec.cwd.len(), limits::CWD)?;
    limit("spec.user", spec.user.len(), limits::USER)?;
    for (path, text) in [("spec.cwd", &spec.cwd), ("spec.user", &spec.user)] {
        if text.contains('\0') {
            return Err(bad(path, "contains a NUL byte".to_owned()));
        }
    }
    if !spec.cwd.is_empty() && !spec.cwd.starts_with('/') {
        let cwd: String = spec.cwd.chars().take(64).collect();
        return Err(bad("spec.cwd", format!("{cwd:?}: must begin with /")));
    }
    let reach = reach("spec.network", spec.network)?;
    Ok(VmSpec {
        image,
        vcpus,
        memory,
        disk,
        env,
        cwd: spec.cwd,
        user: spec.user,
        extra_disks: volumes(spec.volumes)?,
        reach,
    })
}

pub fn reach(path: &str, wire: i32) -> Result<Reach> {
    match v1::Network::try_from(wire) {
        Ok(v1::Network::Unspecified | v1::Network::Default) => Ok(Reach::Default),
        Ok(v1::Network::None) => Ok(Reach::None),
        Err(_) => Err(bad(path, format!("{wire}: this server knows default and none"))),
    }
}

fn volumes(mounts: Vec<v1::VolumeMount>) -> Result<Vec<ExtraDisk>> {
    if mounts.len() > MAX_EXTRA_DISKS {
        return Err(bad("spec.volumes", format!("{} of them: at most {MAX_EXTRA_DISKS}", mounts.len())));
    }
    let disk = |(index, mount): (usize, v1::VolumeMount)| {
        let field = |name: &str| format!("spec.volumes[{index}].{name}");
        Ok(ExtraDisk {
            source: DiskSource::Volume(at(&field("volume"), mount.volume.parse())?),
            read_only: mount.read_only,
            mount: Some(at(&field("path"), mount.path.parse())?),
        })
    };
    mounts.into_iter().enumerate().map(disk).collect()
}

fn env(vars: Vec<v1::EnvVar>) -> Result<Vec<(String, String)>> {
    if vars.len() > limits::ENV {
        return Err(bad("spec.env", format!("{} entries: at most {}", vars.len(), limits::ENV)));
    }
    limit("spec.env", vars.iter().map(|var| var.name.len() + var.value.len()).sum(), limits::ENV_BYTES)?;
    let text = |bytes: bytes::Bytes, index: usize| {
        String::from_utf8(bytes.into()).map_err(|_| bad(&format!("spec.env[{index}]"), "not UTF-8".to_owned()))
    };
    let mut env = Vec::with_capacity(vars.len());
    for (index, var) in vars.into_iter().enumerate() {
        let (name, value) = (text(var.name, index)?, text(var.value, index)?);
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(bad(
                &format!("spec.env[{index}]"),
                "a name must not be empty nor contain '='; neither part a NUL".into(),
            ));
        }
        env.push((name, value));
    }
    Ok(env)
}

pub fn labels(labels: HashMap<String, String>) -> Result<BTreeMap<Label, Label>> {
    if labels.len() > Label::MAX_COUNT {
        return Err(bad("labels", format!("{} of them: at most {}", labels.len(), Label::MAX_COUNT)));
    }
    let mut checked = BTreeMap::new();
    for (key, value) in labels {
        // An error is sent in a header: it does not grow with what was sent to us.
        let path = format!("labels[{:?}]", key.chars().take(64).collect::<String>());
        if key.is_empty() {
            return Err(bad("labels", "a key must not be empty".to_owned()));
        }
        checked.insert(at(&path, key.parse())?, at(&path, value.parse())?);
    }
    Ok(checked)
}

fn at<T>(path: &str, parsed: Result<T>) -> Result<T> {
    parsed.map_err(|error| bad(path, error.chain()))
}

fn limit(path: &str, length: usize, most: usize) -> Result<()> {
    if length > most { Err(bad(path, format!("{length} bytes: at most {most}"))) } else { Ok(()) }
}

fn bad(path: &str, why: String) -> Error {
    Error::new(Kind::InvalidArgument, format!("{path}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(change: impl FnOnce(&mut v1::CreateVmRequest)) -> String {
        let mut request = v1::CreateVmRequest {
            name: "web".into(),
            spec: Some(v1::VmSpec { image: "debian".into(), ..Default::default() }),
            ..Default::default()
        };
        change(&mut request);
        create(request, &Settings::default()).map_or_else(|error| error.chain(), |_| "accepted".to_owned())
    }

    fn spec(request: &mut v1::CreateVmRequest) -> &mut v1::VmSpec {
        request.spec.as_mut().unwrap()
    }

    #[test]
    fn every_bad_field_is_named() {
        let cases: Vec<(&str, String)> = vec![
            ("nothing", error_of(|_| {})),
            ("33 vCPUs", error_of(|r| spec(r).vcpus = 33)),
            ("257 vCPUs", error_of(|r| spec(r).vcpus = 257)),
            ("1 MiB", error_of(|r| spec(r).memory_mib = 1)),
            ("2^32 MiB", error_of(|r| spec(r).memory_mib = 1 << 32)),
            ("2^64 - 1 MiB of disk", error_of(|r| spec(r).disk_mib = u64::MAX)),
            ("a slash", error_of(|r| r.name = "a/b".into())),
            ("300 long", error_of(|r| r.name = "n".repeat(300))),
            ("no spec", error_of(|r| r.spec = None)),
            ("no image", error_of(|r| spec(r).image = String::new())),
            ("image is a path", error_of(|r| spec(r).image = "../../etc/passwd".into())),
            ("a label with =", error_of(|r| drop(r.labels.insert("a=b".into(), "c".into())))),
            ("65 labels", error_of(|r| r.labels = (0..65).map(|n| (n.to_string(), String::new())).collect())),
            ("a label of 129", error_of(|r| drop(r.labels.insert("k".into(), "v".repeat(129))))),
            ("a label without a key", error_of(|r| drop(r.labels.insert(String::new(), "v".into())))),
            (
                "257 variables",
                error_of(|r| spec(r).env = vec![v1::EnvVar { name: "A".into(), value: "b".into() }; 257]),
            ),
            ("a cwd of 4097", error_of(|r| spec(r).cwd = "/".repeat(4097))),
            ("a cwd with a NUL", error_of(|r| spec(r).cwd = "/a\0b".into())),
            ("a cwd that is relative", error_of(|r| spec(r).cwd = "srv/app".into())),
            ("a user of 513", error_of(|r| spec(r).user = "u".repeat(513))),
            ("a policy of tomorrow", error_of(|r| r.restart = 9)),
            ("an env without a name", error_of(|r| spec(r).env.push(v1::EnvVar::default()))),
            (
                "an env of 1 MiB",
                error_of(|r| spec(r).env.push(v1::EnvVar { name: "A".into(), value: vec![b'x'; 1 << 20].into() })),
            ),
        ];
        let told: Vec<String> = cases.iter().map(|(case, told)| format!("{case:22} {told}")).collect();
        insta::assert_snapshot!(told.join("\n"));
    }
}
