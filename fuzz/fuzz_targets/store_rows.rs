#![no_main]

#[path = "../src/store_rows.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|data: &[u8]| target::run(data));
