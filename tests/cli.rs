//! The command from outside: what goes where, and how it ends.
#![cfg(feature = "cli")]

use std::process::{Command, Output};

fn randlora(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_randlora")).args(args).output().expect("the command runs")
}

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
    let help = randlora(&["demo", "--help"]);
    assert!(help.status.success() && help.stderr.is_empty());
    assert!(String::from_utf8_lossy(&help.stdout).contains("Examples:"));
    assert!(String::from_utf8_lossy(&randlora(&["--version"]).stdout).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_folder_that_cannot_be_made_fails_at_once_in_one_line() {
    let file = std::env::temp_dir().join(format!("randlora-cli-{}", std::process::id()));
    std::fs::write(&file, "no folder").expect("a temporary file");
    let output = randlora(&["demo", "--out", file.join("sub").to_str().expect("UTF-8")]);
    std::fs::remove_file(&file).expect("it was just written");
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        message.starts_with("error: ") && message.contains("sub") && message.lines().count() == 1,
        "{message}"
    );
    assert!(output.stdout.is_empty());
}

#[test]
fn a_methods_process_refuses_what_is_no_base() {
    let output = randlora(&["demo-method", "lora"]); // standard input is empty
    assert_eq!(output.status.code(), Some(1));
    assert!(!output.stderr.is_empty());
}
