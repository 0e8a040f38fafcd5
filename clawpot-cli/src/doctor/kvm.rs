//! Hardware virtualisation, as far as it can be judged without starting a VM.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;

use clawpot_common::v1::Host;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

use super::check::Check;

const NAME: &str = "kvm";
/// The only version there has been since 2007 (`Documentation/virt/kvm/api.rst`).
const API: i32 = 12;

/// `_IO(KVMIO, 0x00)`: takes nothing, returns the version.
struct GetApiVersion;

// SAFETY: the request takes no argument, reads and writes no memory of ours, and returns a number.
unsafe impl Ioctl for GetApiVersion {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        rustix::ioctl::opcode::none(0xae, 0x00)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// The version of KVM's API.
pub fn look() -> io::Result<i32> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: the device is KVM's, whose request this is.
    Ok(unsafe { rustix::ioctl::ioctl(&device, GetApiVersion) }?)
}

/// The server's probe has started a VM; what it says counts more than what we see.
pub fn judge(api: &io::Result<i32>, host: Option<&Host>) -> Check {
    let probe = host.filter(|host| !host.vmm_reason.is_empty()).map(|host| host.vmm_reason.as_str());
    let emulated = "VMs are emulated by QEMU, which is slow: use a host with hardware virtualisation, or enable it (nested \
                    virtualisation too) in the firmware or hypervisor, and `modprobe kvm_intel` or `kvm_amd`";
    match (api, probe) {
        (Ok(API), Some(probe)) => Check::ok(NAME, format!("API {API}; the server says: {probe}")),
        (Ok(API), None) => {
            Check::ok(NAME, format!("API {API}; whether guests run only the server's probe VM can show"))
        }
        (Ok(other), _) => Check::warn(NAME, format!("/dev/kvm speaks API {other}, not {API}"), emulated),
        (Err(error), _) if error.kind() == io::ErrorKind::PermissionDenied => Check::unknown(
            NAME,
            "/dev/kvm may not be opened by this user",
            "run `sudo clawpot doctor`; the server, as root, opens it",
        ),
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => Check::warn(NAME, "no /dev/kvm", emulated),
        (Err(error), _) => Check::warn(NAME, format!("/dev/kvm: {error}"), emulated),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn the_device_alone_proves_nothing() {
        let alone = judge(&Ok(12), None);
        assert!(alone.level == Level::Ok && alone.found.contains("only the server's probe"));
        let host = Host { vmm_reason: "probe VM did not boot within 10 s".into(), ..Default::default() };
        assert!(judge(&Ok(12), Some(&host)).found.ends_with("probe VM did not boot within 10 s"));
        assert_eq!(judge(&Ok(11), None).level, Level::Warn);
        assert_eq!(judge(&Err(io::ErrorKind::NotFound.into()), None).level, Level::Warn);
        assert_eq!(judge(&Err(io::ErrorKind::PermissionDenied.into()), None).level, Level::Unknown);
    }
}
