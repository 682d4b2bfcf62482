//! The number of packages that an embedder takes on, this one included.

use std::collections::BTreeSet;
use std::process::Command;

fn packages(features: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "-e",
            "normal,build",
            "--target",
            "x86_64-unknown-linux-gnu",
            "--prefix",
            "none",
            "--locked",
        ])
        .args(features)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("cargo writes UTF-8");
    // "name v1.2.3 (proc-macro) (*)": the first two words are the package.
    text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn the_default_and_the_lean_build_have_at_most_24_packages() {
    for features in [&[][..], &["--no-default-features"]] {
        let found = packages(features);
        assert!(found.len() <= 24, "{}: {found:?}", found.len());
    }
}

#[test]
fn opencl_adds_at_most_12_packages() {
    let (with, without) = (packages(&["--features", "opencl"]), packages(&[]));
    let added: Vec<_> = with.difference(&without).collect();
    assert!(added.len() <= 12, "{}: {added:?}", added.len());
}
