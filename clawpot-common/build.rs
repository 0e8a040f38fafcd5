//! Compiles `proto/` without `protoc`. The descriptor set is kept for gRPC reflection.

use std::path::PathBuf;

const FILES: [&str; 8] = [
    "clawpot/v1/exec.proto",
    "clawpot/v1/vm.proto",
    "clawpot/v1/event.proto",
    "clawpot/v1/host.proto",
    "clawpot/v1/image.proto",
    "clawpot/v1/build.proto",
    "clawpot/v1/volume.proto",
    "clawpot/agent/v1/agent.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from("../proto");
    println!("cargo:rerun-if-changed=../proto");
    let descriptors = protox::compile(FILES, [&root])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    #[allow(clippy::disallowed_methods, reason = "a build script has no crash to survive")]
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
