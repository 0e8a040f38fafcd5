//! What a client asks for: the form of a request is checked before anything is touched, and what passes is within limits.
//!
//! Compiled into the fuzz target and into the test that replays its corpus.

use clawpot_common::v1;
use clawpot_control::Settings;
use clawpot_types::{Error, Kind};
use prost::Message;

use super::validate;

/// Longest error, bytes: it is sent in a header, and read by people.
const ERROR: usize = 4096;

pub fn run(data: &[u8]) {
    if let Ok(request) = v1::CreateVmRequest::decode(data) {
        match validate::create(request, &Settings::default()) {
            Ok(create) => {
                let spec = create.spec;
                assert!((1..=32).contains(&spec.vcpus.get()));
                assert!((64..=1 << 20).contains(&spec.memory.0), "{:?}", spec.memory);
                assert!((64..=4 << 20).contains(&spec.disk.0), "{:?}", spec.disk);
                assert!(spec.env.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() <= 64 << 10);
                let fine =
                    |name: &str, value: &str| !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
                assert!(spec.env.iter().all(|(name, value)| fine(name, value)));
                assert!(spec.cwd.len() <= 4096 && spec.user.len() <= 512);
            }
            Err(error) => told_well(&error),
        }
    }
    if let Ok(request) = v1::ListVmsRequest::decode(data)
        && let Err(error) = validate::labels(request.labels)
    {
        told_well(&error);
    }
}

fn told_well(error: &Error) {
    assert!(matches!(error.kind(), Kind::InvalidArgument), "{error:?}");
    assert!(error.chain().len() <= ERROR, "an error of {} bytes", error.chain().len());
}
