//! Is a server there, and what does it say of itself.

use clawpot_common::v1::{GetHostRequest, Host};

use super::check::Check;
use crate::api::Api;
use crate::failure::Failure;

const NAME: &str = "server";

pub async fn look(api: Result<Api, Failure>) -> Result<Host, String> {
    let api = api.map_err(|failure| failure.first_cause().to_owned())?;
    let answer = api.hosts().get_host(GetHostRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
}

pub fn judge(host: &Result<Host, String>) -> Check {
    let ours = env!("CARGO_PKG_VERSION");
    match host {
        Err(why) => Check::unknown(NAME, format!("not reached: {why}"), "start it: `sudo systemctl start clawpot`"),
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
        assert_eq!(judge(&Err("no socket".into())).level, Level::Unknown);
    }
}
