//! The command from outside: what goes where, and how it ends.

use crate::command::{Work, failure, randlora};

#[test]
fn misuse_ends_with_2_and_says_so_on_standard_error() {
    for args in [&[][..], &["dmeo"], &["demo", "--nonsense"], &["demo", "--out"]] {
        let output = randlora(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn help_and_version_are_results() {
    for command in ["finetune", "eval", "predict", "inspect", "study", "demo"] {
        let help = randlora(&[command, "--help"]);
        assert!(help.status.success() && help.stderr.is_empty());
        let example = format!("Examples:\n  randlora {command}");
        assert!(String::from_utf8_lossy(&help.stdout).contains(&example), "{command}");
    }
    assert!(String::from_utf8_lossy(&randlora(&["--version"]).stdout).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_folder_that_cannot_be_made_fails_at_once_in_one_line() {
    let work = Work::empty("cli");
    let file = work.write("file", "no folder");
    let message = failure(&["demo", "--out", &format!("{file}/sub")]);
    assert!(message.contains("sub"), "{message}");
}

#[test]
fn a_methods_process_refuses_what_is_no_base() {
    let output = randlora(&["demo-method", "lora", "1"]); // standard input is empty
    assert_eq!(output.status.code(), Some(1));
    assert!(!output.stderr.is_empty());
}
