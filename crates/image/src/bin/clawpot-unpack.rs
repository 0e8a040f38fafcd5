//! Unpacks an image's layers in a sandbox of its own; see `clawpot_image::unpack`. Started by the server, never by hand.

fn main() -> std::process::ExitCode {
    clawpot_image::unpack::run()
}
