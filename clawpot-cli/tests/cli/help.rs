//! Help and completions of every verb.

use crate::Ran;

fn help(args: &[&str]) -> String {
    let mut args = args.to_vec();
    args.push("--help");
    let ran: Ran = crate::clawpot(&args).output().unwrap().into();
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    ran.out
}

#[test]
fn every_verb_explains_itself() {
    insta::assert_snapshot!("help", help(&[]));
    for verb in [
        "run",
        "create",
        "ls",
        "inspect",
        "exec",
        "wait",
        "stop",
        "start",
        "rm",
        "ttl",
        "logs",
        "events",
        "build",
        "image",
        "volume",
        "host",
        "doctor",
        "version",
        "completions",
    ] {
        insta::assert_snapshot!(format!("help-{verb}"), help(&[verb]));
    }
    for verb in ["log", "pull", "import", "export", "tag", "rm", "gc"] {
        insta::assert_snapshot!(format!("help-image-{verb}"), help(&["image", verb]));
    }
    for verb in ["create", "cp", "resize", "check", "rm"] {
        insta::assert_snapshot!(format!("help-volume-{verb}"), help(&["volume", verb]));
    }
}

#[test]
fn every_shell_gets_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran: Ran = crate::clawpot(&["completions", shell]).output().unwrap().into();
        assert!(ran.code == Some(0) && ran.out.contains("clawpot"), "{shell}");
    }
}
