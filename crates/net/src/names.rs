//! What an instance calls its things on the host. Each name contains the instance id, so that a daemon finds its own after
//! a crash and sees nobody else's.

use clawpot_types::{InstanceId, Slot};

/// Longest name of a link, in bytes (`IFNAMSIZ` less the terminator).
#[cfg(test)]
const LINK_NAME_MAX: usize = 15;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    instance: InstanceId,
}

impl Names {
    #[must_use]
    pub fn new(instance: InstanceId) -> Self {
        Self { instance }
    }

    /// `cp<instance>-<slot>`: the host's end of the veth, and the netns.
    #[must_use]
    pub fn slot(&self, slot: Slot) -> String {
        format!("cp{}-{slot}", self.instance)
    }

    /// The slot that bears this name, if it is one of this instance's.
    #[must_use]
    pub fn parse_slot(&self, name: &str) -> Option<Slot> {
        let number = name.strip_prefix("cp")?.strip_prefix(self.instance.as_str())?.strip_prefix('-')?;
        let slot = Slot(number.parse().ok()?);
        // "007" and "+7" are not names that we give.
        (slot.to_string() == number).then_some(slot)
    }

    /// All of this instance's links, as nft writes it.
    #[must_use]
    pub fn any_link(&self) -> String {
        format!("cp{}-*", self.instance)
    }

    /// The instance's one nft table on the host. One per instance, so that none can flush another's.
    #[must_use]
    pub fn table(&self) -> String {
        format!("clawpot-{}", self.instance)
    }

    /// Label of the resolver's address on `lo`.
    #[must_use]
    pub fn resolver_label(&self) -> String {
        format!("lo:cp{}", self.instance)
    }
}

/// Whose a link, a namespace or an address label is, if it is some instance's.
pub(crate) fn instance_of(name: &str) -> Option<InstanceId> {
    let rest = name.strip_prefix("lo:").unwrap_or(name).strip_prefix("cp")?;
    let (id, rest) = rest.split_at_checked(InstanceId::LEN)?;
    let ours = rest.is_empty() || rest.strip_prefix('-').is_some_and(|number| number.parse::<u32>().is_ok());
    id.parse().ok().filter(|_| ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names::new("3f7a".parse().unwrap())
    }

    #[test]
    fn names_fit_and_are_found_again() {
        for n in [0, 7, 1022, 1023] {
            let name = names().slot(Slot(n));
            assert!(name.len() <= LINK_NAME_MAX, "{name}");
            assert_eq!(names().parse_slot(&name), Some(Slot(n)));
            assert_eq!(instance_of(&name).unwrap().as_str(), "3f7a");
        }
        assert!(names().resolver_label().len() <= LINK_NAME_MAX);
        assert!(instance_of(&names().resolver_label()).is_some());
    }

    #[test]
    fn only_our_own_are_ours() {
        for other in ["cp3f7b-1", "cp3f7a", "cp3f7a-", "cp3f7a-x", "cp3f7a-007", "cp3f7a-+7", "xcp3f7a-1", "eth0", ""] {
            assert_eq!(names().parse_slot(other), None, "{other}");
        }
        for foreign in ["eth0", "cp", "cpu0", "cp3F7a-1", "cp3f7a-x", "lo"] {
            assert_eq!(instance_of(foreign), None, "{foreign}");
        }
    }
}
