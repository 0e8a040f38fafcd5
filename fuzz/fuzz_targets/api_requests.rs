#![no_main]

#[allow(dead_code, reason = "validate needs a part of it")]
#[path = "../../clawpot-server/src/api/convert.rs"]
mod convert;

#[allow(dead_code, reason = "only part of it is called here")]
#[path = "../../clawpot-server/src/api/validate.rs"]
mod validate;

#[allow(dead_code, reason = "only part of it is used here")]
#[path = "../../clawpot-server/src/limits.rs"]
mod limits;

#[path = "../src/api_requests.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|data: &[u8]| target::run(data));
