//! The server names the field of a request that it refuses. Who typed a command knows it by the option's name.

/// Fields of requests, and what is typed for them.
const TYPED: [(&str, &str); 17] = [
    ("name", "--name"),
    ("labels", "--label"),
    ("ttl_ms", "--ttl"),
    ("restart", "--restart"),
    ("spec.image", "IMAGE"),
    ("spec.vcpus", "--cpus"),
    ("spec.memory_mib", "--memory"),
    ("spec.disk_mib", "--disk"),
    ("spec.env", "--env"),
    ("spec.cwd", "--workdir"),
    ("spec.user", "--user"),
    ("spec.network", "--network"),
    ("spec.volumes", "--volume"),
    ("start.argv", "COMMAND"),
    ("start.env", "--env"),
    ("start.cwd", "--workdir"),
    ("start.user", "--user"),
];

/// `spec.volumes[1].path: …` → `--volume: …`. What begins otherwise stays as it is.
pub fn as_typed(message: &str) -> String {
    let message = message.strip_prefix("exec: ").filter(|rest| rest.starts_with("start.")).unwrap_or(message);
    let Some((path, rest)) = message.split_once(": ") else { return message.to_owned() };
    // An index and what is behind it tell which of several; the value in the rest does so, too.
    let field = path.split('[').next().unwrap_or(path);
    match TYPED.iter().find(|(name, _)| *name == field) {
        Some((_, typed)) => format!("{typed}: {rest}"),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::as_typed;

    #[test]
    fn fields_are_named_as_they_are_typed() {
        for (told, shown) in [
            ("spec.cwd: \"srv\": must begin with /", "--workdir: \"srv\": must begin with /"),
            ("spec.volumes[1].path: path \"a\": must be absolute", "--volume: path \"a\": must be absolute"),
            ("labels[\"a=b\"]: label \"a=b\": is wrong", "--label: label \"a=b\": is wrong"),
            ("exec: start.argv: a program is needed", "COMMAND: a program is needed"),
        ] {
            assert_eq!(as_typed(told), shown);
        }
        for other in ["VM web: not found", "name \"web\": taken by VM x", "exec: it went away", "spec", "specs.cwd: x"]
        {
            assert_eq!(as_typed(other), other);
        }
    }
}
