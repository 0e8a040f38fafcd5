//! nft, and other people's rules that would keep VMs from the network. They are read, never touched.

use serde_json::Value;

use super::check::Check;
use super::tool::{self, Version};

/// Our own tables, whose policies are as they should be.
const OURS: &str = "clawpot";

pub fn nft() -> Check {
    let version = tool::find("nft").map(|nft| tool::output_of(&nft, &["--version"]));
    judge_nft(version.as_ref().map(|said| said.as_ref().ok().and_then(|said| Version::find(said))))
}

/// `None`: not installed. `Some(None)`: installed, version unknown.
fn judge_nft(version: Option<Option<Version>>) -> Check {
    let get = "apt-get install nftables";
    match version {
        None => Check::fail("nft", "not in the PATH: VMs cannot be kept apart", get),
        Some(None) => Check::warn("nft", "does not say its version", get),
        Some(Some(version)) if version < Version(1, 0, 0) => {
            Check::warn("nft", format!("{version}: older than 1.0"), get)
        }
        Some(Some(version)) => Check::ok("nft", version.to_string()),
    }
}

pub fn foreign() -> Check {
    let rules = tool::find("nft").ok_or_else(|| "nft is not installed".to_owned());
    let rules = rules.and_then(|nft| tool::output_of(&nft, &["-j", "list", "ruleset"]));
    let legacy = std::fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default();
    judge(rules, legacy.lines().any(|table| table == "filter"))
}

/// Judges `nft -j list ruleset`. `legacy`: iptables-legacy has a filter table, which nft does not show.
fn judge(rules: Result<String, String>, legacy: bool) -> Check {
    const NAME: &str = "foreign rules";
    let rules = rules.and_then(|text| serde_json::from_str::<Value>(&text).map_err(|error| error.to_string()));
    let rules = match rules {
        Ok(rules) => rules,
        Err(why) => return Check::unknown(NAME, format!("not seen: {why}"), "run `sudo clawpot doctor`"),
    };
    let dropping = dropping_chains(&rules);
    let fix = "let the VMs' links pass there: with Docker `iptables -I DOCKER-USER -i 'cp+' -j ACCEPT` and \
               `iptables -I DOCKER-USER -o 'cp+' -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT`; with ufw set \
               DEFAULT_FORWARD_POLICY=\"ACCEPT\" in /etc/default/ufw, or add the same rules to ufw-before-forward";
    match (dropping.as_slice(), legacy) {
        ([], false) => Check::ok(NAME, "no foreign chain drops what is forwarded"),
        ([], true) => Check::warn(
            NAME,
            "iptables-legacy has a filter table, whose rules nft does not show",
            "see `iptables-legacy -S FORWARD`; if its policy is DROP, let the links cp+ pass",
        ),
        (chains, _) => Check::warn(NAME, format!("drop what is forwarded: {}", chains.join(", ")), fix),
    }
}

/// `ip filter FORWARD` for every base chain at the forward hook whose policy is drop and that is not ours; firewalld's
/// whatever its policy, since its last rule rejects.
fn dropping_chains(rules: &Value) -> Vec<String> {
    let objects = rules.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut found = Vec::new();
    for chain in objects.iter().filter_map(|object| object.get("chain")) {
        let field = |name: &str| chain.get(name).and_then(Value::as_str).unwrap_or_default();
        let forwards = field("hook") == "forward" && matches!(field("family"), "ip" | "inet");
        let drops = field("policy") == "drop" || field("table") == "firewalld";
        if forwards && drops && !field("table").starts_with(OURS) {
            found.push(format!("{} {} {}", field("family"), field("table"), field("name")));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    fn chain(family: &str, table: &str, name: &str, hook: &str, policy: &str) -> String {
        format!(
            r#"{{"chain": {{"family": "{family}", "table": "{table}", "name": "{name}", "handle": 1, "type": "filter", "hook": "{hook}", "prio": 0, "policy": "{policy}"}}}}"#
        )
    }

    fn ruleset(chains: &[String]) -> Result<String, String> {
        let meta = r#"{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}}"#;
        Ok(format!(r#"{{"nftables": [{meta}, {}]}}"#, chains.join(", ")))
    }

    #[test]
    fn only_foreign_forward_drops_matter() {
        let docker = chain("ip", "filter", "FORWARD", "forward", "drop");
        let ours = chain("inet", "clawpot", "forward", "forward", "drop");
        let input = chain("ip", "filter", "INPUT", "input", "drop");
        let bridge = chain("bridge", "filter", "FORWARD", "forward", "drop");
        let plain = r#"{"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER", "handle": 2}}"#.to_owned();
        let quiet = judge(ruleset(&[ours, input, bridge, plain]), false);
        assert_eq!(quiet.level, Level::Ok);
        let found = judge(ruleset(&[docker]), false);
        assert_eq!((found.level, found.found.as_str()), (Level::Warn, "drop what is forwarded: ip filter FORWARD"));
        let firewalld = chain("inet", "firewalld", "filter_FORWARD", "forward", "accept");
        assert_eq!(judge(ruleset(&[firewalld]), false).level, Level::Warn);
    }

    #[test]
    fn what_cannot_be_seen_is_not_called_good() {
        assert_eq!(judge(Err("Operation not permitted (you must be root)".into()), false).level, Level::Unknown);
        assert_eq!(judge(Ok("not json".into()), false).level, Level::Unknown);
        assert_eq!(judge(ruleset(&[chain("ip", "nat", "x", "output", "accept")]), true).level, Level::Warn);
        assert_eq!(judge_nft(None).level, Level::Fail);
        assert_eq!(judge_nft(Some(Some(Version(1, 0, 6)))).level, Level::Ok);
    }
}
