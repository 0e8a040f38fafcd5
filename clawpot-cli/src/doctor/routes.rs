//! Forwarding, and networks that lie where the VMs' addresses are.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::check::Check;

/// Where servers on this host claim their blocks (`crates/net/src/claim.rs`).
const CLAIMS: &str = "/run/clawpot/blocks";
/// Of a block: 1,024 slots of two addresses.
const BLOCK_PREFIX: u32 = 21;
const BLOCK_ADDRESSES: u32 = 2048;

/// The /16s of which a server takes the first free one for its slots (`crates/net/src/address.rs`).
const SLOTS: [[u8; 2]; 10] =
    [[10, 201], [10, 202], [10, 203], [10, 211], [10, 222], [172, 29], [172, 28], [172, 27], [198, 18], [198, 19]];
/// What every guest sees around it: both of its links.
const GUESTS: (Ipv4Addr, u32) = (Ipv4Addr::new(172, 31, 254, 0), 23);

pub fn forwarding() -> Check {
    judge_forwarding(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").map_err(|error| error.to_string()))
}

fn judge_forwarding(value: Result<String, String>) -> Check {
    const NAME: &str = "ip_forward";
    match value.as_deref().map(str::trim) {
        Ok("1") => Check::ok(NAME, "on"),
        Ok(_) => Check::warn(
            NAME,
            "off: VMs reach no network",
            "`sudo sysctl -w net.ipv4.ip_forward=1`, and for every boot `echo net.ipv4.ip_forward=1 | sudo tee \
             /etc/sysctl.d/60-clawpot.conf`",
        ),
        Err(why) => Check::unknown(NAME, format!("not seen: {why}"), "mount /proc"),
    }
}

pub fn overlaps() -> Check {
    judge(std::fs::read_to_string("/proc/net/route").map_err(|error| error.to_string()), &claims(Path::new(CLAIMS)))
}

/// As much of a server's claim as matters here.
#[derive(Debug, Deserialize)]
struct Claim {
    state_dir: PathBuf,
    block: Block,
}

#[derive(Debug, Deserialize)]
struct Block {
    number: u32,
    range: String,
}

impl Claim {
    /// First address and prefix of the block.
    fn addresses(&self) -> Option<(Ipv4Addr, u32)> {
        let range: Ipv4Addr = self.block.range.split('/').next()?.parse().ok()?;
        let first = range.to_bits().checked_add(self.block.number.checked_mul(BLOCK_ADDRESSES)?)?;
        Some((Ipv4Addr::from_bits(first), BLOCK_PREFIX))
    }
}

/// Those that can be read; none without a server.
fn claims(dir: &Path) -> Vec<Claim> {
    let files = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    files.filter_map(|file| serde_json::from_slice(&std::fs::read(file.path()).ok()?).ok()).collect()
}

/// Judges `/proc/net/route`.
fn judge(table: Result<String, String>, claims: &[Claim]) -> Check {
    const NAME: &str = "routes";
    let table = match table {
        Ok(table) => table,
        Err(why) => return Check::unknown(NAME, format!("not seen: {why}"), "mount /proc"),
    };
    let routes: Vec<Route> = table.lines().skip(1).filter_map(route).filter(Route::counts).collect();
    // A server chooses a range that was free; a route may have come since.
    for claim in claims {
        let Some(block) = claim.addresses() else { continue };
        if let [first, ..] = hits(&routes, block).as_slice() {
            return Check::warn(
                NAME,
                format!(
                    "{first} overlaps {}/{}, the addresses of {}'s VMs",
                    block.0,
                    block.1,
                    claim.state_dir.display()
                ),
                "take that route away; or delete the server's VMs and start it again: it then chooses other addresses",
            );
        }
    }
    let free =
        SLOTS.map(|[a, b]| (Ipv4Addr::new(a, b, 0, 0), 16)).into_iter().find(|range| hits(&routes, *range).is_empty());
    let around = hits(&routes, GUESTS);
    match (free, around.as_slice()) {
        (None, _) => Check::fail(
            NAME,
            "every range for the VMs' addresses has a route already",
            format!("free one of {} (see `ip route`)", SLOTS.map(|[a, b]| format!("{a}.{b}.0.0/16")).join(", ")),
        ),
        (Some((network, prefix)), []) => Check::ok(NAME, format!("{network}/{prefix} is free for the VMs' addresses")),
        (Some(_), around) => Check::warn(
            NAME,
            format!("{} overlap what guests see around them, {}/{}", around.join(", "), GUESTS.0, GUESTS.1),
            "VMs cannot reach hosts there: move that network to other addresses",
        ),
    }
}

/// The routes into `range`.
fn hits(routes: &[Route], range: (Ipv4Addr, u32)) -> Vec<String> {
    routes.iter().filter(|route| route.overlaps(range)).map(ToString::to_string).collect()
}

struct Route {
    device: String,
    network: u32,
    prefix: u32,
}

impl Route {
    /// The default route, or a half of everything as some VPNs have it, is less specific than any of ours.
    fn counts(&self) -> bool {
        self.prefix >= 8 && !is_ours(&self.device)
    }

    fn overlaps(&self, (network, prefix): (Ipv4Addr, u32)) -> bool {
        let mask = u32::MAX.checked_shl(32 - self.prefix.min(prefix)).unwrap_or(0);
        (self.network ^ u32::from(network)) & mask == 0
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} on {}", Ipv4Addr::from(self.network), self.prefix, self.device)
    }
}

