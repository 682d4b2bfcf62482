//! `--precision` from outside. What bf16 computes is tested within the library, by emulation where the
//! processor has no instructions for it; here it is whether it is said what is done.

use crate::command::{Work, arguments, randlora, refs};
use randlora::Precision;
use serde_json::{Value, json};

/// What a short training prints on standard output and on standard error.
fn train(work: &Work, precision: &str) -> (Value, String) {
    let out = work.path(precision);
    let settings = ["--out", &out, "--precision", precision, "--epochs", "1", "--seed", "3", "--json"];
    let output = randlora(&refs(&arguments(work, "finetune", &settings)));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    (serde_json::from_slice(&output.stdout).expect("one object"), said)
}

#[test]
fn what_was_computed_in_is_said() {
    let work = Work::new("precision");
    let note = "bf16 is no faster here (no AMX, no AVX512-BF16 of AMD's): computing in f32 instead of bf16";
    let (plain, said) = train(&work, "f32");
    assert_eq!(plain["precision"], "f32");
    assert!(!said.contains("AVX512"), "{said}");
    let (rounded, said) = train(&work, "bf16");
    match Precision::Bf16.is_native() {
        true => {
            assert_eq!(rounded["precision"], "bf16");
            assert!(!said.contains("AVX512"), "{said}");
        }
        false => {
            assert_eq!((&rounded["precision"], said.matches(note).count()), (&json!("f32"), 1), "{said}");
            let file = |folder: &str| work.read(&format!("{folder}/last/adapter_model.safetensors"));
            assert!(file("bf16") == file("f32"), "f32 in name only");
        }
    }
}

#[test]
fn evaluation_takes_it_too_and_nothing_else_is_known() {
    let output = randlora(&["eval", "--help"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("--precision"));
    let work = Work::new("precision-wrong");
    let output =
        randlora(&refs(&arguments(&work, "finetune", &["--out", &work.path("x"), "--precision", "f16"])));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("[possible values: f32, bf16]"));
}
