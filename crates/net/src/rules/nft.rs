//! As much of nftables as we use, and its JSON (libnftables-json(5)).

use std::net::Ipv4Addr;

use serde_json::{Value, json};

/// What can be compared.
#[derive(Clone, Debug)]
pub(crate) enum Expr {
    Text(String),
    Number(u32),
    Address(Ipv4Addr),
    Prefix(Ipv4Addr, u8),
    /// `meta <key>`
    Meta(&'static str),
    /// `ct <key>`
    Ct(&'static str),
    /// A field of a header: `ip saddr`.
    Field(&'static str, &'static str),
    /// Any of these.
    AnyOf(Vec<Expr>),
    /// `a . b`
    Concat(Vec<Expr>),
    /// Bits of the first that the second has.
    Masked(Box<Expr>, Box<Expr>),
    /// `@set`
    Set(&'static str),
}

/// One step of a rule.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Is(Expr, Expr),
    IsNot(Expr, Expr),
    Counter,
    Accept,
    Drop,
    Jump(&'static str),
    Goto(&'static str),
    /// Goes on while there are fewer packets than this.
    PerSecond(u32),
    /// Goes on when there are more connections than this.
    ConnectionsOver(u32),
    /// The verdict that the map has for the key; goes on if it has none.
    Verdict(Expr, &'static str),
    /// ICMP "administratively prohibited".
    Reject,
    Dnat(Ipv4Addr),
    Snat(Ipv4Addr),
    Masquerade,
}

/// Where a chain hangs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    pub(crate) kind: &'static str,
    pub(crate) hook: &'static str,
    pub(crate) priority: i32,
    pub(crate) policy: &'static str,
    /// Of an ingress hook only.
    pub(crate) device: Option<&'static str>,
}

/// One transaction: all of it or nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transaction(Vec<Value>);

/// One element of a set, or of a map from a key to a jump, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) set: &'static str,
    /// Each part padded to four bytes.
    pub(crate) key: Vec<u8>,
    pub(crate) jump: Option<&'static str>,
}

impl Transaction {
    pub(crate) fn table<'a>(&'a mut self, family: &'static str, name: &'a str) -> Table<'a> {
        let table = Table { commands: &mut self.0, family, name };
        table.commands.push(json!({"add": {"table": {"family": family, "name": name}}}));
        table
    }

    /// The table as it is known to be there.
    pub(crate) fn existing<'a>(&'a mut self, family: &'static str, name: &'a str) -> Table<'a> {
        Table { commands: &mut self.0, family, name }
    }

    pub(crate) fn delete_table(&mut self, family: &'static str, name: &str) {
        self.0.push(json!({"delete": {"table": {"family": family, "name": name}}}));
    }

    pub(crate) fn append(&mut self, other: &Self) {
        self.0.extend(other.0.iter().cloned());
    }

    /// For `nft -j -f -`.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "nftables": self.0 })
    }
}

#[derive(Debug)]
pub(crate) struct Table<'a> {
    commands: &'a mut Vec<Value>,
    family: &'static str,
    name: &'a str,
}

