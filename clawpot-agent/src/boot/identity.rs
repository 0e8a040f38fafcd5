//! Who this machine is to those inside: its name, how names are resolved, its machine id.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use clawpot_types::guest::GATEWAY_ADDRESS;

use super::{BootError, Doing};

/// Files that are written on the first boot of a disk; later they are the guest's to change.
pub const FILES: [&str; 4] = ["etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/machine-id"];

/// Sets the name, and writes those of [`FILES`] that are in `fresh`.
pub fn set(hostname: &str, vm: &str, fresh: &[&str]) -> Result<(), BootError> {
    rustix::system::sethostname(hostname.as_bytes()).doing(format_args!("setting the host name {hostname:?}"))?;
    if !fresh.is_empty() && !Path::new("/etc").exists() {
        std::fs::create_dir("/etc").doing("making directory /etc")?;
    }
    for file in fresh {
        let text = match *file {
            "etc/hostname" => format!("{hostname}\n"),
            "etc/hosts" => hosts(hostname),
            "etc/resolv.conf" => format!("nameserver {GATEWAY_ADDRESS}\n"),
            _ => machine_id(vm),
        };
        write(&Path::new("/").join(file), &text).doing(format_args!("writing /{file}"))?;
    }
    Ok(())
}

fn hosts(hostname: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
    )
}

/// The VM's id in hexadecimal: 16 characters are the 32 digits of a machine id, as unique as the VM.
fn machine_id(vm: &str) -> String {
    let digits: String = vm.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{digits:0<32.32}\n")
}

/// Replaces the file; a link of the image, to a resolver that does not run here, is replaced and not followed.
fn write(path: &Path, text: &str) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::create_new(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_id_has_32_digits() {
        assert_eq!(machine_id("abcdefgh01234567"), "61626364656667683031323334353637\n");
        assert_eq!(machine_id("short").len(), 33);
    }
}