/// `cp3f-7`, `cp` + instance id…: links of a server of ours.
fn is_ours(device: &str) -> bool {
    let rest = device.strip_prefix("cp").unwrap_or_default();
    rest.split_once('-').is_some_and(|(_, slot)| !slot.is_empty() && slot.bytes().all(|b| b.is_ascii_digit()))
}

/// "eth0 000200C0 00000000 0001 0 0 0 00FFFFFF …": addresses are hexadecimal in the machine's byte order.
fn route(line: &str) -> Option<Route> {
    let mut fields = line.split_ascii_whitespace();
    let device = fields.next()?.to_owned();
    let mut address = |n| Some(u32::from_be(u32::from_str_radix(fields.nth(n)?, 16).ok()?));
    let network = address(0)?;
    let mask = address(5)?;
    Some(Route { device, network, prefix: mask.leading_ones() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    const HEADER: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

    fn look(routes: &[&str]) -> Check {
        judge(Ok(format!("{HEADER}{}", routes.join("\n"))), &[])
    }

    #[test]
    fn a_route_that_came_after_the_server_is_told() {
        let home = tempfile::tempdir().unwrap();
        let text = r#"{"version":1,"instance":"3f7a","state_dir":"/var/lib/clawpot","block":{"number":2,"range":"10.201.0.0/16"}}"#;
        let (one, other) = (home.path().join("2"), home.path().join("3"));
        std::os::unix::fs::symlink("/nonexistent", other).unwrap();
        std::io::Write::write_all(&mut std::fs::File::create(one).unwrap(), text.as_bytes()).unwrap();
        let claims = claims(home.path());
        assert_eq!(claims[0].addresses(), Some((Ipv4Addr::new(10, 201, 16, 0), 21)));
        // 10.201.16.0/24 by a VPN; 10.201.8.0/24 is in the same /16 and nobody's.
        let at = |third: &str| format!("tun0\t00{third}C90A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0");
        let told = |route: String| judge(Ok(format!("{HEADER}{route}")), &claims);
        let check = told(at("10"));
        assert_eq!(check.level, Level::Warn);
        assert!(check.found.contains("10.201.16.0/24 on tun0 overlaps 10.201.16.0/21"), "{}", check.found);
        assert_eq!(told(at("08")).level, Level::Ok);
        assert!(super::claims(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn routes_into_our_ranges_are_found() {
        let default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0";
        let lan = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0";
        let own = "cp3f01-7\t0000C90A\t00000000\t0001\t0\t0\t0\tFEFFFFFF\t0\t0\t0";
        assert_eq!(look(&[default, lan, own]).level, Level::Ok);
        // The next candidate is taken.
        let vpn = "tun0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0";
        assert_eq!(look(&[vpn]), Check::ok("routes", "172.29.0.0/16 is free for the VMs' addresses"));
        let host = "wg0\t0702C90A\t00000000\t0001\t0\t0\t0\tFFFFFFFF\t0\t0\t0";
        assert_eq!(look(&[host]), Check::ok("routes", "10.202.0.0/16 is free for the VMs' addresses"));
        let docker = "br-1\t00001FAC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0";
        assert!(look(&[docker]).found.starts_with("172.31.0.0/16 on br-1 overlap"));
        let private = "eth1\t000010AC\t00000000\t0001\t0\t0\t0\t0000F0FF\t0\t0\t0";
        let bench = "eth2\t000012C6\t00000000\t0001\t0\t0\t0\t0000FEFF\t0\t0\t0";
        assert_eq!(look(&[vpn, private, bench]).level, Level::Fail);
        assert_eq!(judge(Err("no".into()), &[]).level, Level::Unknown);
    }

    #[test]
    fn forwarding_is_read() {
        assert_eq!(judge_forwarding(Ok("1\n".into())).level, Level::Ok);
        assert_eq!(judge_forwarding(Ok("0\n".into())).level, Level::Warn);
        assert_eq!(judge_forwarding(Err("gone".into())).level, Level::Unknown);
    }
}
