//! Is a server there, and what does it say of itself.

use clawpot_common::v1::Host;

use super::check::Check;
use crate::api::Api;
use crate::failure::Failure;

const NAME: &str = "server";
const START: &str = "see `systemctl status clawpot`; start it: `sudo systemctl start clawpot`";

pub async fn look(api: Result<Api, Failure>) -> Result<Host, Failure> {
    api?.host().await
}

pub fn judge(host: &Result<Host, Failure>) -> Check {
    let ours = env!("CARGO_PKG_VERSION");
    match host {
        Err(why) => {
            Check::unknown(NAME, format!("not reached: {}", why.first_cause()), why.next_step().unwrap_or(START))
        }
        Ok(host) if host.version != ours => Check::warn(
            NAME,
            format!("version {}, this program {ours}", host.version),
            "install the same version of both, then `sudo systemctl restart clawpot`; VMs go on running",
        ),
        Ok(host) => Check::ok(NAME, format!("version {}, VMs run on {} {}", host.version, host.vmm, host.vmm_version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn the_server_is_named_with_its_version() {
        let host = |version: &str| Host { version: version.into(), vmm: "qemu".into(), ..Default::default() };
        assert_eq!(judge(&Ok(host(env!("CARGO_PKG_VERSION")))).level, Level::Ok);
        assert_eq!(judge(&Ok(host("0.0.1"))).level, Level::Warn);
        assert_eq!(judge(&Err(Failure::new("no socket"))).level, Level::Unknown);
    }
}
