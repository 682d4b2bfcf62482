//! The direction of imports (design: each layer sees only those below it) and the length of files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers from the bottom up. A module may import from its own line and from those before it.
const LAYERS: &[&[&str]] = &[
    &["error", "dtype", "shape", "system"], // `error` shows shapes, `shape` returns errors.
    &["opencl::runtime"],
    &["storage", "device"],
    &["cpu"],
    &["random"],
    &["opencl"],
    &["tensor"],
    &["compute"],
    &["grad"],
    &["ops"],
    &["linalg"],
    &["nn"],
    &["gradcheck"],
    &["adapters"],
    &["io"],
    &["models"],
    &["analysis", "metrics", "optim", "data"],
    &["train"],
    &["cli", "main"],
];

/// Imports against the direction, each with its reason.
const EXCEPTIONS: &[(&str, &str)] = &[];

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// The code of a file without its tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let end = text.find("\n#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let end = end.min(text.find("\n#[cfg(test)]\npub(crate) fn cases()").unwrap_or(text.len()));
    let lines = text[..end].lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn imports_run_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let level: BTreeMap<&str, usize> =
        LAYERS.iter().enumerate().flat_map(|(i, names)| names.iter().map(move |&name| (name, i))).collect();
    let mut wrong = Vec::new();
    for file in files(&src) {
        let inside = file.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/");
        let module = match inside.split('/').next().unwrap().trim_end_matches(".rs") {
            // The one module that lies in two layers.
            "opencl" if inside.starts_with("opencl/runtime") => "opencl::runtime",
            module => module,
        };
        // Test-only files see everything.
        if module == "lib" || inside.ends_with("tests.rs") || inside == "ops/cases.rs" {
            continue;
        }
        let own = *level.get(module).unwrap_or_else(|| panic!("{inside}: not in the list of layers"));
        let code = code(&file);
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let name = if rest.starts_with("opencl::runtime") { "opencl::runtime" } else { &name };
            let Some(&theirs) = level.get(name) else { continue };
            if theirs > own && !EXCEPTIONS.contains(&(module, name)) {
                wrong.push(format!("{inside} imports crate::{name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "against the direction of imports:\n{}", wrong.join("\n"));
}

#[test]
fn files_fit_a_head() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in files(&src) {
        let lines = code(&file).lines().count();
        assert!(lines <= 450, "{} has {lines} lines of code: split it", file.display());
    }
}

#[test]
fn unsafe_code_stays_where_it_is_explained() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut with: Vec<String> = files(&src)
        .into_iter()
        .filter(|file| !file.ends_with("tests.rs") && code(file).contains("unsafe "))
        .map(|file| file.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/"))
        .collect();
    with.sort();
    assert_eq!(
        with,
        [
            "cpu/bf16/x86/amx.rs",
            "cpu/bf16/x86/avx512.rs",
            "cpu/bf16/x86/mod.rs",
            "cpu/bf16/x86/pack.rs",
            "cpu/fma/avx2.rs",
            "cpu/fma/avx512.rs",
            "cpu/fma/dots.rs",
            "cpu/fma/mod.rs",
            "cpu/gemm.rs",
            "cpu/simd.rs",
            "io/map.rs",
            "opencl/runtime/driver.rs",
            "opencl/runtime/driver/staging.rs",
            "storage.rs"
        ]
    );
}

/// The library is for systems without them too (see src/system.rs); the command is not.
#[test]
fn clocks_processes_and_threads_are_asked_for_in_one_file() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in files(&src) {
        let inside = file.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/");
        if inside.starts_with("cli/") || inside == "system.rs" || inside.ends_with("tests.rs") {
            continue;
        }
        let code = code(&file);
        for word in ["Instant::now", "SystemTime", "process::id", "thread::spawn", "temp_dir"] {
            assert!(!code.contains(word), "{inside} uses {word}, which panics on wasm32-unknown-unknown");
        }
    }
}

/// `println!` panics where standard output is closed or full: results go through `say`.
#[test]
fn results_are_printed_in_one_file() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in files(&src).into_iter().filter(|file| !file.ends_with("cli/output.rs")) {
        for line in code(&file).lines() {
            let line = line.replace("eprint", "");
            assert!(!line.contains("println!") && !line.contains("print!("), "{}: {line}", file.display());
        }
    }
}
