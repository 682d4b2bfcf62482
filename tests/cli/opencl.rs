//! `randlora devices` and `--device opencl` from outside.

use crate::command::{Work, arguments, failure, randlora, refs};
#[cfg(feature = "opencl")]
use crate::command::{object, text};
#[cfg(feature = "opencl")]
use serde_json::Value;

#[test]
fn a_device_that_is_not_there_says_what_to_do() {
    let work = Work::new("no-device");
    let message = failure(&refs(&arguments(&work, "finetune", &["--device", "opencl:999"])));
    let reasons =
        ["the feature `opencl`", "there is no device 999", "install the driver", "no driver is installed"];
    assert!(reasons.iter().any(|reason| message.contains(reason)), "{message}");
    let output = randlora(&refs(&arguments(&work, "finetune", &["--device", "gpu"])));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`cpu`, `opencl` or `opencl:N` is needed"));
}

#[cfg(not(feature = "opencl"))]
#[test]
fn a_build_without_opencl_says_so() {
    assert!(failure(&["devices"]).contains("build with the feature `opencl`"));
}

/// Whether there is a device to test on; under CI there must be one.
#[cfg(feature = "opencl")]
fn is_there() -> bool {
    let found = randlora::Device::opencl(0);
    assert!(found.is_ok() || std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{found:?}");
    if let Err(error) = &found {
        eprintln!("not tested: {error}");
    }
    found.is_ok()
}

#[cfg(feature = "opencl")]
#[test]
fn devices_are_listed() {
    if !is_there() {
        return;
    }
    assert!(text(&["devices"]).starts_with("opencl:0  "));
    let listed: Value = serde_json::from_str(&text(&["devices", "--json"])).expect("JSON");
    assert!(listed[0]["memory_bytes"].as_u64().expect("a number") > 0);
}

#[cfg(feature = "opencl")]
#[test]
fn a_training_on_opencl_is_that_on_the_cpu() {
    if !is_there() {
        return;
    }
    let work = Work::new("opencl");
    let losses = |device: &str| -> Vec<f64> {
        let out = work.path(device);
        let settings = ["--out", &out, "--device", device, "--epochs", "2"];
        object(&refs(&arguments(&work, "finetune", &settings)));
        let lines = String::from_utf8(work.read(&format!("{device}/metrics.jsonl"))).expect("UTF-8");
        let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.filter_map(|line| line["loss"].as_f64()).take(20).collect()
    };
    let (cpu, opencl) = (losses("cpu"), losses("opencl"));
    assert_eq!((cpu.len(), opencl.len()), (20, 20));
    for (step, (a, b)) in cpu.iter().zip(&opencl).enumerate() {
        assert!((a - b).abs() <= 1e-3, "step {step}: {a} and {b}");
    }
    // Either device takes either's adapter.
    let accuracy = |trained: &str, device: &str| {
        let adapter = work.path(&format!("{trained}/last"));
        let settings = ["--adapter", &adapter, "--device", device];
        object(&refs(&arguments(&work, "eval", &settings)))["accuracy"].as_f64().expect("a number")
    };
    for trained in ["cpu", "opencl"] {
        assert_eq!(accuracy(trained, "cpu"), accuracy(trained, "opencl"), "{trained}");
    }
    let bf16 = failure(&refs(&arguments(&work, "eval", &["--device", "opencl", "--precision", "bf16"])));
    assert!(bf16.contains("OpenCL devices compute in f32"), "{bf16}");
}