impl Table<'_> {
    fn add(&mut self, what: &str, mut object: Value) {
        object["family"] = json!(self.family);
        object["table"] = json!(self.name);
        self.commands.push(json!({"add": {what: object}}));
    }

    /// A chain that is only jumped to.
    pub(crate) fn chain(&mut self, name: &'static str) -> &mut Self {
        self.add("chain", json!({"name": name}));
        self
    }

    pub(crate) fn base_chain(&mut self, name: &'static str, hook: Hook) -> &mut Self {
        let mut chain =
            json!({"name": name, "type": hook.kind, "hook": hook.hook, "prio": hook.priority, "policy": hook.policy});
        if let Some(device) = hook.device {
            chain["dev"] = json!(device);
        }
        self.add("chain", chain);
        self
    }

    pub(crate) fn rule(&mut self, chain: &'static str, steps: &[Step]) -> &mut Self {
        self.add("rule", json!({"chain": chain, "expr": steps.iter().map(Step::to_json).collect::<Vec<_>>()}));
        self
    }

    /// A rule with a counter that can be found by its comment.
    pub(crate) fn counted(&mut self, chain: &'static str, comment: &'static str, steps: &[Step]) -> &mut Self {
        let (last, before) = steps.split_last().map_or((None, steps), |(last, before)| (Some(last), before));
        let expr: Vec<Value> = before.iter().chain([&Step::Counter]).chain(last).map(Step::to_json).collect();
        self.add("rule", json!({"chain": chain, "comment": comment, "expr": expr}));
        self
    }

    pub(crate) fn set(&mut self, name: &'static str, types: &[&'static str], elements: Vec<Expr>) -> &mut Self {
        // A list is a concatenation to nft, also one of a single type.
        let kind = match types {
            [one] => json!(one),
            several => json!(several),
        };
        let mut set = json!({"name": name, "type": kind});
        if !elements.is_empty() {
            set["elem"] = elements.iter().map(Expr::to_json).collect();
        }
        self.add("set", set);
        self
    }

    /// From a key to a verdict.
    pub(crate) fn verdict_map(&mut self, name: &'static str, key: &'static str) -> &mut Self {
        self.add("map", json!({"name": name, "type": key, "map": "verdict"}));
        self
    }

    pub(crate) fn element(&mut self, set: &'static str, element: &Expr) -> &mut Self {
        self.add("element", json!({"name": set, "elem": [element.to_json()]}));
        self
    }

    pub(crate) fn jump_element(&mut self, map: &'static str, key: &Expr, chain: &'static str) -> &mut Self {
        self.add("element", json!({"name": map, "elem": [[key.to_json(), {"jump": {"target": chain}}]]}));
        self
    }
}

impl Expr {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    fn to_json(&self) -> Value {
        let all = |list: &[Self]| list.iter().map(Self::to_json).collect::<Vec<_>>();
        match self {
            Self::Text(text) => json!(text),
            Self::Number(number) => json!(number),
            Self::Address(address) => json!(address.to_string()),
            Self::Prefix(address, length) => json!({"prefix": {"addr": address.to_string(), "len": length}}),
            Self::Meta(key) => json!({"meta": {"key": key}}),
            Self::Ct(key) => json!({"ct": {"key": key}}),
            Self::Field(protocol, field) => json!({"payload": {"protocol": protocol, "field": field}}),
            Self::AnyOf(list) => json!({"set": all(list)}),
            Self::Concat(list) => json!({"concat": all(list)}),
            Self::Masked(value, mask) => json!({"&": [value.to_json(), mask.to_json()]}),
            Self::Set(name) => json!(format!("@{name}")),
        }
    }
}

impl Step {
    fn to_json(&self) -> Value {
        let compare = |op: &str, left: &Expr, right: &Expr| json!({"match": {"op": op, "left": left.to_json(), "right": right.to_json()}});
        match self {
            Self::Is(left, right) => compare("==", left, right),
            Self::IsNot(left, right) => compare("!=", left, right),
            Self::Counter => json!({"counter": null}),
            Self::Accept => json!({"accept": null}),
            Self::Drop => json!({"drop": null}),
            Self::Jump(chain) => json!({"jump": {"target": chain}}),
            Self::Goto(chain) => json!({"goto": {"target": chain}}),
            Self::PerSecond(rate) => json!({"limit": {"rate": rate, "burst": rate, "per": "second"}}),
            Self::ConnectionsOver(connections) => json!({"ct count": {"val": connections, "inv": true}}),
            Self::Verdict(key, map) => json!({"vmap": {"key": key.to_json(), "data": format!("@{map}")}}),
            Self::Reject => json!({"reject": {"type": "icmp", "expr": "admin-prohibited"}}),
            Self::Dnat(address) => json!({"dnat": {"addr": address.to_string()}}),
            Self::Snat(address) => json!({"snat": {"addr": address.to_string()}}),
            Self::Masquerade => json!({"masquerade": null}),
        }
    }
}
